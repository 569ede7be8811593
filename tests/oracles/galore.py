"""GaLore AdamW, algorithm 2 of "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (arXiv 2403.03507)."""

from .lowrank import Adam, down, side_of, svd_basis, up


class GaLore:
    """One matrix. Refreshes at t = 1, T + 1, ...; states are neither reset nor rotated. decay_first: p <- (1 - lr decay) p
    before the update; else after it, as the authors' code does. form: of Adam's denominator, see lowrank.Adam."""

    def __init__(self, rank, update_every, scale=1.0, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0,
                 form="D2", decay_first=False, side=None):  # fmt: skip
        self.rank, self.every, self.scale, self.lr, self.decay = rank, update_every, scale, lr, weight_decay
        self.adam, self.decay_first, self.side = Adam(betas, eps, form), decay_first, side
        self.t, self.basis = 0, None

    def step(self, p, g, basis=None):
        self.t += 1
        side = self.side or side_of(p.shape)
        if basis is not None:
            self.basis = basis
        elif (self.t - 1) % self.every == 0:
            self.basis = svd_basis(g, self.rank, side)
        u = self.scale * up(self.adam.direction(down(g, self.basis, side)), self.basis, side)
        if self.decay_first:
            p *= 1 - self.lr * self.decay
        p -= self.lr * u
        if not self.decay_first:
            p *= 1 - self.lr * self.decay
