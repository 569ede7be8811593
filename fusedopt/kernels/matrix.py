"""The update of a matrix as the epilogue of the matmul that makes it (GaLore, arXiv 2403.03507; FRUGAL, arXiv 2411.07837).

p <- p - (lr u + decay p) with u = scale * (left @ right) + residual, or u = scale * row_factor * col_factor * grad.
u exists only in registers. Grid: one program per tile of p, which owns the elements of its tile and masks what lies
outside; tiles are numbered down bands of 8 rows of tiles, so that programs that run together share operands in L2.
"""

import triton
import triton.language as tl

from fusedopt.kernels.bits import INTERPRETED, widen
from fusedopt.kernels.operands import operand_tile, places, steps
from fusedopt.kernels.precision import KAHAN, SPLIT24, STOCHASTIC, load_param, store_rounded
from fusedopt.kernels.rounding import octet_bits, uniform16_at

BAND = tl.constexpr(8)
PIECE = tl.constexpr(32)
SIGN = tl.constexpr(1)
GRADIENT = tl.constexpr(2)
SHARED_LEFT = tl.constexpr(1)
SHARED_RIGHT = tl.constexpr(2)


@triton.jit
def banded(program, tiles_down, tiles_across):
    """(row, column) of a tile: down a band of BAND rows of tiles, then on to the next column."""
    band = program // (BAND * tiles_across)
    height = tl.minimum(tiles_down - band * BAND, BAND)
    place = program - band * (BAND * tiles_across)
    return band * BAND + place % height, place // height


@triton.jit
def numbers(scalars, grad_scale, clip):
    """lr, decay, grad_sign, grad_sign / grad_scale * clip, seed and step of a scalar row (csrc/fusedopt.h)."""
    sign = tl.load(scalars + 3)
    mul = sign
    if grad_scale is not None:
        mul = mul / tl.load(grad_scale)
    if clip is not None:
        mul = mul * tl.load(clip)
    words = scalars.to(tl.pointer_type(tl.uint32), bitcast=True)
    seed = (tl.load(words + 5).to(tl.uint64) << 32) | tl.load(words + 4).to(tl.uint64)
    return tl.load(scalars), tl.load(scalars + 1), sign, mul, seed, tl.load(words + 6)


