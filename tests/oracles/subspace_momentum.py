"""Subspace-Momentum of "Efficient Adaptive Optimization via Subset-Norm and Subspace-Momentum" (arXiv 2411.07120)."""

import math

import torch

from .lowrank import down, side_of, svd_basis, up
from .subset_norm import chunk_sums, subset_size


class SubspaceMomentum:
    """One matrix: momentum in a subspace, plain gradient outside of it, over Adam's or Subset-Norm's denominator.

    Refreshes at t = 1 and where T divides t (1-based). official_refresh: a refresh after the first stores zeros as the new
    momentum, but steps with the average of the old one, taken into the new basis; else zero first, then average.
    chunk: None for Adam's v, else Subset-Norm's size.
    """

    def __init__(self, rank, update_every=200, chunk=None, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0,
                 official_refresh=False):  # fmt: skip
        self.rank, self.every, self.chunk, self.lr = rank, update_every, chunk, lr
        self.betas, self.eps, self.decay, self.official = betas, eps, weight_decay, official_refresh
        self.t, self.m, self.v, self.basis = 0, 0.0, 0.0, None

    def step(self, p, g, basis=None):
        self.t += 1
        b1, b2 = self.betas
        side = side_of(p.shape)
        refresh = self.t == 1 or self.t % self.every == 0
        if basis is not None:
            self.basis = basis
        elif refresh:
            self.basis = svd_basis(g, self.rank, side)
        r = down(g, self.basis, side)
        if refresh and not self.official:
            self.m = torch.zeros_like(r)
        m = b1 * self.m + (1 - b1) * r
        self.m = torch.zeros_like(r) if refresh and self.official and self.t > 1 else m
        numerator = up(m, self.basis, side) + (g - up(r, self.basis, side))
        squares = g**2 if self.chunk is None else chunk_sums(g, subset_size(g.numel(), self.chunk))
        self.v = b2 * self.v + (1 - b2) * squares
        size = self.lr * math.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        p -= size * numerator / (self.v.sqrt() + self.eps)
        p *= 1 - self.lr * self.decay
