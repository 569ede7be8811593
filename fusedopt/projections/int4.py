"""Q-GaLore's affine group quantiser: projectors in packed 4-bit codes, weights in 8-bit codes rounded stochastically.

Groups of `group` consecutive elements of the matrix in memory order, the last one perhaps shorter:
    s = max(max - min, 1e-5) / (2^B - 1),  z = clamp(-round(min / s), 0, 2^B - 1),
    code = clamp(round(x / s) + z, 0, 2^B - 1),  value = s (code - z).
z is clamped: a group whose values all share a sign is quantised as if it reached to zero on a scale of max - min only, and
saturates where it does not. An orthonormal basis has both signs in nearly every group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedopt.backends.base import Int4Matrix


class Int8Matrix(NamedTuple):
    """As Int4Matrix, with one code per byte: codes uint8 [rows * cols]."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    shape: tuple[int, int]
    group: int = 256


@torch.no_grad()
def quantize_affine(
    x: torch.Tensor, bits: int = 4, group: int = 256, random16: torch.Tensor | None = None
) -> Int4Matrix | Int8Matrix:
    """A matrix [rows, cols] of any floating dtype in 4 or 8 bits. random16: int64 [rows * cols], 16 random bits per element
    (`philox16`): codes are rounded up in proportion to the distance; None rounds to nearest, ties to even.

    A group with a NaN or Inf has a scale that is none either, so that its values are NaN.
    """
    if bits not in (4, 8):
        raise ValueError(f"quantize_affine: bits must be 4 or 8, not {bits!r}")
    if x.dim() != 2 or not x.dtype.is_floating_point:
        raise TypeError(f"quantize_affine: {x.dtype} {tuple(x.shape)}; it takes a floating-point matrix")
    if group < 2 or group % 2:
        raise ValueError(f"quantize_affine: group {group} must be even and positive")
    top, n = 2**bits - 1, x.numel()
    if random16 is not None and random16.numel() != n:
        raise ValueError(f"quantize_affine: {random16.numel()} random words for {n} elements")
    low, high = _limits(x.reshape(-1).float(), group)
    scale = (high - low).clamp(min=1e-5) / top
    zero = (-torch.round(low / scale)).nan_to_num(0.0).clamp(0, top)
    y = _grouped(x.reshape(-1).float(), group) / scale[:, None]
    if random16 is None:
        y = torch.round(y)
    else:
        whole = y.floor()
        y = whole + ((y - whole) * 65536 > _grouped(random16.view(-1), group))
    codes = (y + zero[:, None]).nan_to_num(0.0).clamp_(0, top).to(torch.uint8).view(-1)
    if bits == 8:
        return Int8Matrix(codes[:n].clone(), scale, zero.to(torch.uint8), tuple(x.shape), group)
    packed = (codes[0::2] << 4 | codes[1::2])[: (n + 1) // 2].clone()
    if n % 2:
        packed[-1] &= 0xF0
    return Int4Matrix(packed, scale, zero.to(torch.uint8), tuple(x.shape), group)


@torch.no_grad()
def dequantize_affine(q: Int4Matrix | Int8Matrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix [rows, cols] that codes stand for."""
    rows, cols = q.shape
    codes = q.codes
    if isinstance(q, Int4Matrix):
        codes = torch.stack([codes >> 4, codes & 15], 1).view(-1)
    codes = _grouped(codes[: rows * cols], q.group).to(torch.float32)
    values = (codes - q.zero.to(torch.float32)[:, None]) * q.scale[:, None]
    return values.view(-1)[: rows * cols].view(rows, cols).to(dtype)


def _grouped(flat: torch.Tensor, group: int) -> torch.Tensor:
    """[groups, group], the last group filled up with zeros."""
    short = -len(flat) % group
    return torch.nn.functional.pad(flat, (0, short)).view(-1, group) if short else flat.view(-1, group)


def _limits(flat: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest value of each group, [groups] each."""
    whole = len(flat) // group * group
    parts = [flat[:whole].view(-1, group)] + ([flat[None, whole:]] if whole < len(flat) else [])
    return torch.cat([p.amin(1) for p in parts]), torch.cat([p.amax(1) for p in parts])
