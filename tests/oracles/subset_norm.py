"""Subset-Norm AdamW of "Efficient Adaptive Optimization via Subset-Norm and Subspace-Momentum" (arXiv 2411.07120)."""

import math

import torch


def subset_size(numel: int, target: int) -> int:
    """The largest divisor of numel up to the target; a negative target -j stands for floor(sqrt(numel) / j)."""
    wanted = target if target > 0 else int(math.sqrt(numel) / -target)
    return next(k for k in range(max(1, min(wanted, numel)), 0, -1) if numel % k == 0)


def chunk_sums(g: torch.Tensor, k: int) -> torch.Tensor:
    """Sums of squares of runs of k consecutive elements, spread over the elements again."""
    flat = g.reshape(-1)
    out = torch.empty_like(flat)
    for i in range(0, flat.numel(), k):
        out[i : i + k] = sum(float(x) ** 2 for x in flat[i : i + k])
    return out.view(g.shape)


class SubsetNorm:
    """One tensor. `by`: "chunk" (runs of k elements), or "row" / "column" sums of a matrix (the shorter list of sums is the
    paper's heuristic: rows where rows >= cols). beta2 = 1 accumulates as AdaGrad does. Sums, not means."""

    def __init__(self, size=-2, by="chunk", lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        self.size, self.by, self.lr, self.betas, self.eps, self.decay = size, by, lr, betas, eps, weight_decay
        self.t, self.m, self.v = 0, 0.0, 0.0

    def sums(self, g):
        if self.by == "chunk":
            return chunk_sums(g, subset_size(g.numel(), self.size))
        return (g**2).sum(1 if self.by == "row" else 0, keepdim=True).expand_as(g)

    def denominator(self, g):
        b2 = self.betas[1]
        weight = 1.0 if b2 == 1 else 1 - b2
        self.v = b2 * self.v + weight * self.sums(g)
        return self.v.sqrt() + self.eps

    def step(self, p, g):
        self.t += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        c2 = 1.0 if b2 == 1 else 1 - b2**self.t
        p -= self.lr * math.sqrt(c2) / (1 - b1**self.t) * self.m / self.denominator(g)
        p *= 1 - self.lr * self.decay
