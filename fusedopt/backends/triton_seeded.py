"""Launches of the Triton kernels that project a gradient with random numbers from a seed (kernels/seeded.py)."""

from __future__ import annotations

import torch

from fusedopt.backends.base import check_seeded
from fusedopt.backends.native import matrix_shape
from fusedopt.backends.triton_matrix import PROJECT_TILES, arithmetic, element, nvidia, reads

# Up to this rank a program draws the projector where it multiplies; above, the projector is drawn once into memory, where it stays
# in the L2 cache. A number costs about 35 instructions and is drawn again for every 64 columns: rank / 64 * 35 instructions per
# element of G, against the 16 (bf16) or 31 (fp32) that an H200 has while it reads one. At 4096 x 4096, bf16 and rank 128 that is
# 4 times the time of the read; the projector is 3 % of the gradient there. Counted, not measured.
DRAWN_RANK = 16
DRAW = 256  # numbers of a program that draws into memory


def seeded_constants(dtype: torch.dtype, rows: int, cols: int, rank: int, side: str, on_nvidia: bool) -> dict:
    """The compile-time arguments and options of seeded_kernel. Tiles are those of a projection with fewer components."""
    kind = arithmetic(dtype, on_nvidia)
    tiles = PROJECT_TILES[kind].arguments(on_nvidia)
    components, others = tiles.pop("BM"), tiles.pop("BN")
    while components > 16 and components >= 2 * rank:
        components //= 2
    return {
        "LEFT": side == "left",
        "TYPE": element(dtype),
        "COLS8": cols % 8 == 0,
        "DEPTH8": (rows if side == "left" else cols) % 8 == 0,
        "RANK8": rank % 8 == 0,
        "INPUT_PRECISION": "tf32" if kind == "tf32" else "ieee",
        "BR": components,
        "BS": others,
        **tiles,
        "enable_fp_fusion": True,
    }


def single_constants(dtype: torch.dtype, cols: int, side: str, on_nvidia: bool) -> dict:
    return {
        "LEFT": side == "left",
        "TYPE": element(dtype),
        "COLS8": cols % 8 == 0,
        "num_warps": 8 if on_nvidia else 4,
        "enable_fp_fusion": True,
    }


def draw_constants(depth: int) -> dict:
    return {"DEPTH8": depth % 8 == 0, "K": DRAW, "num_warps": 1, "enable_fp_fusion": True}


def signed_word(word: int) -> int:
    """A 32-bit word as int32, so that every seed is an argument of one type."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def _project_single(grad, key: tuple[int, ...], side: str, out, squares) -> None:
    from fusedopt.kernels.matrix_sums import add_kernel
    from fusedopt.kernels.seeded import TILE_COLS, TILE_ROWS, single_kernel

    rows, cols = grad.shape
    down, across = -(-rows // TILE_ROWS.value), -(-cols // TILE_COLS.value)
    size = (down, cols) if side == "left" else (across, rows)
    part = torch.empty(size, dtype=torch.float32, device=grad.device)
    square_part = None if squares is None else torch.empty_like(part)
    fixed = single_constants(grad.dtype, cols, side, nvidia(grad.device))
    single_kernel[(down * across,)](grad, part, square_part, rows, cols, *key, **fixed)
    options = {name: fixed[name] for name in ("num_warps", "enable_fp_fusion")}
    for sums, to in ((part, out), (square_part, squares)):
        if to is not None:
            add_kernel[(-(-to.numel() // 128),)](sums, to, *sums.shape, ROWS=16, COLS=128, **options)


def project_seeded(grad, seed: int, tensor_id: int, step: int, rank: int, side: str, out, squares) -> bool:
    from fusedopt.kernels.seeded import draw_kernel, seeded_kernel

    rows, cols = matrix_shape(grad)
    check_seeded(side, rank)
    left = side == "left"
    depth, kept = (rows, cols) if left else (cols, rows)
    shape = (rank, cols) if left else (rows, rank)
    if tuple(out.shape) != shape:
        raise ValueError(
            f"a gradient of shape {(rows, cols)} projected on the {side} to rank {rank} needs an output of shape {shape}, "
            f"not {tuple(out.shape)}"
        )
    if squares is not None and (
        squares.numel() != kept or squares.dtype != torch.float32 or not squares.is_contiguous()
    ):
        raise ValueError(f"squares must be {kept} contiguous fp32 elements, not {squares.numel()} of {squares.dtype}")
    if not reads(grad, out):
        return False
    if grad.numel() == 0:
        out.zero_()
        if squares is not None:
            squares.zero_()
        return True
    key = signed_word(seed), signed_word(seed >> 32), signed_word(tensor_id), signed_word(step)
    if rank == 1:
        _project_single(grad, key, side, out, squares)
        return True
    fixed = seeded_constants(grad.dtype, rows, cols, rank, side, nvidia(grad.device))
    scale, stored = -2.0 / rank, None
    if rank > DRAWN_RANK:
        stored = torch.empty((rank, depth), dtype=grad.dtype, device=grad.device)
        draw_kernel[(rank * -(-depth // DRAW),)](stored, rank, depth, *key, scale, **draw_constants(depth))
    grid = (-(-rank // fixed["BR"]) * -(-kept // fixed["BS"]),)
    seeded_kernel[grid](grad, stored, out, squares, rows, cols, rank, *key, scale, **fixed)
    return True
