"""What the low-rank transcriptions share: sides, SVD bases, projections down and up, and Adam with eps beside sqrt(v).

A basis is a matrix [r, cols] with orthonormal rows (side "right": R = G P^T) or [rows, r] with orthonormal columns (side
"left": R = P^T G). Tests hand one basis to the transcription and to what they compare it with: singular vectors have no
unique sign, and those of fp32 and fp64 are far apart where singular values are close.
"""

import math

import torch


def side_of(shape) -> str:
    return "right" if shape[0] >= shape[1] else "left"


def svd_basis(g: torch.Tensor, rank: int, side: str) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(g.double(), full_matrices=False)
    return vh[:rank].clone() if side == "right" else u[:, :rank].clone()


def down(g: torch.Tensor, basis: torch.Tensor, side: str) -> torch.Tensor:
    return g @ basis.T if side == "right" else basis.T @ g


def up(r: torch.Tensor, basis: torch.Tensor, side: str) -> torch.Tensor:
    return r @ basis if side == "right" else basis @ r


class Adam:
    """m, v and a step count of their own: `direction(g)` is m_hat / (sqrt(v_hat) + eps) (form "D1"), or, in form "D2",
    sqrt(c2) / c1 * m / (sqrt(v) + eps), of which `plain` is the last quotient alone."""

    def __init__(self, betas, eps, form="D1"):
        self.betas, self.eps, self.form = betas, eps, form
        self.reset()

    def reset(self):
        self.m, self.v, self.k = 0.0, 0.0, 0

    def direction(self, g):
        b1, b2 = self.betas
        self.k += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        c1, c2 = 1 - b1**self.k, 1 - b2**self.k
        self.factor = math.sqrt(c2) / c1
        self.plain = self.m / (self.v.sqrt() + self.eps)
        if self.form == "D2":
            return self.factor * self.plain
        return (self.m / c1) / ((self.v / c2).sqrt() + self.eps)
