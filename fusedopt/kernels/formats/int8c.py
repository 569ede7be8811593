"""int8c: companded codes without a table, after FlashOptim (arXiv 2602.23349). With y = |x| / scale:

signed    q = round(254 y / (1 + y)) with x's sign, y = q / (254 - q)
unsigned  q = round(255 sqrt(y)),                   y = (q / 255)^2

Reciprocals are squares of reciprocal square roots: one instruction and a product, where a division takes about seven.
"""

import triton
import triton.language as tl

from fusedopt.kernels.bits import SMALLEST, bits, share, with_sign

TOP = tl.constexpr(1.0)


@triton.jit
def int8c_decode(code, scale, SIGNED: tl.constexpr):
    if SIGNED:
        q = code.to(tl.int8, bitcast=True).to(tl.float32)
        root = tl.rsqrt(254.0 - tl.abs(q))
        return q * (root * root) * scale  # q * scale could overflow
    else:
        w = code.to(tl.float32) * (1.0 / 255)
        return w * w * scale


@triton.jit
def int8c_encode(x, inverse, top, SIGNED: tl.constexpr):
    y = share(x, inverse, top)
    if SIGNED:
        root = tl.rsqrt(1.0 + y)
        # The last byte of 1.5 * 2^23 + q is q, rounded to nearest, in two's complement.
        return bits(with_sign(254.0 * y, x) * (root * root) + 12582912.0).to(tl.uint8)
    else:
        q = tl.maximum(255.0 * tl.sqrt(y), tl.where(top > 0.0, 1.0, 0.0))  # no second moment becomes 0
        return bits(tl.where(tl.abs(x) < SMALLEST, 0.0, q) + 12582912.0).to(tl.uint8)
