"""State formats: how an optimizer state is stored, with the pure-torch encoder and decoder that the drivers are tested against.

Every blockwise format keeps one fp32 number per block: the largest finite magnitude, `scale`. With y = x / scale:

int8   the dynamic map of Dettmers et al. (arXiv 2110.02861): the nearest of 256 values, built here from its definition as a
       sorted table and searched; the drivers use the closed form in csrc/formats/int8.h instead.
int8c  companded (FlashOptim, arXiv 2602.23349, with a scale for 256 elements instead of 32): signed
       q = round(127 * 2 y / (1 + |y|)), unsigned q = round(255 sqrt(y)).
fp8    signed: OCP e4m3, 448 at y = 1. unsigned: e5m3 without subnormals, code 255 at y = 1.
int4   two codes a byte, the even element in the high half (torchao's order). signed: the 4-bit dynamic map; unsigned:
       (code + 1) / 16 (Li et al., arXiv 2309.01507).

Signed serves first moments, unsigned second moments. A second moment that is not zero never decodes to zero, which keeps
m / sqrt(v) bounded; int4 has no zero at all in a block that holds anything else. A NaN or an infinity takes the code of the
block's largest value and leaves the scale alone: it spoils its own element only. What exceeds 2^126 counts as that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from fusedopt.abi import FORMAT_SIGNED
from fusedopt.precision import round_stochastic

TINY = torch.finfo(torch.float32).tiny  # what is smaller counts as zero: the drivers flush subnormals
LARGEST = 2.0**126  # what is larger saturates: the inverse of a larger scale would be subnormal


@cache
def dynamic_map(signed: bool, bits: int = 8, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The values of the dynamic map, sorted. Signed 8-bit: 0 at index 127, no -1. Unsigned: 0 at index 0.

    dtype: of the arithmetic too; with float32 the values round as those of bitsandbytes do, some an ulp off.
    """
    values = [0.0, 1.0]
    for decade in range(bits - 1):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=dtype)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - bits + 2)).tolist()
        values += middles
        if signed:
            values += [-x for x in middles]
    return torch.tensor(sorted(values), dtype=dtype)


