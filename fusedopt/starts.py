"""What a state begins as: one number, a share of the parameter, or normal numbers that every backend and process draws alike."""

from __future__ import annotations

import torch

from fusedopt import distributed, masters
from fusedopt.memory import empty_like, flat
from fusedopt.projections.seeds import mix
from fusedopt.projections.subspace import gaussian_numbers
from fusedopt.rule import State

PURPOSE = 0x57A7
PIECE = 1 << 20  # numbers drawn at a time: the temporaries are 64-bit words


def begun(owner, p: torch.Tensor, entry, state: State, group: dict, tensor_id: int, number: int) -> torch.Tensor | None:
    """The first values of a state, shaped like p; None for zeros.

    owner: the parameter, p: itself or its local shard. number: of the state among those of its rule.
    """
    if state.position is not None:
        return masters.weights(p, entry) * state.position(group)
    if state.spread is not None:
        deviation = state.spread(group)
        return normal(owner, p, mix(group["seed"], PURPOSE), tensor_id, number).mul_(deviation) if deviation else None
    if state.initial is not None and (value := state.initial(group)):
        return torch.full((), value, dtype=torch.float64, device=p.device)
    return None


@torch.no_grad()
def normal(owner, p: torch.Tensor, key: int, tensor_id: int, number: int) -> torch.Tensor:
    """N(0, 1) like p in fp32 or fp64: element i of a tensor, in memory order, of a DTensor in that of its indices, is number
    i % 4 of the Philox counter (i // 4, tensor id, number). A shard has the numbers of its place in the whole tensor."""
    out = empty_like(p, torch.float64 if p.dtype == torch.float64 else torch.float32)
    if distributed.is_dtensor(owner):
        out = torch.empty(p.shape, dtype=out.dtype, device=p.device)
    mine = out.view(-1) if distributed.is_dtensor(owner) else flat(out)
    at = _places(owner, p) if distributed.is_dtensor(owner) else None
    for first in range(0, mine.numel(), PIECE):
        count = min(PIECE, mine.numel() - first)
        if at is None:
            quads = torch.arange(first // 4, (first + count + 3) // 4, device=p.device)
            drawn = gaussian_numbers(quads, -2.0, key, tensor_id, number).view(-1)[:count]
        else:
            here = at[first : first + count]
            drawn = gaussian_numbers(here // 4, -2.0, key, tensor_id, number).gather(1, (here % 4)[:, None]).view(-1)
        mine[first : first + count] = drawn
    return out


def _places(owner, p: torch.Tensor) -> torch.Tensor:
    """int64 [numel]: the place of each element of a shard in the whole tensor, row by row."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(owner.shape, owner.device_mesh, owner.placements)
    at = torch.zeros((), dtype=torch.int64, device=p.device)
    for size, begin, mine in zip(owner.shape, offset, p.shape, strict=True):
        at = at[..., None] * size + torch.arange(begin, begin + mine, device=p.device)
    return at.reshape(-1)
