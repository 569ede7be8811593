"""Gaussian noise that is drawn again from a seed instead of being kept: the same numbers in every process.

Number i of a tensor, counted in memory order, is number i % 4 of the Philox counter (i // 4, tensor id, step) under the seed:
it does not depend on launches, threads or devices. Kernels draw in fp32, at most 4e-7 of a number away from the fp64 here.
"""

from __future__ import annotations

import torch

from fusedopt.backends.triton_seeded import signed_word
from fusedopt.memory import flat, is_dense
from fusedopt.projections.seeds import mix
from fusedopt.projections.subspace import gaussian_numbers

PIECE = 1 << 20  # numbers that torch draws at a time: its temporaries are 64-bit words


def key_of(seed: int, purpose: int) -> int:
    """A Philox key of its own for each use of a seed."""
    return mix(seed, purpose)


@torch.no_grad()
def add_noise_(x: torch.Tensor, factor: torch.Tensor | float, key: int, tensor_id: int, step) -> torch.Tensor:
    """x += factor z in place, z ~ N(0, 1), in one launch on a GPU; 16-bit x is rounded to nearest.

    Args:
        x: a floating-point tensor of any layout. factor: a number, or a 1-element tensor on x's device.
        key, tensor_id, step: which numbers. step: below 2^31; a tensor on the device is drawn by torch, in some
            hundred launches.
    """
    if not is_dense(x):
        return x.copy_(add_noise_(x.contiguous(), factor, key, tensor_id, step))
    if not x.numel():
        return x
    if not isinstance(factor, torch.Tensor):
        factor = torch.full(
            (1,), factor, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device
        )
    mine = flat(x.detach())
    if x.dtype == torch.float64 or not _launched(mine, factor, key, tensor_id, step):
        for first in range(0, mine.numel(), PIECE):
            part = mine[first : first + PIECE]
            counter = torch.arange(first // 4, (first + part.numel() + 3) // 4, device=x.device)
            z = gaussian_numbers(counter, -2.0, key, tensor_id, step).view(-1)[: part.numel()]
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            part.copy_(part.to(wide) + factor.to(wide).view(()) * z.to(wide))
    return x


def _launched(x: torch.Tensor, factor: torch.Tensor, key: int, tensor_id: int, step) -> bool:
    """Whether a kernel did it."""
    from fusedopt.backends.select import get_backend

    if (
        isinstance(step, torch.Tensor)
        or x.device.type not in ("cuda", "xpu")
        or get_backend("triton").reason() is not None
    ):
        return False
    launch(x, factor, key, tensor_id, step)
    return True


def launch(x: torch.Tensor, factor: torch.Tensor, key: int, tensor_id: int, step: int) -> None:
    """The Triton kernel on a flat tensor."""
    from fusedopt.kernels.perturb import BLOCK, perturb_kernel

    words = [signed_word(word) for word in (key, key >> 32, tensor_id, step)]
    factor = factor.to(x.device, torch.float32).view(1)
    perturb_kernel[(-(-x.numel() // BLOCK),)](x, factor, x.numel(), *words, BLOCK=BLOCK, num_warps=4)
