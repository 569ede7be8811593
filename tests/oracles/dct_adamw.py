"""DCT-AdamW of "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models" (arXiv 2505.17967)."""

import math

import torch

from .lowrank import side_of


def dct_matrix(d: int) -> torch.Tensor:
    """Orthogonal Q [d, d]: Q[i, j] = sqrt(2/d) cos(pi i (2j + 1) / (2d)), row 0 times sqrt(1/2)."""
    rows = [[math.sqrt(2 / d) * math.cos(math.pi * i * (2 * j + 1) / (2 * d)) for j in range(d)] for i in range(d)]
    q = torch.tensor(rows, dtype=torch.float64)
    q[0] *= math.sqrt(0.5)
    return q


def quantize_rows(x: torch.Tensor, bits: int):
    """(codes, smallest, unit) of each row: codes are integers 0 .. 2^bits - 1, x ~ code * unit + smallest."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    unit = (high - low) / (2**bits - 1)
    safe = torch.where(unit > 0, unit, torch.ones_like(unit))
    return torch.where(unit > 0, torch.floor((x - low) / safe + 0.5), torch.zeros_like(x)), low, unit


class DctAdamW:
    """One matrix. mode "matmul" takes Q as it is, "fft" its transpose (rows of S are then orthonormal DCT-IIs of those of A).

    error_feedback: None, "fp32", 8 or 4 (bits, min-max per row). norm: 1 or 2, ranks the columns of S. side "right" for
    rows >= cols. After a step: indices [rank] in order of falling norm, error (as the next step will see it).
    """

    def __init__(self, rank, update_every=1, error_feedback=None, rotate=True, mode="matmul", norm=1, lr=1e-3,
                 betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, side=None):  # fmt: skip
        self.t, self.m, self.v, self.error, self.indices = 0, None, None, None, None
        self.__dict__.update(rank=rank, every=update_every, feedback=error_feedback, rotate=rotate, mode=mode, norm=norm,
                             lr=lr, betas=betas, eps=eps, decay=weight_decay, side=side)  # fmt: skip

    def _keep_error(self, e):
        if self.feedback in (4, 8):  # by rows of the parameter, of which e may be the transpose
            codes, low, unit = quantize_rows(e.T if self.mirrored else e, self.feedback)
            e = codes * unit + low
            e = e.T if self.mirrored else e
        self.error = e

    def step(self, p, g, indices=None):
        self.t += 1
        side = self.side or side_of(p.shape)
        self.mirrored = side == "left"
        if self.mirrored:  # the same on the transpose
            mirrored = p.T.clone()
            self._step(mirrored, g.T, indices)
            p.copy_(mirrored.T)
        else:
            self._step(p, g, indices)

    def _step(self, p, g, indices):
        q = dct_matrix(p.shape[1])
        q = q if self.mode == "matmul" else q.T
        a = g if self.feedback is None or self.error is None else g + self.error
        old = self.indices
        if self.t == 1 or self.t % self.every == 0:
            if indices is None:
                size = (a @ q).abs() ** self.norm
                indices = size.sum(0).sort(descending=True, stable=True).indices[: self.rank]
            self.indices = indices
        basis = q[:, self.indices]  # [cols, rank]
        low = a @ basis
        if self.feedback is not None:
            self._keep_error(a - low @ basis.T)
        if self.m is None:
            self.m, self.v = torch.zeros_like(low), torch.zeros_like(low)
        elif self.rotate and self.t % self.every == 0:
            turn = q[:, old].T @ basis
            self.m, self.v = self.m @ turn, (self.v @ turn).abs()
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * low
        self.v = b2 * self.v + (1 - b2) * low**2
        c1, c2 = 1 - b1**self.t, 1 - b2**self.t
        u = (self.m / c1) / ((self.v / c2).sqrt() + self.eps)
        p *= 1 - self.lr * self.decay
        p -= self.lr * (u @ basis.T)
