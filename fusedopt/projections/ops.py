"""The matrix products and sums of projected steps: R = project(G), the parameter update from a low-rank product, squares.

Each goes to the backend's own kernel (MatrixKernels) where it takes the work, and to torch's operations elsewhere. On a GPU
plain products are left to torch, whose library is faster than our kernel for a single rounding to nearest.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedopt.backends import select
from fusedopt.backends.base import Int4Matrix, MatrixWork
from fusedopt.backends.reference_matrix import Update, decode_int4
from fusedopt.memory import flat
from fusedopt.precision import ParamPrecision
from fusedopt.projections.subspace import gaussian_projector
from fusedopt.weights import GROUP, Int8Weight, row_blocks, update_rows


def projected_dtype(grad_dtype: torch.dtype, basis_dtype: torch.dtype) -> torch.dtype:
    """fp16 gradients are projected in fp32: sums of loss-scaled ones would overflow."""
    if grad_dtype == torch.float16:
        return torch.float32
    return torch.float64 if torch.float64 in (grad_dtype, basis_dtype) else grad_dtype


def product(grad: torch.Tensor, basis: torch.Tensor, side: str, out: torch.Tensor) -> None:
    if side == "left":
        torch.mm(basis.t(), grad, out=out)
    else:
        torch.mm(grad, basis.t(), out=out)


def project(backend: str, grad: torch.Tensor, basis: torch.Tensor | Int4Matrix, side: str, out: torch.Tensor) -> None:
    """out = basis^T grad (left; basis [rows, r]) or grad basis^T (right; basis [r, cols])."""
    if isinstance(basis, Int4Matrix):
        if select.get_backend(backend).project_packed(grad, basis, side, out):
            return
        basis = decode_int4(basis, out.dtype)
    if select.get_backend(backend).project(grad, basis, side, out):
        return
    if grad.dtype == out.dtype:
        product(grad, basis.to(grad.dtype), side, out)
        return
    rows, cols = grad.shape
    basis = basis.to(out.dtype)
    block = max(1, min(rows, (1 << (22 if grad.is_cuda else 18)) // cols))
    if side == "left":
        out.zero_()
    for first in range(0, rows, block):
        part = grad[first : first + block].to(out.dtype)
        if side == "left":
            out.addmm_(basis[first : first + block].t(), part)
        else:
            torch.mm(part, basis.t(), out=out[first : first + block])


def project_seeded(
    backend: str, grad: torch.Tensor, rank: int, side: str, out: torch.Tensor, squares: torch.Tensor | None,
    *, seed: int, tensor_id: int, step: int, whole: tuple[int, int] | None = None,
    spans: list[tuple[int, int]] | None = None,
) -> None:  # fmt: skip
    """`project` with the random basis of a seed (subspace.gaussian_projector), rounded to grad's dtype where that has 16 bits.

    squares: what the sums of squares of grad's columns (left, [cols]) or rows (right, [rows]) go to, or None.
    whole: the shape of the matrix that grad is a part of; spans: (first, end) of the runs of its rows (left) or columns (right)
    that grad has, None for all of them.
    """
    kernel = select.get_backend(backend).project_seeded
    if spans is None and kernel(grad, seed, tensor_id, step, rank, side, out, squares):
        return
    dtype = grad.dtype if grad.dtype.itemsize == 2 else out.dtype
    keys = {"seed": seed, "tensor_id": tensor_id, "step": step, "device": grad.device, "dtype": dtype}
    shape = grad.shape if whole is None else whole
    runs = [gaussian_projector(shape, rank, side, span=span, **keys) for span in spans or (None,)]
    basis = runs[0] if len(runs) == 1 else torch.cat(runs, 0 if side == "left" else 1)
    project(backend, grad, basis, side, out)
    if squares is not None:
        row_col_sums(backend, grad, *((None, squares) if side == "left" else (squares, None)))


def _row_blocks(grad: torch.Tensor) -> list[slice]:
    rows, cols = grad.shape
    size = max(1, (1 << 18) // max(cols, 1))
    return [slice(first, min(rows, first + size)) for first in range(0, rows, size)]


def row_col_sums(backend: str, grad: torch.Tensor, row_out: torch.Tensor | None, col_out: torch.Tensor | None) -> None:
    """Sums of squares of a gradient [rows, cols]: of each row into row_out [rows], of each column into col_out [cols]."""
    dtype = (row_out if row_out is not None else col_out).dtype
    if dtype == torch.float32 and select.get_backend(backend).row_col_sums(grad, row_out, col_out, None):
        return
    if col_out is not None:
        col_out.zero_()
    for rows in _row_blocks(grad):
        squares = grad[rows].to(dtype, copy=True).square_()
        if row_out is not None:
            torch.sum(squares, 1, out=row_out[rows])
        if col_out is not None:
            col_out += squares.sum(0)


def weighted_square_sum(backend: str, grad, row_weight: torch.Tensor, col_weight: torch.Tensor) -> torch.Tensor:
    """The sum of grad[i, j]^2 row_weight[i] col_weight[j], a 0-dim tensor of the weights' dtype."""
    out = torch.zeros(1, dtype=row_weight.dtype, device=grad.device)
    if out.dtype == torch.float32 and select.get_backend(backend).weighted_square_sum(
        grad, row_weight, col_weight, out
    ):
        return out.view(())
    for rows in _row_blocks(grad):
        squares = grad[rows].to(out.dtype, copy=True).square_()
        out += squares.mv(col_weight).dot(row_weight[rows])
    return out.view(())


