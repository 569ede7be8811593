"""Q-GaLore (arXiv 2407.08296): the affine group quantiser, int8 weights, the int4 projector and the lazy refresh."""

import math

import torch

from .lowrank import Adam, down, side_of, svd_basis, up


def group_parameters(x: torch.Tensor, bits: int, with_zero: bool = False) -> tuple[float, int]:
    """Scale and zero point of one group of values. with_zero: zero counts as one of them, see fusedopt.weights."""
    top = 2**bits - 1
    low, high = float(x.min()), float(x.max())
    if with_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 1e-5) / top
    return scale, min(max(-round(low / scale), 0), top)


def affine_quantize(x: torch.Tensor, bits: int, group: int = 256, uniform: torch.Tensor | None = None,
                    with_zero: bool = False):  # fmt: skip
    """(codes int64, scales fp64, zeros int64) of a flat tensor, one group after the other; the last one may be shorter.

    uniform: numbers of [0, 1) for stochastic rounding, x's shape; None rounds to nearest (ties to even).
    """
    codes, scales, zeros = torch.empty(x.numel(), dtype=torch.int64), [], []
    for first in range(0, x.numel(), group):
        values = x[first : first + group].double()
        scale, zero = group_parameters(values, bits, with_zero)
        for i, value in enumerate(values.tolist()):
            y = value / scale
            if uniform is None:
                whole = round(y)
            else:
                whole = math.floor(y) + (1 if float(uniform[first + i]) < y - math.floor(y) else 0)
            codes[first + i] = min(max(whole + zero, 0), 2**bits - 1)
        scales.append(scale)
        zeros.append(zero)
    return codes, torch.tensor(scales, dtype=torch.float64), torch.tensor(zeros)


def affine_dequantize(codes, scales, zeros, group: int = 256) -> torch.Tensor:
    index = torch.arange(codes.numel()) // group
    return scales[index].double() * (codes.double() - zeros[index].double())


class LazyRefresh:
    """When a layer's projector is refreshed. `due(t)` at 1-based t; after a refresh, `observe` its first singular vector."""

    def __init__(self, update_every, cos_threshold=0.4, gamma=2.0, queue=5):
        self.gap, self.threshold, self.gamma, self.size = update_every, cos_threshold, gamma, queue
        self.queue, self.last = [], None

    def due(self, t):
        return (t - 1) % self.gap == 0

    def observe(self, vector):
        if self.last is not None:
            self.queue = [*self.queue, float(vector @ self.last / (vector.norm() * self.last.norm()))][-self.size :]
            if len(self.queue) == self.size and sum(self.queue) / self.size >= self.threshold:
                self.gap = int(self.gamma * self.gap)
        self.last = vector.clone()


class QGaLore:
    """One matrix, held in floating point (weight_bits=None) or int8 (8): then `step` takes the uniform numbers too.

    projector_bits: 4, or None for an exact projector. Adam's states are exact here. basis: handed in where due.
    """

    def __init__(self, rank, update_every=200, scale=0.25, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                 projector_bits=4, weight_bits=None, group=256, cos_threshold=0.4, gamma=2.0, queue=5):  # fmt: skip
        self.schedule = LazyRefresh(update_every, cos_threshold, gamma, queue)
        self.adam = Adam(betas, eps, "D1")
        self.t, self.basis, self.refreshes = 0, None, []
        self.__dict__.update(rank=rank, scale=scale, lr=lr, decay=weight_decay, projector_bits=projector_bits,
                             weight_bits=weight_bits, group=group)  # fmt: skip

    def step(self, p, g, uniform=None, basis=None):
        """p: fp64 weights, or the weights that int8 codes stand for; changed in place to what is stored after the step."""
        self.t += 1
        side = side_of(p.shape)
        if self.schedule.due(self.t):
            exact = svd_basis(g, self.rank, side) if basis is None else basis
            self.schedule.observe(exact[0] if side == "right" else exact[:, 0])
            self.refreshes.append(self.t)
            if self.projector_bits is not None:
                stored = affine_quantize(exact.reshape(-1), self.projector_bits, self.group)
                exact = affine_dequantize(*stored, self.group).view(exact.shape)
            self.basis = exact
        p -= self.lr * self.scale * up(self.adam.direction(down(g, self.basis, side)), self.basis, side)
        p -= self.lr * self.decay * p
        if self.weight_bits is not None:
            flat_uniform = None if uniform is None else uniform.reshape(-1)
            stored = affine_quantize(p.reshape(-1), self.weight_bits, self.group, flat_uniform)
            p.copy_(affine_dequantize(*stored, self.group).view(p.shape))
