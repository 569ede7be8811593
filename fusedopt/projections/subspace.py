"""Bases of the dominant subspace of a gradient."""

from __future__ import annotations

import torch


def svd_basis(grad: torch.Tensor, rank: int, side: str, old: torch.Tensor | None = None) -> torch.Tensor:
    wide = grad.dtype if grad.dtype == torch.float64 else torch.float32
    u, _, v = torch.linalg.svd(grad.to(wide), full_matrices=False)
    return u[:, :rank] if side == "left" else v[:rank]


def refresh_basis(grad, rank, side, old=None, *, seed, tensor_id, step):
    return svd_basis(grad, rank, side), None


def random_basis(shape, rank, side, seed, tensor_id, step, device):
    gen = torch.Generator(device).manual_seed(seed + tensor_id + step)
    return svd_basis(torch.randn(shape, generator=gen, device=device), rank, side)
