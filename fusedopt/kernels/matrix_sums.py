"""Sums of squares over the rows and columns of a gradient in one read (Adafactor, arXiv 1804.04235; APOLLO, arXiv 2412.05270).

With q = (mul g)^2 + eps: row i is sum_j q b_j, column j is sum_i a_i q, the total sum_ij a_i q b_j. Two stages, so that
each sum is added in one fixed order: `partial_kernel` leaves the sums of each tile, `add_kernel` adds them up.
"""

import triton
import triton.language as tl

from fusedopt.kernels.bits import nearest, widen
from fusedopt.kernels.operands import places, steps

# Rows and columns of a program's tile. Its partial sums are 4 / 128 + 4 / 256 bytes an element, 2.3 % of a bf16 matrix:
# smaller tiles would cost memory, larger ones leave fewer programs than an H200 runs at a time for 2048 x 2048.
TILE_ROWS = tl.constexpr(128)
TILE_COLS = tl.constexpr(256)
PIECE = tl.constexpr(16)


@triton.jit(do_not_specialize=["mul", "rows", "cols"])
def partial_kernel(
    grad, row_part, col_part, total_part, row_weight, col_weight, mul, rows, cols, eps,
    COLS8: tl.constexpr,
):  # fmt: skip
    """Sums of one tile: row_part [tiles across, rows], col_part [tiles down, cols], total_part [tiles], each or None.

    Grid: one program per tile of 128 x 256, read 16 rows at a time; the last ones of a row or column mask what is outside.
    """
    if COLS8:
        cols = cols // 8 * 8
    across = tl.cdiv(cols, TILE_COLS)
    tile_row, tile_col = tl.program_id(0) // across, tl.program_id(0) % across
    factor = 1.0
    if mul is not None:
        factor = tl.load(mul)
    first, col = tile_row * TILE_ROWS, tile_col * TILE_COLS
    j = col + tl.arange(0, TILE_COLS)
    weight = None
    if col_weight is not None:
        weight = tl.load(col_weight + j, mask=j < cols, other=0.0)[None, :]
    down = tl.zeros((PIECE, TILE_COLS), tl.float32)
    total = tl.zeros((PIECE,), tl.float32)
    for piece in range(0, TILE_ROWS, PIECE):
        at, inside = _piece(first + piece, col, rows, cols)
        q = widen(tl.load(grad + at, mask=inside, other=0.0)) * factor
        q = tl.where(inside, q * q + eps, 0.0)
        i = first + piece + tl.arange(0, PIECE)
        a = None
        if row_weight is not None:
            a = tl.load(row_weight + i, mask=i < rows, other=0.0)
        if col_part is not None:
            down += q if row_weight is None else q * a[:, None]
        if row_part is not None or total_part is not None:
            sums = tl.sum(q if col_weight is None else q * weight, axis=1)
            if row_part is not None:
                tl.store(row_part + tile_col.to(tl.int64) * rows + i, sums, mask=i < rows)
            if total_part is not None:
                total += sums if row_weight is None else sums * a
    if col_part is not None:
        tl.store(col_part + tile_row.to(tl.int64) * cols + j, tl.sum(down, axis=0), mask=j < cols)
    if total_part is not None:
        tl.store(total_part + tl.program_id(0), tl.sum(total))


@triton.jit
def _piece(row, col, rows, cols):
    i, j = places(row, col, PIECE, TILE_COLS)
    return i * cols + j, (i < rows) & (j < cols)


@triton.jit(do_not_specialize=["count", "numel"])
def add_kernel(part, out, count, numel, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out[j] = sum over k of part[k, j], part [count, numel]. Grid: one program per COLS sums."""
    j = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)[None, :]
    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in steps(0, count, ROWS):
        k = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(part + (k.to(tl.int64) * numel + j), mask=(k < count) & (j < numel), other=0.0)
    j = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    tl.store(out + j, nearest(tl.sum(total, axis=0), out.dtype.element_ty), mask=j < numel)
