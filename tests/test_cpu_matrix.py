"""Matrix work of the CPU backend against fp64: updates of projected parameters, projections, sums by row and column."""

from dataclasses import replace

import pytest
import torch
from cpu_matrix_oracle import TINY, U, gamma, product, reference_apply_matrix
from harness import assert_bitwise, guarded, guards_untouched

from fusedopt import abi
from fusedopt.backends import cpu
from fusedopt.backends.base import Int4Matrix, MatrixWork, RowNumbers
from fusedopt.precision import get_precision, list_precisions, philox16

pytestmark = pytest.mark.skipif(cpu.native is None, reason="the native CPU module is not built")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ISAS = [name for name, _ in cpu.native.isa()] if cpu.native else []
KINDS = ("product", "sign", "gradient", "scaled")
KEPT = [("nearest", F32)] + [(p, d) for p in list_precisions() for d in (BF16, F16) if d in get_precision(p).dtypes]
SHAPES = ((1, 1, 1), (97, 65, 7), (401, 530, 37), (13, 1100, 128), (110, 70, 600))
NUMBERS = RowNumbers(0.05, 0.004, 0.0, -1.0, 0x1234567890ABCDEF, 7, ())


@pytest.fixture(autouse=True)
def settings():
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


class GuardedScratch:
    """Scratch of exactly the size that was asked for, full of NaN, between guards."""

    def take(self, floats):
        return guarded(torch.full((floats,), float("nan")))

    def give_back(self, buffer):
        assert guards_untouched(buffer), "memory next to the scratch was written"


def backend(isa):
    made = cpu.CpuBackend(isa)
    assert made.reason() is None
    made._scratch = GuardedScratch()
    return made


def scalar_row(row):
    buffer = bytearray(4 * abi.SCALAR_STRIDE)
    abi.pack_scalar_row(buffer, 0, (row.lr, row.decay, row.l2, row.grad_sign), row.seed, row.step, row.scalars)
    return torch.frombuffer(buffer, dtype=F32)


def matrix(gen, rows, cols, dtype, integers=False, offset=0):
    x = (
        torch.randint(-4, 5, (rows, cols), generator=gen).float()
        if integers
        else torch.randn(rows, cols, generator=gen)
    )
    return guarded(x.to(dtype).flatten(), offset).view(rows, cols)


def make(
    shape, kind, precision="nearest", dtype=F32, factors=F32, grads=None, integers=False, offset=0, seed=0, **more
):
    """A MatrixWork whose tensors lie between guards."""
    rows, cols, rank = shape
    gen = torch.Generator().manual_seed(seed)
    keeps = get_precision(precision)
    stored, companion = keeps.store(
        torch.randn(rows * cols, generator=gen), dtype, philox16(3, 3, 3, rows * cols) if keeps.random else None
    )
    given = {
        "param": guarded(stored.to(dtype), offset).view(rows, cols),
        "companion": None if companion is None or dtype == F32 else guarded(companion, offset).view(rows, cols),
    }
    if kind != "product":
        given["grad"] = matrix(gen, rows, cols, grads or dtype, integers, offset)
    if kind == "scaled":
        given |= {"left": None, "right": None}
        given |= {
            "row_factor": guarded(torch.rand(rows, generator=gen)),
            "col_factor": guarded(torch.rand(cols, generator=gen)),
        }
    else:
        given |= {
            "left": matrix(gen, rows, rank, factors, integers),
            "right": matrix(gen, rank, cols, factors, integers),
        }
    if kind in ("sign", "gradient"):
        back = rank + 3
        given |= {"residual": kind, "residual_scale": 0.25}
        given |= {
            "grad_left": matrix(gen, rows, back, factors, integers),
            "grad_right": matrix(gen, back, cols, factors, integers),
        }
        given |= {"grad_scale": torch.tensor([4.0]), "clip": torch.tensor([0.5])}
    given |= {"scale": 0.5, **more}
    return MatrixWork(precision=keeps, scalars=scalar_row(NUMBERS), numbers=NUMBERS, tensor_id=5, **given)


def tensors(work):
    names = "param companion left right grad row_factor col_factor grad_left grad_right".split()
    return {name: t for name in names if (t := getattr(work, name)) is not None}


