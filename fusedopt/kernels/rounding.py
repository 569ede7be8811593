"""Parameter stores: rounding to nearest, and stochastic rounding with Philox4x32-10 (Salmon et al., SC 2011).

The bits of csrc/precision.h and csrc/philox.h: key = seed, counter = (element // 8, tensor id, step), 16 bits an
element.
"""

import triton
import triton.language as tl

from fusedopt.kernels.formats import bits, store_stream, to_bf16


@triton.jit
def uniform16(seed, step, tensor, octet, ROWS: tl.constexpr):
    """uint32 (ROWS, 256) random words below 2^16. octet: int64 (ROWS, 32), the index of each 8 consecutive elements.

    One Philox call per 8 elements; joins put word w and half h of an octet at its element 2 w + h, in the lane that
    drew them.
    """
    low = octet.to(tl.uint32)
    c0, c1, c2, c3 = tl.philox(
        seed, low, (octet >> 32).to(tl.uint32), low * 0 + tensor.to(tl.uint32), low * 0 + step.to(tl.uint32)
    )
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # last axes: word // 2, word % 2
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, 256))


@triton.jit
def bf16_stochastic(x, random16):
    u = bits(x)
    finite = (u & 0x7F800000) != 0x7F800000
    special = u | tl.where(x == x, 0, 0x400000).to(tl.uint32)
    return (tl.where(finite, u + random16, special) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


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
def store_param(
    x, p, local, inside, whole, seed, step, tensor, octet, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    TYPE: tl.constexpr = p.dtype.element_ty
    if STOCHASTIC and TYPE == tl.bfloat16:
        stored = bf16_stochastic(x, uniform16(seed, step, tensor, octet, x.shape[0]))
    elif STOCHASTIC and TYPE == tl.float16:
        stored = fp16_stochastic(x, uniform16(seed, step, tensor, octet, x.shape[0]))
    elif TYPE == tl.bfloat16:
        stored = to_bf16(x)
    else:
        stored = x.to(TYPE)
    store_stream(p, stored, local, inside, whole, ALIGNED)
