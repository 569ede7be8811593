"""Builds MatrixWork by hand, and steps it in plain fp64 torch: the oracle of `apply_matrix`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from harness import guarded, guards_untouched

from fusedopt import abi
from fusedopt.backends.base import Int4Matrix, MatrixWork, RowNumbers
from fusedopt.precision import get_precision, philox16

SEED = 0x1234567890ABCDEF
# Powers of two: with integer matrices every weight is a sum of few multiples of 2^-20, which fp32 adds exactly in any order.
LR, DECAY = 2.0**-6, 2.0**-7
SOURCES = ("product", "sign", "gradient", "scaled")


@dataclass
class MatrixProblem:
    work: MatrixWork
    guarded: list[torch.Tensor]  # views of every buffer a step may write or overrun
    weights: torch.Tensor  # fp64, before the step

    def snapshot(self) -> list[torch.Tensor]:
        written = (self.work.param, self.work.companion)
        return [t.clone().view(-1).view(torch.uint8) for t in written if t is not None]


def int4_values(packed: Int4Matrix) -> torch.Tensor:
    """fp64 [rows, cols] of a packed matrix, element by element."""
    rows, cols = packed.shape
    values = torch.empty(rows * cols, dtype=torch.float64)
    codes, scale, zero = packed.codes.tolist(), packed.scale.tolist(), packed.zero.tolist()
    for e in range(rows * cols):
        code = codes[e // 2] & 15 if e % 2 else codes[e // 2] >> 4
        values[e] = scale[e // packed.group] * (code - zero[e // packed.group])
    return values.view(rows, cols)


def dense(x) -> torch.Tensor:
    """fp64 of an operand."""
    return int4_values(x) if isinstance(x, Int4Matrix) else x.double()


def reference_update(work: MatrixWork) -> torch.Tensor:
    """u of a MatrixWork in fp64."""
    numbers = work.numbers
    if work.left is None:
        u = work.scale * work.grad.double()
        if work.row_factor is not None:
            u = u * work.row_factor.double()[:, None]
        if work.col_factor is not None:
            u = u * work.col_factor.double()[None, :]
        return u
    u = work.scale * (dense(work.left) @ dense(work.right) + 0.0)  # sums begin with +0
    if work.residual is None:
        return u
    e = work.grad.double() - dense(work.grad_left) @ dense(work.grad_right)
    if work.residual == "sign":
        return u + work.residual_scale * numbers.grad_sign * e.sign()
    mul = numbers.grad_sign
    if work.grad_scale is not None:
        mul = mul / work.grad_scale.double()
    if work.clip is not None:
        mul = mul * work.clip.double()
    return u + work.residual_scale * mul * e


def reference_apply_matrix(work: MatrixWork) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(fp64 weights after the step, the parameter and the companion that keep them). Leaves `work` as it is.

    Both are exact where fp32 holds the weights exactly.
    """
    n, shape, dtype = work.param.numel(), work.param.shape, work.param.dtype
    precision = work.precision.for_dtype(dtype)
    companion = None if work.companion is None else work.companion.reshape(-1)
    old = precision.load(work.param.reshape(-1), companion, torch.float64).view(shape)
    if work.found_inf is not None and float(work.found_inf) != 0:
        return old, work.param.clone(), None if companion is None else work.companion.clone()
    new = old - (work.numbers.lr * reference_update(work) + work.numbers.decay * old)
    random16 = philox16(work.numbers.seed, work.numbers.step, work.tensor_id, n) if precision.random else None
    stored, kept = precision.store(new.float().view(-1), dtype, random16)
    return new, stored.view(shape), None if kept is None else kept.view(shape)


def scalar_row(numbers: RowNumbers) -> torch.Tensor:
    """fp32 [SCALAR_STRIDE], the second row of a table of two."""
    buffer = bytearray(2 * 4 * abi.SCALAR_STRIDE)
    head = (numbers.lr, numbers.decay, numbers.l2, numbers.grad_sign)
    abi.pack_scalar_row(buffer, 1, head, numbers.seed, numbers.step, ())
    return torch.frombuffer(buffer, dtype=torch.float32).view(2, abi.SCALAR_STRIDE)[1]


