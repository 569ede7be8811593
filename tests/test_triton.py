"""The Triton backend, interpreted on the CPU (TRITON_INTERPRET=1), against the fp64 reference and bit by bit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from harness import (  # noqa: E402
    RULES,
    assert_bitwise,
    assert_close,
    assert_guards,
    clone,
    make_problem,
    oracle,
    snapshot,
)

import fusedopt  # noqa: E402, F401  (registers the rules)
from fusedopt.abi import GRAIN_SIZE, Phase  # noqa: E402
from fusedopt.backends.base import BucketKey  # noqa: E402
from fusedopt.backends.reference import ReferenceBackend  # noqa: E402
from fusedopt.backends.triton import TritonBackend, interpreted  # noqa: E402
from fusedopt.formats import INT8, dynamic_map  # noqa: E402
from fusedopt.kernels.driver import TILE  # noqa: E402
from fusedopt.kernels.formats import int8_decode, int8_encode  # noqa: E402
from fusedopt.kernels.rounding import store_param  # noqa: E402
from fusedopt.precision import philox16, round_stochastic  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BACKEND = TritonBackend()
pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 when Triton is imported")

# Storage of p, g, states and rounding. Every rule takes each.
STORAGE = (
    (F32, F32, "fp32", "nearest"),
    (BF16, BF16, "int8", "stochastic"),
    (BF16, BF16, "bf16", "nearest"),
    (F16, F32, "int8", "stochastic"),
    (F32, BF16, "int8", "nearest"),
)


@triton.jit
def rounding_kernel(x, out, numel, seed, step, tensor):
    tile = tl.program_id(0)
    row = tl.arange(0, 8)[:, None]
    local = row * 256 + tl.arange(0, 256)[None, :]
    inside = tile * 2048 + local < numel
    value = tl.load(x + tile * 2048 + local, mask=inside, other=0.0)
    octet = tile.to(tl.int64) * 256 + row * 32 + tl.arange(0, 32)[None, :]
    whole = (tile + 1) * 2048 <= numel
    key = tl.load(seed).to(tl.uint64, bitcast=True)
    store_param(value, out + tile * 2048, local, inside, whole, key, step, tensor, octet, True, True)


@triton.jit
def codec_kernel(x, codes, values, SIGNED: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    one = tl.full((N,), 1.0, tl.float32)
    code = int8_encode(tl.load(x + at), one, SIGNED)
    tl.store(codes + at, code)
    tl.store(values + at, int8_decode(code, one, SIGNED))


def check(problem, clip: bool = False):
    exact = oracle(problem, clip)
    problem.run(BACKEND, clip)
    assert_close(problem, exact)
    assert_guards(problem)
    assert not problem.work.counters.any(), "counters were left non-zero"
    return exact


@pytest.mark.parametrize("rule,storage", list(itertools.product(RULES, STORAGE)))
def test_step_matches_reference(rule, storage):
    param, grad, formats, precision = storage
    seed = 1 if rule == "lion" else 0  # data without a sign that hangs on the last bit of fp32
    check(
        make_problem(
            rule,
            (300, 1, 2048, 2500),
            param_dtype=param,
            grad_dtype=grad,
            formats=formats,
            precision=precision,
            seed=seed,
        )
    )


@pytest.mark.parametrize("rule", ("adam", "sgd_momentum", "lars_momentum", "lamb"))
@pytest.mark.parametrize("offset", (0, 1))
def test_clip_unscale_maximize(rule, offset):
    problem = make_problem(
        rule, (4200, 5), param_dtype=BF16, grad_dtype=F16, max_norm=0.5, grad_scale=64.0, maximize=True, offset=offset
    )  # fmt: skip
    exact = check(problem, clip=True)
    torch.testing.assert_close(problem.work.norm.double(), exact.work.norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(problem.work.clip.double(), exact.work.clip, rtol=1e-5, atol=0)


def test_mixed_formats():
    check(make_problem("adam_amsgrad", (3000,), formats=("int8", "bf16", "fp32")))


@pytest.mark.parametrize("numels", ((255, 256, 257), (2047, 2049, 1)))
@pytest.mark.parametrize("offset", (0, 3))
def test_tails_and_misaligned_rows(numels, offset):
    check(
        make_problem(
            "adam", numels, param_dtype=BF16, grad_dtype=BF16, formats="int8", precision="stochastic", offset=offset
        )
    )


@pytest.mark.parametrize("rule", ("lamb", "lars_momentum"))
def test_empty_rows_are_no_rows(rule):
    with_empty, without = (make_problem(rule, numels, formats="int8") for numels in ((7, 0), (7,)))
    for problem in (with_empty, without):
        problem.run(BACKEND)
        assert not problem.work.counters.any()
    assert torch.equal(with_empty.params[0], without.params[0])


@pytest.mark.parametrize("dtype", (BF16, F16))
def test_stochastic_rounding_bits(dtype):
    """A store of any fp32 value rounds to the bits of round_stochastic."""
    numel = 2 * TILE.value + 100
    wide = torch.randn(numel) * 10.0 ** torch.randint(-9, 6, (numel,))
    wide[:6] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 65519.0])
    seed, step, tensor = 0x1234567890ABCDEF, 7, (1 << 31) - 5
    got = torch.empty_like(wide, dtype=dtype)
    rounding_kernel[(3,)](wide, got, numel, torch.tensor([seed]), step, tensor)
    want = round_stochastic(wide, dtype, philox16(seed, step, tensor, numel))
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(torch.int16), want[~nan].view(torch.int16))


@pytest.mark.parametrize("signed", (True, False))
def test_int8_codec(signed):
    """Every code survives a round trip; encoding is the nearest value of the map, as the reference searches it."""

    def run(x):
        codes, values = torch.empty(x.numel(), dtype=torch.uint8), torch.empty(x.numel())
        codec_kernel[(1,)](x, codes, values, signed, x.numel())
        return codes, values

    table = dynamic_map(signed)
    codes, values = run(table.float())
    assert torch.equal(codes, torch.arange(256, dtype=torch.uint8))
    torch.testing.assert_close(values.double(), table, rtol=1e-6, atol=0)

    x = (10.0 ** (9 * torch.rand(1 << 16, generator=torch.Generator().manual_seed(0)) - 9)).float()
    if signed:
        x[::2] *= -1
    x[::256] = 1.0  # every block has absmax 1
    x[1::512] = 0.0
    want, _ = INT8.encode(x, signed)
    codes, _ = run(x)
    difference = (codes.int() - want.int()).abs()
    assert difference.max() <= 1 and (difference > 0).sum() <= 3  # ties, to within fp32


@pytest.mark.parametrize("rule", ("adam", "lamb", "lars_momentum"))
def test_found_inf_writes_nothing(rule):
    problem = make_problem(rule, (2100,), param_dtype=BF16, formats="int8", precision="stochastic", found_inf=1.0)
    before = snapshot(problem)
    problem.run(BACKEND)
    assert_bitwise(before, snapshot(problem))
    assert not problem.work.counters.any()


def test_found_inf_zero_steps():
    check(make_problem("adam", (300,), found_inf=0.0))


@pytest.mark.parametrize("rule", ("adam", "lamb", "lars_momentum"))
def test_results_do_not_depend_on_chunk_size(rule):
    outcomes = []
    for chunk in (GRAIN_SIZE, 3 * GRAIN_SIZE, 16 * GRAIN_SIZE):
        problem = make_problem(
            rule,
            (20000, 3),
            param_dtype=BF16,
            grad_dtype=BF16,
            formats="int8",
            precision="stochastic",
            max_norm=0.5,
            chunk=chunk,
        )
        problem.run(BACKEND, clip=True)
        outcomes.append([*snapshot(problem), problem.work.norm, problem.work.clip])
    assert_bitwise(outcomes[0], outcomes[1])
    assert_bitwise(outcomes[0], outcomes[2])


def test_norm_of_several_launches():
    """The last of several NORM launches combines the totals of all. Without `sums` only gradients are read."""
    first, second = (make_problem("adam", n, max_norm=1.0, seed=i) for i, n in enumerate([(5000, 0, 30), (100,)]))
    shared = {"totals": torch.zeros(2), "norm": torch.zeros(1), "clip": torch.zeros(1), "sums": None, "total_count": 2}
    for index, problem in enumerate((first, second)):
        for item in problem.work.items:
            item.param.fill_(float("nan"))
        BACKEND.launch(replace(problem.work, phase=Phase.NORM, total_index=index, cache={}, **shared))
        assert not problem.work.counters.any()
    grads = [item.grad.double() for p in (first, second) for item in p.work.items]
    want = torch.cat(grads).norm()
    torch.testing.assert_close(shared["norm"].double(), want.view(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(shared["clip"].double(), (1 / (want + 1e-6)).clamp(max=1).view(1), rtol=1e-6, atol=0)


def test_norm_without_elements():
    problem = make_problem("adam", (0, 0), max_norm=1.0)
    problem.work.norm.fill_(7)
    BACKEND.launch(replace(problem.work, phase=Phase.NORM, cache={}))
    assert problem.work.norm.item() == 0 and problem.work.clip.item() == 1


def test_nonfinite_gradients_poison_visibly():
    problem = make_problem("adam", (600,), formats="int8")
    problem.work.items[0].grad[300] = float("nan")
    problem.run(BACKEND)
    scales = problem.work.items[0].scales[0]
    assert scales.isnan().tolist() == [False, True, False]
    assert problem.params[0][300].isnan() and problem.params[0].isnan().sum() == 1


def test_zero_gradient_and_zero_lr_change_no_parameter():
    problem = make_problem("adam", (300,), param_dtype=BF16, precision="stochastic", hyper_changes={"lr": 0.0})
    problem.work.items[0].grad.zero_()
    before = problem.params[0].clone()
    problem.run(BACKEND)
    assert torch.equal(before, problem.params[0])


def test_supports_names_the_reason():
    key = BucketKey(torch.device("cpu"), "triton", "adam", F32, F32, ("fp32", "fp32"), "nearest", True)
    assert BACKEND.supports(key) is None
    assert "float64" in BACKEND.supports(key._replace(param_dtype=torch.float64))
    assert "meta" in BACKEND.supports(key._replace(device=torch.device("meta")))


def test_reference_sees_the_same_sums():
    problem = make_problem("lars", (4100, 9))
    exact = clone(problem)
    exact.run(ReferenceBackend(torch.float64), phases=(Phase.NORM,))
    problem.run(BACKEND, phases=(Phase.NORM,))
    torch.testing.assert_close(problem.work.sums.double(), exact.work.sums, rtol=1e-6, atol=0)