def rms(p: torch.Tensor, companion: torch.Tensor | None, precision: ParamPrecision, dtype: torch.dtype) -> torch.Tensor:
    """The root mean square of the weights that a dense parameter and its companion stand for, 0-dim. Nothing is copied whole."""
    x = flat(p)
    if p.is_cuda and companion is None:  # a GPU converts 16-bit values as it sums
        return torch.linalg.vector_norm(x, dtype=dtype) / x.numel() ** 0.5
    if companion is not None:
        size, low = 1 << (22 if p.is_cuda else 18), flat(companion)
        ranges = (slice(first, first + size) for first in range(0, x.numel(), size))
        parts = (precision.load(x[r], low[r], dtype) for r in ranges)
        return (sum(torch.dot(part, part) for part in parts) / x.numel()).sqrt()
    parts = (x[first : first + (1 << 18)].to(dtype) for first in range(0, x.numel(), 1 << 18))
    return (sum(torch.dot(part, part) for part in parts) / x.numel()).sqrt()


def _plain(work: MatrixWork) -> bool:
    """Whether addmm_ rounds as asked: once, to nearest, with host numbers."""
    if work.left is None or work.residual is not None or work.found_inf is not None or work.precision.name != "nearest":
        return False
    if isinstance(work.left, Int4Matrix) or isinstance(work.right, Int4Matrix):
        return False
    p = work.param
    if not work.left.dtype == work.right.dtype == p.dtype:
        return False
    numbers = (work.numbers.lr, work.numbers.decay)
    return (p.dtype in (torch.float32, torch.float64) or p.is_cuda) and not any(map(torch.is_tensor, numbers))


def _unpacked(work: MatrixWork) -> MatrixWork:
    """The work with its projector decoded: on a CPU that is faster than decoding inside the product."""
    factors = {name: getattr(work, name) for name in ("left", "right", "grad_left", "grad_right")}
    packed = {id(x): x for x in factors.values() if isinstance(x, Int4Matrix)}
    if not packed:
        return work
    dtype = next(x.dtype for x in factors.values() if isinstance(x, torch.Tensor))
    decoded = {key: decode_int4(x, dtype) for key, x in packed.items()}
    return replace(work, **{name: decoded.get(id(x), x) for name, x in factors.items()})


def _apply_int8(backend: str, work: MatrixWork) -> None:
    """The update of an int8 weight, a few rows at a time: decoded, stepped and encoded again, rounded stochastically."""
    update = Update(work, torch.float32)
    for first, last in row_blocks(work.param):
        u = update.rows(slice(first, last))
        step_rows(backend, work.param, first, last, u, work.numbers, work.scalars, work.tensor_id, work.found_inf)


def step_rows(
    backend: str, weight: Int8Weight, first: int, last: int, u, numbers, scalars, tensor_id: int, found
) -> None:
    """Some rows of an int8 weight (whole groups) from their update u, fp32."""
    kernel = weight.device.type != "cpu" and weight.group == GROUP and select.get_backend("triton").reason() is None
    update_rows(
        weight, first, last, u, numbers, scalars, tensor_id, found_inf=found, triton=kernel and backend != "reference"
    )


def apply(backend: str, work: MatrixWork) -> None:
    """Updates a parameter. See MatrixWork."""
    if work.param.device.type == "cpu":
        work = _unpacked(work)
    if isinstance(work.param, Int8Weight):
        _apply_int8(backend, work)
        return
    if work.param.device.type == "cpu" and select.get_backend(backend).apply_matrix(work):
        return
    if _plain(work):
        alpha = -work.numbers.lr * work.scale
        work.param.addmm_(work.left, work.right, beta=1 - work.numbers.decay, alpha=alpha)
        return
    if not select.get_backend(backend).apply_matrix(work):
        select.get_backend("reference").apply_matrix(work)