def pack_int4(rows: int, cols: int, gen: torch.Generator, group: int = 256, step: float | None = None) -> Int4Matrix:
    """Random codes; scales are powers of two (step: about that size instead)."""
    n = rows * cols
    groups = -(-n // group)
    scale = 2.0 ** -torch.randint(0, 3, (groups,), generator=gen).float()
    if step is not None:
        scale = step * (0.5 + torch.rand(groups, generator=gen))
    zero = torch.randint(6, 10, (groups,), generator=gen).to(torch.uint8)
    codes = torch.randint(0, 256, ((n + 1) // 2,), generator=gen).to(torch.uint8)
    return Int4Matrix(guarded(codes), guarded(scale), guarded(zero), (rows, cols), group)


def make_matrix_problem(
    shape=(40, 72),
    rank: int = 20,
    *,
    source: str = "product",
    param_dtype=torch.bfloat16,
    operand_dtype=torch.bfloat16,
    grad_dtype=None,
    precision="nearest",
    exact: bool = True,
    shared: str | None = "left",
    grad_rank: int | None = None,
    packed: str | None = None,
    group: int = 256,
    offset: int = 0,
    found_inf: float | None = None,
    grad_scale: float | None = None,
    clip: float | None = None,
    maximize: bool = False,
    factors: str = "both",
    seed: int = 0,
    step: int = 5,
    tensor_id: int = (1 << 31) - 3,
) -> MatrixProblem:
    """source: one of SOURCES. exact: integers and powers of two, so that there is one right answer in fp32.

    shared: the operand both products have, "left", "right" or None; it is the packed one if `packed` says so. offset:
    elements by which p, its companion and the gradient are misaligned.
    """
    gen = torch.Generator().manual_seed(seed)
    rows, cols = shape

    def values(*size, top: int = 3) -> torch.Tensor:
        if exact:
            return torch.randint(-top, top + 1, size, generator=gen).float()
        return torch.randn(*size, generator=gen)

    buffers = []

    def buffer(x: torch.Tensor, dtype=None, shift: int = 0) -> torch.Tensor:
        view = guarded(x.reshape(-1).to(dtype or x.dtype), shift)
        buffers.append(view)
        return view.view(x.shape)

    keeps = get_precision(precision).for_dtype(param_dtype)
    # multiples of 2^-10 that need a companion where there is one, otherwise of 2^-5: within 8 bits
    w = torch.randint(-2048, 2049, (rows * cols,), generator=gen).float() / 1024
    w = w if exact else torch.randn(rows * cols, generator=gen)
    p, companion = (w if keeps.companion else (w * 32).round() / 32).to(param_dtype), None
    if keeps.companion:
        p, companion = keeps.store(
            w, param_dtype, torch.zeros(rows * cols, dtype=torch.int64) if keeps.random else None
        )
        companion = buffer(companion.view(shape), shift=offset)
    p = buffer(p.view(shape), shift=offset)
    grad = left = right = grad_left = grad_right = row_factor = col_factor = None
    if source == "scaled":
        row_factor = 2.0 ** torch.randint(-2, 3, (rows,), generator=gen).float() if exact else values(rows)
        col_factor = values(cols)
        row_factor = buffer(row_factor) if factors in ("both", "row") else None
        col_factor = buffer(col_factor) if factors in ("both", "col") else None
    else:

        def operand(size, side):
            if packed == side:
                return pack_int4(*size, gen, group, None if exact else 0.1)
            return buffer(values(*size), operand_dtype)

        left, right = operand((rows, rank), "left"), operand((rank, cols), "right")
        if source != "product":
            other = rank if shared else grad_rank or rank
            grad_left = left if shared == "left" else buffer(values(rows, other), operand_dtype)
            grad_right = right if shared == "right" else buffer(values(other, cols), operand_dtype)
    if source != "product":
        grad = values(rows, cols, top=9)
        if source in ("sign", "gradient"):  # near the projected gradient, so that some residuals are 0
            close = (dense(grad_left) @ dense(grad_right)).float()
            grad = (close + values(rows, cols, top=1)).to(torch.float32)
            grad = grad if (grad == grad.to(grad_dtype or operand_dtype).float()).all() else values(rows, cols, top=9)
        grad = buffer(grad, grad_dtype or operand_dtype, offset)
    numbers = RowNumbers(LR, DECAY, 0.0, -1.0 if maximize else 1.0, SEED, step, ())
    work = MatrixWork(
        p, companion, keeps, left, right, scalar_row(numbers), numbers, tensor_id, 0.25, grad, row_factor, col_factor,
        source if source in ("sign", "gradient") else None, 0.5, grad_left, grad_right,
        grad_scale=None if grad_scale is None else torch.tensor([grad_scale]),
        clip=None if clip is None else torch.tensor([clip]),
        found_inf=None if found_inf is None else torch.tensor([found_inf]),
    )  # fmt: skip
    flat = None if companion is None else companion.reshape(-1)
    return MatrixProblem(work, buffers, keeps.load(p.reshape(-1), flat, torch.float64).view(shape))


def assert_guards(problem: MatrixProblem) -> None:
    for view in problem.guarded:
        assert guards_untouched(view), "memory next to a tensor was written"


def assert_exact_step(problem: MatrixProblem, backend) -> None:
    """The step of an exact problem, bit for bit, and nothing beside it."""
    weights, param, companion = reference_apply_matrix(problem.work)
    assert torch.equal(weights.float().double(), weights), "the problem is not exact in fp32"
    before = problem.snapshot()
    assert backend.apply_matrix(problem.work) is True
    assert_same_bits(problem.work.param, param)
    if companion is not None:
        assert_same_bits(problem.work.companion, companion)
    assert_guards(problem)
    frozen = problem.work.found_inf is not None and float(problem.work.found_inf) != 0
    unchanged = all(torch.equal(a, b) for a, b in zip(before, problem.snapshot(), strict=True))
    assert unchanged == frozen, "nothing moved" if unchanged else "a skipped step wrote"


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    as_int = {1: torch.int8, 2: torch.int16, 4: torch.int32}[want.element_size()]
    differ = got.contiguous().view(as_int) != want.contiguous().view(as_int)
    where = differ.nonzero()[:3].tolist()
    assert not differ.any(), f"{int(differ.sum())} of {got.numel()} elements differ, the first at {where}"


def assert_close_step(problem: MatrixProblem, backend, rtol: float = 2e-6) -> None:
    """The step of a problem of real numbers: within rounding of the weights, and of the sums that make u."""
    work = problem.work
    precision = work.precision.for_dtype(work.param.dtype)
    weights, _, _ = reference_apply_matrix(work)
    sums = 1.0
    if work.left is not None:
        sums = dense(work.left).abs() @ dense(work.right).abs()
        if work.residual:
            sums = sums + dense(work.grad_left).abs() @ dense(work.grad_right).abs()
    assert backend.apply_matrix(work) is True
    flat = None if work.companion is None else work.companion.reshape(-1)
    got = precision.load(work.param.reshape(-1), flat, torch.float64).view(work.param.shape)
    step = {"nearest": 0.5, "stochastic": 1.0}.get(precision.name)
    eps = torch.finfo(work.param.dtype).eps * step if step else 2.0**-15
    eps = 2.0**-22 if precision.name in ("master", "split32") or work.param.dtype == torch.float32 else eps
    bound = eps * 1.01 * weights.abs() + 2.0**-24 * problem.weights.abs() + rtol * work.numbers.lr * sums
    error = (got - weights).abs()
    if work.residual == "sign":  # a residual within rounding of 0 has no sign of its own
        e = (work.grad.double() - dense(work.grad_left) @ dense(work.grad_right)).abs()
        error = error[e > rtol * sums]
        bound = bound.expand(e.shape)[e > rtol * sums]
        assert len(error) > 0.99 * e.numel()
    assert (error <= bound).all(), f"error {error.max():.3g}, {float((error / bound).max()):.3g} times its bound"
    assert_guards(problem)
