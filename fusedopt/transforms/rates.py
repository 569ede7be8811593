"""What watches gradients to change the run: hypergradient learning rates, and GradES's freezing of converged matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedopt.transforms.base import Batch, Transform
from fusedopt.transforms.clipping import check_positive


@dataclass(frozen=True)
class Hypergradient(Transform):
    """lr <- min(max(lr + rate <g_t, g_(t-1)>, least), most) before each step; nothing at the first.

    When to use it: SGD and its kin where a good learning rate is not known; the change is in proportion to squared gradients.

    Args:
        rate: step length of the learning rate. least, most: its bounds.
        per: "model", one inner product over all tensors, or "group", one for each parameter group.
    The optimizer needs `lr` as a 1-element tensor, which is changed in place, on the parameters' device if the step is to wait
    for nothing; groups that share one tensor need per="model".
    State: `hypergradient_previous`, the last gradient, fp32, 4 bytes per element. Sums over all tensors.
    Raises ValueError: an option is out of range; at the step: lr is a number.
    Source: arXiv 1703.04782, algorithm 4 (SGD-HD); FedHyper, arXiv 2310.03156.
    """

    rate: float = 1e-4
    least: float = 0.0
    most: float = float("inf")
    per: str = "model"
    name = "hypergradient"
    scope = "model"
    keeps = ("hypergradient_previous",)

    def __post_init__(self):
        check_positive("Hypergradient", "rate", self.rate)
        if not 0.0 <= self.least <= self.most:
            raise ValueError(f"Hypergradient: invalid bounds: least={self.least}, most={self.most}")
        if self.per not in ("model", "group"):
            raise ValueError(f"Hypergradient: unknown per {self.per!r}; it is 'model' or 'group'")

    def ready(self, batches: list[Batch]) -> None:
        if not all(isinstance(g["lr"], torch.Tensor) for batch in batches for g in batch.groups):
            raise ValueError("Hypergradient: it changes lr in place. Create the optimizer with lr=torch.tensor(...).")

    def before(self, batches: list[Batch]) -> None:
        groups = {id(g): g for batch in batches for g in batch.groups}
        sums: dict[int, torch.Tensor | float] = dict.fromkeys(groups, 0.0)
        for batch in batches:
            old = batch.states("hypergradient_previous")
            dots = batch.dots(batch.grads, old)
            for group, dot in zip(batch.groups, dots.unbind(), strict=True):
                sums[id(group)] = sums[id(group)] + dot.to(batches[0].device)
            batch.put(old, batch.grads)
        if self.per == "model":
            sums = dict.fromkeys(groups, sum(sums.values()))
        for lr, change in {id(g["lr"]): (g["lr"], sums[key]) for key, g in groups.items()}.values():
            if (skip := batches[0].skip) is not None:
                change = torch.where(skip, 0.0, change)
            lr.add_((self.rate * change).to(lr.device, lr.dtype).view(lr.shape)).clamp_(self.least, self.most)


class GradES:
    """Freezes matrices whose gradients have become small, for good: call `update()` after backward and before opt.step().

    When to use it: fine-tuning of transformers, to save the steps of layers that have converged.

    From step start + 1 on, a parameter of two dimensions or more is frozen (requires_grad=False, no gradient) where the sum of
    |g|, or of |g - g_last|, is below the threshold. Its states stay as they are. Waits for the device at every update.

    Args:
        opt: any optimizer. threshold: in the units of the metric. start: steps of grace.
        metric: "l1" or "l1_change" (which keeps the last gradients, 4 bytes per element). normalise: "sum" or "mean" over elements.
    Raises ValueError: an option is out of range. Source: arXiv 2509.01842.
    """

    def __init__(self, opt, threshold: float, start: int, metric: str = "l1", normalise: str = "sum"):
        check_positive("GradES", "threshold", threshold)
        if not isinstance(start, int) or start < 0:
            raise ValueError(f"GradES: invalid start: {start!r}; it is a number of steps")
        if metric not in ("l1", "l1_change") or normalise not in ("sum", "mean"):
            raise ValueError(f"GradES: unknown metric {metric!r} or normalise {normalise!r}")
        self.opt, self.threshold, self.start, self.metric, self.normalise = opt, threshold, start, metric, normalise
        self.steps = 0
        self._last: dict[torch.Tensor, torch.Tensor] = {}

    @torch.no_grad()
    def update(self) -> list[torch.Tensor]:
        """Counts a step; freezes what has converged, and returns it."""
        self.steps += 1
        live = [
            p
            for g in self.opt.param_groups
            for p in g["params"]
            if p.requires_grad and p.grad is not None and p.dim() > 1
        ]
        changes = live
        if self.metric == "l1_change":
            changes = [p for p in live if p in self._last]
            grads = [p.grad.float() - self._last[p] for p in changes]
            self._last = {p: p.grad.to(torch.float32, copy=True) for p in live}
        else:
            grads = [p.grad for p in live]
        if self.steps <= self.start or not changes:
            return []
        sums = torch.stack([g.abs().sum(dtype=torch.float64).cpu() for g in grads])
        if self.normalise == "mean":
            sums = sums / torch.tensor([p.numel() for p in changes])
        frozen = [p for p, s in zip(changes, sums.tolist(), strict=True) if s < self.threshold]
        for p in frozen:
            p.requires_grad_(False)
            p.grad = None
            self._last.pop(p, None)
        return frozen

    def state_dict(self) -> dict:
        """The count and which parameters are frozen, by index; gradients of the last step are not kept."""
        params = [p for g in self.opt.param_groups for p in g["params"]]
        return {"steps": self.steps, "frozen": [i for i, p in enumerate(params) if not p.requires_grad]}

    def load_state_dict(self, state: dict) -> None:
        self.steps = int(state["steps"])
        params = [p for g in self.opt.param_groups for p in g["params"]]
        for i in state["frozen"]:
            params[i].requires_grad_(False)
            params[i].grad = None
