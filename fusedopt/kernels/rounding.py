"""Stochastic rounding with Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).

The bits of csrc/precision.h and csrc/philox.h: key = seed, counter = (element // 8, tensor id, step), 16 bits an
element. The 8 highest bits of the octet's number are the stream: 0 for the parameter, 1 + i for state i.
"""

import triton
import triton.language as tl

from fusedopt.kernels.bits import bits


@triton.jit
def philox(seed, step, tensor, octet, STREAM: tl.constexpr):
    """The four random words of each octet. octet: int64."""
    low = octet.to(tl.uint32)
    high = (octet >> 32).to(tl.uint32) | (STREAM << 24)
    return tl.philox(seed, low, high, low * 0 + tensor.to(tl.uint32), low * 0 + step.to(tl.uint32))


@triton.jit
def octet_bits(seed, step, tensor, octet, STREAM: tl.constexpr):
    """uint32 (ROWS, 8 N) random words below 2^16 for the elements of (ROWS, N) octets.

    One Philox call per 8 elements; joins put word w and half h of an octet at its element 2 w + h, in the lane that
    drew them.
    """
    c0, c1, c2, c3 = philox(seed, step, tensor, octet, STREAM)
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # last axes: word // 2, word % 2
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (octet.shape[0], 8 * octet.shape[1]))


@triton.jit
def uniform16(seed, step, tensor, first_octet, tile, STREAM: tl.constexpr, ROWS: tl.constexpr):
    """uint32 (ROWS, 256) random words below 2^16 for the elements of a tile. tile: int64. first_octet: of tile 0."""
    octet = first_octet + tile * (ROWS * 32) + tl.arange(0, ROWS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    return octet_bits(seed, step, tensor, octet, STREAM)


@triton.jit
def uniform16_at(seed, step, tensor, element, STREAM: tl.constexpr):
    """The same words for elements that need not fill octets, int64 numbers of any shape: one Philox call for each."""
    c0, c1, c2, c3 = philox(seed, step, tensor, element >> 3, STREAM)
    place = element.to(tl.int32) & 7
    word = tl.where(place < 4, tl.where(place < 2, c0, c1), tl.where(place < 6, c2, c3))
    return tl.where(place % 2 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def bf16_stochastic(x, random16):
    u = bits(x)  # the low half of infinity is 0 and does not carry
    return (tl.where(x == x, u + random16, u | 0x400000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def fp16_stochastic(x, random16):
    u = bits(x)
    magnitude = u & 0x7FFFFFFF
    normal = (magnitude - 0x38000000 + (random16 >> 3)) >> 13  # 13 bits are dropped
    is_small = magnitude < 0x38800000
    scaled = tl.where(is_small, tl.abs(x) * 16777216.0, 0.0)  # subnormals: multiples of 2^-24
    whole = scaled.to(tl.int32)
    up = (scaled - whole.to(tl.float32)) * 65536.0 > random16.to(tl.float32)
    small = (whole + up.to(tl.int32)).to(tl.uint32)
    out = tl.where(is_small, small, normal)
    out = tl.where(out > 0x7C00, 0x7C00, out)
    special = tl.where(magnitude > 0x7F800000, 0x7E00, 0x7C00)
    out = tl.where(magnitude >= 0x7F800000, special, out).to(tl.uint32)
    return (out | ((u >> 16) & 0x8000)).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def stochastic(x, random16, TYPE: tl.constexpr):
    if TYPE == tl.bfloat16:
        return bf16_stochastic(x, random16)
    else:
        return fp16_stochastic(x, random16)
