"""Triton kernels on matrices, interpreted on the CPU: bit by bit where fp32 is exact, otherwise against fp64 torch."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from harness import guarded, guards_untouched  # noqa: E402
from matrix_harness import (  # noqa: E402
    SOURCES,
    assert_close_step,
    assert_exact_step,
    dense,
    make_matrix_problem,
    pack_int4,
)
from oracles.philox import philox4x32  # noqa: E402

from fusedopt.backends.base import Int4Matrix  # noqa: E402
from fusedopt.backends.triton import TritonBackend, interpreted  # noqa: E402
from fusedopt.kernels.rounding import octet_bits, uniform16_at  # noqa: E402
from fusedopt.precision import get_precision, list_precisions  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BACKEND = TritonBackend()
pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 when Triton is imported")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("precision", list_precisions())
@pytest.mark.parametrize("shape,rank", (((40, 72), 24), ((37, 51), 19)))
def test_every_precision_and_source(source, precision, shape, rank):
    """Bits of the parameter and of its companion, random ones included: those of fusedopt.precision."""
    assert_exact_step(make_matrix_problem(shape, rank, source=source, precision=precision), BACKEND)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("precision", [name for name in list_precisions() if F16 in get_precision(name).dtypes])
def test_fp16(source, precision):
    assert_exact_step(
        make_matrix_problem((33, 40), 16, source=source, precision=precision, param_dtype=F16, operand_dtype=F16),
        BACKEND,
    )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("operands,grad", ((F32, F32), (F32, BF16), (BF16, F32)))
@pytest.mark.parametrize("param", (F32, BF16))
def test_mixed_types(source, operands, grad, param):
    problem = make_matrix_problem(
        (70, 90), 40, source=source, param_dtype=param, operand_dtype=operands, grad_dtype=grad, precision="stochastic"
    )
    assert_exact_step(problem, BACKEND)


@pytest.mark.parametrize(
    "shape,rank",
    (((1, 1), 1), ((1, 7), 65), ((9, 1), 128), ((2, 8), 65), ((129, 3), 1), ((3, 257), 128), ((130, 136), 65)),
)
@pytest.mark.parametrize("source", ("sign", "product"))
def test_tails(shape, rank, source):
    """Matrices smaller than a tile, and one row or column more than whole tiles; ranks of one to three rounds."""
    assert_exact_step(make_matrix_problem(shape, rank, source=source, precision="stochastic", seed=2), BACKEND)


def test_more_than_a_band_of_tiles():
    """Every tile is owned by one program: 10 rows of 3 tiles, of which the last band has 2."""
    problem = make_matrix_problem((9 * 64 + 5, 136), 8, operand_dtype=F32, precision="stochastic")
    assert_exact_step(problem, BACKEND)


@pytest.mark.parametrize("precision", list_precisions())
@pytest.mark.parametrize("source", ("gradient", "scaled"))
def test_misaligned(precision, source):
    assert_exact_step(make_matrix_problem((21, 48), 16, source=source, precision=precision, offset=3), BACKEND)


@pytest.mark.parametrize("residual", ("sign", "gradient"))
@pytest.mark.parametrize("shared,grad_rank", (("left", None), ("right", None), (None, 24), (None, 7)))
def test_operands_of_the_residual(residual, shared, grad_rank):
    """The projector is shared on either side; without a shared one the ranks may differ."""
    problem = make_matrix_problem(
        (45, 80), 16, source=residual, shared=shared, grad_rank=grad_rank, precision="kahan", seed=1
    )
    assert_exact_step(problem, BACKEND)


@pytest.mark.parametrize("source", ("sign", "gradient"))
@pytest.mark.parametrize("maximize", (False, True))
@pytest.mark.parametrize("grad_scale,clip", ((4.0, None), (None, 0.5), (8.0, 0.25)))
def test_sign_scale_and_clip(source, maximize, grad_scale, clip):
    problem = make_matrix_problem(
        (20, 24), 8, source=source, maximize=maximize, grad_scale=grad_scale, clip=clip, param_dtype=F32
    )
    assert_exact_step(problem, BACKEND)


@pytest.mark.parametrize("factors", ("both", "row", "col", "none"))
def test_factors(factors):
    problem = make_matrix_problem((19, 300), source="scaled", factors=factors, precision="split24")
    assert_exact_step(problem, BACKEND)


@pytest.mark.parametrize("packed", ("left", "right"))
@pytest.mark.parametrize("source", ("product", "sign"))
@pytest.mark.parametrize("shape,rank,group", (((40, 72), 24, 256), ((41, 73), 19, 256), ((66, 40), 72, 64)))
def test_int4_operands(packed, source, shape, rank, group):
    """Groups that end within a row; rows that begin in the middle of a byte."""
    problem = make_matrix_problem(
        shape, rank, source=source, packed=packed, shared=packed, group=group, precision="stochastic"
    )
    assert_exact_step(problem, BACKEND)


def test_int4_of_odd_groups():
    problem = make_matrix_problem((16, 24), 8, packed="left", group=12, precision="stochastic")
    assert_exact_step(problem, BACKEND)


@pytest.mark.parametrize("packed", ("left", "right", None))
@pytest.mark.parametrize("operands,rtol", ((F32, 2e-6), (BF16, 2.0**-7)))
def test_real_numbers(packed, operands, rtol):
    """An int4 projector is rounded to the type of the other operand, as a stored copy of it would be."""
    problem = make_matrix_problem(
        (70, 88), 48, exact=False, packed=packed, operand_dtype=operands, param_dtype=F32, seed=3
    )
    assert_close_step(problem, BACKEND, rtol if packed else 2e-6)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("precision", ("nearest", "stochastic", "kahan", "split24", "split32", "master"))
def test_real_numbers_in_every_precision(source, precision):
    problem = make_matrix_problem((40, 64), 32, source=source, exact=False, precision=precision, seed=4)
    assert_close_step(problem, BACKEND)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("found_inf", (1.0, 0.0, float("nan")))
def test_found_inf(source, found_inf):
    """Non-zero, and not a number: nothing is written."""
    problem = make_matrix_problem((33, 40), 16, source=source, precision="kahan", found_inf=found_inf)
    assert_exact_step(problem, BACKEND)


def test_a_nan_spoils_its_own_element():
    problem = make_matrix_problem((20, 40), 8, source="gradient", precision="split24")
    problem.work.grad[3, 5] = float("nan")
    BACKEND.apply_matrix(problem.work)
    assert problem.work.param.isnan().nonzero().tolist() == [[3, 5]]


def test_master_weights_are_the_weights():
    problem = make_matrix_problem((20, 40), 8, precision="master")
    problem.work.param.fill_(float("nan"))
    assert_exact_step(problem, BACKEND)


def test_empty():
    for shape, rank in (((0, 8), 4), ((8, 0), 4)):
        BACKEND.apply_matrix(make_matrix_problem(shape, rank).work)
    problem = make_matrix_problem((8, 16), 0)
    assert_exact_step(problem, BACKEND)  # an empty product: only decay


def test_shapes_that_do_not_fit():
    problem = make_matrix_problem((20, 40), 8)
    problem.work.right = problem.work.right[:7]
    with pytest.raises(ValueError, match=r"left @ right of shapes \(20, 8\) and \(7, 40\).* of shape \(20, 40\)"):
        BACKEND.apply_matrix(problem.work)
    problem = make_matrix_problem((20, 40), 8, source="sign")
    problem.work.grad = problem.work.grad[:, :39]
    with pytest.raises(ValueError, match=r"gradient has shape \(20, 39\)"):
        BACKEND.apply_matrix(problem.work)


def test_what_kernels_cannot_read_is_left_alone():
    problem = make_matrix_problem((20, 40), 8, source="gradient")
    before = problem.snapshot()
    problem.work.grad = problem.work.grad.t().contiguous().t()
    assert BACKEND.apply_matrix(problem.work) is False
    problem.work.grad = problem.work.grad.contiguous().double()
    assert BACKEND.apply_matrix(problem.work) is False
    assert torch.equal(problem.snapshot()[0], before[0])
    packed = pack_int4(20, 8, torch.Generator())
    grad, out = torch.zeros(20, 40, dtype=torch.float64), torch.zeros(8, 40, dtype=torch.float64)
    assert BACKEND.project_packed(grad, packed, "left", out) is False


@triton.jit
def bits_kernel(out, seed, first, step, tensor, N: tl.constexpr):
    base = tl.load(first)
    key = tl.load(seed).to(tl.uint64, bitcast=True)
    element = base + tl.arange(0, N)[None, :]
    at = tl.arange(0, N)[None, :]
    tl.store(out + at, uniform16_at(key, step, tensor, element, 0).to(tl.int32))
    octet = base // 8 + tl.arange(0, N // 8)[None, :]
    tl.store(out + N + at, octet_bits(key, step, tensor, octet, 0).to(tl.int32))


@pytest.mark.parametrize("first", (0, 8 * ((1 << 32) - 2), 1 << 38))
def test_random_bits_of_distant_elements(first):
    """Both ways to draw them, beyond 2^32 octets."""
    seed, step, tensor, n = 0xFEDCBA9876543210, 77, 12345, 32
    out = torch.zeros(2 * n, dtype=torch.int32)
    key = torch.tensor([seed - (1 << 64)])
    bits_kernel[(1,)](out, key, torch.tensor([first]), step, tensor, n)
    want = []
    for i in range(first, first + n):
        words = philox4x32(((i // 8) & 0xFFFFFFFF, i // 8 >> 32, tensor, step), (seed & 0xFFFFFFFF, seed >> 32))
        want.append(words[i % 8 // 2] >> 16 * (i % 2) & 0xFFFF)
    assert out.tolist() == want + want


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("shape,rank", (((70, 136), 72), ((131, 67), 19), ((9, 5), 3)))
@pytest.mark.parametrize("dtype", (BF16, F16, F32))
def test_project_packed(side, shape, rank, dtype):
    gen = torch.Generator().manual_seed(0)
    rows, cols = shape
    grad = guarded(torch.randint(-3, 4, (rows * cols,), generator=gen).to(dtype)).view(shape)
    packed = pack_int4(*((rows, rank) if side == "left" else (rank, cols)), gen)
    size = (rank, cols) if side == "left" else (rows, rank)
    out = guarded(torch.full((size[0] * size[1],), float("nan")))
    assert BACKEND.project_packed(grad, packed, side, out.view(size))
    exact = dense(packed).T @ grad.double() if side == "left" else grad.double() @ dense(packed).T
    assert torch.equal(out.view(size).double(), exact)
    assert guards_untouched(out)


def test_project_packed_rounds_its_result():
    gen = torch.Generator().manual_seed(0)
    grad, packed = torch.randn(100, 64, generator=gen).bfloat16(), pack_int4(100, 32, gen, step=0.1)
    out = torch.empty(32, 64, dtype=BF16)
    BACKEND.project_packed(grad, packed, "left", out)
    exact = dense(packed).bfloat16().double().T @ grad.double()
    torch.testing.assert_close(out.double(), exact, rtol=2.0**-8, atol=1e-5)


def test_project_packed_refuses_other_shapes():
    packed = Int4Matrix(torch.zeros(32, dtype=torch.uint8), torch.ones(1), torch.zeros(1, dtype=torch.uint8), (8, 8))
    with pytest.raises(ValueError, match=r"needs a projector of shape \(9, 8\)"):
        BACKEND.project_packed(torch.zeros(9, 5), packed, "left", torch.zeros(8, 5))
    with pytest.raises(ValueError, match="unknown side 'top'"):
        BACKEND.project_packed(torch.zeros(8, 5), packed, "top", torch.zeros(8, 5))
