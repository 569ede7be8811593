"""fp8. signed: OCP e4m3, 448 at the scale. unsigned: e5m3 without subnormals, (1 + (c & 7) / 8) 2^(c / 8 - 31) / 1.875.

On bits: tl.float8 casts are wrong in the interpreter. Shifted right by 120 in the exponent, e4m3 with its subnormals is
fp32 with its subnormals, rounded to 3 bits of mantissa; products here keep subnormals (no .ftz in the PTX).
"""

import triton
import triton.language as tl

from fusedopt.kernels.bits import SMALLEST, bits, from_bits, share

TOP = tl.constexpr(1.0)
SHIFT = tl.constexpr(2.0**120)


@triton.jit
def fp8_decode(code, scale, SIGNED: tl.constexpr):
    if SIGNED:
        spaced = code.to(tl.int8, bitcast=True).to(tl.int32) << 20  # the sign fills the top bits
        return from_bits(spaced.to(tl.uint32, bitcast=True) & 0x87F00000) * (SHIFT / 448) * scale
    else:
        value = from_bits((code.to(tl.uint32) << 20) + (96 << 23)) * (scale * (1.0 / 1.875))
        return tl.where(code == 0, 0.0, value)


@triton.jit
def fp8_encode(x, inverse, top, SIGNED: tl.constexpr):
    y = share(x, inverse, top)
    u = bits(y * (448 / SHIFT if SIGNED else 1.875))
    rounded = u + 0x7FFFF + ((u >> 20) & 1)
    if SIGNED:
        magnitude = rounded >> 20
        return tl.where(magnitude == 0, 0, magnitude | ((bits(x) >> 24) & 0x80)).to(tl.uint8)  # no -0
    else:
        code = (rounded - (96 << 23)).to(tl.int32, bitcast=True) >> 20  # negative below 2^-31
        return tl.where(tl.abs(x) < SMALLEST, 0, tl.maximum(code, tl.where(top > 0.0, 1, 0))).to(tl.uint8)
