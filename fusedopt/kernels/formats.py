"""Loads and stores of optimizer states in each Format, on tiles of (rows, 256): the Triton twin of csrc/formats.h.

int8 is the blockwise dynamic map of Dettmers et al. (arXiv 2110.02861) in closed form. With k = code + 1 (unsigned) or
|code - 127| (signed), n = 2^floor(log2 k) and 10^d the scale of k's decade, both directions use f = (k + 1/2) / n in
[1, 2), the mantissa of k + 1/2:
    value = 10^d (0.9 f - 0.8),   k = floor(n z) with z = value / (0.9 10^d) + 8/9.
The only table left is 10^d, a product of three selected constants. Lookups lose: tl.gather becomes shuffles at a
quarter of the rate of arithmetic, a table in global memory needs an address and a load for every entry.
"""

import triton
import triton.language as tl

FP32 = tl.constexpr(0)
BF16 = tl.constexpr(1)
INT8 = tl.constexpr(2)  # a format code is one of these, plus 0x100 for the signed map


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
def spread(x, ROWS: tl.constexpr):
    """(ROWS * 32,) to (ROWS, 256): each value for 8 consecutive elements, in the lane that has it."""
    x = tl.reshape(x, (ROWS, 32))
    x = tl.join(x, x)
    x = tl.join(x, x)
    return tl.reshape(tl.join(x, x), (ROWS, 256))


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
def int8_encode(x, inverse, SIGNED: tl.constexpr):
    magnitude = bits(x) & 0x7FFFFFFF
    y = from_bits(magnitude) * inverse
    y = tl.where(
        y < (1.0 - 0.45 / 128 if SIGNED else 1.0 - 0.45 / 256), y, 1.02
    )  # NaN too; 1.02 lands on the last code
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
    if not SIGNED:
        z = tl.maximum(z, 1.0)  # never code 0 for a second moment that is not zero: m / sqrt(v) stays bounded
    k = (bits(z).to(tl.int32) - 0x3F000000) >> shift
    if SIGNED:
        k = tl.where(y < 0.275e-6, 0, k)
        return tl.maximum(tl.where(x < 0.0, 127 - k, 127 + k), 0).to(tl.uint8)  # -1 has no code
    else:
        smallest = tl.where(inverse > 0.0, 0x00800000, 0x7FFFFFFF).to(tl.uint32)  # subnormal counts as 0
        return tl.where(magnitude >= smallest, k - 1, 0).to(tl.uint8)


@triton.jit
def row_pointer(table, column, rows, row, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """A tensor's address from the row table, as a pointer to TYPE, promised to be a multiple of ALIGN bytes.

    The promise is made on the cast itself: made on the result of a call, it is lost when the call is inlined (Triton
    3.6).
    """
    p = tl.load(table + column * rows + row).to(tl.pointer_type(TYPE))
    if ALIGN > 1:
        p = tl.multiple_of(p, ALIGN)
    return p


@triton.jit
def state_pointer(table, state, rows, row, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    FORMAT_ID: tl.constexpr = FORMAT & 0xFF
    if FORMAT_ID == FP32:
        return row_pointer(table, 2 + state, rows, row, tl.float32, 16 if ALIGNED else 1)
    elif FORMAT_ID == BF16:
        return row_pointer(table, 2 + state, rows, row, tl.bfloat16, 16 if ALIGNED else 1)
    else:  # promised 8 bytes only: 16 codes a thread would force every other stream into pieces of 16 elements a thread
        return row_pointer(table, 2 + state, rows, row, tl.uint8, 8 if ALIGNED else 1)


@triton.jit
def load_stream(p, local, inside, whole, other, ALIGNED: tl.constexpr):
    """A tile's elements: without masks, in 16-byte pieces, where the whole tile is inside an aligned tensor.

    The branch is around each access, not around the whole step: a second copy of the arithmetic needs twice the
    registers.
    """
    if ALIGNED:
        if whole:
            x = tl.load(p + local)
        else:
            x = tl.load(p + local, mask=inside, other=other)
    else:
        x = tl.load(p + local, mask=inside, other=other)
    return x


@triton.jit
def store_stream(p, x, local, inside, whole, ALIGNED: tl.constexpr):
    if ALIGNED:
        if whole:
            tl.store(p + local, x)
        else:
            tl.store(p + local, x, mask=inside)
    else:
        tl.store(p + local, x, mask=inside)


@triton.jit
def load_state(p, scales, local, inside, whole, blocks, inside_blocks, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """fp32 values of a tile; zeros outside the tensor, so that they raise no absmax."""
    FORMAT_ID: tl.constexpr = FORMAT & 0xFF
    SIGNED: tl.constexpr = (FORMAT & 0x100) != 0
    x = load_stream(p, local, inside, whole, 127 if FORMAT_ID == INT8 and SIGNED else 0, ALIGNED)
    if FORMAT_ID == INT8:
        scale = tl.load(scales + blocks, mask=inside_blocks, other=0.0)
        return int8_decode(x, spread(scale, x.shape[0]), SIGNED)
    else:
        return x.to(tl.float32)


@triton.jit
def store_state(x, p, scales, local, inside, whole, blocks, inside_blocks, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    FORMAT_ID: tl.constexpr = FORMAT & 0xFF
    if FORMAT_ID == INT8:
        # The integer order of magnitudes puts NaN above infinity: a non-finite element poisons its block, visibly.
        largest = tl.max((bits(x) & 0x7FFFFFFF).to(tl.int32), axis=1, keep_dims=True)
        largest = tl.where(largest < 0x00800000, 0, largest)
        scale = from_bits(largest)
        usable = (largest > 0) & (largest < 0x7F800000)
        inverse = tl.where(usable, 1.0 / tl.where(usable, scale, 1.0), 0.0)
        stored = int8_encode(x, inverse, (FORMAT & 0x100) != 0)
        lanes = tl.reshape(tl.broadcast_to(scale, (x.shape[0], 32)), (x.shape[0] * 32,))
        tl.store(scales + blocks, lanes, mask=inside_blocks & (tl.arange(0, x.shape[0] * 32) % 32 == 0))
    elif FORMAT_ID == BF16:
        stored = to_bf16(x)
    else:
        stored = x
    store_stream(p, stored, local, inside, whole, ALIGNED)
