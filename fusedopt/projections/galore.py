"""GaLore: Zhao et al., "Memory-Efficient LLM Training by Gradient Low-Rank Projection" (arXiv 2403.03507), algorithm 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fusedopt.distributed import spread
from fusedopt.projections import base
from fusedopt.projections.basis import BasisSite
from fusedopt.projections.sharded import ShardedBasisSite, refusal

METHODS = ("randomized", "svd", "random")


@dataclass(frozen=True)
class GaLore(base.Subspace):
    """Steps matrices in a low-rank subspace of their gradients, refreshed now and then; states have the subspace's shape.

    Args:
        rank: dimension of the subspace; matrices whose smaller side is no larger are stepped as they are.
        update_every: steps between refreshes of a matrix's subspace.
        scale: of the projected-back update (the paper's alpha).
        side: "std" projects the larger side of a matrix away ("right" for rows >= cols), "reverse_std" the other,
            "left" and "right" always that one.
        stagger: spread the refreshes of many matrices over the steps instead of refreshing all at once.
        method: "randomized" (range finder of Halko et al. 2011 with warm start), "svd" (full, the paper's) or "random".

    Weight decay acts on the full matrix and must be decoupled. Raises ValueError for options out of range.
    Source: arXiv 2403.03507, algorithm 2. The states are neither reset nor rotated at a refresh, as there.
    """

    name: ClassVar[str] = "galore"
    site: ClassVar[type] = BasisSite
    low_rank_gradient: ClassVar[bool] = True

    scale: float = 0.25
    method: str = "randomized"

    def __post_init__(self):
        super().__post_init__()
        base.check_choice(self.method, "projection method", METHODS)

    def tensors(self, p):
        shape = base.matrix_shape(p)
        basis = base.basis_shape(shape, self.rank_for(shape), self.side_for(shape))
        return {"projector": (basis, base.basis_dtype(p))}

    def sharded_site(self):
        return ShardedBasisSite if self.site is BasisSite else None

    def refuses_shards(self, p):
        return super().refuses_shards(p) or refusal(p)

    def tensor_like(self, p, name):
        shape, dtype = self.tensors(p)[name]
        away = 0 if self.side_for(base.matrix_shape(p)) == "left" else 1
        return spread(p, shape, {away: away}, dtype)
