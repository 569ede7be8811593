"""ParamPrecision: how an updated fp32 parameter is kept in 16 bits; the drivers match this pure-torch rounding bit for bit.

nearest      rounds to nearest even.
stochastic   rounds up or down in proportion to the distance: right on average, no memory.
kahan        a compensation of the parameter's dtype keeps what rounding cut off, itself rounded stochastically: rounded to
             nearest it would be 3 % wrong about a decay of 1e-5 a step.
split24      bf16 and 8 more bits of the fp32 weight, rounded stochastically to 24 bits.
split32      bf16 and the other 16 bits: the fp32 weight exactly. Its bf16 half rounds ties away from zero, so that the
             signed low half says on which side of it the weight lies.
master       a separate fp32 weight, of which the parameter is the rounded copy.

The four last ones keep a tensor beside the parameter, its companion. Random bits come from Philox4x32-10 (Salmon et al.,
SC 2011) with key = seed and counter = (element // 8, tensor id, step): independent of backend, grid, chunk and thread count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

NOISE_STREAM = 0xFD  # of the noise that a rule takes: no parameter or state draws from it
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ParamPrecision:
    """A way to keep a 16-bit parameter.

    id: Precision in csrc/fusedopt.h. companion: the name of its tensor in a parameter's state, or None. storage: the
    companion's dtype, None for the parameter's. dtypes: parameters it can keep; others are refused. random: draws random bits.
    """

    name: str
    id: int
    companion: str | None = None
    storage: torch.dtype | None = None
    dtypes: tuple[torch.dtype, ...] = HALF
    random: bool = False

    def companion_dtype(self, param_dtype: torch.dtype) -> torch.dtype:
        return self.storage or param_dtype

    def traffic(self, param_dtype: torch.dtype) -> tuple[int, int]:
        """Bytes (read, written) of an element's weight in a step. A master weight is read in place of its rounded copy."""
        companion = self.companion_dtype(param_dtype).itemsize if self.companion else 0
        read = companion if self.name == "master" else param_dtype.itemsize + companion
        return read, param_dtype.itemsize + companion

    def for_dtype(self, dtype: torch.dtype) -> ParamPrecision:
        """Itself, or nearest for fp32 and fp64 parameters, which need no help. Raises ValueError for a dtype it cannot keep."""
        if dtype not in HALF:
            return NEAREST
        if dtype not in self.dtypes:
            kept = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            raise ValueError(
                f"param_precision {self.name!r} keeps {kept} parameters, not {dtype}; use 'master' or 'kahan'"
            )
        return self

    def load(self, p: torch.Tensor, companion: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The weights a flat parameter and its companion stand for."""
        if self.name == "kahan":
            return p.to(dtype) + companion.to(dtype)
        if self.name in ("split24", "split32"):
            return _join(p, companion).to(dtype)
        return companion.to(dtype) if self.name == "master" else p.to(dtype)

    def store(self, x: torch.Tensor, dtype: torch.dtype, random16: torch.Tensor | None = None):
        """(parameter, companion | None) of flat fp32 weights. random16: see `philox16`; None rounds to nearest."""
        if self.name == "split24":
            return _split24(x, random16)
        if self.name == "split32":
            return _split32(x)
        if self.name == "kahan":
            p = x.to(dtype)
            rest = torch.where(torch.isfinite(p), x - p.to(x.dtype), torch.zeros_like(x))
            return p, rest.to(dtype) if random16 is None else round_stochastic(rest, dtype, random16)
        if self.name == "master":
            return x.to(dtype), x
        if self.name == "stochastic" and random16 is not None:
            return round_stochastic(x, dtype, random16), None
        return x.to(dtype), None

    def attach(self, p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The companion that makes a flat parameter stand for the fp32 weights x, as far as it can; p stays as it is."""
        if self.name == "master":
            return x.clone()
        if self.name == "kahan":
            return (x - p.to(x.dtype)).to(p.dtype)
        bits = 8 if self.name == "split24" else 16
        low = (_bits(x) - (p.contiguous().view(torch.int16).long() << 16 & _MASK)).float() / 2 ** (16 - bits)
        return low.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(self.storage)


NEAREST = ParamPrecision("nearest", 0)
_BF16 = (torch.bfloat16,)
_precisions = {
    p.name: p
    for p in (
        NEAREST,
        ParamPrecision("stochastic", 1, random=True),
        ParamPrecision("kahan", 2, "kahan_comp", random=True),
        ParamPrecision("split24", 3, "low_bits", torch.int8, _BF16, random=True),
        ParamPrecision("split32", 4, "low_bits", torch.int16, _BF16),
        ParamPrecision("master", 5, "master_param", torch.float32),
    )
}
COMPANIONS = tuple(dict.fromkeys(p.companion for p in _precisions.values() if p.companion))


def companion_dtypes(companion: str) -> tuple[torch.dtype, ...]:
    """The dtypes that a companion of a name can have."""
    kept = [p for p in _precisions.values() if p.companion == companion]
    return tuple(dict.fromkeys(d for p in kept for d in ((p.storage,) if p.storage else p.dtypes)))


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


def philox_words(seed: int, step, tensor_id: int, octet: torch.Tensor, stream: int) -> tuple[torch.Tensor, ...]:
    """The four 32-bit words of each counter (octet, stream in its 8 highest bits, tensor id, step), int64 as `octet` is."""
    if isinstance(step, torch.Tensor):
        step = step.long()
    c0, c1 = octet & _MASK, octet >> 32 | stream << 24
    c2, c3 = torch.full_like(octet, tensor_id & _MASK), torch.zeros_like(octet) + step
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        hi0, lo0 = _multiply(0xD2511F53, c0)
        hi1, lo1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def philox16(seed: int, step, tensor_id: int, numel: int, device="cpu", stream: int = 0, first: int = 0):
    """int64 [numel]: the 16 random bits of each element. step: int or integer tensor.

    stream: 0 for the parameter, 1 + i for state i, in the 8 highest bits of the octet's number. first: index of the first
    element, a multiple of 8.
    """
    octet = torch.arange(first // 8, first // 8 + (numel + 7) // 8, dtype=torch.int64, device=device)
    words = torch.stack(philox_words(seed, step, tensor_id, octet, stream), 1)
    return torch.stack([words & 0xFFFF, words >> 16], 2).view(-1)[:numel]


def gaussian16(seed: int, step, tensor_id: int, numel: int, device="cpu", first: int = 0) -> torch.Tensor:
    """fp64 [numel]: the noise N(0, 1) of each element for a rule that takes it (csrc/gauss.h). first: a multiple of 8."""
    drawn = (
        philox16(seed, step, tensor_id, numel + numel % 2, device, NOISE_STREAM, first)
        .double()
        .add_(0.5)
        .mul_(2.0**-16)
    )
    even, odd = drawn.view(-1, 2).unbind(1)
    r, turn = (-2 * torch.log(even + 2.0**-24)).sqrt_(), odd * (2 * math.pi)
    return torch.stack([r * turn.cos(), r * turn.sin()], 1).view(-1)[:numel]


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


def _bits(x: torch.Tensor) -> torch.Tensor:
    """int64: the bits of fp32 values, of a NaN only what fits in bf16."""
    bits = x.float().contiguous().view(torch.int32).long() & _MASK
    return torch.where(x.isnan(), (bits & 0xFFFF0000) | 0x400000, bits)


def _signed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int64 as an integer dtype of fewer bits, by its lowest bits."""
    half = 1 << (torch.iinfo(dtype).bits - 1)
    return ((x + half) % (2 * half) - half).to(dtype)


def _split24(x: torch.Tensor, random16: torch.Tensor | None):
    bits = _bits(x) + (128 if random16 is None else random16 >> 8) >> 8
    return _signed((bits + 0x80) >> 8, torch.int16).view(torch.bfloat16), _signed(bits, torch.int8)


def _split32(x: torch.Tensor):
    bits = _bits(x)
    return _signed((bits + 0x8000) >> 16, torch.int16).view(torch.bfloat16), _signed(bits, torch.int16)


def _join(p: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """fp32 of a bf16 half and signed low bits. A zero that was put into p later keeps no negative low bits: they would wrap."""
    high, low = p.contiguous().view(torch.int16).long() & 0xFFFF, low.long() << (8 if low.dtype == torch.int8 else 0)
    low = torch.where(high & 0x7FFF == 0, low.clamp(min=0), low)
    return _signed((high << 16) + low, torch.int32).view(torch.float32)
