"""The update of a projected matrix in pure torch, a few rows at a time, so that no full-size update exists (MatrixWork)."""

from __future__ import annotations

import torch

from fusedopt.backends.base import Int4Matrix, MatrixWork
from fusedopt.precision import philox16

BLOCK = 1 << 18  # elements of a block of rows: about 1 MB of fp32


def decode_int4(packed: Int4Matrix, dtype: torch.dtype) -> torch.Tensor:
    """A packed projector as [rows, cols]."""
    n = packed.shape[0] * packed.shape[1]
    codes = torch.stack([packed.codes >> 4, packed.codes & 15], 1).view(-1)[:n].to(dtype)
    group = torch.arange(n, device=codes.device) // packed.group
    return ((codes - packed.zero.to(dtype)[group]) * packed.scale.to(dtype)[group]).view(packed.shape)


def _factor(x, dtype: torch.dtype) -> torch.Tensor | None:
    if isinstance(x, Int4Matrix):
        return decode_int4(x, dtype)
    return None if x is None else x.to(dtype)


def _number(x, dtype: torch.dtype, device):
    return x.to(device=device, dtype=dtype).view(()) if isinstance(x, torch.Tensor) else x


class Update:
    """u of a MatrixWork, some rows at a time."""

    def __init__(self, work: MatrixWork, dtype: torch.dtype):
        self.work, self.dtype = work, dtype
        self.left, self.right = _factor(work.left, dtype), _factor(work.right, dtype)
        self.grad_left, self.grad_right = _factor(work.grad_left, dtype), _factor(work.grad_right, dtype)
        mul = self.sign = _number(work.numbers.grad_sign, dtype, work.param.device)
        if work.grad_scale is not None:
            mul = mul / work.grad_scale.to(dtype).view(())
        self.mul = mul if work.clip is None else mul * work.clip.to(dtype).view(())

    def rows(self, part: slice) -> torch.Tensor:
        work, dtype = self.work, self.dtype
        if self.left is None:
            u = work.grad[part].to(dtype)
            if work.row_factor is not None:
                u = u * work.row_factor[part, None].to(dtype)
            if work.col_factor is not None:
                u = u * work.col_factor.to(dtype)
            return u * work.scale
        u = work.scale * (self.left[part] @ self.right)
        if work.residual is not None:
            rest = work.grad[part].to(dtype) - self.grad_left[part] @ self.grad_right
            weight = self.sign * rest.sign() if work.residual == "sign" else self.mul * rest
            u = u + work.residual_scale * weight
        return u


def apply_matrix(work: MatrixWork, dtype: torch.dtype | None = None) -> bool:
    """One update as MatrixWork says, in fp64 where a tensor is fp64, else in fp32. Always True: it takes every work."""
    if work.found_inf is not None and bool(work.found_inf):
        return True
    p, device = work.param, work.param.device
    tensors = [t for t in (p, work.left, work.right, work.grad) if isinstance(t, torch.Tensor)]
    if dtype is None:
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    lr, decay = (_number(x, dtype, device) for x in (work.numbers.lr, work.numbers.decay))
    update = Update(work, dtype)
    rows, cols = p.shape
    step = max(8, BLOCK // cols // 8 * 8)  # whole octets of random bits
    for first in range(0, rows, step):
        part = slice(first, min(rows, first + step))
        companion = None if work.companion is None else work.companion[part]
        _store(work, p[part], companion, update.rows(part), lr, decay, first * cols, dtype)
    return True


def _store(work: MatrixWork, p, companion, u, lr, decay, element: int, dtype) -> None:
    """The epilogue of some rows. element: the index of their first element in the parameter."""
    precision = work.precision
    x = precision.load(p.reshape(-1), None if companion is None else companion.reshape(-1), dtype)
    x = x - (lr * u.reshape(-1) + decay * x)
    if p.dtype in precision.dtypes and precision.name != "nearest":
        row = work.numbers
        bits = None
        if precision.random:
            bits = philox16(row.seed, row.step, work.tensor_id, p.numel(), p.device, first=element)
        x, kept = precision.store(x.float(), p.dtype, bits)
        if companion is not None:
            companion.copy_(kept.view(companion.shape))
    p.copy_(x.view(p.shape))
