"""APOLLO and APOLLO-Mini: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance" (arXiv 2412.05270), algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fusedopt.projections import base, ops

SCOPES = ("channel", "tensor")
_TINY = 1e-8  # added to norms in a denominator, as in the reference implementation


class ApolloSite(base.Site):
    """Projects with Gaussian numbers that are drawn anew from their seed, and scales the gradient by the ratio of norms."""

    takes_int8 = True
    squares: torch.Tensor | None = None  # of the gradient's columns or rows, for the limiter; from before() to after()

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.basis_dtype == torch.float64 else torch.float32

    def before(self, grad: torch.Tensor, step: int, slot, steps) -> None:
        every = self.projection.update_every
        period = (step - 1 - self.offset) // every * every + self.offset + 1  # the step this projector is of
        keys = {"seed": self.seed, "tensor_id": self.tensor_id, "step": max(1, period)}
        if self.projection.norm_growth is not None:
            kept = self.shape[1] if self.side == "left" else self.shape[0]
            self.squares = torch.empty(kept, dtype=self.wide, device=grad.device)
        ops.project_seeded(slot.key.backend, grad, self.rank, self.side, self.projected, self.squares, **keys)

    def after(self, grad: torch.Tensor, slot, steps) -> None:
        dim = 0 if self.side == "left" else 1
        whole = self.projection.scope == "tensor"
        norm_of = (lambda x: x.norm()) if whole else (lambda x: x.norm(dim=dim))
        update, projected = norm_of(self.update.to(self.wide)), norm_of(self.projected.to(self.wide))
        mul = steps.multiplier(slot)
        factor = update * mul / (projected * abs(mul) + _TINY)
        if self.squares is not None:
            norm = (factor.square() * self.squares).sum().sqrt()
            factor = factor / self._limit(norm, steps.found)
            self.squares = None
        work = replace(steps.work(slot, grad), scale=self.projection.scale**0.5)
        spread = factor.expand(self.shape[1 - dim]).contiguous()
        if self.side == "left":
            work.col_factor = spread
        else:
            work.row_factor = spread
        ops.apply(slot.key.backend, work)

    def operations(self, slot) -> list[base.Operation]:
        """The projector is drawn and read; the gradient is read for its norms and for the update; norms read R and U."""
        project, _ = super().operations(slot)
        grad = slot.param.numel() * slot.grad_dtype.itemsize
        return [
            base.Operation("projection", project.bytes + self.basis_bytes()),
            base.Operation("norms", grad + base.nbytes(self.projected, self.update)),
            base.Operation("scaled update", sum(base.weight_bytes(slot)) + grad),
        ]

    def _limit(self, norm: torch.Tensor, found: torch.Tensor | None) -> torch.Tensor:
        """The norm-growth limiter: what the update is divided by, so that its norm grows by at most its factor a step."""
        growth = self.projection.norm_growth
        last = self.entry["update_norm"]
        limit = torch.where(last > 0, (norm / (last + _TINY) / growth).clamp(min=1.0), torch.ones_like(norm))
        new = norm / limit
        if found is not None:
            new = torch.where(found.view(()) != 0, last, new)
        last.copy_(new)
        return limit


@dataclass(frozen=True)
class Apollo(base.Subspace):
    """Scales the gradient itself, per channel or per tensor, by how the rule changes norms in a random low-rank space.

    W <- W - lr sqrt(scale) G s / limiter, with s = |U_j| / |R_j| for the columns j of R = P^T G and the rule's direction U (or
    one s for the tensor). P is Gaussian and drawn again from its seed at every step: it takes no memory.

    Args:
        rank: rows of R.
        update_every: steps between new projectors. States are kept.
        scale: alpha; the update is multiplied by its square root.
        scope: "channel" (APOLLO) or "tensor" (APOLLO-Mini).
        norm_growth: an update's norm may grow by this factor a step, at most; None for no limit.
        side: as in `GaLore`.
        stagger: spread the changes of projectors over the steps.

    Raises ValueError for options out of range. Source: arXiv 2412.05270, algorithm 1. The limiter acts on the norm of the
    bias-corrected update.
    """

    name: ClassVar[str] = "apollo"
    site: ClassVar[type] = ApolloSite

    rank: int = 256
    scope: str = "channel"
    norm_growth: float | None = 1.01

    def __post_init__(self):
        super().__post_init__()
        base.check_choice(self.scope, "APOLLO scope", SCOPES)
        if self.norm_growth is not None and self.norm_growth < 1:
            raise ValueError(f"Invalid norm_growth: {self.norm_growth}; it is at least 1, or None for no limit")

    def tensors(self, p):
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        return {} if self.norm_growth is None else {"update_norm": ((), wide)}


@dataclass(frozen=True)
class ApolloMini(Apollo):
    """APOLLO with rank 1 and one factor per tensor: states of (almost) no size. Arguments as in `Apollo`."""

    name: ClassVar[str] = "apollo_mini"

    rank: int = 1
    scale: float = 128.0
    scope: str = "tensor"
