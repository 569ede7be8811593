"""Conda of "Conda: Column-Normalized Adam for Training Large Language Models Faster" (arXiv 2509.24218)."""

from .lowrank import down, side_of, svd_basis, up


class Conda:
    """One matrix: m full, v in the singular basis of m. due(t): whether step t refreshes; None is t = 1, T + 1, ..."""

    def __init__(self, update_every=2000, scale=1.0, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, due=None):
        self.scale, self.lr, self.betas, self.eps, self.decay = scale, lr, betas, eps, weight_decay
        self.due = due or (lambda t: (t - 1) % update_every == 0)
        self.t, self.m, self.v, self.basis = 0, 0.0, 0.0, None

    def step(self, p, g, basis=None):
        self.t += 1
        b1, b2 = self.betas
        side = side_of(p.shape)
        self.m = b1 * self.m + (1 - b1) * g
        if basis is not None:
            self.basis = basis
        elif self.due(self.t):
            self.basis = svd_basis(self.m, min(p.shape), side)
        self.v = b2 * self.v + (1 - b2) * down(g, self.basis, side) ** 2
        u = up(down(self.m, self.basis, side) / (self.v.sqrt() + self.eps), self.basis, side)
        p -= self.lr * (1 - b2**self.t) ** 0.5 / (1 - b1**self.t) * self.scale * u
        p *= 1 - self.lr * self.decay
