"""The CUDA sources run on the CPU (tests/simt) against the fp64 reference: all rules, formats, types and phases."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import RULES, assert_bitwise, assert_close, assert_guards, make_problem, oracle, snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simt import build as simt

from fusedopt.abi import Phase
from fusedopt.backends.cuda import CudaBackend
from fusedopt.formats import get_format
from fusedopt.precision import philox16, round_stochastic
from fusedopt.rule import get_rule

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TYPES = ((F32, F32), (BF16, BF16), (F32, BF16), (F16, F16), (BF16, F32))

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="needs g++ or clang++ for the CUDA shim")


@pytest.fixture(scope="module")
def library():
    return simt.library()


@pytest.fixture(scope="module")
def cuda(library):
    backend = CudaBackend(library, on_cpu=True)
    assert backend.reason() is None
    return backend


def mixed(rule: str) -> tuple[str, ...]:
    return ("int8", "bf16", "fp32")[: len(get_rule(rule).states)]


# With beta1 = 0.9 and bf16 tensors Lion's sum hits exact zeros, whose sign rounding decides.
def problem(rule, *args, **options):
    changes = {"betas": (0.9003, 0.99), **options.pop("hyper_changes", {})}
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
@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "mixed"])
@pytest.mark.parametrize("rule", RULES)
def test_step(cuda, rule, form, types):
    formats = mixed(rule) if form == "mixed" else form
    for precision in ("nearest", "stochastic") if types[0] != F32 else ("nearest",):
        check(
            cuda,
            problem(
                rule,
                (300, 1, 2048, 2500),
                param_dtype=types[0],
                grad_dtype=types[1],
                formats=formats,
                precision=precision,
            ),
        )


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rule", RULES)
def test_misaligned_rows_give_the_same_bits(cuda, rule, form):
    results = []
    for offset in (0, 1):
        one = problem(
            rule, (300, 7, 2304), param_dtype=BF16, grad_dtype=BF16, formats=form, precision="stochastic", offset=offset
        )
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


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_stochastic_rounding_has_the_bits_of_the_contract(cuda, dtype):
    given = problem("sgd", (3001, 515), param_dtype=dtype, precision="stochastic", hyper_changes={"weight_decay": 0.0})
    want = []
    for item in given.work.items:
        row = given.work.numbers[item.scalar_row]
        p, lr = item.param.float(), torch.tensor(row.lr, dtype=F32)
        random16 = philox16(row.seed, row.step, item.tensor_id, p.numel())
        want.append(round_stochastic(p - (lr * item.grad + 0.0 * p), dtype, random16))
    given.run(cuda)
    assert_bitwise([item.param for item in given.work.items], want)


def wide(n: int) -> torch.Tensor:
    """Values over the whole range of the map and beyond, with zeros and a subnormal."""
    gen = torch.Generator().manual_seed(5)
    x = torch.randn(n, generator=gen) * 10.0 ** (torch.rand(n, generator=gen) * 12 - 9)
    x[::17] = 0.0
    x[5] = 1e-40
    x[256:512] *= 1e-15
    x[512:768] = 0.0
    return x


@pytest.mark.parametrize("signed", [True, False])
def test_int8_codes(cuda, signed):
    # Numbers that make a state the gradient, or its square.
    changes = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "betas": (0.9, 0.0)}
    given = problem(
        "sgd_momentum" if signed else "adam",
        (20_000,),
        formats="int8",
        hyper_changes=changes,
        grad_values=lambda g, i: wide(g.numel()),
    )
    item = given.work.items[0]
    x = item.grad.clone() if signed else item.grad * item.grad
    codes, scale = get_format("int8").encode(x, signed)
    given.run(cuda)
    got = item.states[-1]
    assert torch.equal(item.scales[-1], scale)
    normal = (x == 0) | (x.abs() >= torch.finfo(F32).tiny)  # subnormals may count as zero or not
    difference = (got.int() - codes.int())[normal].abs()
    assert difference.max() <= 1  # only at a tie between two values
    assert (difference > 0).sum() <= 20
    if not signed:
        assert ((got > 0) == (x > 0))[normal].all()


def test_not_a_number_poisons_its_block_only(cuda):
    def one_nan(g, i):
        g[300] = float("nan")
        return g

    given = problem("adam", (1000,), formats="int8", grad_values=one_nan)
    given.run(cuda)
    item = given.work.items[0]
    for scale in item.scales:
        assert scale.isnan().tolist() == [False, True, False, False]
    assert item.param.isnan().nonzero().tolist() == [[300]]


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
            given = problem(rule, (40_000, 1, 6000, 2048), grad_dtype=BF16, formats="int8", chunk=chunk, max_norm=0.5)
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
    form=st.sampled_from(["fp32", "bf16", "int8"]),
    types=st.sampled_from(TYPES),
    numels=st.lists(st.sampled_from([0, 1, 7, 8, 9, 255, 256, 257, 2047, 2048, 2049, 4100]), min_size=1, max_size=4),
    offset=st.integers(0, 3),
    chunk=st.sampled_from([2048, 4096]),
    precision=st.sampled_from(["nearest", "stochastic"]),
)
def test_any_shape(cuda, rule, form, types, numels, offset, chunk, precision):
    check(
        cuda,
        problem(
            rule,
            tuple(numels),
            param_dtype=types[0],
            grad_dtype=types[1],
            formats=form,
            offset=offset,
            chunk=chunk,
            precision=precision,
        ),
    )


def test_launch_errors_are_raised(cuda, library):
    given = problem("adam", (300,))
    with pytest.raises(RuntimeError, match="probe"):
        cuda.launch(replace(given.work, phase=Phase.PROBE))
    with pytest.raises(RuntimeError, match="layout"):
        library.launch(bytes(library.launch_bytes()))


def test_supports_names_the_reason(cuda):
    key = problem("adam", (300,)).work.key
    assert cuda.supports(key) is None
    assert "int3" in cuda.supports(key._replace(formats=("int3", "fp32")))
    assert "float64" in cuda.supports(key._replace(param_dtype=torch.float64))
    assert "cpu" in (CudaBackend().supports(key) or "") or not torch.cuda.is_available()


ASAN = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, harness, fusedopt
from fusedopt.backends.cuda import CudaBackend
from simt import build as simt

def exact(values, offset=0):  # no guard zone: the allocator's is watched
    view = torch.empty(values.numel() + offset, dtype=values.dtype)[offset:]
    view.copy_(values)
    return view

harness.guarded = exact
cuda = CudaBackend(simt.library(asan=True), on_cpu=True)
for rule, form, dtype, offset in (
    ("adam", "int8", torch.bfloat16, 0),
    ("lamb", "int8", torch.float32, 0),
    ("adam_amsgrad", "bf16", torch.float16, 1),
    ("lion", "int8", torch.bfloat16, 1),
    ("lars_momentum", "fp32", torch.float32, 0),
):
    options = dict(param_dtype=dtype, formats=form, offset=offset, precision="stochastic", max_norm=1.0)
    given = harness.make_problem(rule, (300, 1, 2048, 2500), **options)
    given.run(cuda, clip=True)
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
