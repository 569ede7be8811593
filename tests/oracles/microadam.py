"""MicroAdam, algorithms 1-3 of "MicroAdam: Accurate Adaptive Optimization with Low Space Overhead and Provable
Convergence" (arXiv 2405.15593)."""

import math

import torch


def quantize_error(x: torch.Tensor, bits: int = 4):
    """(integer codes, smallest, largest) of one block; the two bounds are kept in bf16."""
    low, high = x.min().bfloat16().to(x.dtype), x.max().bfloat16().to(x.dtype)
    unit = (high - low) / (2**bits - 1)
    if unit == 0:
        return torch.zeros(x.numel(), dtype=torch.int64), low, high
    codes = torch.floor((x - low) / unit + 0.5).clamp(0, 2**bits - 1)  # bf16 bounds may lie inside the values
    return codes.long(), low, high


def dequantize_error(codes, low, high, dtype, bits: int = 4):
    unit = (high - low) / (2**bits - 1)
    return codes.to(dtype) * unit + low


class MicroAdam:
    """One tensor, flat. block: elements a top-k is taken over; error_block: elements that share error bounds."""

    def __init__(self, numel, window=10, density=0.01, block=32768, error_block=100_000, lr=1e-3, betas=(0.9, 0.999),
                 eps=1e-8, weight_decay=0.0, dtype=torch.float64):  # fmt: skip
        self.t = 0
        self.error = torch.zeros(numel, dtype=dtype)
        self.codes = torch.zeros(numel, dtype=torch.int64)
        self.bounds = [(0.0, 0.0) for _ in range(0, numel, error_block)]
        self.rows: list = [None] * window  # lists of (index, value)
        self.__dict__.update(n=numel, window=window, density=density, block=block, error_block=error_block, lr=lr,
                             betas=betas, eps=eps, decay=weight_decay, dtype=dtype)  # fmt: skip

    def update(self, g) -> torch.Tensor:
        self.t += 1
        a = g.reshape(-1).to(self.dtype) + self.error
        chosen = []
        for first in range(0, self.n, self.block):
            part = a[first : first + self.block]
            k = math.ceil(self.density * part.numel())
            order = sorted(range(part.numel()), key=lambda i: -abs(float(part[i])))[:k]  # noqa: B023
            chosen += [(first + i, part[i].bfloat16().to(self.dtype)) for i in order]
        self.rows[(self.t - 1) % self.window] = chosen
        for i, _ in chosen:
            a[i] = 0
        for b, first in enumerate(range(0, self.n, self.error_block)):
            part = slice(first, min(self.n, first + self.error_block))
            codes, low, high = quantize_error(a[part])
            self.codes[part], self.bounds[b] = codes, (float(low), float(high))
            self.error[part] = dequantize_error(codes, low, high, self.dtype)
        b1, b2 = self.betas
        zm, zv = torch.zeros(self.n, dtype=self.dtype), torch.zeros(self.n, dtype=self.dtype)
        for age in range(min(self.t, self.window) - 1, -1, -1):
            for i, value in self.rows[(self.t - 1 - age) % self.window]:
                zm[i] += b1**age * value
                zv[i] += b2**age * value**2
        m = (1 - b1) / (1 - b1**self.t) * zm
        v = (1 - b2) / (1 - b2**self.t) * zv
        return torch.where(zv > 0, m / (v.sqrt() + self.eps), torch.zeros_like(m))

    def step(self, p, g):
        u = self.update(g).view(p.shape)
        p *= 1 - self.lr * self.decay
        p -= self.lr * u
