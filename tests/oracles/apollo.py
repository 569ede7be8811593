"""APOLLO and APOLLO-Mini, algorithm 1 of "APOLLO: SGD-like Memory, AdamW-level Performance" (arXiv 2412.05270)."""

import torch

from .lowrank import Adam, down, side_of


class Apollo:
    """One matrix. The basis is Gaussian / sqrt(rank), not orthonormal, and is always handed in (`basis=` where it is due).

    per: "channel" (a scale for each row or column that the projection keeps) or "tensor" (Mini). tiny: added to the norms
    that are divided by, 1e-8 in the authors' code. The limiter sees G * s before sqrt(scale) and the bias correction.
    """

    def __init__(self, scale=1.0, per="channel", lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, gamma=1.01,
                 limit=True, form="D2", decay_first=False, tiny=1e-8, scale_front=False, side=None):  # fmt: skip
        self.adam = Adam(betas, eps, form)
        self.last_norm = self.basis = None
        self.__dict__.update(scale=scale, per=per, lr=lr, decay=weight_decay, gamma=gamma, limit=limit, side=side,
                             form=form, decay_first=decay_first, tiny=tiny, scale_front=scale_front)  # fmt: skip

    def step(self, p, g, basis=None):
        side = self.side or side_of(p.shape)
        self.basis = self.basis if basis is None else basis
        r = down(g, self.basis, side)
        n = self.adam.direction(r)
        factor = 1.0
        if self.form == "D2":
            n, factor = self.adam.plain, self.adam.factor
        if self.per == "tensor":
            s = n.norm() / (r.norm() + self.tiny)
        else:
            rank_dim = 1 if side == "right" else 0
            s = (n**2).sum(rank_dim, keepdim=True).sqrt() / ((r**2).sum(rank_dim, keepdim=True).sqrt() + self.tiny)
        self.s = s
        u = g * s
        if self.scale_front:
            u = u * self.scale**0.5
        if self.limit:
            norm = u.norm()
            if self.last_norm is not None:
                shrink = torch.clamp(norm / (self.last_norm + self.tiny), min=self.gamma) / self.gamma
                u, norm = u / shrink, norm / shrink
            self.last_norm = norm
        if not self.scale_front:
            u = u * self.scale**0.5
        if self.decay_first:
            p *= 1 - self.lr * self.decay
        p -= self.lr * factor * u
        if not self.decay_first:
            p *= 1 - self.lr * self.decay
