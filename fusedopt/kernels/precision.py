"""Loads and stores of parameters in every ParamPrecision (csrc/precision.h): the parameter and its companion.

With x the fp32 weight, p the parameter, c the companion:
kahan     p = nearest(x), c = stochastic(x - p) in p's type; x = p + c
split24   bf16 p and 8 low bits of x rounded stochastically to 24 bits; split32: 16 low bits, exact
master    c = x in fp32, p = nearest(c) is only written
"""

import triton
import triton.language as tl

from fusedopt.kernels.access import load_stream, row_pointer, store_stream
from fusedopt.kernels.bits import bits, nearest, widen
from fusedopt.kernels.rounding import stochastic, uniform16

NEAREST = tl.constexpr(0)
STOCHASTIC = tl.constexpr(1)
KAHAN = tl.constexpr(2)
SPLIT24 = tl.constexpr(3)
SPLIT32 = tl.constexpr(4)
MASTER = tl.constexpr(5)


@triton.jit
def companion_pointer(table, rows, row, PARAM: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr):
    if PRECISION == KAHAN:
        return row_pointer(table, 13, rows, row, PARAM, 16 if ALIGNED else 1)
    elif PRECISION == SPLIT24:
        return row_pointer(table, 13, rows, row, tl.int8, 8 if ALIGNED else 1)
    elif PRECISION == SPLIT32:
        return row_pointer(table, 13, rows, row, tl.int16, 16 if ALIGNED else 1)
    else:
        return row_pointer(table, 13, rows, row, tl.float32, 16 if ALIGNED else 1)


@triton.jit
def split_bits(x):
    """The bits of a weight that is split: of a NaN only what fits in bf16."""
    u = bits(x)
    return tl.where(x == x, u, (u & 0xFFFF0000) | 0x400000)


@triton.jit
def join_split(high, low):
    """The weight of a bf16 and its low bits (int32). Where the bf16 is a zero that was put there later, negative low bits
    are dropped: they would wrap around into a NaN."""
    h = high.to(tl.uint16, bitcast=True).to(tl.int32) << 16
    low = tl.where((h & 0x7FFFFFFF) == 0, tl.maximum(low, 0), low)
    return (h + low).to(tl.float32, bitcast=True)


@triton.jit
def as_bf16(u):
    return u.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def load_param(p, c, local, inside, whole, PRECISION: tl.constexpr, ALIGNED: tl.constexpr):
    """The fp32 weights a tile's parameters and companions stand for; zeros outside."""
    if PRECISION == MASTER:
        return load_stream(c, local, inside, whole, 0.0, ALIGNED)
    elif PRECISION == KAHAN:
        x = widen(load_stream(p, local, inside, whole, 0.0, ALIGNED))
        return x + widen(load_stream(c, local, inside, whole, 0.0, ALIGNED))
    elif PRECISION == SPLIT24:
        x = load_stream(p, local, inside, whole, 0.0, ALIGNED)
        return join_split(x, load_stream(c, local, inside, whole, 0, ALIGNED).to(tl.int32) << 8)
    elif PRECISION == SPLIT32:
        x = load_stream(p, local, inside, whole, 0.0, ALIGNED)
        return join_split(x, load_stream(c, local, inside, whole, 0, ALIGNED).to(tl.int32))
    else:
        return widen(load_stream(p, local, inside, whole, 0.0, ALIGNED))


@triton.jit
def store_param(
    x, p, c, tile, local, inside, whole, seed, step, tensor, first_octet,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """p, c: of the tile's first element."""
    random16 = None
    if (PRECISION == STOCHASTIC or PRECISION == KAHAN) or PRECISION == SPLIT24:
        random16 = uniform16(seed, step, tensor, first_octet, tile, 0, local.shape[0])
    store_rounded(x, random16, p, c, local, inside, whole, PRECISION, ALIGNED)


@triton.jit
def store_rounded(x, random16, p, c, local, inside, whole, PRECISION: tl.constexpr, ALIGNED: tl.constexpr):
    """random16: of the shape of x, or None where PRECISION draws none."""
    TYPE: tl.constexpr = p.dtype.element_ty
    if PRECISION == STOCHASTIC:
        stored = stochastic(x, random16, TYPE)
    elif PRECISION == SPLIT24:
        u = (split_bits(x) + (random16 >> 8)) >> 8
        stored = as_bf16((u + 0x80) >> 8)
        store_stream(c, u.to(tl.uint8).to(tl.int8, bitcast=True), local, inside, whole, ALIGNED)
    elif PRECISION == SPLIT32:
        u = split_bits(x)
        stored = as_bf16((u + 0x8000) >> 16)
        store_stream(c, u.to(tl.uint16).to(tl.int16, bitcast=True), local, inside, whole, ALIGNED)
    else:
        stored = nearest(x, TYPE)
        if PRECISION == MASTER:
            store_stream(c, x, local, inside, whole, ALIGNED)
        elif PRECISION == KAHAN:
            rounded = widen(stored)
            rest = tl.where(tl.abs(rounded) < float("inf"), x - rounded, 0.0)
            store_stream(c, stochastic(rest, random16, TYPE), local, inside, whole, ALIGNED)
    store_stream(p, stored, local, inside, whole, ALIGNED)
