"""FRUGAL, algorithm 1 of "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead" (arXiv 2411.07837)."""

import torch

from .lowrank import Adam, down, side_of, svd_basis, up


class Frugal:
    """One matrix. subspace: "svd", "random" (an orthonormal basis, handed in) or "columns" (indices, handed in: a 1-D
    integer tensor of active columns, or of rows where side is "left"). inactive: "sign_sgd", "sgd" or "no".

    Refreshes at t = 1, T + 1, ...; each zeroes the states and restarts their step count. Decay comes first.
    """

    def __init__(self, density=0.25, update_every=200, subspace="svd", inactive="sign_sgd", inactive_scale=1.0, lr=1e-3,
                 betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, scale=1.0, reset=True, side=None):  # fmt: skip
        self.adam = Adam(betas, eps, "D1")
        self.t, self.basis = 0, None
        self.__dict__.update(density=density, every=update_every, subspace=subspace, inactive=inactive,
                             inactive_scale=inactive_scale, lr=lr, decay=weight_decay, scale=scale, reset=reset,
                             side=side)  # fmt: skip

    def step(self, p, g, basis=None):
        self.t += 1
        side = self.side or side_of(p.shape)
        if (self.t - 1) % self.every == 0:
            if self.reset:
                self.adam.reset()
            if basis is None:
                if self.subspace != "svd":
                    raise ValueError("hand in the basis: it is random")
                basis = svd_basis(g, round(self.density * min(p.shape)), side)
            if self.subspace == "columns":
                eye = torch.eye(p.shape[1 if side == "right" else 0], dtype=p.dtype)
                basis = eye[basis] if side == "right" else eye[:, basis]
            self.basis = basis
        r = down(g, self.basis, side)
        rest = g - up(r, self.basis, side)
        p *= 1 - self.lr * self.decay
        p -= self.lr * self.scale * up(self.adam.direction(r), self.basis, side)
        if self.inactive == "sign_sgd":
            p -= self.lr * self.inactive_scale * rest.sign()
        elif self.inactive == "sgd":
            p -= self.lr * self.inactive_scale * rest
