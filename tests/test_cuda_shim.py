"""The CUDA sources run on the CPU (tests/simt) against the fp64 reference: all rules, formats, types and phases."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import (
    RULES,
    assert_bitwise,
    assert_close,
    assert_guards,
    guarded,
    guards_untouched,
    hyper,
    make_problem,
    oracle,
    snapshot,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from simt import build as simt

from fusedopt.abi import Phase
from fusedopt.backends.cuda import CudaBackend
from fusedopt.formats import get_format, list_formats
from fusedopt.precision import get_precision, list_precisions, philox16, round_stochastic
from fusedopt.rule import get_rule

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TYPES = ((F32, F32), (BF16, BF16), (F32, BF16), (F16, F16), (BF16, F32))

WITH_STATES = [rule for rule in RULES if get_rule(rule).states]
CODED = [name for name in list_formats() if get_format(name).block]

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="needs g++ or clang++ for the CUDA shim")


@pytest.fixture(scope="module")
def library():
    return simt.library()


@pytest.fixture(scope="module")
def cuda(library):
    backend = CudaBackend(library, on_cpu=True)
    assert backend.reason() is None
    return backend


MIXES = (("int8", "bf16", "fp32"), ("int4", "int8c", "bf16_stochastic"), ("bf16", "fp8", "int4"))


def mixed(rule: str, which: int = 0) -> tuple[str, ...]:
    return (MIXES[which] + MIXES[which])[: len(get_rule(rule).states)]


# With beta1 = 0.9 and bf16 tensors Lion's sum hits exact zeros, whose sign rounding decides.
def problem(rule, *args, **options):
    changes = {"betas": (0.9003, *hyper(rule)["betas"][1:]), **options.pop("hyper_changes", {})}
    return make_problem(rule, *args, hyper_changes=changes, **options)


def occupied(given):
    return replace(given, work=replace(given.work, items=[it for it in given.work.items if it.param.numel()]))


def check(backend, given, clip=False):
    exact = oracle(given, clip)
    given.run(backend, clip)
    if occupied(given).work.items:
        assert_close(occupied(given), occupied(exact))
    assert_guards(given)
    assert not given.work.counters.any()
    return exact


@pytest.mark.parametrize("types", TYPES, ids=lambda t: "-".join(str(d).removeprefix("torch.") for d in t))
@pytest.mark.parametrize("rule", RULES)
def test_types(cuda, rule, types):
    for precision in ("nearest", "stochastic") if types[0] != F32 else ("nearest",):
        options = dict(param_dtype=types[0], grad_dtype=types[1], formats=mixed(rule), precision=precision)
        check(cuda, problem(rule, (300, 1, 2048, 2501), **options))


@pytest.mark.parametrize("form", [*list_formats(), *range(len(MIXES))])
@pytest.mark.parametrize("rule", WITH_STATES)
def test_formats(cuda, rule, form):
    formats = mixed(rule, form) if isinstance(form, int) else form
    for grad_dtype, offset in ((F32, 0), (BF16, 1)):
        check(cuda, problem(rule, (300, 1, 2048, 2501), grad_dtype=grad_dtype, formats=formats, offset=offset))


COMPANIONS = [(p, d) for p in ("kahan", "split24", "split32", "master") for d in get_precision(p).dtypes]


@pytest.mark.parametrize(("precision", "dtype"), COMPANIONS)
@pytest.mark.parametrize("rule", RULES)
def test_precisions(cuda, rule, precision, dtype):
    for which, offset in ((1, 0), (2, 1)):
        options = dict(param_dtype=dtype, grad_dtype=dtype, formats=mixed(rule, which), precision=precision)
        check(cuda, problem(rule, (300, 1, 2048, 2501), offset=offset, **options))


def test_a_master_weight_is_read_instead_of_the_parameter(cuda):
    given = problem("sgd", (300,), param_dtype=BF16, precision="master")
    exact = oracle(given)
    given.work.items[0].param.fill_(float("nan"))
    given.run(cuda)
    assert_close(given, exact)


@pytest.mark.parametrize("form", list_formats())
@pytest.mark.parametrize("rule", ["adam_amsgrad", "lion"])
def test_misaligned_rows_give_the_same_bits(cuda, rule, form):
    precision = {"int8c": "kahan", "fp8": "split24", "int4": "split32", "bf16": "master"}.get(form, "stochastic")
    results = []
    for offset in (0, 1):
        options = dict(param_dtype=BF16, grad_dtype=BF16, formats=form, precision=precision, offset=offset)
        one = problem(rule, (300, 7, 2304), **options)
        assert one.work.key.aligned == (offset == 0)
        one.run(cuda)
        assert_guards(one)
        results.append(snapshot(one))
    assert_bitwise(*results)


@pytest.mark.parametrize("rule", RULES)
def test_clip_unscale_maximize(cuda, rule):
    given = problem(rule, (300, 5000), grad_dtype=BF16, formats="int8", max_norm=0.5, grad_scale=1024.0, maximize=True)
    exact = check(cuda, given, clip=True)
    torch.testing.assert_close(given.work.norm.double(), exact.work.norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(given.work.clip.double(), exact.work.clip, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("precision", "dtype"), [("stochastic", BF16), ("stochastic", F16), *COMPANIONS])
def test_weights_have_the_bits_of_the_contract(cuda, precision, dtype):
    options = dict(param_dtype=dtype, precision=precision, hyper_changes={"weight_decay": 0.0})
    given = problem("sgd", (3001, 515), **options)
    keeps, want = get_precision(precision), []
    for item in given.work.items:
        row = given.work.numbers[item.scalar_row]
        p, lr = keeps.load(item.param, item.companion, F32), torch.tensor(row.lr, dtype=F32)
        random16 = philox16(row.seed, row.step, item.tensor_id, p.numel(), first=8 * item.first_octet)
        want += [t for t in keeps.store(p - (lr * item.grad + 0.0 * p), dtype, random16) if t is not None]
    given.run(cuda)
    assert_bitwise(snapshot(given), want)


# Numbers that make a state the gradient, or its square.
PLAIN = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "betas": (0.9, 0.0)}


@pytest.mark.parametrize(("rule", "state"), [("sgd_momentum", 0), ("adam", 1)])
def test_bf16_states_have_random_bits_of_their_own_stream(cuda, rule, state):
    given = problem(rule, (3001, 515), formats="bf16_stochastic", hyper_changes=PLAIN)
    want = []
    for item in given.work.items:
        row = given.work.numbers[item.scalar_row]
        x = item.grad.clone() if state == 0 else item.grad * item.grad
        random16 = philox16(row.seed, row.step, item.tensor_id, x.numel(), stream=1 + state, first=8 * item.first_octet)
        want.append(round_stochastic(x, BF16, random16))
    given.run(cuda)
    assert_bitwise([item.states[state] for item in given.work.items], want)


@pytest.mark.parametrize("form", CODED)
@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_a_step(cuda, signed, form):
    """A step stores what the quantise kernel makes of the state, over the whole range of the format and beyond."""

    def wide(g, i):
        x = g * 10.0 ** (torch.rand(g.numel(), generator=torch.Generator().manual_seed(5)) * 12 - 9)
        x[::17], x[5] = 0.0, 1e-40
        x[256:512] *= 1e-15
        x[512:768] = 0.0
        x[1000], x[1001] = float("inf"), -float("inf")
        return x

    rule = "sgd_momentum" if signed else "adam"
    given = problem(rule, (20_001,), formats=form, hyper_changes=PLAIN, grad_values=wide)
    item = given.work.items[0]
    x = item.grad.clone() if signed else item.grad * item.grad
    codes, scale = torch.empty_like(item.states[-1]), torch.empty_like(item.scales[-1])
    cuda.quantize(x, get_format(form), signed, codes, scale)
    given.run(cuda)
    assert_bitwise([item.states[-1], item.scales[-1]], [codes, scale])


@pytest.mark.parametrize("form", CODED)
def test_not_a_number_poisons_its_element_only(cuda, form):
    def one_nan(g, i):
        g[300] = float("nan")
        return g

    given = problem("adam", (1000,), formats=form, grad_values=one_nan)
    exact = oracle(given)
    given.run(cuda)
    got, want = given.work.items[0], exact.work.items[0]
    assert got.param.isnan().nonzero().tolist() == [[300]]
    got.param[300] = want.param[300] = 0.0
    assert_close(given, exact)  # the scales are the finite ones, and NaN takes the code of the largest value
    state, scale = got.states[1], got.scales[1]
    values = get_format(form).decode(state, scale, False, torch.float64, 1000)
    block = get_format(form).block
    assert values[300] == pytest.approx(float(scale[300 // block]), rel=1e-6) and values.isfinite().all()


@pytest.mark.parametrize("form", CODED)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e3, 1e18])
def test_from_zero_states(cuda, form, size):
    """The first step: zero states stay zero with zero gradients; tiny gradients and an outlier keep to the reference."""

    def sized(g, i):
        if size > 1:
            g[77] = size
            return g
        return g * size

    given = problem("adam", (777,), formats=form, grad_values=sized)
    item = given.work.items[0]
    for stored, scale, state in zip(item.states, item.scales, given.work.rule.states, strict=True):
        stored.fill_(get_format(form).zero_code(state.signed))
        scale.zero_()
    zeros = [t.clone() for t in (*item.states, *item.scales)]
    check(cuda, given)
    if size == 0.0:
        assert_bitwise([*item.states, *item.scales], zeros)


@pytest.mark.parametrize("rule", ["adam", "lamb", "lars_momentum"])
def test_found_inf_writes_nothing(cuda, rule):
    given = problem(rule, (300, 2048), param_dtype=BF16, formats="int8", found_inf=1.0)
    before = snapshot(given)
    given.run(cuda)
    assert_bitwise(before, snapshot(given))
    check(cuda, problem(rule, (300, 2048), formats="int8", found_inf=0.0))


@pytest.mark.parametrize("rule", ["adam", "lamb", "lars_momentum"])
def test_results_do_not_depend_on_chunks_or_block_order(cuda, library, rule):
    results = []
    for chunk, order in ((2048, 0), (2048, 1), (4096, 2), (16384, 3), (32768, 0)):
        library.order(order)
        try:
            options = dict(formats=mixed(rule, 1), param_dtype=BF16, precision="kahan", max_norm=0.5)
            given = problem(rule, (40_000, 1, 6000, 2048), grad_dtype=BF16, chunk=chunk, **options)
            given.run(cuda, clip=True)
        finally:
            library.order(0)
        assert not given.work.counters.any()
        results.append(
            [
                *snapshot(given),
                given.work.sums.clone() if given.work.sums is not None else torch.zeros(1),
                given.work.norm,
                given.work.clip,
            ]
        )
    for other in results[1:]:
        assert_bitwise(results[0], other)


@pytest.mark.parametrize("types", [(F32, F32), (BF16, F16), (F16, BF16)])
def test_norms_per_tensor(cuda, types):
    given = problem("lars", (20_000, 0, 1, 4096), param_dtype=types[0], grad_dtype=types[1], chunk=16384)
    given.run(cuda, phases=[Phase.NORM])
    total = 0.0
    for item in given.work.items:
        if item.param.numel():
            want = torch.stack([t.double().square().sum() for t in (item.param, item.grad)])
            torch.testing.assert_close(given.work.sums[item.tensor_id].double(), want, rtol=1e-6, atol=0)
            total += float(want[1])
    assert float(given.work.norm) == pytest.approx(total**0.5, rel=1e-6)


def test_norm_over_several_launches_and_empty_rows(cuda):
    parts = [problem("adam", numels, max_norm=0.1, seed=i) for i, numels in enumerate([(5000, 0), (0,), (300, 0, 2)])]
    totals = torch.full((3,), float("nan"))
    for i, part in enumerate((parts[0], parts[2], parts[1])):  # the empty launch is last: it combines
        cuda.launch(replace(part.work, phase=Phase.NORM, totals=totals, total_index=i, total_count=3, cache={}))
    want = sum(float(it.grad.double().square().sum()) for p in parts for it in p.work.items) ** 0.5
    norm, clip = parts[1].work.norm, parts[1].work.clip
    assert float(norm) == pytest.approx(want, rel=1e-6)
    assert float(clip) == pytest.approx(0.1 / (want + 1e-6), rel=1e-5)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rule=st.sampled_from(RULES),
    forms=st.tuples(*[st.sampled_from(list_formats())] * 4),
    types=st.sampled_from(TYPES),
    numels=st.lists(st.sampled_from([0, 1, 7, 8, 9, 255, 256, 257, 2047, 2048, 2049, 4100]), min_size=1, max_size=4),
    offset=st.integers(0, 3),
    chunk=st.sampled_from([2048, 4096]),
    precision=st.sampled_from(list_precisions()),
)
def test_any_shape(cuda, rule, forms, types, numels, offset, chunk, precision):
    assume(types[0] == F32 or types[0] in get_precision(precision).dtypes)
    options = dict(param_dtype=types[0], grad_dtype=types[1], formats=forms[: len(get_rule(rule).states)])
    check(cuda, problem(rule, tuple(numels), offset=offset, chunk=chunk, precision=precision, **options))


SUMMED = ((1, 1), (3, 1500), (130, 256), (257, 37), (300, 520))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_sums_of_squares(cuda, library, dtype):
    """A tile adds up at most 24 terms in a chain in fp32 (16 rows and 8 warps, or 8 columns and 5 steps of a warp); squares,
    weights and mul round 5 times. No order of the CTAs changes a bit, whatever lies next to the matrix."""
    for rows, cols in SUMMED:
        gen = torch.Generator().manual_seed(rows)
        grad = guarded(torch.randn(rows * cols, generator=gen).to(dtype), rows % 2).view(rows, cols)
        a, b, mul = torch.rand(rows, generator=gen), torch.rand(cols, generator=gen), torch.tensor([-0.37])
        results = []
        for order in (0, 1, 2):
            library.order(order)
            try:
                row, col, total = (guarded(torch.zeros(n)) for n in (rows, cols, 1))
                cuda.row_col_sums(grad, row, col, mul)
                cuda.weighted_square_sum(grad, a, b, total)
            finally:
                library.order(0)
            assert all(map(guards_untouched, (row, col, total)))
            results.append([row, col, total])
        assert_bitwise(results[0] * 2, results[1] + results[2])
        alone = torch.empty(rows), torch.empty(cols)
        cuda.row_col_sums(grad, alone[0], None, mul)
        cuda.row_col_sums(grad, None, alone[1], mul)
        assert_bitwise(alone, results[0][:2])
        exact = grad.double().square()
        scaled = exact * mul.double() ** 2
        weighted = (exact * a.double()[:, None] * b.double()).sum()
        bound = 1.01 * (16 + 24 + 5) * 2.0**-24
        for got, want in zip(results[0], (scaled.sum(1), scaled.sum(0), weighted), strict=True):
            assert ((got - want).abs() <= bound * want + 1e-30).all()


def test_sums_refuse_what_the_kernels_do_not_take(cuda):
    grad, row = torch.ones(6, 8), torch.zeros(6)
    for tensors, message in (
        ((grad.t(), None, None), "grad"),
        ((grad, torch.zeros(8), None), "row_out"),
        ((row, None, None), "matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda.row_col_sums(*tensors)
    with pytest.raises(ValueError, match="without elements"):
        cuda.row_col_sums(grad[:0], row[:0], None)


def test_launch_errors_are_raised(cuda, library):
    given = problem("adam", (300,))
    with pytest.raises(RuntimeError, match="probe"):
        cuda.launch(replace(given.work, phase=Phase.PROBE))
    with pytest.raises(RuntimeError, match="layout"):
        library.launch(bytes(library.launch_bytes()))


def test_supports_names_the_reason(cuda):
    key = problem("adam", (300,)).work.key
    assert cuda.supports(key) is None
    assert "float64" in cuda.supports(key._replace(param_dtype=torch.float64))
    assert "cpu" in (CudaBackend().supports(key) or "") or not torch.cuda.is_available()


ASAN = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, harness, fusedopt
from fusedopt.backends.cuda import CudaBackend
from fusedopt.formats import get_format
from simt import build as simt

def exact(values, offset=0):  # no guard zone: the allocator's is watched
    view = torch.empty(values.numel() + offset, dtype=values.dtype)[offset:]
    view.copy_(values)
    return view

harness.guarded = exact
cuda = CudaBackend(simt.library(asan=True), on_cpu=True)
for rule, form, dtype, offset, precision in (
    ("adam", "int8", torch.bfloat16, 0, "stochastic"),
    ("lamb", ("int4", "int8c"), torch.bfloat16, 0, "split24"),
    ("adam_amsgrad", ("bf16", "bf16_stochastic", "int4"), torch.float16, 1, "kahan"),
    ("lion", "fp8", torch.bfloat16, 1, "split32"),
    ("lars_momentum", "fp32", torch.float32, 0, "nearest"),
    ("sgd_momentum", "int4", torch.float16, 0, "master"),
):
    options = dict(param_dtype=dtype, formats=form, offset=offset, precision=precision, max_norm=1.0)
    given = harness.make_problem(rule, (300, 1, 2048, 2501), **options)
    given.run(cuda, clip=True)
for name in ("int8", "int8c", "fp8", "int4"):
    form = get_format(name)
    for offset in (0, 1):
        x = exact(torch.randn(8451), offset)
        codes, scale = (exact(t, offset) for t in form.encode(x, True))
        cuda.quantize(x, form, True, codes, scale)
        cuda.dequantize(codes, scale, form, True, x)
for dtype, offset in ((torch.float32, 0), (torch.bfloat16, 1)):
    grad = exact(torch.randn(130 * 300).to(dtype), offset).view(130, 300)
    cuda.row_col_sums(grad, exact(torch.empty(130)), exact(torch.empty(300)), exact(torch.ones(1)))
    cuda.weighted_square_sum(grad, exact(torch.ones(130)), exact(torch.ones(300)), exact(torch.empty(1)))
print("clean", flush=True)
given = harness.make_problem("adam", (300,))
given.work.table[10] = 400
given.run(cuda)
print("overrun unnoticed")
"""


def test_address_sanitizer_finds_no_stray_access():
    runtime = subprocess.run(
        [simt.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(runtime) or shutil.which("g++") is None:
        pytest.skip("the compiler has no shared address sanitizer runtime")
    tests = Path(__file__).resolve().parent
    simt.build(asan=True)
    script = ASAN.format(root=str(tests.parent), tests=str(tests))
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=170
    )
    assert "clean" in result.stdout, result.stderr[-4000:]
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr, "a planted overrun went unnoticed"
