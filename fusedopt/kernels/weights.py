"""The step of int8 weights (Q-GaLore, arXiv 2407.08296): decodes, updates and encodes some rows in one pass.

Grid: one program per 8 groups of 256 elements; the last program owns the tail. Codes, scales and zeros are those of
fusedopt.weights, whose random bits belong to elements: see kernels/rounding.py.
"""

import triton
import triton.language as tl

from fusedopt.kernels.access import load_stream, store_stream
from fusedopt.kernels.bits import bits, widen
from fusedopt.kernels.rounding import uniform16

TILE_GROUPS = tl.constexpr(8)
TILE = tl.constexpr(2048)


@triton.jit
def round_even(x):
    """To the nearest whole number, ties to even, for |x| below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def encode(x, random16, STOCHASTIC: tl.constexpr):
    """(codes uint8, scale fp32, zero fp32) of groups, the rows of x."""
    broken = tl.max(((bits(x) & 0x7F800000) == 0x7F800000).to(tl.int32), 1) > 0
    clean = tl.where(broken[:, None], 0.0, x)
    low, high = tl.minimum(tl.min(clean, 1), 0.0), tl.maximum(tl.max(clean, 1), 0.0)
    span = high - low
    broken = broken | (span > 3.4028234663852886e38)
    scale = tl.div_rn(tl.maximum(tl.where(broken, 1.0, span), 1e-5), tl.full(span.shape, 255.0, tl.float32))
    zero = tl.minimum(tl.maximum(-round_even(tl.div_rn(tl.where(broken, 0.0, low), scale)), 0.0), 255.0)
    units = tl.div_rn(tl.where(broken[:, None], 0.0, x), tl.broadcast_to(scale[:, None], x.shape))
    if STOCHASTIC:
        whole = tl.floor(units)
        whole += tl.where((units - whole) * 65536.0 > random16.to(tl.float32), 1.0, 0.0)
    else:
        whole = round_even(units)
    codes = tl.minimum(tl.maximum(whole + zero[:, None], 0.0), 255.0)
    return codes.to(tl.int32).to(tl.uint8), tl.where(broken, float("nan"), scale), zero


@triton.jit(do_not_specialize=["first", "numel", "tensor", "factor"])
def update_kernel(
    codes,
    scale,
    zero,
    u,
    scalars,
    found_inf,
    first,
    numel,
    tensor,
    factor,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Elements `first` .. first + numel of a weight: p <- p - (lr * factor * u + decay * p).

    first: a multiple of 256. Tiles, and so random bits, are those of the whole weight, whose codes, scale and zero these
    are. u: [numel]. scalars: fp32 [SCALAR_STRIDE], see fusedopt.abi. ALIGNED: codes and u begin at multiples of 16 bytes.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0.0:
            return
    words = scalars.to(tl.pointer_type(tl.uint32))
    lr, decay = tl.load(scalars), tl.load(scalars + 1)
    seed = tl.load(words + 4).to(tl.uint64) | (tl.load(words + 5).to(tl.uint64) << 32)
    step = tl.load(words + 6)
    begin = tl.multiple_of(first.to(tl.int64), 256)
    tile = begin // TILE + tl.program_id(0)
    start = tile * TILE
    local = tl.arange(0, TILE_GROUPS)[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = (start + local >= begin) & (start + local < begin + numel)
    whole = (start >= begin) & (start + TILE <= begin + numel)
    group = tile * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
    owned = (group * 256 >= begin) & (group * 256 < begin + numel)
    difference = load_stream(codes + start, local, inside, whole, 0, ALIGNED).to(tl.float32)
    difference -= tl.load(zero + group, mask=owned, other=0).to(tl.float32)[:, None]
    p = tl.where(inside, difference * tl.load(scale + group, mask=owned, other=0.0)[:, None], 0.0)
    direction = widen(load_stream(u + (start - begin), local, inside, whole, 0.0, ALIGNED))
    p = p - (lr * factor * direction + decay * p)
    random16 = uniform16(seed, step, tensor, 0, tile, 0, TILE_GROUPS) if STOCHASTIC else local
    new_codes, new_scale, new_zero = encode(p, random16, STOCHASTIC)
    store_stream(codes + start, new_codes, local, inside, whole, ALIGNED)
    tl.store(scale + group, new_scale, mask=owned)
    tl.store(zero + group, new_zero.to(tl.int32).to(tl.uint8), mask=owned)
