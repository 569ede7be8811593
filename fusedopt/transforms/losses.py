"""Several losses: PCGrad's projection of conflicting gradients, and Bloop's auxiliary loss that does not hinder the main one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusedopt.distributed import is_dtensor
from fusedopt.projections.seeds import mix
from fusedopt.transforms.base import Batch, Transform, _laid_out
from fusedopt.transforms.clipping import check_positive


def _dot(xs: Sequence[torch.Tensor | None], ys: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """fp64, 0-dim, on the first one's device: the inner product over all tensors; None is zero."""
    parts = [(x.float() if x.dtype.itemsize < 4 else x).mul(y).sum(dtype=torch.float64)
             for x, y in zip(xs, ys, strict=True) if x is not None and y is not None]  # fmt: skip
    return (
        torch.stack([part.to(parts[0].device) for part in parts]).sum()
        if parts
        else torch.zeros((), dtype=torch.float64)
    )


def pcgrad(
    losses: Sequence[torch.Tensor], params: Sequence[torch.Tensor], reduction: str = "sum", seed: int = 0, step: int = 0
) -> None:
    """Sets .grad of parameters to the sum of the losses' gradients without what conflicts, in place of backward().

    Each gradient, over all parameters: for the others in random order, if <g_i, g_j> < 0 then g_i <- g_i - (<g_i, g_j> / |g_j|^2)
    g_j. Then opt.step() with any rule. All decisions stay on the device. Memory: two gradients for each loss.

    Args:
        losses: 0-dim tensors. params: what is trained. reduction: "sum" or "mean" over losses.
        seed, step: of the order.
    Raises ValueError: no loss; an unknown reduction; DTensor parameters, whose gradients it would sum in part.
    Source: arXiv 2001.06782, algorithm 1.
    """
    losses, params = list(losses), [p for p in params if p.requires_grad]
    if not losses or reduction not in ("sum", "mean"):
        raise ValueError(
            f"pcgrad: {len(losses)} losses, reduction {reduction!r}; it takes at least one, and 'sum' or 'mean'"
        )
    if any(map(is_dtensor, params)):
        raise ValueError(
            "pcgrad: DTensor parameters have shards of gradients, whose inner products it does not complete."
        )
    last = len(losses) - 1
    each = [
        [
            None if g is None else g.detach()
            for g in torch.autograd.grad(loss, params, retain_graph=i < last, allow_unused=True)
        ]
        for i, loss in enumerate(losses)
    ]
    with torch.no_grad():
        merged = combine(each, seed, step)
        scale = 1.0 / len(losses) if reduction == "mean" else 1.0
        for p, g in zip(params, merged, strict=True):
            p.grad = None if g is None else (g * scale).to(p.dtype)


def combine(each: Sequence[Sequence[torch.Tensor | None]], seed: int = 0, step: int = 0) -> list[torch.Tensor | None]:
    """The sum over losses of gradients without what conflicts; None where no loss reaches a parameter."""
    gen = torch.Generator().manual_seed(mix(seed, step) >> 1)
    squares = [_dot(g, g) for g in each]
    merged: list = [None] * len(each[0])
    for i, start in enumerate(each):
        g = [None if x is None else x.to(torch.promote_types(x.dtype, torch.float32), copy=True) for x in start]
        for j in torch.randperm(len(each), generator=gen).tolist():
            if j == i:
                continue
            share = _dot(g, each[j]).clamp(max=0.0) / squares[j].clamp(min=1e-300)
            for k, other in enumerate(each[j]):
                if other is not None:
                    part = share.to(other.device) * -other.to(torch.promote_types(other.dtype, torch.float32))
                    g[k] = part.to(part.dtype) if g[k] is None else g[k].add_(part)
        merged = [y if x is None else x if y is None else x.add_(y) for x, y in zip(merged, g, strict=True)]
    return merged


def auxiliary_backward(loss: torch.Tensor, params: Sequence[torch.Tensor], retain_graph: bool = False) -> None:
    """Puts the gradient of an auxiliary loss into each parameter's `auxiliary_grad`, for `Bloop`. Call it before or after the
    main loss's backward(); where both share a graph, the first of them with retain_graph=True. Do not scale this loss."""
    params = [p for p in params if p.requires_grad]
    for p, g in zip(
        params, torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True), strict=True
    ):
        p.auxiliary_grad = g


@dataclass(frozen=True)
class Bloop(Transform):
    """e <- decay e + (1 - decay) g, g <- g + weight (a - (<a, e> / |e|^2) e), over all tensors, with the gradient a of an auxiliary
    loss that `auxiliary_backward` has put into each parameter's auxiliary_grad.

    When to use it: an auxiliary loss (regulariser, distillation) that shall not slow the main one down.

    Args:
        weight: of the auxiliary loss. decay: of the average of main gradients, in [0, 1).
    State: `bloop_ema`, fp32, 4 bytes per element. Sums over all tensors. auxiliary_grad is dropped by the step.
    Raises ValueError: an option is out of range. Source: Careful with that Scalpel (arXiv 2402.02998).
    """

    weight: float = 1.0
    decay: float = 0.99
    name = "bloop"
    scope = "model"
    whole = True  # auxiliary gradients are not redistributed
    keeps = ("bloop_ema",)

    def __post_init__(self):
        check_positive("Bloop", "weight", self.weight)
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"Bloop: invalid decay: {self.decay}; it is in [0, 1)")

    def before(self, batches: list[Batch]) -> None:
        home, dot, square, others = batches[0].device, 0.0, 0.0, []
        for batch in batches:
            means = batch.states("bloop_ema")
            batch.put(means, torch._foreach_lerp(means, batch.grads, 1.0 - self.decay))
            found = [getattr(slot.owner, "auxiliary_grad", None) for slot in batch.slots]
            mine = [torch.zeros_like(g) if a is None else _laid_out(a.detach().to(g.dtype), g)
                    for a, g in zip(found, batch.grads, strict=True)]  # fmt: skip
            dot = dot + batch.dots(mine, means).sum().to(home)
            square = square + batch.square_norms(means).sum().to(home)
            others.append(mine)
            for slot in batch.slots:
                slot.owner.auxiliary_grad = None
        share = torch.where(square > 0, dot / square.clamp(min=1e-300), 0.0)
        for batch, mine in zip(batches, others, strict=True):
            along = torch._foreach_mul(batch.states("bloop_ema"), share.to(batch.device, batch.dtype))
            torch._foreach_sub_(mine, along)
            torch._foreach_add_(batch.grads, mine, alpha=self.weight)
