"""The matrix products of a projected step: R = project(G), and the parameter update from a low-rank product.

project goes to torch.mm unless the backend has a faster kernel. apply takes torch's addmm_ where a single rounding of plain
fp32 is all that is asked for and the backend has no kernel of its own, and Backend.apply_matrix elsewhere.
"""

from __future__ import annotations

import torch

from fusedopt.backends import select
from fusedopt.backends.base import Int4Matrix, MatrixWork


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


def project(backend: str, grad: torch.Tensor, basis: torch.Tensor, side: str, out: torch.Tensor) -> None:
    """out = basis^T grad (left; basis [rows, r]) or grad basis^T (right; basis [r, cols])."""
    kernel = getattr(select.get_backend(backend), "project", None)
    if kernel is not None and kernel(grad, basis, side, out):
        return
    if grad.dtype == out.dtype:
        product(grad, basis.to(grad.dtype), side, out)
        return
    rows, cols = grad.shape
    basis = basis.to(out.dtype)
    block = max(1, min(rows, (1 << 18) // cols))
    if side == "left":
        out.zero_()
    for first in range(0, rows, block):
        part = grad[first : first + block].to(out.dtype)
        if side == "left":
            out.addmm_(basis[first : first + block].t(), part)
        else:
            torch.mm(part, basis.t(), out=out[first : first + block])


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


def apply(backend: str, work: MatrixWork) -> None:
    """Updates a parameter. See MatrixWork."""
    kernel = getattr(select.get_backend(backend), "apply_matrix", None)
    if kernel is not None and kernel(work):
        return
    if _plain(work):
        alpha = -work.numbers.lr * work.scale
        work.param.addmm_(work.left, work.right, beta=1 - work.numbers.decay, alpha=alpha)
        return
    select.get_backend("reference").apply_matrix(work)
