"""int8: the blockwise dynamic map of Dettmers et al. (arXiv 2110.02861) in closed form.

With k = code + 1 (unsigned) or |code - 127| (signed), n = 2^floor(log2 k), 10^d the scale of k's decade and a = 0.9 10^d / n:
    value = 10^d (0.9 f - 0.8) = a (k + 1/2 - 8/9 n),   f = (k + 1/2) / n in [1, 2), the mantissa of k + 1/2;
encoding counts values from the decade's end on, r = y / a - 10/9 n, so that k = 2 n + floor(r) up to there; the last value
of a decade also takes the gap behind it, up to r = 1, and the next decade's values are five times as far apart. 10^d is one
exp2, a single instruction; decoding by the exp2 of a would err by twice as much. Lookups lose: tl.gather becomes shuffles at a
quarter of the rate of arithmetic, a table in global memory needs an address and a load for every entry.
"""

import triton
import triton.language as tl

from fusedopt.kernels.arithmetic import exp2
from fusedopt.kernels.bits import SMALLEST, bits, from_bits, with_sign

TOP = tl.constexpr(1.02)  # lands on the last code
STEP = tl.constexpr(2.321928094887362)  # log2(10 / 2): a decade on
LOG2_10 = tl.constexpr(3.321928094887362)
LOG2_09 = tl.constexpr(-0.15200309344504997)  # log2(0.9)
WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23: sums with it are whole numbers, in their low bits


@triton.jit
def int8_decode(code, scale, SIGNED: tl.constexpr):
    fk = code.to(tl.float32)
    if SIGNED:
        centred = fk - 127.0
        m = tl.abs(centred) * 2.0**-125 + 2.0**-126  # 2 (k + 1/2)
    else:
        centred = fk
        m = fk * 2.0**-126 + 1.5 * 2.0**-126  # k + 1/2
    mb = bits(m)
    f = from_bits((mb & 0x007FFFFF) | 0x3F800000)
    decade = (mb & 0x7F800000).to(tl.int32).to(tl.float32)  # (d + 8) 2^23, small enough to lose nothing below
    value = (f * 0.9 - 0.8) * exp2(decade * (LOG2_10 / 2**23) - 8.0 * LOG2_10)
    value = tl.minimum(value, 1.0) * scale  # the last code stands alone in its decade, at 1
    value = tl.where(centred == 0.0, 0.0, value)
    if SIGNED:
        return with_sign(value, centred)
    else:
        return value


@triton.jit
def int8_encode(x, inverse, top, SIGNED: tl.constexpr):
    y = tl.abs(x) * inverse
    y = tl.where(y < (1.0 - 0.45 / 128 if SIGNED else 1.0 - 0.45 / 256), y, top)
    if SIGNED:
        y = tl.where(y < 0.275e-6, 0.0, y)
    else:  # never code 0 for a second moment that is not zero: m / sqrt(v) stays bounded
        y = tl.maximum(y, tl.minimum(top, 1.00001e-7))
    # 154 / 512 is log10(2): the decade of y, or the one below, in the form place = 6 - log2(n).
    estimate = tl.umulhi(bits(y), tl.full(y.shape, 154, tl.uint32)).to(tl.int32)
    place = tl.minimum((38 if SIGNED else 37) - estimate, 6 if SIGNED else 5)
    n = (0x42800000 - (place << 23)).to(tl.float32, bitcast=True)
    offset: tl.constexpr = 6 - LOG2_09 if SIGNED else 7 - LOG2_09 + STEP
    # r, less nearly a half: rounding it to nearest is then rounding down.
    r = y * exp2(place.to(tl.float32) * STEP + offset) + (n * (-10.0 / 9) - 0.49998)
    r = tl.where(r >= 0.50002, r * 0.2 - 0.399984, tl.minimum(r, -0.6))
    if SIGNED:
        k = bits((r + WHOLE) + 2.0 * n).to(tl.int32, bitcast=True) & 0x1FF
        sign = x.to(tl.int32, bitcast=True) >> 31
        return tl.maximum((k ^ sign) - sign + 127, 0).to(tl.uint8)  # no -1
    else:
        code = bits((r + (WHOLE - 1.0)) + 2.0 * n)
        return tl.where(tl.abs(x) < SMALLEST, 0, code).to(tl.uint8)
