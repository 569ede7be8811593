"""The projection of a gradient with a projector in packed int4: R = P^T G or G P^T (Q-GaLore, arXiv 2407.08296).

Grid: one program per tile of R, which owns its elements and walks the whole inner dimension: no partial sums in memory,
and the same bits however many programs run at a time. Tiles of 64 x 64 are the small side of what keeps tensor cores
busy: R is narrow, and larger ones would be too few to fill a GPU.
"""

import triton
import triton.language as tl

from fusedopt.kernels.bits import nearest
from fusedopt.kernels.matrix import dot
from fusedopt.kernels.operands import operand_tile, places, steps


@triton.jit(do_not_specialize=["rows", "cols", "rank"])
def project_kernel(
    grad, codes, code_scale, code_zero, out, rows, cols, rank,
    LEFT: tl.constexpr, TYPE: tl.constexpr, GROUP: tl.constexpr, COLS8: tl.constexpr, RANK8: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """LEFT: out [rank, cols] = P^T G with P [rows, rank], else out [rows, rank] = G P^T with P [rank, cols].

    Programs that follow each other share a tile of the gradient, the larger operand.
    """
    if COLS8:
        cols = cols // 8 * 8
    if RANK8:
        rank = rank // 8 * 8
    acc = tl.zeros((BM, BN), tl.float32)
    if LEFT:
        down = tl.cdiv(rank, BM)
        row, col = tl.program_id(0) % down * BM, tl.program_id(0) // down * BN
        for k in steps(0, rows, BK):
            a = operand_tile(codes, code_scale, code_zero, k, row, rows, rank, TYPE, BK, BM, GROUP, RANK8)
            b = operand_tile(grad, None, None, k, col, rows, cols, TYPE, BK, BN, GROUP, COLS8)
            acc = dot(tl.trans(a), b, acc, INPUT_PRECISION)
        height, width = rank, cols
    else:
        across = tl.cdiv(rank, BN)
        row, col = tl.program_id(0) // across * BM, tl.program_id(0) % across * BN
        for k in steps(0, cols, BK):
            a = operand_tile(grad, None, None, row, k, rows, cols, TYPE, BM, BK, GROUP, COLS8)
            b = operand_tile(codes, code_scale, code_zero, col, k, rank, cols, TYPE, BN, BK, GROUP, COLS8)
            acc = dot(a, tl.trans(b), acc, INPUT_PRECISION)
        height, width = rows, rank
    i, j = places(row, col, BM, BN)
    tl.store(out + (i * width + j), nearest(acc, out.dtype.element_ty), mask=(i < height) & (j < width))
