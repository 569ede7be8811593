"""The two passes of M-FAC (arXiv 2107.03356) over a window of gradients in its format: products of a row with all, a combination.

Rows have `width` elements, a multiple of 256 where the format has blocks; decoded in registers, multiplied and summed in
fp64, in an order that nothing changes. Grid: a tile of 2048 elements by a group of DEPTH rows each program, 8 elements for each
of 256 threads; the last tile masks its tail, and the last group ends with the window.
"""

import triton
import triton.language as tl

from fusedopt.kernels.access import load_stream
from fusedopt.kernels.bits import widen
from fusedopt.kernels.operands import steps
from fusedopt.kernels.quantize import TILE, _place
from fusedopt.kernels.states import BF16, FP32, load_codes


@triton.jit
def _row(rows, scales, row, row_size, scale_count, tile, local, inside, whole, left,
         FORMAT: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """fp64 values of a tile of a row; zeros past its end."""
    FORMAT_ID: tl.constexpr = FORMAT & 0xFF
    p = rows + row.to(tl.int64) * row_size
    if FORMAT_ID == FP32 or FORMAT_ID == BF16:
        x = widen(load_stream(p + tile * TILE, local, inside, whole, 0.0, ALIGNED))
    else:
        x = load_codes(p, scales + row.to(tl.int64) * scale_count, tile, local, inside, whole, left, FORMAT, ALIGNED)
    return x.to(tl.float64)


@triton.jit(do_not_specialize=["window", "width", "scale_count"])
def products_kernel(rows, scales, place, part, window, width, row_size, scale_count,
                    FORMAT: tl.constexpr, ALIGNED: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """part fp64 [tiles, window]: a tile's share of the products of row `place` (int64 [1]) with each row.

    row_size: entries from one row to the next, scale_count: scales.
    """
    tile, local, inside, whole, left = _place(width)
    at = (tile, local, inside, whole, left)
    g = _row(rows, scales, tl.load(place), row_size, scale_count, *at, FORMAT, ALIGNED)
    first = tl.program_id(1) * DEPTH
    for k in steps(0, tl.minimum(DEPTH, window - first), 1):
        row = first + k
        x = _row(rows, scales, row, row_size, scale_count, *at, FORMAT, ALIGNED)
        tl.store(part + tile * window + row, tl.sum(tl.sum(g * x, axis=1), axis=0))


@triton.jit(do_not_specialize=["window", "width", "scale_count"])
def combine_kernel(rows, scales, y, part, window, width, row_size, scale_count,
                   FORMAT: tl.constexpr, ALIGNED: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """part fp64 [groups, width]: the sum over the rows of a group of y (fp64 [window]) times row."""
    tile, local, inside, whole, left = _place(width)
    at = (tile, local, inside, whole, left)
    total = tl.zeros(local.shape, tl.float64)
    first = tl.program_id(1) * DEPTH
    for k in steps(0, tl.minimum(DEPTH, window - first), 1):
        row = first + k
        total += tl.load(y + row) * _row(rows, scales, row, row_size, scale_count, *at, FORMAT, ALIGNED)
    tl.store(part + tl.program_id(1).to(tl.int64) * width + tile * TILE + local, total, mask=inside)
