"""int4: 4-bit codes, two a byte, the even element in the high half; 128 elements share a scale.

signed: the 4-bit dynamic map, code - 7 counts 0, +-0.0055, +-0.0325, +-0.0775, +-0.2125, ..., +-0.8875, 1. unsigned:
(code + 1) / 16, Li et al., "Memory Efficient Optimizers with 4-bit States" (arXiv 2309.01507); it has no zero.
"""

import triton
import triton.language as tl

from fusedopt.kernels.bits import bits, from_bits

TOP = tl.constexpr(1.0)


@triton.jit
def unpack(pairs):
    """(ROWS, 128) bytes to (ROWS, 256) codes, in the lane that has the byte."""
    return tl.reshape(tl.join(pairs >> 4, pairs & 15), (pairs.shape[0], 256))


@triton.jit
def pack(codes):
    high, low = tl.split(tl.reshape(codes, (codes.shape[0], 128, 2)))
    return (high << 4) | low


@triton.jit
def int4_decode(code, scale, SIGNED: tl.constexpr):
    if SIGNED:
        # 10^d (0.9 f - 0.8) as in int8.py: f is the mantissa of k + 1/2
        centred = code.to(tl.float32) - 7.0
        mb = bits(tl.abs(centred) * 2.0 + 1.0)
        f = from_bits((mb & 0x007FFFFF) | 0x3F800000)
        value = tl.where(mb >= 0x41880000, 1.0, f * 0.9 - 0.8)  # the last code is 1
        value = tl.where(mb < 0x41000000, tl.where(mb < 0x40800000, value * 1e-2, value * 1e-1), value)
        value = tl.where(centred == 0.0, 0.0, value) * scale
        return from_bits(bits(value) | (bits(centred) & 0x80000000))
    else:
        return (code.to(tl.float32) + 1.0) * (scale * 0.0625)


@triton.jit
def int4_encode(x, inverse, top, SIGNED: tl.constexpr):
    y = tl.abs(x) * inverse
    y = tl.where(y < 1.0, y, top)
    if SIGNED:
        k = (y >= 0.00275).to(tl.int32) + (y >= 0.019).to(tl.int32)
        k += (y >= 0.055).to(tl.int32) + (y >= 0.145).to(tl.int32)
        k += (y >= 0.325).to(tl.int32) + (y >= 0.55).to(tl.int32)
        k += (y >= 0.775).to(tl.int32)
        negative = x.to(tl.int32, bitcast=True) < 0
        k += ((y >= 0.94375) & ~negative).to(tl.int32)  # -1 has no code
        return tl.where(negative, 7 - k, 7 + k).to(tl.uint8)
    else:
        return tl.maximum((16.0 * y + 0.5).to(tl.int32) - 1, 0).to(tl.uint8)
