"""int8: the blockwise dynamic map of Dettmers et al. (arXiv 2110.02861) in closed form.

With k = code + 1 (unsigned) or |code - 127| (signed), n = 2^floor(log2 k) and 10^d the scale of k's decade, both
directions use f = (k + 1/2) / n in [1, 2), the mantissa of k + 1/2:
    value = 10^d (0.9 f - 0.8),   k = floor(n z) with z = value / (0.9 10^d) + 8/9.
The only table left is 10^d, a product of three selected constants. Lookups lose: tl.gather becomes shuffles at a
quarter of the rate of arithmetic, a table in global memory needs an address and a load for every entry.
"""

import triton
import triton.language as tl

from fusedopt.kernels.bits import SMALLEST, bits, from_bits, negative

TOP = tl.constexpr(1.02)  # lands on the last code


@triton.jit
def int8_decode(code, scale, SIGNED: tl.constexpr):
    fk = code.to(tl.float32)
    if SIGNED:
        centred = fk - 127.0
        m = tl.abs(centred) * 2.0 + 1.0  # 2 (k + 1/2)
        zero = centred == 0.0
    else:
        m = fk + 1.5  # k + 1/2
        zero = fk == 0.0
    mb = bits(m)
    f = from_bits((mb & 0x007FFFFF) | 0x3F800000)
    value = tl.where(zero, 0.0, f * 0.9 - 0.8)
    # The low 3 bits of m's exponent are d + 6. Here and below, multiplying inside the select makes it one predicated
    # multiply.
    value *= tl.where((mb & 0x02000000) != 0, scale * 1e-2, scale * 1e-6)
    value = tl.where((mb & 0x01000000) != 0, value * 1e2, value)
    value = tl.where((mb & 0x00800000) != 0, value * 1e1, value)
    value = tl.minimum(value, scale)  # the last code stands alone in its decade, at 1
    if SIGNED:
        value = from_bits(bits(value) | (bits(centred) & 0x80000000))
    return value


@triton.jit
def int8_encode(x, inverse, top, SIGNED: tl.constexpr):
    y = tl.abs(x) * inverse
    y = tl.where(y < (1.0 - 0.45 / 128 if SIGNED else 1.0 - 0.45 / 256), y, top)
    # 154 / 512 is log10(2): the decade of y, or the one below, in the form shift = 23 - log2(n). Its low bits are the
    # power of 10.
    estimate = tl.umulhi(bits(y), tl.full(y.shape, 154, tl.uint32)).to(tl.int32)
    shift = tl.minimum((55 if SIGNED else 54) - estimate, 23 if SIGNED else 22)
    z = y * tl.where((shift & 4) != 0, 1e3 / 0.9 if SIGNED else 1e4 / 0.9, 0.1 / 0.9 if SIGNED else 1.0 / 0.9)
    z = tl.where((shift & 2) != 0, z * 1e2, z)
    z = tl.where((shift & 1) != 0, z * 1e1, z) + 8.0 / 9
    above = bits(z) >= (0x40000000 + ((1 << shift) >> 1)).to(tl.uint32)  # z >= 2 + 1 / n: nearer to the next decade
    z = tl.where(above, z * 0.1 + 0.8, z)
    shift = tl.where(above, shift - 1, shift)
    z = tl.minimum(z, 1.9999999)
    if not SIGNED:  # never code 0 for a second moment that is not zero: m / sqrt(v) stays bounded
        z = tl.maximum(z, tl.where(top > 0.0, 1.0, 0.0))
    k = (bits(z).to(tl.int32) - 0x3F000000) >> shift
    if SIGNED:
        k = tl.where(y < 0.275e-6, 0, k)
        return tl.maximum(tl.where(negative(x), 127 - k, 127 + k), 0).to(tl.uint8)  # no -1
    else:
        return tl.where(tl.abs(x) < SMALLEST, 0, k - 1).to(tl.uint8)