def _blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    pad = -x.numel() % size
    return torch.nn.functional.pad(x, (0, pad)).view((x.numel() + pad) // size, size)


def _normed(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x as fp32 blocks, |x| / scale in [0, 1], scale). Non-finite elements have y = 1."""
    blocks = _blocks(x.to(torch.float32), size)
    magnitude = blocks.abs()
    magnitude = torch.where(magnitude < TINY, torch.zeros_like(magnitude), magnitude)  # NaN stays
    scale = torch.where(torch.isfinite(magnitude), magnitude, torch.zeros_like(magnitude)).amax(1)
    scale = scale.clamp(max=LARGEST)
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    y = magnitude * inverse[:, None]
    y = torch.where(y < 1, y, torch.ones_like(y))  # NaN too
    return blocks, y, scale


def _finish(codes: torch.Tensor, numel: int) -> torch.Tensor:
    return codes.to(torch.uint8).view(-1)[:numel]


def _scaled(values: torch.Tensor, scale: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    numel = values.numel()
    return (_blocks(values.to(dtype), size) * scale.to(dtype)[:, None]).view(-1)[:numel]


def _with_sign(magnitude: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    return torch.where(negative, -magnitude, magnitude)


def _encode_int8(x: torch.Tensor, signed: bool, block: int):
    blocks, y, scale = _normed(x, block)
    table = dynamic_map(signed).to(x.device)
    if signed:
        positive = torch.bucketize(y.double(), (table[127:-1] + table[128:]) / 2, right=True)
        codes = torch.where(torch.signbit(blocks), 127 - positive.clamp(max=127), 127 + positive)
        codes = torch.where(scale[:, None] > 0, codes, 127)
    else:
        codes = torch.bucketize(y.double(), (table[:-1] + table[1:]) / 2, right=True).clamp(min=1)
        codes = torch.where(_present(blocks, scale), codes, 0)
    return _finish(codes, x.numel()), scale


def _present(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Which second moments are not zero."""
    return ~(blocks.abs() < TINY) & (scale[:, None] > 0)


def _decode_int8(codes, scale, signed, dtype, block, numel):
    return _scaled(dynamic_map(signed).to(codes.device)[codes.long()], scale, block, dtype)


def _encode_int8c(x: torch.Tensor, signed: bool, block: int):
    blocks, y, scale = _normed(x, block)
    if signed:
        q = (127 * 2 * y / (1 + y) + 0.5).floor()
        codes = torch.where(torch.signbit(blocks), -q, q) % 256
        codes = torch.where(scale[:, None] > 0, codes, 0)
    else:
        q = (255 * y.sqrt() + 0.5).floor().clamp(min=1)
        codes = torch.where(_present(blocks, scale), q, 0)
    return _finish(codes, x.numel()), scale


def _decode_int8c(codes, scale, signed, dtype, block, numel):
    if signed:
        q = codes.view(torch.int8).double()
        return _scaled(q / (254 - q.abs()), scale, block, dtype)
    return _scaled((codes.double() / 255).square(), scale, block, dtype)


def _encode_fp8(x: torch.Tensor, signed: bool, block: int):
    blocks, y, scale = _normed(x, block)
    if signed:
        codes = _with_sign(y * 448, torch.signbit(blocks)).to(torch.float8_e4m3fn).view(torch.uint8)
        codes = torch.where((codes == 0x80) | (scale[:, None] == 0), torch.zeros_like(codes), codes)  # no -0
    else:
        z = y.double().clamp(min=2.0**-40) * 1.875  # beside an outlier y underflows where x is present
        mantissa, exponent = torch.frexp(z)  # mantissa in [1/2, 1), exponent <= 1
        codes = (8 * (2 * mantissa - 1)).round() + 8 * (exponent + 30)  # a mantissa that rounds up to 2 carries
        codes = torch.where(_present(blocks, scale), codes.clamp(1, 255), 0)
    return _finish(codes, x.numel()), scale


def _decode_fp8(codes, scale, signed, dtype, block, numel):
    if signed:
        return _scaled(codes.view(torch.float8_e4m3fn).double() / 448, scale, block, dtype)
    c = codes.long()
    values = torch.ldexp(1 + (c % 8).double() / 8, c // 8 - 31) / 1.875
    return _scaled(torch.where(c > 0, values, 0.0), scale, block, dtype)


def _encode_int4(x: torch.Tensor, signed: bool, block: int):
    blocks, y, scale = _normed(x, block)
    if signed:
        table = dynamic_map(True, 4).to(x.device)
        positive = torch.bucketize(y.double(), (table[7:-1] + table[8:]) / 2, right=True)
        codes = torch.where(torch.signbit(blocks), 7 - positive.clamp(max=7), 7 + positive)
        codes = torch.where(scale[:, None] > 0, codes, 7)
    else:
        codes = ((16 * y + 0.5).floor() - 1).clamp(min=0)
        codes = torch.where(scale[:, None] > 0, codes, 0)
    pairs = codes.to(torch.uint8).view(-1, 2)
    return _finish(pairs[:, 0] * 16 + pairs[:, 1], (x.numel() + 1) // 2), scale


def _decode_int4(codes, scale, signed, dtype, block, numel):
    both = torch.stack([codes >> 4, codes & 15], 1).view(-1)[:numel].long()
    values = dynamic_map(True, 4).to(codes.device)[both] if signed else (both + 1).double() / 16
    return _scaled(values, scale, block, dtype)


@dataclass(frozen=True)
class Format:
    """A way to store a state.

    id: FormatId in csrc/fusedopt.h. storage: dtype of the stored tensor. bits: per element. block: elements that share one
    fp32 scale, 0 for none. zeros: the stored byte of zeros, (signed, unsigned). error_bounds: largest
    |decode(encode(x)) - x| as a share of (|x|, scale of the block), (signed, unsigned). stochastic: stores draw random bits.
    """

    name: str
    id: int
    storage: torch.dtype
    bits: int
    block: int = 0
    zeros: tuple[int, int] = (0, 0)
    error_bounds: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 0.0), (0.0, 0.0))
    stochastic: bool = False
    encoder: Callable | None = None
    decoder: Callable | None = None

    @property
    def bytes_per_element(self) -> float:
        return self.bits / 8 + (4 / self.block if self.block else 0)

    def code(self, signed: bool) -> int:
        """A Launch's format word."""
        return self.id | (FORMAT_SIGNED if signed else 0)

    def error_bound(self, signed: bool) -> tuple[float, float]:
        return self.error_bounds[0 if signed else 1]

    def zero_code(self, signed: bool) -> int:
        """The stored value of an all-zero state."""
        return self.zeros[0 if signed else 1]

    def scale_count(self, numel: int) -> int:
        return -(-numel // self.block) if self.block else 0

    def stored_count(self, numel: int) -> int:
        """Entries of the stored tensor: half as many where a byte holds two codes."""
        return -(-numel // 2) if self.bits == 4 else numel

    def encode(self, x: torch.Tensor, signed: bool, random16: torch.Tensor | None = None):
        """(stored, scale | None) of a flat tensor in memory order. random16: see precision.philox16; for stochastic formats."""
        if self.block:
            return self.encoder(x, signed, self.block)
        if self.stochastic and random16 is not None:
            return round_stochastic(x.float(), self.storage, random16), None
        return x.to(self.storage), None

    def decode(self, stored: torch.Tensor, scale: torch.Tensor | None, signed: bool, dtype: torch.dtype, numel: int):
        """The `numel` values of a flat stored tensor."""
        if self.block:
            return self.decoder(stored, scale, signed, dtype, self.block, numel)
        return stored.to(dtype)


# Largest gap of the 8-bit map is 0.9 * 10^d / 2^j: absolute near 1, relative to the value it is worst in the first decades.
_MAP = 0.9 / 64 / 2 + 1e-6
_BF16 = ((2.0**-8, 0.0),) * 2
_formats = {
    f.name: f
    for f in (
        Format("fp32", 0, torch.float32, 32),
        Format("bf16", 1, torch.bfloat16, 16, error_bounds=_BF16),
        Format("bf16_stochastic", 6, torch.bfloat16, 16, error_bounds=((2.0**-7, 0.0),) * 2, stochastic=True),
        Format("int8", 2, torch.uint8, 8, 256, (127, 0), ((0.0, _MAP), (0.0, _MAP)), False, _encode_int8, _decode_int8),
        # half a step of q is 1/254 of 127 z and dy/dz <= 2; half a step of 255 w and dy/dw <= 2, and code 1 for the smallest
        Format("int8c", 3, torch.uint8, 8, 256, (0, 0), ((0.0, 1 / 126), (0.0, 1 / 254)), False,
               _encode_int8c, _decode_int8c),
        # 3 bits of mantissa; e4m3's subnormals are multiples of 2^-9 / 448, e5m3 ends at 2^-31
        Format("fp8", 4, torch.uint8, 8, 256, (0, 0), ((2.0**-4, 2.0**-10 / 448), (2.0**-4, 2.0**-31)), False,
               _encode_fp8, _decode_fp8),
        Format("int4", 5, torch.uint8, 4, 128, (0x77, 0), ((0.0, 0.1126), (0.0, 1 / 16)), False,
               _encode_int4, _decode_int4),
    )
}  # fmt: skip
FP32, BF16, INT8 = _formats["fp32"], _formats["bf16"], _formats["int8"]
ALIASES = {"8bit": "int8", "4bit": "int4", "float32": "fp32", "bfloat16": "bf16"}


def get_format(name: str | Format) -> Format:
    if isinstance(name, Format):
        return name
    found = _formats.get(ALIASES.get(name, name))
    if found is None:
        raise ValueError(f"unknown state_format {name!r}; known formats: {', '.join(list_formats())}")
    return found


def list_formats() -> list[str]:
    """Names of the state formats, as `state_format=` takes them."""
    return list(_formats)
