"""APOLLO's random projector: its distribution, its words, and the kernels that draw it, against fp64 and each other."""

from __future__ import annotations

import math

import pytest
import torch
from harness import assert_bitwise, guarded, guards_untouched
from oracles.philox import philox4x32

from fusedopt.backends import cpu
from fusedopt.projections import ops
from fusedopt.projections.subspace import gaussian_projector

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
KEY = {"seed": 0x9234567890ABCDEF, "tensor_id": 5, "step": 201}
ISAS = [name for name, _ in cpu.native.isa()] if cpu.native else []
FP32_ERROR = 4e-7  # of a number that a kernel draws, relatively
SHAPES = ((1, 1, 1), (37, 53, 1), (300, 1100, 1), (130, 70, 3), (97, 270, 128), (2100, 70, 5), (70, 2100, 5))
over_sides = pytest.mark.parametrize("side", ("left", "right"))


def triton_backend():
    pytest.importorskip("triton")
    from fusedopt.backends.triton import TritonBackend, interpreted

    if not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1 when Triton is imported")
    return TritonBackend()


def backend(name):
    return triton_backend() if name == "triton" else cpu.CpuBackend(name)


BACKENDS = (*ISAS, "triton")
over_backends = pytest.mark.parametrize("name", BACKENDS)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def transcribed(d: int, j: int, rank: int, *, seed: int, tensor_id: int, step: int) -> float:
    """One number by its formula, with a Philox of its own."""
    words = philox4x32((d // 4, 0xFE << 24 | j, tensor_id, step), (seed & 0xFFFFFFFF, seed >> 32))
    one, other = words[:2] if d % 4 < 2 else words[2:]
    r = math.sqrt(-2 * math.log(((one >> 8) + 1) / 2**24) / rank)
    angle = 2 * math.pi * (other >> 8) / 2**24
    return r * (math.sin(angle) if d % 2 else math.cos(angle))


@over_sides
def test_numbers_are_those_of_the_formula(side):
    P = gaussian_projector((19, 23), 7, side, dtype=F64, **KEY)
    by_component = P.t() if side == "left" else P
    assert by_component.shape == (7, 19 if side == "left" else 23)
    want = torch.tensor([[transcribed(d, j, 7, **KEY) for d in range(by_component.shape[1])] for j in range(7)])
    torch.testing.assert_close(by_component.float(), want, rtol=1e-6, atol=1e-12)


@over_sides
@pytest.mark.parametrize("dtype", (F64, F32, BF16))
def test_a_span_has_the_numbers_of_the_whole(side, dtype):
    P = gaussian_projector((1999, 1999), 40, side, dtype=dtype, **KEY)
    for first, end in ((0, 1999), (0, 1), (3, 9), (4, 8), (5, 7), (1998, 1999)):
        part = gaussian_projector((1999, 1999), 40, side, dtype=dtype, span=(first, end), **KEY)
        assert part.is_contiguous()
        assert_bitwise([part], [P[first:end] if side == "left" else P[:, first:end]])


def test_a_projector_does_not_depend_on_side_nor_on_what_lies_beyond():
    """The same numbers for every length of the side: components are counted apart, not numbered through."""
    left, right = (gaussian_projector((99, 99), 5, side, **KEY) for side in ("left", "right"))
    assert torch.equal(left.t(), right)
    assert torch.equal(gaussian_projector((42, 300), 5, "left", **KEY), left[:42])
    assert torch.equal(gaussian_projector((99, 99), 5, "left", dtype=BF16, **KEY), left.bfloat16())


def test_many_components_are_drawn_in_blocks():
    P = gaussian_projector((70000, 200), 9, "left", **KEY)  # more counters than are drawn at a time
    for j in (0, 1, 8):
        for d in (0, 65535, 69999):
            assert P[d, j] == pytest.approx(transcribed(d, j, 9, **KEY), rel=1e-6)


def test_distribution():
    """Of a million numbers: moments within 5 of their standard deviations, shares of the normal law, no correlation."""
    z = gaussian_projector((1000, 1000), 1000, "right", dtype=F64, **KEY) * math.sqrt(1000)
    n = z.numel()
    sigma = 1 / math.sqrt(n)
    assert abs(z.mean()) < 5 * sigma
    assert abs(z.var() - 1) < 5 * math.sqrt(2) * sigma
    assert abs((z**3).mean()) < 5 * math.sqrt(15) * sigma
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96) * sigma
    assert abs((z**6).mean() - 15) < 5 * math.sqrt(10395 - 225) * sigma
    for t in (0.1, 0.5, 1.0, 2.0, 3.0, 4.0):
        share = math.erf(t / math.sqrt(2))
        assert abs((z.abs() < t).double().mean() - share) < 5 * math.sqrt(share * (1 - share)) * sigma
    others = [gaussian_projector((1000, 1000), 1000, "right", dtype=F64, **(KEY | c)) * math.sqrt(1000)
              for c in ({"step": 202}, {"step": 401}, {"tensor_id": 6}, {"seed": KEY["seed"] + 1})]  # fmt: skip
    shifted = [z.roll(lag, dim) for lag in (1, 2, 3, 4, 5, 8) for dim in (0, 1)]
    for other in others + shifted:
        assert abs((z * other).mean()) < 5 * sigma
        assert abs((z**2 * other**2).mean() - 1) < 5 * math.sqrt(8) * sigma


def test_lengths_are_kept():
    """Johnson and Lindenstrauss: |P^T x|^2 is |x|^2 chi^2(r) / r, for sparse and smooth x as for random ones."""
    rank, n = 256, 3000
    P = gaussian_projector((n, 400), rank, "left", dtype=F64, **KEY)
    x = torch.stack([torch.eye(n)[17], torch.ones(n), torch.linspace(-1, 1, n).cos(), torch.arange(n) % 4 - 1.5], 1)
    ratios = (P.t() @ x.double()).square().sum(0) / x.double().square().sum(0)
    assert ((ratios - 1).abs() < 5 * math.sqrt(2 / rank)).all(), ratios


@over_backends
def test_drawn_numbers(name):
    """A projection of the identity is the projector itself."""
    if name == "triton":
        depth, ranks = 150, (1, 3, 40)
    else:
        depth, ranks = 3001, (1, 3, 128)
    for rank in ranks:
        out = torch.empty(rank, depth)
        assert backend(name).project_seeded(torch.eye(depth), *KEY.values(), rank, "left", out, None)
        want = gaussian_projector((depth, depth), rank, "left", dtype=F64, **KEY).t()
        assert ((out - want).abs() <= FP32_ERROR * want.abs() + 1e-12).all()


@pytest.mark.skipif(not ISAS, reason="the native CPU module is not built")
def test_instruction_sets_draw_the_same_bits():
    outs = [torch.empty(5, 999) for _ in ISAS]
    for name, out in zip(ISAS, outs, strict=True):
        backend(name).project_seeded(torch.eye(999), *KEY.values(), 5, "left", out, None)
    for out in outs[1:]:
        assert_bitwise([out], [outs[0]])


def problem(shape, side, dtype, seed=0):
    rows, cols, rank = shape
    g = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)
    out = guarded(torch.full((rank * cols if side == "left" else rows * rank,), float("nan")))
    squares = guarded(torch.full((cols if side == "left" else rows,), float("nan")))
    return guarded(g.flatten()).view(rows, cols), out.view((rank, cols) if side == "left" else (rows, rank)), squares


