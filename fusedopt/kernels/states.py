"""Loads and stores of optimizer states, tiles of (rows, 256) elements, in every Format; the reduction to a block's scale."""

import triton
import triton.language as tl

from fusedopt.kernels.access import load_stream, row_pointer, spread, store_stream
from fusedopt.kernels.arithmetic import div
from fusedopt.kernels.bits import LARGEST, SMALLEST, to_bf16, widen
from fusedopt.kernels.formats import fp8, int4, int8, int8c
from fusedopt.kernels.formats.fp8 import fp8_decode, fp8_encode
from fusedopt.kernels.formats.int4 import int4_decode, int4_encode, pack, unpack
from fusedopt.kernels.formats.int8 import int8_decode, int8_encode
from fusedopt.kernels.formats.int8c import int8c_decode, int8c_encode
from fusedopt.kernels.rounding import bf16_stochastic, uniform16

# A format word is one of these, plus 0x100 for signed (csrc/fusedopt.h), plus RAISED in these kernels: the rule makes something
# of zeros (a stored eps), which past the end of a tensor would raise the scale of its last block.
FP32 = tl.constexpr(0)
BF16 = tl.constexpr(1)
INT8 = tl.constexpr(2)
INT8C = tl.constexpr(3)
FP8 = tl.constexpr(4)
INT4 = tl.constexpr(5)
BF16_STOCHASTIC = tl.constexpr(6)
INT8_TOP = int8.TOP
INT8C_TOP = int8c.TOP
FP8_TOP = fp8.TOP
INT4_TOP = int4.TOP


