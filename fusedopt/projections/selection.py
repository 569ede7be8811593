"""Choices of columns, rows, elements and whole tensors (FRUGAL; Subspace-Momentum): which part of a model keeps states.

Random choices are keyed by (seed, tensor, step) and by element, not drawn in sequence: a CPU, a GPU and a resumed run choose
the same. Index vectors are int64 and ascending.
"""

from __future__ import annotations

import math
import random

import torch

from fusedopt.precision import philox16
from fusedopt.projections.seeds import mix

BLOCK_ORDERS = ("random", "ascending", "descending", "mirror")
_STREAM = 0xFF  # of the Philox counter: no parameter or state draws from it
_SMALL = 1 << 16  # up to here elements are ranked by random keys; above, permuted one by one in O(chosen) memory


def count(n: int, density: float, least: int = 0) -> int:
    """round(density * n), halves up, within [least, n]."""
    if not 0 <= density <= 1:
        raise ValueError(f"density {density} must be between 0 and 1")
    return min(n, max(least, math.floor(density * n + 0.5)))


@torch.no_grad()
def random_indices(n: int, k: int, *, seed: int, tensor_id: int, step: int, device="cpu") -> torch.Tensor:
    """k of n columns or rows, every set equally likely (up to ties of 48-bit keys)."""
    _check_count(k, n, "random_indices")
    words = philox16(seed, step, tensor_id, 3 * n, device, _STREAM).view(n, 3)
    keys = words[:, 0] << 32 | words[:, 1] << 16 | words[:, 2]
    return torch.sort(keys, stable=True).indices[:k].sort().values


@torch.no_grad()
def random_elements(
    shape: tuple[int, int], k: int, *, seed: int, tensor_id: int, step: int, device="cpu"
) -> torch.Tensor:
    """k of the rows * cols elements of a matrix, as flat indices in memory order; temporaries of O(k) elements.

    Large matrices: the first k places of a keyed permutation, a Feistel network over Z_rows x Z_cols of 8 rounds (Black and
    Rogaway 2002), which maps places one by one. A matrix with a side below 16 has too small a half for that and is ranked.
    """
    rows, cols = shape
    _check_count(k, rows * cols, "random_elements")
    if rows * cols <= _SMALL or min(rows, cols) < 16:
        return random_indices(rows * cols, k, seed=seed, tensor_id=tensor_id, step=step, device=device)
    place = torch.arange(k, dtype=torch.int64, device=device)
    i, j = place // cols, place % cols
    for turn in range(4):
        i = (i + _hash32(j, mix(seed, tensor_id, step, 2 * turn))) % rows
        j = (j + _hash32(i, mix(seed, tensor_id, step, 2 * turn + 1))) % cols
    return (i * cols + j).sort().values


@torch.no_grad()
def top_indices(norms: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of `norms` [n]; of equals the lowest index. NaN counts as 0."""
    _check_count(k, len(norms), "top_indices")
    return torch.sort(norms.nan_to_num(), descending=True, stable=True).indices[:k].sort().values


@torch.no_grad()
def squared_norms(G: torch.Tensor, side: str) -> torch.Tensor:
    """Squared l2 norms of the columns (side "right") or rows ("left") of G [rows, cols], fp32 (fp64 for fp64), in blocks of
    rows that keep temporaries below 5 % of G."""
    dtype = torch.float64 if G.dtype == torch.float64 else torch.float32
    rows, cols = G.shape
    out = torch.zeros(cols if side == "right" else rows, dtype=dtype, device=G.device)
    block = max(1, rows * G.element_size() // (20 * 4))
    for start in range(0, rows, block):
        part = G[start : start + block].to(dtype, copy=True).square_()
        if side == "right":
            out += part.sum(0)
        else:
            torch.sum(part, 1, out=out[start : start + block])
    return out


def active_blocks(n: int, density: float, period: int, order: str = "random", seed: int = 0) -> list[int]:
    """Which of n tensors keep states in refresh period 0, 1, 2, ...: round(density * n) of them, ascending, at least one
    where density > 0.

    order: "random", drawn anew; "ascending" and "descending", a window that goes round; "mirror", to the end and back.
    """
    if order not in BLOCK_ORDERS:
        raise ValueError(f"active_blocks: order {order!r}; known: {', '.join(BLOCK_ORDERS)}")
    if n < 0 or period < 0:
        raise ValueError(f"active_blocks: {n} tensors, period {period}; neither may be negative")
    k = count(n, density, least=1 if density > 0 else 0)
    if order == "random":
        return sorted(random.Random(mix(seed, period)).sample(range(n), k))
    if k == 0:
        return []
    if order == "mirror":
        track = [*range(n), *reversed(range(n))]
        place = period * k % len(track)
        chosen: dict[int, None] = {}
        while len(chosen) < k:  # at a turn the window meets the same tensor twice and goes on to the next
            chosen[track[place % len(track)]] = None
            place += 1
        return sorted(chosen)
    window = [(period * k + i) % n for i in range(k)]
    return sorted(window if order == "ascending" else [n - 1 - i for i in window])


def _check_count(k: int, n: int, what: str) -> None:
    if not 0 <= k <= n:
        raise ValueError(f"{what}: {k} of {n}; the number to choose must be between 0 and {n}")


def _hash32(x: torch.Tensor, key: int) -> torch.Tensor:
    """31-bit hashes of non-negative int64 x under a 64-bit key (xor, multiply and shift, two rounds as in murmur3)."""
    x = (x & 0xFFFFFFFF) ^ (key & 0xFFFFFFFF)
    x = ((x ^ x >> 16) * 0x45D9F3B) & 0xFFFFFFFF
    x = (x + (key >> 32)) & 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x2C1B3C6D) & 0xFFFFFFFF
    return (x ^ x >> 15) >> 1
