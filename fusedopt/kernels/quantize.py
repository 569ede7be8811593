"""Blockwise quantisation and dequantisation of one flat tensor: the codecs of the optimizer step as kernels of their own.

Grid: one program per tile of 2048 elements, 8 for each of 256 threads; the last program owns the tail. The step's
functions do the work, so codes are those that a step would store.
"""

import triton
import triton.language as tl

from fusedopt.kernels.access import load_stream, store_stream
from fusedopt.kernels.bits import nearest, widen
from fusedopt.kernels.states import load_codes, store_codes

TILE_ROWS = tl.constexpr(8)
TILE = tl.constexpr(2048)


@triton.jit
def _place(numel):
    """Of this program's tile: its number, indices of elements in it, which are inside, whether all are, elements left."""
    tile = tl.program_id(0).to(tl.int64)
    left = tl.minimum(numel - tile * TILE, TILE).to(tl.int32)
    local = tl.arange(0, TILE_ROWS)[:, None] * 256 + tl.arange(0, 256)[None, :]
    return tile, local, local < left, left == TILE, left


@triton.jit(do_not_specialize=["numel"])
def quantize_kernel(x, codes, scale, numel, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    tile, local, inside, whole, left = _place(numel)
    value = widen(load_stream(x + tile * TILE, local, inside, whole, 0.0, ALIGNED))
    store_codes(value, codes, scale, tile, local, inside, whole, left, FORMAT, ALIGNED)


@triton.jit(do_not_specialize=["numel"])
def dequantize_kernel(codes, scale, out, numel, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    tile, local, inside, whole, left = _place(numel)
    value = load_codes(codes, scale, tile, local, inside, whole, left, FORMAT, ALIGNED)
    store_stream(out + tile * TILE, nearest(value, out.dtype.element_ty), local, inside, whole, ALIGNED)
