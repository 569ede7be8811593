"""int4: 4-bit codes, two a byte, the even element in the high half; 128 elements share a scale.

signed: the 4-bit dynamic map, code - 7 counts 0, +-0.0055, +-0.0325, +-0.0775, +-0.2125, ..., +-0.8875, 1. unsigned:
(code + 1) / 16, Li et al., "Memory Efficient Optimizers with 4-bit States" (arXiv 2309.01507); it has no zero.
"""

import triton
import triton.language as tl

from fusedopt.kernels.bits import negative, share, with_sign

TOP = tl.constexpr(1.0)


@triton.jit
def unpack(pairs):
    """(ROWS, N) bytes to (ROWS, 2 N) codes, in the lane that has the byte."""
    return tl.reshape(tl.join(pairs >> 4, pairs & 15), (pairs.shape[0], 2 * pairs.shape[1]))


@triton.jit
def pack(codes):
    high, low = tl.split(tl.reshape(codes, (codes.shape[0], 128, 2)))
    return (high << 4) | low


@triton.jit
def int4_decode(code, scale, SIGNED: tl.constexpr):
    if SIGNED:
        k = code.to(tl.float32) - 7.0
        m = tl.abs(k)  # the map is convex up to the last value: the largest of three lines
        value = tl.maximum(tl.maximum(m * 0.0055, m * 0.045 - 0.0575), tl.minimum(m * 0.225 - 0.6875, 1.0))
        return with_sign(value * scale, k)
    else:
        return (code.to(tl.float32) + 1.0) * (scale * 0.0625)


@triton.jit
def int4_encode(x, inverse, top, SIGNED: tl.constexpr):
    y = share(x, inverse, top)
    if SIGNED:  # how many boundaries are not above y: a binary search by selects, the lowest boundary apart
        c4 = y >= 0.325
        c2 = y >= tl.where(c4, 0.775, 0.055)
        c1 = y >= tl.where(c4, tl.where(c2, 0.94375, 0.55), tl.where(c2, 0.145, 0.019))
        k = tl.where(c4, 5, 1)
        k = tl.where(c2, k + 2, k)
        k = tl.where(c1, k + 1, k)
        k = tl.where(y < 0.00275, 0, k)
        return tl.where(negative(x), tl.maximum(7 - k, 0), 7 + k).to(tl.uint8)  # -1 has no code
    else:
        return tl.maximum((16.0 * y + 0.5).to(tl.int32) - 1, 0).to(tl.uint8)
