"""Loads and stores of optimizer states in each Format, on tiles of (ROWS, 256): the Triton twin of csrc/formats.h.

int8 is the blockwise dynamic map of Dettmers et al. (arXiv 2110.02861) in closed form. With k = code + 1 (unsigned) or
|code - 127| (signed), j = floor(log2 k) and 10^d the scale of decade j, both directions go through the same number f in [1, 2):
    f = (k + 1/2) / 2^j = mantissa of k + 1/2,   value = 10^d (0.9 f - 0.8),   k = floor(2^j f).
So the only table is 10^d, a product of three selected constants. Loads from a table of 8 entries in global memory need
as many instructions (address and load for each of five tables) and a quarter-rate unit; tl.gather becomes shuffles.
"""

import triton
import triton.language as tl

BLOCK: tl.constexpr = tl.constexpr(256)  # elements that share a scale: one row of a tile
FP32 = tl.constexpr(0)
BF16 = tl.constexpr(1)
INT8 = tl.constexpr(2)
FORMAT_MASK = tl.constexpr(0xFF)
FORMAT_SIGNED = tl.constexpr(0x100)

TINY_BITS = tl.constexpr(0x00800000)  # smallest normal fp32
INF_BITS = tl.constexpr(0x7F800000)
MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def element_type(FORMAT: tl.constexpr):
    FORMAT_ID: tl.constexpr = FORMAT & FORMAT_MASK
    if FORMAT_ID == FP32:
        return tl.float32
    elif FORMAT_ID == BF16:
        return tl.bfloat16
    else:
        return tl.uint8
