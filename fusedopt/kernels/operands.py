"""Tiles of matrix operands: dense ones, and projectors in packed int4 decoded in registers (Q-GaLore, arXiv 2407.08296).

Int4 (Int4Matrix in backends/base.py): groups of consecutive elements in row-major order, value = scale * (code - zero),
two codes a byte, the even element in the high half. A decoded tile goes to the matmul without a copy in global memory.
"""

import triton
import triton.language as tl

from fusedopt.kernels.bits import INTERPRETED, nearest, widen
from fusedopt.kernels.formats.int4 import unpack


def _interpreted_range(start, stop, step):
    return range(start, int(stop.handle.data.item()), step)


# The range of loops over the inner dimension. Triton 3.6 does not interpret one that ends at an argument with NumPy 2.4.
steps = _interpreted_range if INTERPRETED.value else tl.range


@triton.jit
def spread8(x):
    """(R, N) to (R, 8 N): each value for 8 consecutive elements."""
    x = tl.join(x, x)
    x = tl.join(x, x)
    x = tl.join(x, x)
    return tl.reshape(x, (x.shape[0], 8 * x.shape[1]))


@triton.jit
def places(row, col, R: tl.constexpr, C: tl.constexpr):
    """Rows (R, 1), int64, and columns (1, C) of a tile."""
    i = row + tl.arange(0, R)[:, None]
    return i.to(tl.int64), col + tl.arange(0, C)[None, :]


@triton.jit
def int4_tile(
    codes, scale, zero, row, col, rows, cols,
    R: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """fp32 (R, C) from (row, col) on, zeros outside. EIGHTS: whole octets in each row and group, so one scale an octet."""
    if EIGHTS:
        eights = cols // 8
        i, j = places(row, col // 8, R, C // 8)
        inside = (i < rows) & (j < eights)
        group = (i * eights + j) // (GROUP // 8)
        factor = spread8(tl.load(scale + group, mask=inside, other=0.0))
        origin = spread8(tl.load(zero + group, mask=inside, other=0)).to(tl.int32)
        pairs = eights * 4
        i, j = places(row, col // 8 * 4, R, C // 2)
        code = unpack(tl.load(codes + (i * pairs + j), mask=(i < rows) & (j < pairs), other=0))
    else:
        i, j = places(row, col, R, C)
        inside = (i < rows) & (j < cols)
        element = i * cols + j
        factor = tl.load(scale + element // GROUP, mask=inside, other=0.0)
        origin = tl.load(zero + element // GROUP, mask=inside, other=0).to(tl.int32)
        pair = tl.load(codes + element // 2, mask=inside, other=0)
        code = tl.where(element % 2 == 0, pair >> 4, pair & 15)
    return factor * (code.to(tl.int32) - origin).to(tl.float32)


@triton.jit
def operand_tile(
    x, scale, zero, row, col, rows, cols,
    TYPE: tl.constexpr, R: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """(R, C) of TYPE from (row, col) on, zeros outside, of a dense matrix, or of int4 codes where there is a scale.

    EIGHTS: cols is a multiple of 8. Then a mask is the same for 8 columns, and a masked load still has 16 bytes.
    """
    if scale is not None:
        tile = int4_tile(x, scale, zero, row, col, rows, cols, R, C, GROUP, EIGHTS)
    else:
        i, j = places(row, col, R, C)
        tile = tl.load(x + (i * cols + j), mask=(i < rows) & (j < cols), other=0.0)
    if INTERPRETED:  # multiplies bf16 wrongly (Triton 3.6 and 3.9): values are rounded to TYPE, but kept in fp32
        return widen(nearest(widen(tile), TYPE))
    elif tile.dtype != TYPE:
        return nearest(widen(tile), TYPE)
    else:
        return tile