@triton.jit
def state_pointer(table, state, rows, row, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    FORMAT_ID: tl.constexpr = FORMAT & 0xFF
    if FORMAT_ID == FP32:
        return row_pointer(table, 2 + state, rows, row, tl.float32, 16 if ALIGNED else 1)
    elif FORMAT_ID == BF16 or FORMAT_ID == BF16_STOCHASTIC:
        return row_pointer(table, 2 + state, rows, row, tl.bfloat16, 16 if ALIGNED else 1)
    else:  # promised 8 bytes only: 16 codes a thread would force every other stream into pieces of 16 elements a thread
        return row_pointer(table, 2 + state, rows, row, tl.uint8, 8 if ALIGNED else 1)


@triton.jit
def decode(code, scale, FORMAT: tl.constexpr):
    FORMAT_ID: tl.constexpr = FORMAT & 0xFF
    SIGNED: tl.constexpr = (FORMAT & 0x100) != 0
    if FORMAT_ID == INT8:
        return int8_decode(code, scale, SIGNED)
    elif FORMAT_ID == INT8C:
        return int8c_decode(code, scale, SIGNED)
    elif FORMAT_ID == FP8:
        return fp8_decode(code, scale, SIGNED)
    else:
        return int4_decode(code, scale, SIGNED)


@triton.jit
def encode(x, scale, FORMAT: tl.constexpr):
    """Codes of x; scale: fp32, a lane's 8 elements each (`block_scales`)."""
    FORMAT_ID: tl.constexpr = FORMAT & 0xFF
    SIGNED: tl.constexpr = (FORMAT & 0x100) != 0
    TOP: tl.constexpr = (
        INT8_TOP
        if FORMAT_ID == INT8
        else INT8C_TOP
        if FORMAT_ID == INT8C
        else FP8_TOP
        if FORMAT_ID == FP8
        else INT4_TOP
    )
    usable = scale > 0.0
    inverse = spread(tl.where(usable, div(1.0, tl.where(usable, scale, 1.0)), 0.0), x.shape[0])
    top = spread(tl.where(usable, TOP, 0.0), x.shape[0])
    if FORMAT_ID == INT8:
        return int8_encode(x, inverse, top, SIGNED)
    elif FORMAT_ID == INT8C:
        return int8c_encode(x, inverse, top, SIGNED)
    elif FORMAT_ID == FP8:
        return fp8_encode(x, inverse, top, SIGNED)
    else:
        return int4_encode(x, inverse, top, SIGNED)


@triton.jit
def block_scales(x, LANES: tl.constexpr):
    """fp32 (rows * 32,): for every 8 elements of x the scale of their block of LANES * 8 elements.

    |x| + 0 x is NaN for what is not finite, and a maximum of floats leaves NaN out. From 8 elements to the block in
    integers: NVIDIA reduces 32 integers in one instruction.
    """
    ROWS: tl.constexpr = x.shape[0]
    eight = tl.max(tl.reshape(tl.abs(x) + x * 0.0, (ROWS, 32, 8)), axis=2)
    eight = tl.where(eight >= SMALLEST, tl.minimum(eight, LARGEST), 0.0).to(tl.int32, bitcast=True)
    eight = tl.reshape(eight, (ROWS * 32 // LANES, LANES))
    block = tl.max(eight, axis=1, keep_dims=True)
    block = tl.broadcast_to(block, (ROWS * 32 // LANES, LANES))
    return tl.reshape(block, (ROWS * 32,)).to(tl.float32, bitcast=True)


@triton.jit
def load_codes(p, scales, tile, local, inside, whole, left, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """fp32 values of a tile of a blockwise format; zeros outside the tensor, so that they raise no scale.

    p: the tensor's codes. left: elements from the tile's first on. A block's scale is loaded by each lane, in one
    dimension: a (8, 1) tensor of pointers would get a layout that is contiguous over rows, and every scale would move
    through shared memory.
    """
    FORMAT_ID: tl.constexpr = FORMAT & 0xFF
    SIGNED: tl.constexpr = (FORMAT & 0x100) != 0
    ROWS: tl.constexpr = local.shape[0]
    LANES: tl.constexpr = 16 if FORMAT_ID == INT4 else 32
    lane = tl.arange(0, ROWS * 32)
    scale = tl.load(scales + (tile * (ROWS * 32 // LANES) + lane // LANES), mask=lane * 8 < left, other=0.0)
    scale = spread(scale, ROWS)
    if FORMAT_ID == INT4:
        bytes = tl.arange(0, ROWS)[:, None] * 128 + tl.arange(0, 128)[None, :]
        pairs = load_stream(p + tile * (ROWS * 128), bytes, bytes * 2 < left, whole, 0, ALIGNED)
        x = decode(unpack(pairs), scale, FORMAT)
        if ALIGNED:
            if not whole:
                x = tl.where(inside, x, 0.0)
        else:
            x = tl.where(inside, x, 0.0)
        return x
    else:
        none: tl.constexpr = 127 if FORMAT_ID == INT8 and SIGNED else 0
        code = load_stream(p + tile * (ROWS * 256), local, inside, whole, none, ALIGNED)
        return decode(code, scale, FORMAT)


@triton.jit
def store_codes(x, p, scales, tile, local, inside, whole, left, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """Stores a tile's codes, and each block's scale from the block's first lane."""
    FORMAT_ID: tl.constexpr = FORMAT & 0xFF
    ROWS: tl.constexpr = local.shape[0]
    LANES: tl.constexpr = 16 if FORMAT_ID == INT4 else 32
    if FORMAT & 0x200:
        x = tl.where(inside, x, 0.0)
    scale = block_scales(x, LANES)
    codes = encode(x, scale, FORMAT)
    lane = tl.arange(0, ROWS * 32)
    first = (lane % LANES == 0) & (lane * 8 < left)
    tl.store(scales + (tile * (ROWS * 32 // LANES) + lane // LANES), scale, mask=first)
    if FORMAT_ID == INT4:
        bytes = tl.arange(0, ROWS)[:, None] * 128 + tl.arange(0, 128)[None, :]
        store_stream(p + tile * (ROWS * 128), pack(codes), bytes, bytes * 2 < left, whole, ALIGNED)
    else:
        store_stream(p + tile * (ROWS * 256), codes, local, inside, whole, ALIGNED)


@triton.jit
def load_state(p, scales, tile, local, inside, whole, left, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    FORMAT_ID: tl.constexpr = FORMAT & 0xFF
    if (FORMAT_ID == FP32 or FORMAT_ID == BF16) or FORMAT_ID == BF16_STOCHASTIC:
        return widen(load_stream(p + tile * (local.shape[0] * 256), local, inside, whole, 0.0, ALIGNED))
    else:
        return load_codes(p, scales, tile, local, inside, whole, left, FORMAT, ALIGNED)


@triton.jit
def store_state(
    x, p, scales, tile, local, inside, whole, left, seed, step, tensor, first_octet,
    STREAM: tl.constexpr, FORMAT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    FORMAT_ID: tl.constexpr = FORMAT & 0xFF
    p_at = p + tile * (local.shape[0] * 256)
    if FORMAT_ID == FP32:
        store_stream(p_at, x, local, inside, whole, ALIGNED)
    elif FORMAT_ID == BF16:
        store_stream(p_at, to_bf16(x), local, inside, whole, ALIGNED)
    elif FORMAT_ID == BF16_STOCHASTIC:
        random16 = uniform16(seed, step, tensor, first_octet, tile, STREAM, local.shape[0])
        store_stream(p_at, bf16_stochastic(x, random16), local, inside, whole, ALIGNED)
    else:
        store_codes(x, p, scales, tile, local, inside, whole, left, FORMAT, ALIGNED)