@triton.jit
def halved(x):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def update_tile(u, row, col, target, PRECISION: tl.constexpr, EIGHTS: tl.constexpr):
    """The step of one tile of weights; random bits are those of the elements' places in memory, as in a step.

    target: (p, companion, rows, cols, lr, decay, seed, step, tensor).
    """
    p, c, rows, cols, lr, decay, seed, step, tensor = target
    i, j = places(row, col, u.shape[0], u.shape[1])
    inside = (i < rows) & (j < cols)
    local = i * cols + j
    w = load_param(p, c, local, inside, False, PRECISION, False)
    w = w - (lr * u + decay * w)
    random16 = None
    if (PRECISION == STOCHASTIC or PRECISION == KAHAN) or PRECISION == SPLIT24:
        if EIGHTS:
            i, j = places(row, col // 8, u.shape[0], u.shape[1] // 8)
            random16 = octet_bits(seed, step, tensor, i * (cols // 8) + j, 0)
        else:
            random16 = uniform16_at(seed, step, tensor, local, 0)
    store_rounded(w, random16, p, c, local, inside, False, PRECISION, False)


@triton.jit
def finish_piece(
    product, second, row, col, target, residual,
    RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """residual: (grad, scale of the product, scale of the sign, scale of the gradient)."""
    grad, scale, sign, mul = residual
    u = scale * product
    if RESIDUAL != 0:
        _, _, rows, cols, _, _, _, _, _ = target
        i, j = places(row, col, u.shape[0], u.shape[1])
        e = widen(tl.load(grad + (i * cols + j), mask=(i < rows) & (j < cols), other=0.0)) - second
        if RESIDUAL == SIGN:
            u += sign * ((e > 0.0).to(tl.float32) - (e < 0.0).to(tl.float32))
        else:
            u += mul * e
    update_tile(u, row, col, target, PRECISION, EIGHTS)


@triton.jit
def finish_half(
    product, second, row, col, target, residual,
    RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    if product.shape[1] > PIECE:
        left, right = halved(product)
        second_left, second_right = halved(second) if RESIDUAL != 0 else (None, None)
        half: tl.constexpr = product.shape[1] // 2
        finish_piece(left, second_left, row, col, target, residual, RESIDUAL, PRECISION, EIGHTS)
        finish_piece(right, second_right, row, col + half, target, residual, RESIDUAL, PRECISION, EIGHTS)
    else:
        finish_piece(product, second, row, col, target, residual, RESIDUAL, PRECISION, EIGHTS)


@triton.jit
def finish(
    product, second, row, col, target, residual,
    RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """The epilogue, for 32 columns after the other: the weights, companions and random bits of 128 columns at a time
    would need 40 registers more, and one program would fill an SM of sm_90 in place of two."""
    if product.shape[1] > 2 * PIECE:
        left, right = halved(product)
        second_left, second_right = halved(second) if RESIDUAL != 0 else (None, None)
        half: tl.constexpr = product.shape[1] // 2
        finish_half(left, second_left, row, col, target, residual, RESIDUAL, PRECISION, EIGHTS)
        finish_half(right, second_right, row, col + half, target, residual, RESIDUAL, PRECISION, EIGHTS)
    else:
        finish_half(product, second, row, col, target, residual, RESIDUAL, PRECISION, EIGHTS)


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    if INTERPRETED:
        return acc + tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)


@triton.jit(do_not_specialize=[
    "scalars", "grad_scale", "clip", "found_inf", "rows", "cols", "rank", "grad_rank", "tensor",
])  # fmt: skip
def product_kernel(
    p, c, grad, left, left_scale, left_zero, right, right_scale, right_zero,
    grad_left, grad_left_scale, grad_left_zero, grad_right, grad_right_scale, grad_right_zero,
    scalars, grad_scale, clip, found_inf, rows, cols, rank, grad_rank, scale, residual_scale, tensor,
    TYPE: tl.constexpr, GROUP: tl.constexpr, RESIDUAL: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
    COLS8: tl.constexpr, RANK8: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Steps one tile of p. TYPE: of the operands in the matmul. Pointers that do not apply are None.

    SHARED: which operand of grad_left @ grad_right is that of left @ right, and loaded once for both; 0: a loop of its own.
    COLS8, RANK8: cols, the ranks are multiples of 8.
    """
    if COLS8:
        cols = cols // 8 * 8  # tells the compiler
    if RANK8:
        rank = rank // 8 * 8
        grad_rank = grad_rank // 8 * 8
    tile_row, tile_col = banded(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(cols, BN))
    row, col = tile_row * BM, tile_col * BN
    if found_inf is not None:  # nothing is inside an empty matrix
        skip = tl.load(found_inf) != 0.0
        rows = tl.where(skip, 0, rows)
        rank = tl.where(skip, 0, rank)
        grad_rank = tl.where(skip, 0, grad_rank)
    lr, decay, sign, mul, seed, step = numbers(scalars, grad_scale, clip)

    acc = tl.zeros((BM, BN), tl.float32)
    second = None
    if RESIDUAL != 0:
        second = tl.zeros((BM, BN), tl.float32)
    for k in steps(0, rank, BK):
        a = operand_tile(left, left_scale, left_zero, row, k, rows, rank, TYPE, BM, BK, GROUP, RANK8)
        b = operand_tile(right, right_scale, right_zero, k, col, rank, cols, TYPE, BK, BN, GROUP, COLS8)
        acc = dot(a, b, acc, INPUT_PRECISION)
        if SHARED == SHARED_LEFT:
            b = operand_tile(
                grad_right, grad_right_scale, grad_right_zero, k, col, rank, cols, TYPE, BK, BN, GROUP, COLS8
            )
            second = dot(a, b, second, INPUT_PRECISION)
        elif SHARED == SHARED_RIGHT:
            a = operand_tile(grad_left, grad_left_scale, grad_left_zero, row, k, rows, rank, TYPE, BM, BK, GROUP, RANK8)
            second = dot(a, b, second, INPUT_PRECISION)
    if RESIDUAL != 0 and SHARED == 0:
        for k in steps(0, grad_rank, BK):
            a = operand_tile(
                grad_left, grad_left_scale, grad_left_zero, row, k, rows, grad_rank, TYPE, BM, BK, GROUP, RANK8
            )
            b = operand_tile(
                grad_right, grad_right_scale, grad_right_zero, k, col, grad_rank, cols, TYPE, BK, BN, GROUP, COLS8
            )
            second = dot(a, b, second, INPUT_PRECISION)

    target = (p, c, rows, cols, lr, decay, seed, step, tensor)
    residual = (grad, scale, residual_scale * sign, residual_scale * mul)
    finish(acc, second, row, col, target, residual, RESIDUAL, PRECISION, COLS8)


@triton.jit(do_not_specialize=["scalars", "found_inf", "rows", "cols", "tensor"])
def scaled_kernel(
    p, c, grad, row_factor, col_factor, scalars, found_inf, rows, cols, scale, tensor,
    PRECISION: tl.constexpr, COLS8: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Steps one tile of p with u = scale * row_factor * col_factor * grad; factors are fp32, or None for 1."""
    if COLS8:
        cols = cols // 8 * 8
    across = tl.cdiv(cols, BN)
    row, col = tl.program_id(0) // across * BM, tl.program_id(0) % across * BN
    if found_inf is not None:
        rows = tl.where(tl.load(found_inf) != 0.0, 0, rows)
    lr, decay, _, _, seed, step = numbers(scalars, None, None)
    i, j = places(row, col, BM, BN)
    u = widen(tl.load(grad + (i * cols + j), mask=(i < rows) & (j < cols), other=0.0))
    factor = scale
    if row_factor is not None:
        factor = factor * tl.load(row_factor + i, mask=i < rows, other=0.0)
    if col_factor is not None:
        factor = factor * tl.load(col_factor + j, mask=j < cols, other=0.0)
    update_tile(factor * u, row, col, (p, c, rows, cols, lr, decay, seed, step, tensor), PRECISION, COLS8)
