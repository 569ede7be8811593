"""Gradients and the comparison that the tests of the low-rank transcriptions share."""

import torch

STEPS = 11


def tensor(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(p: torch.Tensor, step: int) -> torch.Tensor:
    """Depends on p, so that errors feed back; magnitudes change tenfold, so that clipping and limiting act."""
    return (0.3 * p.detach() + tensor(p.shape, 100 + step)) * (10.0 if step in (3, 7) else 1.0)


def close(a, b, start, bound=1e-10):
    moved = (b - start).abs().max()
    assert moved > 0
    assert (a - b).abs().max() <= bound * moved
