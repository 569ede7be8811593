"""Loads and stores of optimizer states in each Format, on tiles of (rows, 256): the Triton twin of csrc/formats.h.

int8 is the blockwise dynamic map of Dettmers et al. (arXiv 2110.02861) in closed form. With k = code + 1 (unsigned) or
|code - 127| (signed), n = 2^floor(log2 k) and 10^d the scale of k's decade, both directions use f = (k + 1/2) / n in [1, 2),
the mantissa of k + 1/2:
    value = 10^d (0.9 f - 0.8),   k = floor(n z) with z = value / (0.9 10^d) + 8/9.
The only table left is 10^d, a product of three selected constants. Lookups lose: tl.gather becomes shuffles at a quarter of
the rate of arithmetic, a table in global memory needs an address and a load for every entry.
"""

import triton
import triton.language as tl

FP32 = tl.constexpr(0)
BF16 = tl.constexpr(1)
INT8 = tl.constexpr(2)
FORMAT_MASK = tl.constexpr(0xFF)
FORMAT_SIGNED = tl.constexpr(0x100)


@triton.jit
def bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def from_bits(x):
    return x.to(tl.float32, bitcast=True)


# The interpreter truncates where the hardware rounds to nearest even (Triton 3.6 and 3.9).
INTERPRETED = tl.constexpr(not isinstance(bits, triton.JITFunction))


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
    value = f * 0.9 - 0.8
    # The low 3 bits of m's exponent are the decade t = d + 6.
    value *= tl.where((mb & 0x02000000) != 0, 1e-2, 1e-6)
    value *= tl.where((mb & 0x01000000) != 0, 1e2, 1.0)
    value *= tl.where((mb & 0x00800000) != 0, 1e1, 1.0)
    value = tl.where(value < 1.0, value, 1.0)  # the last code stands alone in its decade, at 1
    value = tl.where(zero, 0.0, value)
    if SIGNED:
        value = from_bits(bits(value) | (bits(centred) & 0x80000000))
    return value * scale


@triton.jit
def int8_encode(x, inverse, SIGNED: tl.constexpr):
    xb = bits(x)
    magnitude = xb & 0x7FFFFFFF
    y = from_bits(magnitude) * inverse
    # 1.02 lands on the last code; a negative value takes the code before it, since -1 has none. A NaN goes the same way.
    if SIGNED:
        negative = (xb >> 31) != 0
        y = tl.where(y < 1.0 - 0.45 / 128, y, tl.where(negative, 0.9999, 1.02))
    else:
        y = tl.where(y < 1.0 - 0.45 / 256, y, 1.02)
    # 154 / 512 is log10(2): the decade of y, or the one below.
    t = tl.maximum(tl.umulhi(bits(y), tl.full(y.shape, 154, tl.uint32)).to(tl.int32) - 32, 0)
    y9 = y * tl.where((t & 4) != 0, 1.0 / 9, 1e4 / 9)
    y9 *= tl.where((t & 2) != 0, 1.0, 1e2)
    y9 *= tl.where((t & 1) != 0, 1.0, 1e1)
    z = y9 + 8.0 / 9
    if SIGNED:
        j = t
    else:
        j = t + 1
    above = z >= from_bits((0x40000000 + (0x400000 >> j)).to(tl.uint32))  # 2 + 1 / n: midway to the next decade
    z = tl.where(above, z * 0.1 + 0.8, z)
    j += above.to(tl.int32)
    z = tl.where(z < 2.0, z, 1.9999999)
    if SIGNED:
        k = (bits(z) - 0x3F000000) >> (23 - j).to(tl.uint32)
        k = tl.where(y < 0.275e-6, 0, k.to(tl.int32))
        return (127 + tl.where(negative, -k, k)).to(tl.uint8)
    else:
        z = tl.where(z > 1.0, z, 1.0)  # never code 0 for a second moment that is not zero: m / sqrt(v) stays bounded
        k = (bits(z) - 0x3F000000) >> (23 - j).to(tl.uint32)
        smallest = tl.where(inverse > 0.0, 0x00800000, 0x7FFFFFFF).to(tl.uint32)  # subnormal counts as 0
        return tl.where(magnitude >= smallest, k.to(tl.int32) - 1, 0).to(tl.uint8)


@triton.jit
def row_pointer(table, column, rows, row, TYPE: tl.constexpr):
    """A tensor's address from the row table, as a pointer to TYPE."""
    return tl.load(table + column * rows + row).to(tl.pointer_type(TYPE))


@triton.jit
def state_pointer(table, state, rows, row, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    FORMAT_ID: tl.constexpr = FORMAT & FORMAT_MASK
    if FORMAT_ID == FP32:
        p = row_pointer(table, 2 + state, rows, row, tl.float32)
    elif FORMAT_ID == BF16:
        p = row_pointer(table, 2 + state, rows, row, tl.bfloat16)
    else:
        p = row_pointer(table, 2 + state, rows, row, tl.uint8)
    if ALIGNED:
        # int8 is promised 8 bytes only: 16 codes a thread would force every other stream into pieces of 16 elements a thread.
        p = tl.multiple_of(p, 8 if FORMAT_ID == INT8 else 16)
    return p


@triton.jit
def load_state(p, scales, local, inside, blocks, inside_blocks, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """fp32 values of a tile; zeros outside the tensor."""
    FORMAT_ID: tl.constexpr = FORMAT & FORMAT_MASK
    SIGNED: tl.constexpr = (FORMAT & FORMAT_SIGNED) != 0
    if MASKED:
        x = tl.load(p + local, mask=inside, other=127 if FORMAT_ID == INT8 and SIGNED else 0)
    else:
        x = tl.load(p + local)
    if FORMAT_ID == INT8:
        if MASKED:
            scale = tl.load(scales + blocks, mask=inside_blocks, other=0.0)
        else:
            scale = tl.load(scales + blocks)
        return int8_decode(x, scale, SIGNED)
    else:
        return x.to(tl.float32)


@triton.jit
def store_state(x, p, scales, local, inside, blocks, inside_blocks, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    FORMAT_ID: tl.constexpr = FORMAT & FORMAT_MASK
    if FORMAT_ID == INT8:
        # The integer order of magnitudes puts NaN above infinity: a non-finite element poisons its block, visibly.
        magnitude = (bits(x) & 0x7FFFFFFF).to(tl.int32)
        if MASKED:
            magnitude = tl.where(inside, magnitude, 0)
        largest = tl.max(magnitude, axis=1, keep_dims=True)
        largest = tl.where(largest < 0x00800000, 0, largest)
        scale = from_bits(largest)
        usable = (largest > 0) & (largest < 0x7F800000)
        inverse = tl.where(usable, 1.0 / tl.where(usable, scale, 1.0), 0.0)
        stored = int8_encode(x, inverse, (FORMAT & FORMAT_SIGNED) != 0)
        if MASKED:
            tl.store(scales + blocks, scale, mask=inside_blocks)
        else:
            tl.store(scales + blocks, scale)
    elif FORMAT_ID == BF16:
        stored = to_bf16(x)
    else:
        stored = x
    if MASKED:
        tl.store(p + local, stored, mask=inside)
    else:
        tl.store(p + local, stored)