def copied(work):
    return replace(work, **{name: t.clone() for name, t in tensors(work).items()})


def check(isa, work, medium=False):
    before = copied(work)
    want, bound = reference_apply_matrix(before, medium)
    backend(isa).apply_matrix(work)
    companion = None if work.companion is None else work.companion.flatten()
    got = work.precision.load(work.param.flatten(), companion, torch.float64).view(work.param.shape)
    assert got.isfinite().all()
    assert ((got - want).abs() <= bound).all(), float(((got - want).abs() / bound).max())
    assert work.precision.name != "master" or torch.equal(work.param, work.companion.to(work.param.dtype))
    for name, t in tensors(work).items():
        assert guards_untouched(t), f"memory next to {name} was written"
        if name not in ("param", "companion"):
            assert_bitwise([t], [getattr(before, name)])
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("precision", "dtype"), KEPT)
@pytest.mark.parametrize("isa", ISAS)
def test_updates(isa, precision, dtype, kind):
    for i, shape in enumerate(SHAPES):
        check(isa, make(shape, kind, precision, dtype, (F32, BF16, F16)[i % 3], offset=i % 2, seed=i))


@pytest.mark.parametrize("factors", [F32, BF16, F16])
@pytest.mark.parametrize("grads", [F32, BF16, F16])
@pytest.mark.parametrize("isa", ISAS)
def test_types(isa, grads, factors):
    for kind, precision, dtype in (
        ("sign", "nearest", F32),
        ("gradient", "stochastic", BF16),
        ("scaled", "kahan", F16),
    ):
        check(isa, make((50, 530, 37), kind, precision, dtype, factors, grads))


@pytest.mark.parametrize("isa", ISAS)
def test_a_product_of_two_types(isa):
    work = make((50, 70, 37), "product", factors=BF16)
    check(isa, replace(work, right=matrix(torch.Generator().manual_seed(1), 37, 70, F32)))


@pytest.mark.parametrize("isa", ISAS)
def test_factors_may_be_missing(isa):
    for missing in ("row_factor", "col_factor"):
        check(isa, replace(make((50, 530, 1), "scaled"), **{missing: None}))
    check(isa, replace(make((50, 530, 1), "scaled"), row_factor=None, col_factor=None))
    check(isa, replace(make((50, 70, 9), "gradient"), grad_scale=None, clip=None))


@pytest.mark.parametrize("isa", ISAS)
def test_medium_rounds_fp32_factors_to_bf16_and_nothing_else_does(isa):
    shape, results = (60, 300, 301), {}
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        results[precision] = check(isa, make(shape, "gradient"), medium=precision == "medium")
        check(isa, make(shape, "gradient", factors=BF16, dtype=BF16))
        check(isa, make(shape, "gradient", factors=F16))
    assert torch.equal(results["highest"], results["high"])
    has_pairs = isa == "avx512" and "avx512_bf16" in open("/proc/cpuinfo").read()
    assert torch.equal(results["highest"], results["medium"]) != has_pairs


@pytest.mark.parametrize("medium", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("precision", "dtype"), KEPT)
@pytest.mark.parametrize("isa", ISAS)
def test_bits_of_the_contract(isa, precision, dtype, kind, medium):
    """With integers all sums are exact: what is left is the epilogue in fp32 and the rounding, bit for bit."""
    torch.set_float32_matmul_precision("medium" if medium else "highest")
    work = make((70, 611, 300), kind, precision, dtype, (F32, BF16)[medium], BF16, integers=True, offset=1)
    if kind == "scaled":
        by = torch.tensor(work.scale) * work.row_factor
        u = by[:, None] * work.col_factor * work.grad.float()
    else:
        u = work.scale * (work.left.float() @ work.right.float())
        if kind != "product":
            e = work.grad.float() - work.grad_left.float() @ work.grad_right.float()
            by = work.residual_scale * NUMBERS.grad_sign * (e.sign() if kind == "sign" else 0.125 * e)
            u = u + by
    keeps = work.precision
    companion = None if work.companion is None else work.companion.flatten()
    p = keeps.load(work.param.flatten(), companion, F32)
    x = p - (work.scalars[0] * u.flatten() + work.scalars[1] * p)
    want = keeps.store(x, dtype, philox16(NUMBERS.seed, NUMBERS.step, work.tensor_id, x.numel()))
    backend(isa).apply_matrix(work)
    got = [work.param.flatten()] + ([] if companion is None else [work.companion.flatten()])
    assert_bitwise(got, [t for t in want[: len(got)] if t is not None])


