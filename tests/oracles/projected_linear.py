"""GaLore-AdamW on full gradients in fp64, arXiv 2403.03507 algorithm 2, whose basis comes from a sketch of the gradient and
serves from the next step on: what projected_linear(refresh="sketch") must do without ever having the full gradient."""

import torch


class SketchedGaLoreAdamW:
    """One matrix W [m, n] at a time. first_basis: of step 1; omega(step): Gaussian [n, width] (left) or [m, width] (right)."""

    def __init__(self, w, rank, left, scale, lr, betas, eps, weight_decay, first_basis, omega, due):
        self.w, self.rank, self.left, self.scale, self.lr = w.clone(), rank, left, scale, lr
        self.betas, self.eps, self.decay = betas, eps, weight_decay
        self.p, self.omega, self.due = first_basis, omega, due  # p: [m, r] or [n, r]
        self.m = self.v = None
        self.t = 0

    def step(self, g):
        self.t += 1
        r = self.p.T @ g if self.left else g @ self.p
        if self.m is None:
            self.m, self.v = torch.zeros_like(r), torch.zeros_like(r)
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * r
        self.v = b2 * self.v + (1 - b2) * r * r
        n = (self.m / (1 - b1**self.t)) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)
        back = self.p @ n if self.left else n @ self.p.T
        self.w = self.w - self.lr * self.decay * self.w - self.lr * self.scale * back
        if self.due(self.t):
            s = g @ self.omega(self.t) if self.left else g.T @ self.omega(self.t)
            u = torch.linalg.svd(s, full_matrices=False)[0][:, : self.rank]
            flip = torch.where((u * self.p).sum(0) < 0, -1.0, 1.0)
            self.p = u * flip
