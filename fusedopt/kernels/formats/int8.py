"""int8: the blockwise dynamic map of Dettmers et al. (arXiv 2110.02861) in closed form.

With k = code + 1 (unsigned) or |code - 127| (signed), n = 2^floor(log2 k) and 10^d the scale of k's decade, both
directions use f = (k + 1/2) / n in [1, 2), the mantissa of k + 1/2:
    value = 10^d (0.9 f - 0.8),   k = floor(n z) with z = value / (0.9 10^d) + 8/9.
10^d is one exp2, which is a single instruction. Lookups lose: tl.gather becomes shuffles at a quarter of the rate of
arithmetic, a table in global memory needs an address and a load for every entry.
"""

import triton
import triton.language as tl

from fusedopt.kernels.bits import SMALLEST, bits, from_bits, negative, with_sign

TOP = tl.constexpr(1.02)  # lands on the last code
LOG2_10 = tl.constexpr(3.321928094887362)
LOG2_10_9 = tl.constexpr(0.15200309344504997)  # log2(1 / 0.9)


@triton.jit
def int8_decode(code, scale, SIGNED: tl.constexpr):
    fk = code.to(tl.float32)
    if SIGNED:
        centred = fk - 127.0
        m = tl.abs(centred) * 2.0**-125 + 2.0**-126  # 2 (k + 1/2)
    else:
        m = fk * 2.0**-126 + 1.5 * 2.0**-126  # k + 1/2
    mb = bits(m)
    f = from_bits((mb & 0x007FFFFF) | 0x3F800000)
    decade = (mb & 0x7F800000).to(tl.int32).to(tl.float32)  # (d + 8) 2^23, small enough to lose nothing below
    value = (f * 0.9 - 0.8) * tl.exp2(decade * (LOG2_10 / 2**23) - 8.0 * LOG2_10)
    value = tl.minimum(value, 1.0) * scale  # the last code stands alone in its decade, at 1
    if SIGNED:
        return with_sign(tl.where(centred == 0.0, 0.0, value), centred)
    else:
        return tl.where(fk == 0.0, 0.0, value)


@triton.jit
def int8_encode(x, inverse, top, SIGNED: tl.constexpr):
    y = tl.abs(x) * inverse
    y = tl.where(y < (1.0 - 0.45 / 128 if SIGNED else 1.0 - 0.45 / 256), y, top)
    # 154 / 512 is log10(2): the decade of y, or the one below, in the form place = 6 - log2(n).
    estimate = tl.umulhi(bits(y), tl.full(y.shape, 154, tl.uint32)).to(tl.int32)
    place = tl.minimum((38 if SIGNED else 37) - estimate, 6 if SIGNED else 5)
    power = tl.exp2(place.to(tl.float32) * LOG2_10 + (LOG2_10_9 if SIGNED else LOG2_10_9 + LOG2_10))
    z = y * power + 8.0 / 9
    above = bits(z) >= (0x40000000 + (0x10000 << place)).to(tl.uint32)  # z >= 2 + 1 / n: nearer to the next decade
    z = tl.where(above, z * 0.1 + 0.8, z)
    place = tl.where(above, place - 1, place)
    z = tl.minimum(z, 1.9999999)
    if not SIGNED:  # never code 0 for a second moment that is not zero: m / sqrt(v) stays bounded
        z = tl.maximum(z, tl.where(top > 0.0, 1.0, 0.0))
    k = (bits(z).to(tl.int32) - 0x3F000000) >> (place + 17)
    if SIGNED:
        k = tl.where(y < 0.275e-6, 0, k)
        return tl.maximum(tl.where(negative(x), 127 - k, 127 + k), 0).to(tl.uint8)  # no -1
    else:
        return tl.where(tl.abs(x) < SMALLEST, 0, k - 1).to(tl.uint8)