@pytest.mark.parametrize("isa", ISAS)
def test_updates_do_not_depend_on_threads(isa):
    for shape, kind, precision, dtype in (
        ((801, 1100, 37), "product", "nearest", F32),
        ((801, 1100, 270), "sign", "kahan", BF16),
        ((801, 1100, 5), "scaled", "stochastic", F16),
    ):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            work = make(shape, kind, precision, dtype)
            backend(isa).apply_matrix(work)
            results.append([t for t in (work.param, work.companion) if t is not None])
        assert_bitwise(results[0], results[1])
        assert_bitwise(results[0], results[2])


@pytest.mark.parametrize("isa", ISAS)
def test_found_inf_writes_nothing(isa):
    work = make((50, 70, 9), "gradient", "kahan", BF16, found_inf=torch.tensor([1.0]))
    before = copied(work)
    backend(isa).apply_matrix(work)
    assert_bitwise(list(tensors(work).values()), list(tensors(before).values()))
    check(isa, replace(work, found_inf=torch.tensor([0.0])))


@pytest.mark.parametrize("isa", ISAS)
def test_a_nan_stays_in_its_row_and_column(isa):
    """Padding never meets it: 0 * NaN would spread."""
    for dtype in (F32, BF16):
        work = make((21, 45, 5), "product", factors=dtype)
        work.left[20, 4] = work.right[4, 44] = float("nan")
        backend(isa).apply_matrix(work)
        bad = work.param.isnan()
        assert bad[20].all() and bad[:, 44].all() and int(bad.sum()) == 21 + 45 - 1


