"""What rescales the step of any rule element by element: cautious masking, and learning rates by groups of momenta (SGG)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fusedopt.rules.cautious import NORMALISERS
from fusedopt.states import decode
from fusedopt.transforms.base import Batch, Transform
from fusedopt.transforms.clipping import check_positive
from fusedopt.transforms.wrappers import check_count, decays


def rescaled(batch: Batch, old: list[torch.Tensor], new: list[torch.Tensor], factors) -> list[torch.Tensor]:
    """old less its decoupled decay, plus the rest of the step times a factor for each element."""
    out = []
    for w, p, d, factor in zip(old, new, decays(batch).to(batch.dtype).unbind(), factors, strict=True):
        decayed = w - d * w
        out.append(decayed + (p - decayed) * factor)
    return out


def need_momentum(cls: str, batches: list[Batch]) -> None:
    """Raises ValueError for a rule without a full first moment."""
    for slot in (s for batch in batches for s in batch.slots):
        if slot.site is not None or "exp_avg" not in slot.rule.state_names:
            raise ValueError(
                f"{cls}: rule {slot.rule.name!r} keeps no full exp_avg of parameter {slot.tensor_id}. Use AdamW, Lion or another "
                "rule with a first moment, without projection."
            )


def momenta(batch: Batch) -> list[torch.Tensor]:
    return [decode(s.param, s.entry, s.rule.states[s.rule.state_names.index("exp_avg")]) for s in batch.slots]


@dataclass(frozen=True)
class Cautious(Transform):
    """Keeps the elements of a step whose sign is against their gradient's, scaled up for the others: with u the step of the rule
    apart from decoupled decay and k = [u g > 0], u <- u k n / max(k's sum + a, b n) in each tensor of n elements.

    When to use it: with any rule with momentum, in place of tuning its decay rates; Adam, AdamW and Lion have it inside their
    kernels (their option cautious=True), which costs no memory and rounds once.

    Args:
        normalise: "mean": a = 0, b = 1e-3 (C-AdamW). "count": a = 1, b = 0 (C-Lion).
    g is the gradient as this transform gets it, without L2 decay. A step below the rounding of its weight counts as none.
    State: none; the weights before the step and the signs of gradients are kept during it (5 bytes per element). Sums over each
    tensor. Raises ValueError: an unknown normalise. Source: arXiv 2411.16085, algorithm 1.
    """

    normalise: str = "mean"
    name = "cautious"
    scope = "tensor"
    reads_weights = after_step = True

    def __post_init__(self):
        if self.normalise not in NORMALISERS:
            raise ValueError(f"Cautious: invalid normalise: {self.normalise!r}; it is 'mean' or 'count'")

    def each(self, batch: Batch) -> None:
        old = torch._foreach_mul(batch.weights(), 1.0)
        signs = [
            (-g if group["maximize"] else g).sign().to(torch.int8)
            for g, group in zip(batch.grads, batch.groups, strict=True)
        ]
        batch.kept[self.name] = old, signs

    def after(self, batches: list[Batch]) -> None:
        add, floor = NORMALISERS[self.normalise]
        for batch in batches:
            old, signs = batch.kept.pop(self.name)
            new, kept = batch.weights(), []
            for w, p, d, sign in zip(old, new, decays(batch).to(batch.dtype).unbind(), signs, strict=True):
                kept.append((w - d * w - p) * sign > 0)
            n = batch.tensor_sizes()
            scale = n / torch.maximum(batch.sums(kept) + add, floor * n).clamp(min=1e-300)
            factors = (k * s for k, s in zip(kept, scale.to(batch.dtype).unbind(), strict=True))
            batch.set_weights(rescaled(batch, old, new, factors))


def group_bounds(x: torch.Tensor, clusters: int, rounds: int = 10) -> torch.Tensor:
    """[clusters - 1]: where the clusters of one-dimensional k-means over x (at least one element) meet, by Lloyd's algorithm
    from the quantiles."""
    ordered = x.flatten().double().sort().values
    total = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    n = len(ordered)
    places = (torch.arange(clusters, device=x.device) * 2 + 1) * (n - 1) // (2 * clusters)
    centres = ordered[places]
    for _ in range(rounds):
        bounds = (centres[1:] + centres[:-1]) / 2
        inner = torch.searchsorted(ordered, bounds, right=True)
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), n)])
        count = edges.diff()
        means = (total[edges[1:]] - total[edges[:-1]]) / count.clamp(min=1)
        centres = torch.where(count > 0, means, centres)
    return (centres[1:] + centres[:-1]) / 2


@dataclass(frozen=True)
class GradientGrouping(Transform):
    """SGG: every `every` steps the momenta |m| of each tensor are put into clusters of like size (one-dimensional k-means); with
    a the mean of |m| and mu_k that of cluster k, mu'_k = beta_c mu'_k + (1 - beta_c) mu_k and
    s_k = clamp(beta_s s_k + (1 - beta_s) a / max(mu'_k, eps), low, high). Every step of the rule, apart from decoupled decay,
    is multiplied by the s of the element's cluster.

    When to use it: large language models with AdamW, whose learning rates it evens out inside a layer.

    Args:
        clusters: 2 to 255. every: steps between two clusterings. beta_c, beta_s: decay rates. low, high: limits of s.
        eps: the least mu'.
    States: `grouping_cluster`, uint8, 1 byte per element, and two numbers per cluster; the weights before the step are kept during
    it (4 bytes per element). Reads the rule's `exp_avg`. Whole tensors. With capturable=True clusters are made at every
    step, as a graph cannot leave them out.
    Raises ValueError: an option is out of range; at the step: a rule without `exp_avg`.
    Source: "Taming LLMs by Scaling Learning Rates with Gradient Grouping" (arXiv 2506.01049) as its published code does it;
    clusters begin at quantiles, where that code draws at random.
    """

    clusters: int = 3
    every: int = 500
    beta_c: float = 0.999
    beta_s: float = 0.999
    low: float = 0.1
    high: float = 10.0
    eps: float = 1e-8
    name = "grouping"
    scope = "tensor"
    keeps = ("grouping_cluster", "grouping_mean", "grouping_scale")
    codes = ("grouping_cluster",)
    whole = counts = reads_weights = after_step = True

    def __post_init__(self):
        check_count("GradientGrouping", "clusters", self.clusters, 2)
        check_count("GradientGrouping", "every", self.every, 1)
        check_positive("GradientGrouping", "low", self.low)
        check_positive("GradientGrouping", "eps", self.eps)
        if self.clusters > 255:
            raise ValueError(f"GradientGrouping: invalid clusters: {self.clusters}; it is at most 255")
        for name, beta in (("beta_c", self.beta_c), ("beta_s", self.beta_s)):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"GradientGrouping: invalid {name}: {beta}; it is in [0, 1)")
        if not self.low <= self.high:
            raise ValueError(f"GradientGrouping: low is {self.low}, above high, which is {self.high}")

    def shapes(self, p):
        return {
            "grouping_cluster": tuple(p.shape),
            "grouping_mean": (self.clusters,),
            "grouping_scale": (self.clusters,),
        }

    def ready(self, batches: list[Batch]) -> None:
        need_momentum("GradientGrouping", batches)

    def each(self, batch: Batch) -> None:
        batch.kept[self.name] = torch._foreach_mul(batch.weights(), 1.0), batch.count(self.name)

    def after(self, batches: list[Batch]) -> None:
        for batch in batches:
            old, before = batch.kept.pop(self.name)
            if batch.on_device:
                first, due = (before == 0).unbind(), ((before + 1) % self.every == 0).unbind()
                self._begin(batch, lambda i, x, first=first: torch.where(first[i], torch.ones_like(x), x))
                self._group(batch, lambda i, new, x, due=due: torch.where(due[i], new.to(x.dtype), x))
            else:
                if new := [i for i, n in enumerate(before) if n == 0]:
                    self._begin(batch.only(new), lambda i, x: torch.ones_like(x))
                if due := [i for i, n in enumerate(before) if (n + 1) % self.every == 0]:
                    self._group(batch.only(due), lambda i, new, x: new)
            scales, clusters = batch.states("grouping_scale"), batch.states("grouping_cluster")
            factors = (s.to(batch.dtype)[k.long()] for s, k in zip(scales, clusters, strict=True))
            batch.set_weights(rescaled(batch, old, batch.weights(), factors))

    def _begin(self, batch: Batch, choose: Callable) -> None:
        for name in ("grouping_mean", "grouping_scale"):
            states = batch.states(name)
            batch.put(states, [choose(i, x) for i, x in enumerate(states)])

    def _group(self, batch: Batch, choose: Callable) -> None:
        means, scales, clusters = (batch.states(name) for name in self.keeps[1:] + self.keeps[:1])
        for i, m in enumerate(x.abs() for x in momenta(batch)):
            if not m.numel():
                continue
            index = torch.bucketize(m.double(), group_bounds(m, self.clusters))
            flat = index.flatten()
            count = torch.zeros(self.clusters, dtype=torch.float64, device=m.device)
            total = count.index_add(0, flat, m.flatten().double())
            count = count.index_add(0, flat, torch.ones_like(flat, dtype=torch.float64))
            every = m.double().mean()
            mean = torch.where(count > 0, total / count.clamp(min=1), every)
            mean = self.beta_c * means[i].double() + (1 - self.beta_c) * mean
            scale = self.beta_s * scales[i].double() + (1 - self.beta_s) * every / mean.clamp(min=self.eps)
            values = mean, scale.clamp(self.low, self.high), index
            states = means[i], scales[i], clusters[i]
            chosen = [choose(i, new.to(x.dtype), x) for new, x in zip(values, states, strict=True)]
            for state, value in zip(states, chosen, strict=True):
                batch.put([state], [value])
