"""int8c: companded codes without a table, after FlashOptim (arXiv 2602.23349). With y = |x| / scale:

signed    q = round(254 y / (1 + y)) with x's sign, y = q / (254 - q)
unsigned  q = round(255 sqrt(y)),                   y = (q / 255)^2

Reciprocals are squares of reciprocal square roots: one instruction and a product, where a division takes about seven.
"""

import triton
import triton.language as tl

from fusedopt.kernels.bits import SMALLEST

TOP = tl.constexpr(1.0)


@triton.jit
def int8c_decode(code, scale, SIGNED: tl.constexpr):
    if SIGNED:
        q = code.to(tl.int8, bitcast=True).to(tl.float32)
        root = tl.rsqrt(254.0 - tl.abs(q))
        return q * scale * (root * root)
    else:
        w = code.to(tl.float32) * (1.0 / 255)
        return w * w * scale


@triton.jit
def int8c_encode(x, inverse, top, SIGNED: tl.constexpr):
    y = tl.abs(x) * inverse
    y = tl.where(y < 1.0, y, top)
    if SIGNED:
        root = tl.rsqrt(1.0 + y)
        q = (254.0 * y * (root * root) + 0.5).to(tl.int32)
        return tl.where(x.to(tl.int32, bitcast=True) < 0, -q, q).to(tl.uint8)
    else:
        q = (255.0 * tl.sqrt(y) + 0.5).to(tl.int32)
        # never 0 for a second moment that is not zero
        return tl.where(tl.abs(x) < SMALLEST, 0, tl.maximum(q, tl.where(top > 0.0, 1, 0))).to(tl.uint8)
