"""What the tests of projections share: single matrices stepped by an optimizer and by a transcription with its basis."""

from __future__ import annotations

import torch
from oracles.compare import gradient

from fusedopt.backends.reference_matrix import decode_int4

SHAPES = ((12, 7), (7, 12), (16, 16))
LR, BETAS, EPS, DECAY = 0.02, (0.9, 0.99), 1e-3, 0.1


def matrix(shape, dtype=torch.float64, seed: int = 0) -> torch.nn.Parameter:
    gen = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype))


def site_of(opt, index: int = 0):
    """The projected site of a parameter, after a step."""
    return next(s.site for s in opt._plan.slots if s.tensor_id == index)


def basis_of(opt, index: int = 0) -> torch.Tensor:
    """The basis that the last step used, fp64."""
    basis = site_of(opt, index).basis()
    return (basis if isinstance(basis, torch.Tensor) else decode_int4(basis, torch.float64)).double()


def follow(
    opt, p: torch.nn.Parameter, transcription, steps: int, hand_in=None, refreshes=lambda step: True
) -> list[float]:
    """Steps both from the same start with the same gradients, which depend on the parameter.

    hand_in(opt): what the transcription gets from the engine as its basis, at the steps where refreshes(step).
    Returns the distance of the two after each step, relative to the largest weight.
    """
    mine = p.detach().double().clone()
    start, distances = mine.clone(), []
    for step in range(1, steps + 1):
        g = gradient(mine, step)
        p.grad = g.to(p.dtype)
        opt.step()
        given = {"basis": hand_in(opt)} if hand_in is not None and refreshes(step) else {}
        transcription.step(mine, g, **given)
        distances.append(float((p.detach().double() - mine).abs().max() / mine.abs().max()))
    assert (mine - start).abs().max() > 0.01 * mine.abs().max()
    return distances
