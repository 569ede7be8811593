"""The bits of fp32 numbers, and conversions between fp32 and 16 bits, which round to nearest even."""

import triton
import triton.language as tl

SMALLEST = tl.constexpr(2.0**-126)  # what is smaller counts as zero
LARGEST = tl.constexpr(2.0**126)  # what is larger counts as this much: the inverse of a larger scale would be subnormal


@triton.jit
def bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def from_bits(x):
    return x.to(tl.float32, bitcast=True)


# The interpreter truncates where the hardware rounds to nearest even, and loses subnormals of bf16 (Triton 3.6 and 3.9).
INTERPRETED = tl.constexpr(not isinstance(bits, triton.JITFunction))


@triton.jit
def widen(x):
    """fp32 of fp32, bf16 or fp16."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return from_bits(x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        return x.to(tl.float32)


@triton.jit
def to_bf16(x):
    if INTERPRETED:
        u = bits(x)
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, (u >> 16) | 0x40)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def nearest(x, TYPE: tl.constexpr):
    if TYPE == tl.bfloat16:
        return to_bf16(x)
    else:
        return x.to(TYPE)


@triton.jit
def share(x, inverse, top):
    """|x| / scale, and `top` for NaN and infinity. A minimum of floats leaves NaN out, but not in Triton 3.6's interpreter."""
    y = tl.abs(x) * inverse
    if INTERPRETED:
        return tl.where(y < top, y, top)
    else:
        return tl.minimum(y, top)


@triton.jit
def negative(x):
    return x.to(tl.int32, bitcast=True) < 0


@triton.jit
def with_sign(magnitude, x):
    """magnitude, not negative, with the sign of x."""
    return from_bits(bits(magnitude) | (bits(x) & 0x80000000))