def test_errors_name_the_tensor():
    work, take = make((50, 70, 9), "gradient"), cpu.CpuBackend().apply_matrix
    int4 = Int4Matrix(torch.zeros(4, dtype=torch.uint8), torch.ones(1), torch.zeros(1, dtype=torch.uint8), (50, 9))
    for changes, message in (
        ({"left": work.left.t().contiguous().t()}, "update, left"),
        ({"right": work.right.double()}, "update, right"),
        ({"grad_right": work.grad_right[:, :-1].contiguous()}, "residual, right"),
        ({"grad_left": None}, "both factors"),
        ({"grad": None}, "residual needs"),
        ({"residual": "sum"}, "unknown residual"),
        ({"precision": get_precision("split24")}, "needs its companion"),
        ({"left": None, "right": None}, "residual needs"),
        ({"left": int4._replace(shape=(50, 9))}, "dequantise"),
        ({"clip": torch.ones(1).double()}, "clip"),
        ({"param": work.param.flatten()}, "seen as a matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            take(replace(work, **changes))


def projection(shape, side, grads, factors, seed=0):
    rows, cols, rank = shape
    gen = torch.Generator().manual_seed(seed)
    projector = (rows, rank) if side == "left" else (rank, cols)
    return matrix(gen, rows, cols, grads), matrix(gen, *projector, factors)


# the two last ones are split along K
PROJECTED = ((1, 1, 1), (97, 65, 7), (70, 611, 37), (611, 70, 128), (60, 50, 530), (4100, 33, 5), (33, 4100, 5))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("types", [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32), (F16, F16)], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_projections(isa, types, side):
    for i, shape in enumerate(PROJECTED):
        grad, projector = projection(shape, side, *types, seed=i)
        for out_dtype in (F32, types[0]):
            rows, cols, rank = shape
            size = (rank, cols) if side == "left" else (rows, rank)
            out = guarded(torch.zeros(size[0] * size[1], dtype=out_dtype)).view(size)
            backend(isa).project(grad, projector, side, out)
            want, bound = product(projector.t(), grad) if side == "left" else product(grad, projector.t())
            if out_dtype != F32:
                bound = bound + want.abs() * (2.0**-8 if out_dtype == BF16 else 2.0**-11) * 1.01 + 2.0**-24
            assert ((out.double() - want).abs() <= bound).all(), (shape, float(((out - want).abs() / bound).max()))
            assert all(map(guards_untouched, (out, grad, projector)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("isa", ISAS)
def test_projections_do_not_depend_on_threads(isa, side):
    for shape, dtype in (((2100, 130, 37), F32), ((130, 2100, 37), F32), ((801, 1100, 130), BF16)):
        grad, projector = projection(shape, side, dtype, dtype)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = torch.empty((shape[2], shape[1]) if side == "left" else (shape[0], shape[2]))
            backend(isa).project(grad, projector, side, out)
            results.append(out)
        assert_bitwise(results[:1] * 2, results[1:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("isa", ISAS)
def test_medium_projections(isa, side):
    grad, projector = projection((301, 211, 37), side, F32, F32)
    rows, cols, rank = 301, 211, 37
    factors = (projector.t(), grad) if side == "left" else (grad, projector.t())
    out = torch.empty((rank, cols) if side == "left" else (rows, rank))
    torch.set_float32_matmul_precision("medium")
    backend(isa).project(grad, projector, side, out)
    want, bound = product(*factors, medium=True)
    assert ((out - want).abs() <= bound).all()
    # the same as rounding first, which leaves exact products
    want, bound = product(*(x.bfloat16() for x in factors))
    if isa == "avx512" and "avx512_bf16" in open("/proc/cpuinfo").read():
        assert ((out - want).abs() <= bound).all()


def test_a_projection_keeps_a_nan_to_its_column():
    for dtype in (F32, BF16):
        grad, projector = projection((35, 45, 5), "left", dtype, dtype)
        grad[34, 44] = float("nan")
        out = torch.empty(5, 45)
        cpu.CpuBackend().project(grad, projector, "left", out)
        assert out[:, 44].isnan().all() and out[:, :44].isfinite().all()


SUMMED = ((1, 1), (3, 1500), (200, 37), (1000, 64), (129, 2050))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("isa", ISAS)
def test_sums_of_squares(isa, dtype):
    """At most 64 terms add up in fp32 (a lane of a row of 1024, or the rows of a chunk); squares and mul round 3 times."""
    for shape in SUMMED:
        rows, cols = shape
        gen = torch.Generator().manual_seed(rows)
        grad, mul = matrix(gen, rows, cols, dtype, offset=1), torch.tensor([-0.37])
        row, col = guarded(torch.zeros(rows)), guarded(torch.zeros(cols))
        exact = (grad.double() * mul.double()).square()
        kernels, results = backend(isa), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            kernels.row_col_sums(grad, row, col, mul)
            results.append([row.clone(), col.clone()])
            assert guards_untouched(row) and guards_untouched(col)
        assert_bitwise(results[0] * 2, results[1] + results[2])
        for got, want in ((row, exact.sum(1)), (col, exact.sum(0))):
            assert ((got - want).abs() <= gamma(68) * want + rows * cols * TINY).all()
        alone = [torch.empty(rows), torch.empty(cols)]
        kernels.row_col_sums(grad, alone[0], None, mul)
        kernels.row_col_sums(grad, None, alone[1], mul)
        assert_bitwise(alone, results[0])
        kernels.row_col_sums(grad, row, None, None)
        want = grad.double().square().sum(1)
        assert ((row - want).abs() <= gamma(66) * want + cols * TINY).all()


@pytest.mark.parametrize("isa", ISAS)
def test_weighted_square_sum(isa):
    for dtype, shape in ((d, s) for d in (F32, BF16, F16) for s in SUMMED):
        gen = torch.Generator().manual_seed(shape[0])
        grad = matrix(gen, *shape, dtype)
        a, b = torch.rand(shape[0], generator=gen), torch.rand(shape[1], generator=gen)
        kernels, results = backend(isa), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(guarded(torch.zeros(1)))
            kernels.weighted_square_sum(grad, a, b, results[-1])
            assert guards_untouched(results[-1])
        assert_bitwise(results[:1] * 2, results[1:])
        want = float((grad.double().square() * a.double()[:, None] * b.double()).sum())
        assert abs(float(results[0]) - want) <= 70 * U * want
