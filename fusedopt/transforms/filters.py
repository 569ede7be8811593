"""Grokfast: amplifies the slow components of the gradients (arXiv 2405.20233, algorithms 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedopt.transforms.base import Batch, Transform


@dataclass(frozen=True)
class Grokfast(Transform):
    """h <- alpha h + (1 - alpha) g (h = g at the first step), g <- g + amplify h.

    When to use it: small algorithmic tasks that generalise long after they fit (grokking); weight decay helps it.

    Args:
        alpha: decay rate of the average, in [0, 1). amplify: factor of the average (lambda in the paper), 0 or more.
    State: `grokfast_ema`, fp32, shaped like the parameter: 4 bytes per element.
    Raises ValueError: an option is out of range. Source: arXiv 2405.20233, algorithm 2.
    """

    alpha: float = 0.98
    amplify: float = 2.0
    name = "grokfast"
    keeps = ("grokfast_ema",)
    counts = True

    def __post_init__(self):
        if not 0.0 <= self.alpha < 1.0:
            raise ValueError(f"Grokfast: invalid alpha: {self.alpha}; it is in [0, 1)")
        if not self.amplify >= 0.0:
            raise ValueError(f"Grokfast: invalid amplify: {self.amplify}; it is 0 or more")

    def each(self, batch: Batch) -> None:
        means, before = batch.states("grokfast_ema"), batch.count(self.name)
        if batch.on_device:
            weight = torch.where(before == 0, 1.0, 1.0 - self.alpha)
            if batch.skip is not None:
                weight = weight * ~batch.skip
            for mean, g, w in zip(means, batch.grads, weight.to(batch.dtype).unbind(), strict=True):
                mean.lerp_(g, w)
        else:
            for first in (True, False):
                mine = [i for i, n in enumerate(before) if (n == 0) == first]
                if mine:
                    old, new = [means[i] for i in mine], [batch.grads[i] for i in mine]
                    torch._foreach_copy_(old, new) if first else torch._foreach_lerp_(old, new, 1.0 - self.alpha)
        torch._foreach_add_(batch.grads, means, alpha=self.amplify)


@dataclass(frozen=True)
class GrokfastMA(Transform):
    """g <- g + amplify mean of the last `window` gradients (this one included), once there are so many.

    When to use it: as Grokfast, where memory for the window is no matter; the average forgets completely.

    Args:
        window: gradients in the average, 1 or more. amplify: factor of the average.
        reduce: "mean" or "sum" of the window. warmup: wait until the window is full.
    State: `grokfast_window`, fp32 [window, *shape]: 4 window bytes per element.
    Raises ValueError: an option is out of range. Source: arXiv 2405.20233, algorithm 1.
    """

    window: int = 100
    amplify: float = 5.0
    reduce: str = "mean"
    warmup: bool = True
    name = "grokfast_ma"
    keeps = ("grokfast_window",)
    counts = True
    whole = True  # the window has a dimension more than a shard

    def __post_init__(self):
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"GrokfastMA: invalid window: {self.window}; it is 1 or more")
        if not self.amplify >= 0.0:
            raise ValueError(f"GrokfastMA: invalid amplify: {self.amplify}; it is 0 or more")
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"GrokfastMA: unknown reduce {self.reduce!r}; it is 'mean' or 'sum'")

    def shapes(self, p):
        return {"grokfast_window": (self.window, *p.shape)}

    def each(self, batch: Batch) -> None:
        before = batch.count(self.name)
        for i, (ring, g) in enumerate(zip(batch.states("grokfast_window"), batch.grads, strict=True)):
            if not batch.on_device:
                ring[before[i] % self.window].copy_(g)
                count = min(before[i] + 1, self.window)
                if not self.warmup or count == self.window:
                    g.add_(ring.sum(0), alpha=self.amplify / (count if self.reduce == "mean" else 1))
                continue
            place = (before[i] % self.window).long().view(1)
            new = g if batch.skip is None else torch.where(batch.skip, ring.index_select(0, place)[0], g)
            ring.index_copy_(0, place, new.unsqueeze(0))
            count = (before[i] + 1).clamp(max=self.window)
            factor = self.amplify / count if self.reduce == "mean" else torch.full_like(count, self.amplify)
            if self.warmup:
                factor = factor * (count == self.window)
            g.add_(ring.sum(0) * factor.to(g.dtype))
