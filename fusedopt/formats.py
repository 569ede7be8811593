"""State formats: how an optimizer state is stored, with the pure-torch encoder and decoder that the drivers are tested against.

int8 is the blockwise dynamic map of Dettmers et al. (arXiv 2110.02861), built here from its definition as a sorted table
and searched for the nearest value; the drivers use the closed form in csrc/formats.h instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from fusedopt.abi import BLOCK, FORMAT_SIGNED


@cache
def dynamic_map(signed: bool) -> torch.Tensor:
    """The 256 values of the 8-bit dynamic map, sorted, float64. Signed: 0 at index 127, no -1. Unsigned: 0 at index 0."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += middles
        if signed:
            values += [-x for x in middles]
    return torch.tensor(sorted(values), dtype=torch.float64)


def _blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    pad = -x.numel() % size
    return torch.nn.functional.pad(x, (0, pad)).view((x.numel() + pad) // size, size)


def _encode_cast(dtype):
    return lambda x, signed: (x.to(dtype), None)


def _decode_cast(codes, scale, signed, dtype):
    return codes.to(dtype)


def _encode_int8(x: torch.Tensor, signed: bool):
    tiny = torch.finfo(torch.float32).tiny
    blocks = _blocks(x.to(torch.float32), BLOCK)
    scale = blocks.abs().amax(1)  # NaN spreads, as in the drivers
    scale = torch.where(scale < tiny, torch.zeros_like(scale), scale)
    usable = (scale > 0) & torch.isfinite(scale)
    inverse = torch.where(usable, 1 / scale, torch.zeros_like(scale))
    normed = blocks * inverse[:, None]
    table = dynamic_map(signed).to(x.device)
    if signed:
        magnitude = torch.where(normed.abs() < 1, normed.abs(), torch.ones_like(normed))
        positive = torch.bucketize(magnitude.double(), (table[127:-1] + table[128:]) / 2, right=True)
        codes = torch.where(torch.signbit(normed), 127 - positive.clamp(max=127), 127 + positive)
    else:
        magnitude = torch.where(normed < 1, normed, torch.ones_like(normed))
        codes = torch.bucketize(magnitude.double(), (table[:-1] + table[1:]) / 2, right=True)
        codes = torch.where((blocks.abs() >= tiny) & usable[:, None], codes.clamp(min=1), torch.zeros_like(codes))
    return codes.to(torch.uint8).view(-1)[: x.numel()], scale


def _decode_int8(codes: torch.Tensor, scale: torch.Tensor, signed: bool, dtype: torch.dtype) -> torch.Tensor:
    values = dynamic_map(signed).to(device=codes.device, dtype=dtype)[codes.long()]
    return (_blocks(values, BLOCK) * scale.to(dtype)[:, None]).view(-1)[: codes.numel()]


@dataclass(frozen=True)
class Format:
    """A way to store a state.

    id: the code in csrc/fusedopt.h. storage: dtype of the stored tensor. block: elements per fp32 scale, 0 for none.
    error_bound: largest |decode(encode(x)) - x| as a share of (|x|, absmax of the block).
    encode(x, signed) -> (stored, scale | None) and decode(stored, scale, signed, dtype) -> x: flat tensors in memory order.
    """

    name: str
    id: int
    storage: torch.dtype
    block: int
    error_bound: tuple[float, float]
    encode: Callable
    decode: Callable

    @property
    def bytes_per_element(self) -> float:
        return self.storage.itemsize + (4 / self.block if self.block else 0)

    def code(self, signed: bool) -> int:
        return self.id | (FORMAT_SIGNED if signed else 0)

    def zero_code(self, signed: bool) -> int:
        """The stored value of an all-zero state."""
        return 127 if self.block and signed else 0

    def scale_count(self, numel: int) -> int:
        return -(-numel // self.block) if self.block else 0


FP32 = Format("fp32", 0, torch.float32, 0, (0.0, 0.0), _encode_cast(torch.float32), _decode_cast)
BF16 = Format("bf16", 1, torch.bfloat16, 0, (2.0**-8, 0.0), _encode_cast(torch.bfloat16), _decode_cast)
# Largest gap of a map is 0.9 * 10^d / 2^j; relative to the value it is worst in the first decades, absolute near 1.
INT8 = Format("int8", 2, torch.uint8, BLOCK, (0.0, 0.9 / 64 / 2 + 1e-6), _encode_int8, _decode_int8)

_formats = {f.name: f for f in (FP32, BF16, INT8)}
ALIASES = {"8bit": "int8", "float32": "fp32", "bfloat16": "bf16"}


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
