"""The projection of a gradient with random numbers from a seed, and its squares, in one read (APOLLO, arXiv 2412.05270).

R = P^T G (LEFT) or G P^T, with P of kernels/normal.py, and the sums of squares of G's columns (LEFT) or rows.
"""

import triton
import triton.language as tl

from fusedopt.kernels.bits import INTERPRETED, nearest, widen
from fusedopt.kernels.matrix import dot
from fusedopt.kernels.normal import normals
from fusedopt.kernels.operands import operand_tile, places, steps

# Rows and columns of a program's tile at rank 1, read 16 rows at a time. Two partial sums: 8 / 128 bytes an element on the left,
# 8 / 256 on the right, 3 % of a bf16 matrix.
TILE_ROWS = tl.constexpr(128)
TILE_COLS = tl.constexpr(256)
PIECE = tl.constexpr(16)


@triton.jit
def projector_tile(
    stored, component, place, rank, depth, key, scale,
    TYPE: tl.constexpr, R: tl.constexpr, K: tl.constexpr, K8: tl.constexpr,
):  # fmt: skip
    """(R, K) of TYPE from (component, place) on: loaded where there is a matrix [rank, depth], else drawn. place: a multiple
    of 4. What is drawn outside meets only zeros of the gradient, or parts of the result that are not stored."""
    if stored is not None:
        tile = operand_tile(stored, None, None, component, place, rank, depth, TYPE, R, K, 8, K8)
    else:
        j = component + tl.arange(0, R)[:, None]
        tile = nearest(normals(j, place // 4 + tl.arange(0, K // 4)[None, :], key, scale), TYPE)
        if INTERPRETED:  # as in operand_tile
            tile = widen(tile)
    return tile


@triton.jit(do_not_specialize=["rank", "depth", "seed_low", "seed_high", "tensor", "step"])
def draw_kernel(
    out, rank, depth, seed_low, seed_high, tensor, step, scale, DEPTH8: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out [rank, depth] = the projector, rounded to nearest. Grid: one program per component and K places."""
    if DEPTH8:
        depth = depth // 8 * 8
    across = tl.cdiv(depth, K)
    component, place = tl.program_id(0) // across, tl.program_id(0) % across * K
    key = (seed_low, seed_high, tensor, step)
    j = component + tl.arange(0, 1)[:, None]
    tile = normals(j, place // 4 + tl.arange(0, K // 4)[None, :], key, scale)
    i, k = places(component, place, 1, K)
    tl.store(out + (i * depth + k), nearest(tile, out.dtype.element_ty), mask=(i < rank) & (k < depth))


@triton.jit(do_not_specialize=["rows", "cols", "rank", "seed_low", "seed_high", "tensor", "step"])
def seeded_kernel(
    grad, stored, out, squares, rows, cols, rank, seed_low, seed_high, tensor, step, scale,
    LEFT: tl.constexpr, TYPE: tl.constexpr, COLS8: tl.constexpr, DEPTH8: tl.constexpr, RANK8: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of R, BR components by BS columns (LEFT) or rows. stored: P [rank, rows or cols], or None to draw it here.

    Grid: one program per tile, which walks the whole inner dimension; those that share a tile of the gradient follow each
    other, and the first of them owns its squares.
    """
    if COLS8:
        cols = cols // 8 * 8
    if RANK8:
        rank = rank // 8 * 8
    key = (seed_low, seed_high, tensor, step)
    tiles = tl.cdiv(rank, BR)
    component, first = tl.program_id(0) % tiles * BR, tl.program_id(0) // tiles * BS
    s = first + tl.arange(0, BS)
    if LEFT:
        depth = rows
        if DEPTH8:
            depth = rows // 8 * 8
        acc = tl.zeros((BR, BS), tl.float32)
        sums = tl.zeros((BK, BS), tl.float32)
        for k in steps(0, rows, BK):
            p = projector_tile(stored, component, k, rank, depth, key, scale, TYPE, BR, BK, DEPTH8)
            g = operand_tile(grad, None, None, k, first, rows, cols, TYPE, BK, BS, 8, COLS8)
            acc = dot(p, g, acc, INPUT_PRECISION)
            if squares is not None:
                wide = widen(g)
                sums += wide * wide
        if squares is not None:
            tl.store(squares + s, tl.sum(sums, axis=0), mask=s < tl.where(component == 0, cols, 0))
        i, j = places(component, first, BR, BS)
        tl.store(out + (i * cols + j), nearest(acc, out.dtype.element_ty), mask=(i < rank) & (j < cols))
    else:
        acc = tl.zeros((BS, BR), tl.float32)
        sums = tl.zeros((BS, BK), tl.float32)
        for k in steps(0, cols, BK):
            p = projector_tile(stored, component, k, rank, cols, key, scale, TYPE, BR, BK, COLS8)
            g = operand_tile(grad, None, None, first, k, rows, cols, TYPE, BS, BK, 8, COLS8)
            acc = dot(g, tl.trans(p), acc, INPUT_PRECISION)
            if squares is not None:
                wide = widen(g)
                sums += wide * wide
        if squares is not None:
            tl.store(squares + s, tl.sum(sums, axis=1), mask=s < tl.where(component == 0, rows, 0))
        i, j = places(first, component, BS, BR)
        tl.store(out + (i * rank + j), nearest(acc, out.dtype.element_ty), mask=(i < rows) & (j < rank))


@triton.jit(do_not_specialize=["rows", "cols", "seed_low", "seed_high", "tensor", "step"])
def single_kernel(
    grad, part, square_part, rows, cols, seed_low, seed_high, tensor, step,
    LEFT: tl.constexpr, TYPE: tl.constexpr, COLS8: tl.constexpr,
):  # fmt: skip
    """Rank 1: sums of one tile, weighted and of squares. LEFT: part, square_part [tiles down, cols], else [tiles across, rows].

    Grid: one program per tile of 128 x 256, read 16 rows at a time; the last ones of a row or column mask what is outside.
    """
    if COLS8:
        cols = cols // 8 * 8
    key = (seed_low, seed_high, tensor, step)
    across = tl.cdiv(cols, TILE_COLS)
    tile_row, tile_col = tl.program_id(0) // across, tl.program_id(0) % across
    first, col = tile_row * TILE_ROWS, tile_col * TILE_COLS
    zero = tl.arange(0, 1)[:, None]
    if LEFT:
        down = tl.zeros((PIECE, TILE_COLS), tl.float32)
        down_squares = tl.zeros((PIECE, TILE_COLS), tl.float32)
        for piece in range(0, TILE_ROWS, PIECE):
            quad = (first + piece) // 4 + tl.arange(0, PIECE // 4)[None, :]
            weight = widen(nearest(normals(zero, quad, key, -2.0), TYPE))
            g = _piece(grad, first + piece, col, rows, cols)
            down += g * tl.reshape(weight, (PIECE, 1))
            down_squares += g * g
        j = col + tl.arange(0, TILE_COLS)
        at = tile_row.to(tl.int64) * cols + j
        tl.store(part + at, tl.sum(down, axis=0), mask=j < cols)
        if square_part is not None:
            tl.store(square_part + at, tl.sum(down_squares, axis=0), mask=j < cols)
    else:
        weight = widen(nearest(normals(zero, col // 4 + tl.arange(0, TILE_COLS // 4)[None, :], key, -2.0), TYPE))
        for piece in range(0, TILE_ROWS, PIECE):
            g = _piece(grad, first + piece, col, rows, cols)
            i = first + piece + tl.arange(0, PIECE)
            at = tile_col.to(tl.int64) * rows + i
            tl.store(part + at, tl.sum(g * weight, axis=1), mask=i < rows)
            if square_part is not None:
                tl.store(square_part + at, tl.sum(g * g, axis=1), mask=i < rows)


@triton.jit
def _piece(grad, row, col, rows, cols):
    i, j = places(row, col, PIECE, TILE_COLS)
    return widen(tl.load(grad + (i * cols + j), mask=(i < rows) & (j < cols), other=0.0))
