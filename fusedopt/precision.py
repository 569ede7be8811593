"""ParamPrecision: how an updated fp32 parameter is stored in 16 bits; the drivers match this pure-torch rounding bit for bit.

Stochastic rounding draws 16 bits per element from Philox4x32-10 (Salmon et al., SC 2011) with key = seed and
counter = (element // 8, tensor id, step): independent of backend, grid, chunk and thread count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ParamPrecision:
    name: str
    id: int


_precisions = {p.name: p for p in (ParamPrecision("nearest", 0), ParamPrecision("stochastic", 1))}


def get_precision(name: str | ParamPrecision) -> ParamPrecision:
    if isinstance(name, ParamPrecision):
        return name
    if name not in _precisions:
        raise ValueError(f"unknown param_precision {name!r}; known: {', '.join(_precisions)}")
    return _precisions[name]


def list_precisions() -> list[str]:
    """Names that `param_precision=` takes."""
    return list(_precisions)


_MASK = 0xFFFFFFFF


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * b for 32-bit values held in int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)  # each below 2^48
    total = high + (low >> 16)
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)


def philox16(seed: int, step, tensor_id: int, numel: int, device="cpu") -> torch.Tensor:
    """int64 [numel]: the 16 random bits of each element. step: int or integer tensor."""
    if isinstance(step, torch.Tensor):
        step = step.long()
    octet = torch.arange((numel + 7) // 8, dtype=torch.int64, device=device)
    c0, c1 = octet & _MASK, octet >> 32
    c2, c3 = torch.full_like(octet, tensor_id & _MASK), torch.zeros_like(octet) + step
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        hi0, lo0 = _multiply(0xD2511F53, c0)
        hi1, lo1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    words = torch.stack([c0, c1, c2, c3], 1)
    return torch.stack([words & 0xFFFF, words >> 16], 2).view(-1)[:numel]


def round_stochastic(x: torch.Tensor, dtype: torch.dtype, random16: torch.Tensor) -> torch.Tensor:
    """Rounds flat fp32 x to bf16 or fp16: away from zero with probability (dropped part) / (unit in the last place)."""
    bits = x.contiguous().view(torch.int32).long() & _MASK
    sign, magnitude = bits & 0x80000000, bits & 0x7FFFFFFF
    finite = magnitude < 0x7F800000
    if dtype == torch.bfloat16:
        up = ((magnitude + random16) & 0x7FFF0000) | sign
        up = torch.where(up >= 2**31, up - 2**32, up).to(torch.int32).view(torch.float32)
        return torch.where(finite, up, x).to(dtype)
    if dtype != torch.float16:
        return x.to(dtype)
    normal = (((magnitude + (random16 >> 3)) >> 13) << 13).to(torch.int32).view(torch.float32)
    scaled = x.abs() * 2.0**24  # fp16 subnormals are multiples of 2^-24
    whole = scaled.floor()
    small = (whole + ((scaled - whole) * 65536 > random16)) * 2.0**-24
    out = torch.where(magnitude < (113 << 23), small, normal)
    out = torch.where(out > 65504, torch.full_like(out, float("inf")), out)
    return torch.where(finite, torch.where(sign > 0, -out, out), x).to(dtype)