def exact(g, rank, side):
    """(R, what rounding may change, squares) with a projector rounded to the gradient's dtype."""
    large = (max(g.shape[0], rank), max(g.shape[1], rank))  # rank is no larger than either side there
    P = gaussian_projector(large, rank, side, dtype=g.dtype, **KEY).double()
    P, G = (P[: g.shape[0]] if side == "left" else P[:, : g.shape[1]]), g.double()
    R, size = (P.t() @ G, P.t().abs() @ G.abs()) if side == "left" else (G @ P.t(), G.abs() @ P.t().abs())
    # Where a number lies at the middle between two 16-bit ones, it may be rounded the other way: a unit of up to 3 of them.
    unit = {F32: 0.0, BF16: 2.0**-7, F16: 2.0**-10}[g.dtype] * P.abs().max() * G.abs().max() * 3
    return (
        R,
        size * (FP32_ERROR + (g.numel() // R.numel() * rank + 8) * 2.0**-24) + unit,
        G.square().sum(int(side == "right")),
    )


@over_sides
@pytest.mark.parametrize("dtype", (F32, BF16, F16))
@over_backends
def test_projections_and_squares(name, dtype, side):
    shapes = SHAPES if name != "triton" else ((1, 1, 1), (37, 53, 1), (140, 300, 1), (70, 90, 3), (80, 97, 128))
    for i, shape in enumerate(shapes):
        g, out, squares = problem(shape, side, dtype, i)
        assert backend(name).project_seeded(g, *KEY.values(), shape[2], side, out, squares)
        R, bound, want = exact(g, shape[2], side)
        assert ((out - R).abs() <= bound).all(), (shape, float(((out - R).abs() / bound).max()))
        torch.testing.assert_close(squares.double(), want, rtol=5e-6, atol=0)
        assert all(map(guards_untouched, (g, out, squares)))
        alone = torch.empty_like(out)
        backend(name).project_seeded(g, *KEY.values(), shape[2], side, alone, None)
        assert_bitwise([alone], [out])
        if dtype != F32:
            narrow = torch.empty(out.shape, dtype=dtype)
            backend(name).project_seeded(g, *KEY.values(), shape[2], side, narrow, squares)
            assert_bitwise([narrow], [out.to(dtype)])


@over_sides
@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("name", ISAS)
def test_threads_change_nothing(name, dtype, side):
    for shape in ((801, 1100, 1), (801, 1100, 37), (2100, 130, 5), (130, 2100, 5)):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            g, out, squares = problem(shape, side, dtype)
            backend(name).project_seeded(g, *KEY.values(), shape[2], side, out, squares)
            results.append([out, squares])
        assert_bitwise(results[0] * 2, results[1] + results[2])


@over_sides
@over_backends
def test_a_nan_stays_in_its_row_or_column(name, side):
    for rank in (1, 3):
        g, out, squares = problem((35, 45, rank), side, F32)
        g[34, 44] = float("nan")
        backend(name).project_seeded(g, *KEY.values(), rank, side, out, squares)
        bad = out.isnan().all(0) if side == "left" else out.isnan().all(1)
        last = (44 if side == "left" else 34,)
        assert bad.nonzero().tolist() == squares.isnan().nonzero().tolist() == [[*last]]
        assert int(out.isnan().sum()) == rank


@over_sides
@pytest.mark.parametrize("dtype", (F32, BF16, F16, F64))
def test_torch_does_the_same_where_there_is_no_kernel(dtype, side):
    wide = F64 if dtype == F64 else F32
    for rows, cols, rank in ((37, 53, 1), (130, 70, 3)):
        g = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).to(dtype)
        shape = (rank, cols) if side == "left" else (rows, rank)
        out, squares = torch.empty(shape, dtype=wide), torch.empty(cols if side == "left" else rows, dtype=wide)
        ops.project_seeded("reference", g, rank, side, out, squares, **KEY)
        P = gaussian_projector((rows, cols), rank, side, dtype=dtype, **KEY).double()
        want = P.t() @ g.double() if side == "left" else g.double() @ P.t()
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(squares.double(), g.double().square().sum(int(side == "right")), rtol=1e-5, atol=0)


@over_backends
def test_what_does_not_fit(name):
    take, g = backend(name).project_seeded, torch.zeros(4, 6)
    assert not take(g.double(), 1, 2, 3, 2, "left", torch.zeros(2, 6).double(), None)
    for arguments, message in (
        ((g, 1, 2, 3, 2, "top", torch.zeros(2, 6), None), "unknown side 'top'"),
        ((g, 1, 2, 3, 0, "left", torch.zeros(0, 6), None), "rank 1 or more, not 0"),
        ((g, 1, 2, 3, 2, "left", torch.zeros(2, 5), None), "out"),
        ((g, 1, 2, 3, 2, "right", torch.zeros(4, 2), torch.zeros(6)), "squares"),
    ):
        with pytest.raises(ValueError, match=message):
            take(*arguments)
