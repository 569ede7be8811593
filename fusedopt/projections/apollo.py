"""APOLLO and APOLLO-Mini: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance" (arXiv 2412.05270), algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fusedopt.distributed import Sharding, add_up, shard_of, split_groups, spread
from fusedopt.projections import base, ops
from fusedopt.projections.sharded import refusal

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
        self.project(slot.key.backend, grad, keys)

    def project(self, backend: str, grad: torch.Tensor, keys: dict) -> None:
        """Fills `projected` and, where it is wanted, `squares`. keys: of the projector."""
        ops.project_seeded(backend, grad, self.rank, self.side, self.projected, self.squares, **keys)

    def norms(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of U and R: of their columns (left) or rows (right), or of the whole of each."""
        both = self.update.to(self.wide), self.projected.to(self.wide)
        if self.projection.scope == "tensor":
            return both[0].norm(), both[1].norm()
        dim = 0 if self.side == "left" else 1
        return both[0].norm(dim=dim), both[1].norm(dim=dim)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of a number for each kept column (left) or row (right)."""
        return x.sum()

    def after(self, grad: torch.Tensor, slot, steps) -> None:
        update, projected = self.norms()
        mul = steps.multiplier(slot)
        factor = update * mul / (projected * abs(mul) + _TINY)
        if self.squares is not None:
            norm = self.total(factor.square() * self.squares).sqrt()
            factor = factor / self._limit(norm, steps.found)
            self.squares = None
        self.apply(grad, factor, slot, steps)

    def apply(self, grad: torch.Tensor, factor: torch.Tensor, slot, steps) -> None:
        """Updates the parameter by the scaled gradient."""
        work = replace(steps.work(slot, grad), scale=self.projection.scale**0.5)
        left = self.side == "left"
        factors = factor.expand(self.shape[1 if left else 0]).contiguous()
        if left:
            work.col_factor = factors
        else:
            work.row_factor = factors
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


class ShardedApolloSite(ApolloSite):
    """One sharded matrix (DTensor: FSDP2, tensor parallelism, hybrid meshes). `whole` is its shape, `shape` that of this
    process's shard.

    Where processes share out the rows or columns that are projected away, each draws its part of the projector and has part of
    R and of the squares: they are summed over these processes. Where they share out those that are kept, R, the states and the
    factors are split like them, and sums over all of them (the limiter's norm, with scope "tensor" also those of U and R) are
    sums of one number a process.
    """

    def __init__(self, projection, p, entry, grad_dtype, tensor_id, group, place):
        super().__init__(projection, p, entry, grad_dtype, tensor_id, group, place)
        self.sharding = Sharding(p)
        self.shape = self.sharding.local_matrix
        away = 0 if self.side == "left" else 1
        self.adders, self.sharers = split_groups(p, away), split_groups(p, 1 - away)
        self.spans = _spans(p, self.whole, away) if self.adders else None  # of the projector's numbers

    def project(self, backend, grad, keys):
        summed = [x for x in (self.projected, self.squares) if x is not None]
        if grad.numel():
            super().project(backend, grad, {**keys, "whole": self.whole, "spans": self.spans})
        else:
            for x in summed:
                x.zero_()
        for x in summed:
            add_up(x, self.adders)

    def norms(self):
        norms = super().norms()
        if self.projection.scope == "channel" or not self.sharers:
            return norms
        update, projected = add_up(torch.stack(norms).double().square(), self.sharers).sqrt().to(self.wide)
        return update, projected

    def total(self, x):
        return add_up(x.sum(dtype=torch.float64), self.sharers).to(self.wide)

    def apply(self, grad, factor, slot, steps):
        if grad.numel():
            super().apply(grad, factor, slot, steps)


def _spans(p, whole: tuple[int, int], dim: int) -> list[tuple[int, int]] | None:
    """(first, end) of the runs of a DTensor matrix's rows (dim 0) or columns (dim 1) that this process has; None: all of them."""
    size = whole[dim]
    numbers = torch.arange(size).view((size, 1) if dim == 0 else (1, size))
    mine = shard_of(spread(p, tuple(numbers.shape), {dim: dim}, torch.int64), numbers).view(-1).cpu()
    runs = mine.tensor_split((mine.diff() != 1).nonzero().view(-1) + 1)
    spans = [(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]
    return None if spans == [(0, size)] else spans


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

    def sharded_site(self):
        return ShardedApolloSite if self.site is ApolloSite else None

    def refuses_shards(self, p):
        return super().refuses_shards(p) or refusal(p)


@dataclass(frozen=True)
class ApolloMini(Apollo):
    """APOLLO with rank 1 and one factor per tensor: states of (almost) no size. Arguments as in `Apollo`."""

    name: ClassVar[str] = "apollo_mini"

    rank: int = 1
    scale: float = 128.0
    scope: str = "tensor"
