"""Launches of the Triton kernels of Newton-Schulz iterations (kernels/newton_schulz.py)."""

from __future__ import annotations

import torch

from fusedopt.backends.triton_matrix import TILES, Tiles, element, nvidia

# Of matrices with a side of 64 or less; 128 x 128 would be masked in half and more.
SMALL = Tiles(64, 64, 64, num_warps=4, num_stages=4)


def tiles_for(size: int, other: int) -> Tiles:
    """Not measured on a GPU. size, other: of the result, rows and columns."""
    return SMALL if min(size, other) <= 64 else TILES["half"][0]


def symmetric_constants(x: torch.Tensor, on_nvidia: bool) -> dict:
    """Compile-time arguments and options of symmetric_kernel for x [batch, rows, cols] or [rows, cols]."""
    rows, cols = x.shape[-2:]
    tile = tiles_for(min(rows, cols), min(rows, cols)).arguments(on_nvidia)
    del tile["BN"]  # square tiles: a mirrored one is a tile
    return _shared(x) | tile


def add_product_constants(x: torch.Tensor, on_nvidia: bool) -> dict:
    return _shared(x) | tiles_for(*x.shape[-2:]).arguments(on_nvidia)


def _shared(x: torch.Tensor) -> dict:
    rows, cols = x.shape[-2:]
    return {
        "TALL": rows > cols,
        "TYPE": element(x.dtype),
        "COLS8": cols % 8 == 0,
        "ROWS8": rows % 8 == 0,
        "enable_fp_fusion": True,
    }


def symmetric_programs(size: int, block: int) -> int:
    """Programs that make a symmetric matrix: of its tiles those on or below the diagonal."""
    tiles = -(-size // block)
    return tiles * (tiles + 1) // 2


def symmetric(x: torch.Tensor, addend: torch.Tensor | None, out: torch.Tensor, alpha: float, beta: float) -> None:
    """out = alpha x x^T + beta addend of a batch x [n, rows, cols]; alpha x^T x + beta addend where rows > cols."""
    from fusedopt.kernels.newton_schulz import symmetric_kernel

    count, rows, cols = x.shape
    fixed = symmetric_constants(x, nvidia(x.device))
    grid = (count * symmetric_programs(min(rows, cols), fixed["BM"]),)
    symmetric_kernel[grid](x, addend, out, rows, cols, float(alpha), float(beta), **fixed)


def newton_schulz(x: torch.Tensor, coefficients) -> bool:
    """Iterates a batch of matrices [n, rows, cols] in place. False, with nothing done, for dtypes other than bf16 and fp16 and
    tensors with gaps."""
    from fusedopt.kernels.newton_schulz import add_product_kernel

    if x.dtype not in (torch.bfloat16, torch.float16) or not x.is_contiguous():
        return False
    if not x.numel():
        return True
    count, rows, cols = x.shape
    size = min(rows, cols)
    gram, polynomial = (torch.empty(count, size, size, dtype=x.dtype, device=x.device) for _ in range(2))
    source, other = x, torch.empty_like(x)
    fixed = add_product_constants(x, nvidia(x.device))
    grid = (count * -(-rows // fixed["BM"]) * -(-cols // fixed["BN"]),)
    for a, b, c in coefficients:
        symmetric(source, None, gram, 1.0, 0.0)
        symmetric(gram, gram, polynomial, c, b)
        add_product_kernel[grid](source, polynomial, other, rows, cols, float(a), **fixed)
        source, other = other, source
    if source is not x:
        x.copy_(source)
    return True
