"""Newton-Schulz iterations X <- a X + (b A + c A^2) X with A = X X^T (Muon: Jordan et al. 2024), in 16-bit operands, fp32 sums.

A and the polynomial P = b A + c A^2 are symmetric: one program makes a tile on or below the diagonal and writes it twice, as it
is and mirrored, so both products take half the multiplications of a plain matmul. a X + P X is a matmul whose epilogue adds.
Nothing is transposed in memory: of tall X, A is X^T X and the last product X P. Grids are one-dimensional, all tiles of the first
matrix of a batch, then of the next; a program owns its tile (and its mirror image) and masks what lies outside.
"""

import triton
import triton.language as tl

from fusedopt.kernels.bits import nearest, widen
from fusedopt.kernels.matrix import banded, dot, halved
from fusedopt.kernels.operands import operand_tile, places, steps

PIECE = tl.constexpr(32)


@triton.jit
def triangular(index):
    """(row, column) of a tile on or below the diagonal, numbered row by row: index = row (row + 1) / 2 + column."""
    row = ((tl.sqrt((8 * index + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)  # the root is rounded, on a GPU approximate
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


@triton.jit
def finish_piece(acc, row, col, alpha, addend, beta, out, rows, cols, mirrored):
    """Stores alpha acc + beta addend at (row, col) of out [rows, cols], and where `mirrored`, of a square one, at (col, row)."""
    acc = alpha * acc
    i, j = places(row, col, acc.shape[0], acc.shape[1])
    inside = (i < rows) & (j < cols)
    if addend is not None:
        acc += beta * widen(tl.load(addend + (i * cols + j), mask=inside, other=0.0))
    value = nearest(acc, out.dtype.element_ty)
    tl.store(out + (i * cols + j), value, mask=inside)
    if mirrored:
        down, across = places(col, row, acc.shape[1], acc.shape[0])
        tl.store(out + (down * cols + across), tl.trans(value), mask=(down < rows) & (across < cols))


@triton.jit
def finish_half(acc, row, col, alpha, addend, beta, out, rows, cols, mirrored):
    if acc.shape[1] > PIECE:
        left, right = halved(acc)
        finish_piece(left, row, col, alpha, addend, beta, out, rows, cols, mirrored)
        finish_piece(right, row, col + acc.shape[1] // 2, alpha, addend, beta, out, rows, cols, mirrored)
    else:
        finish_piece(acc, row, col, alpha, addend, beta, out, rows, cols, mirrored)


@triton.jit
def finish(acc, row, col, alpha, addend, beta, out, rows, cols, mirrored):
    """The epilogue, 32 columns after the other: whole tiles need up to 21 registers more on sm_90, where one program would then
    fill an SM in place of two, and 90 more on sm_100."""
    if acc.shape[1] > 2 * PIECE:
        left, right = halved(acc)
        finish_half(left, row, col, alpha, addend, beta, out, rows, cols, mirrored)
        finish_half(right, row, col + acc.shape[1] // 2, alpha, addend, beta, out, rows, cols, mirrored)
    else:
        finish_half(acc, row, col, alpha, addend, beta, out, rows, cols, mirrored)


@triton.jit(do_not_specialize=["rows", "cols", "alpha", "beta"])
def symmetric_kernel(
    x, addend, out, rows, cols, alpha, beta,
    TALL: tl.constexpr, TYPE: tl.constexpr, COLS8: tl.constexpr, ROWS8: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = alpha x x^T + beta addend, [rows, rows], of x [rows, cols]; TALL: alpha x^T x + beta addend, [cols, cols].

    addend: symmetric, or None. ROWS8, COLS8: rows, cols are multiples of 8.
    """
    if COLS8:
        cols = cols // 8 * 8  # tells the compiler
    if ROWS8:
        rows = rows // 8 * 8
    size = cols if TALL else rows
    tiles = tl.cdiv(size, BM)
    count = tiles * (tiles + 1) // 2
    batch = (tl.program_id(0) // count).to(tl.int64)
    down, across = triangular(tl.program_id(0) % count)
    row, col = down * BM, across * BM
    x += batch * rows * cols
    out += batch * size * size

    acc = tl.zeros((BM, BM), tl.float32)
    if TALL:
        for k in steps(0, rows, BK):
            a = operand_tile(x, None, None, k, row, rows, cols, TYPE, BK, BM, 8, COLS8)
            b = operand_tile(x, None, None, k, col, rows, cols, TYPE, BK, BM, 8, COLS8)
            acc = dot(tl.trans(a), b, acc, "ieee")
    else:
        for k in steps(0, cols, BK):
            a = operand_tile(x, None, None, row, k, rows, cols, TYPE, BM, BK, 8, COLS8)
            b = operand_tile(x, None, None, col, k, rows, cols, TYPE, BM, BK, 8, COLS8)
            acc = dot(a, tl.trans(b), acc, "ieee")
    if addend is not None:
        addend += batch * size * size
    finish(acc, row, col, alpha, addend, beta, out, size, size, down != across)


@triton.jit(do_not_specialize=["rows", "cols", "beta"])
def add_product_kernel(
    x, polynomial, out, rows, cols, beta,
    TALL: tl.constexpr, TYPE: tl.constexpr, COLS8: tl.constexpr, ROWS8: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = beta x + polynomial x, all [rows, cols], polynomial [rows, rows]; TALL: beta x + x polynomial, [cols, cols]."""
    if COLS8:
        cols = cols // 8 * 8
    if ROWS8:
        rows = rows // 8 * 8
    size = cols if TALL else rows
    down, across = tl.cdiv(rows, BM), tl.cdiv(cols, BN)
    batch = (tl.program_id(0) // (down * across)).to(tl.int64)
    tile_row, tile_col = banded(tl.program_id(0) % (down * across), down, across)
    row, col = tile_row * BM, tile_col * BN
    x += batch * rows * cols
    out += batch * rows * cols
    polynomial += batch * size * size

    acc = tl.zeros((BM, BN), tl.float32)
    for k in steps(0, size, BK):
        if TALL:
            a = operand_tile(x, None, None, row, k, rows, cols, TYPE, BM, BK, 8, COLS8)
            b = operand_tile(polynomial, None, None, k, col, size, size, TYPE, BK, BN, 8, COLS8)
        else:
            a = operand_tile(polynomial, None, None, row, k, size, size, TYPE, BM, BK, 8, ROWS8)
            b = operand_tile(x, None, None, k, col, rows, cols, TYPE, BK, BN, 8, COLS8)
        acc = dot(a, b, acc, "ieee")
    finish(acc, row, col, 1.0, x, beta, out, rows, cols, False)
