"""Subspace-Momentum: Nguyen and Nguyen, "Subset-Norm and Subspace-Momentum" (arXiv 2411.07120): momentum in a subspace only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fusedopt.abi import Phase
from fusedopt.memory import flat
from fusedopt.projections import base, ops
from fusedopt.projections.pieces import FullSite, PieceLaunch, Pieces, in_scratch
from fusedopt.projections.seeds import generator
from fusedopt.projections.selection import random_indices, squared_norms, top_indices
from fusedopt.projections.subset_norm import SubsetMoment, adam_only, check_subset_size
from fusedopt.projections.subspace import refresh_basis, svd_basis
from fusedopt.rules.adam_parts import ADAM_DENOMINATOR, EMA
from fusedopt.rules.sgd import SGD_PLAIN

METHODS = ("randomized", "svd", "topk", "uniform", "srht")


def unit_basis(index: torch.Tensor, size: int, side: str, dtype: torch.dtype) -> torch.Tensor:
    """The basis of chosen coordinates of a side."""
    basis = torch.zeros(size, index.numel(), dtype=dtype, device=index.device)
    basis.scatter_(0, index.view(1, -1), 1.0)
    return basis if side == "left" else basis.t().contiguous()


def hadamard_basis(size: int, rank: int, side: str, gen: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a Hadamard matrix with random signs; where size is no power of 2, cut to it and orthonormalised."""
    device = gen.device
    whole = 1 << (size - 1).bit_length()
    index = torch.randperm(whole, generator=gen, device=device)[:rank]
    signs = torch.randint(0, 2, (size,), generator=gen, device=device) * 2 - 1
    both = index[None, :] & torch.arange(size, device=device)[:, None]
    shift = 32
    while shift:
        both ^= both >> shift
        shift //= 2
    basis = (1 - 2 * (both & 1)) * signs[:, None]
    basis = torch.linalg.qr(basis.to(dtype))[0] if size < whole else basis.to(dtype) / size**0.5
    return basis if side == "left" else basis.t().contiguous()


class SubspaceMomentumSite(FullSite):
    """One matrix of Subspace-Momentum."""

    plain_rule = "sgd"

    def __init__(self, projection, p, entry, grad_dtype, tensor_id, group, place):
        super().__init__(projection, p, entry, grad_dtype, tensor_id, group, place)
        self.side, self.rank = projection.side_for(self.shape), projection.rank_for(self.shape)
        low_rank = projection.state_shape(self.shape)
        basis_dtype = torch.float64 if self.dtype == torch.float64 else base.basis_dtype(p)
        dtype = ops.projected_dtype(grad_dtype, basis_dtype)
        self.low_rank = torch.empty(low_rank, dtype=dtype, device=p.device)  # the projected gradient
        self.average = torch.empty(low_rank, dtype=self.dtype, device=p.device)  # its moving average, decoded

    @property
    def gradient_reads(self) -> int:
        """For the projection and for the update; for the sums of subsets once more."""
        return 2 if self.projection.subset_size is None else 3

    def bind(self, slot, steps) -> None:
        self.pieces = self.pieces_of(slot, steps, self.shape)
        self.low_pieces = Pieces(tuple(self.low_rank.shape), slot.param.device, slot.key.backend)
        size = self.projection.subset_size
        self.moment = None if size is None else SubsetMoment(size, self.shape)
        self.launches: tuple[PieceLaunch, PieceLaunch] | None = None

    def due(self, step: int) -> bool:
        return step == 1 or step % self.projection.update_every == 0

    def _fresh(self, grad: torch.Tensor, step: int) -> torch.Tensor:
        method, side, old = self.projection.method, self.side, None if self.cold else self.entry["projector"]
        if method == "svd":
            return svd_basis(grad, self.rank, side, old)
        if method == "randomized":
            keys = {"seed": self.seed, "tensor_id": self.tensor_id, "step": step}
            into = {"basis_out": self.entry["projector"], "with_projected": False}
            return refresh_basis(grad, self.rank, side, old, **into, **keys)[0]
        size = self.shape[0] if side == "left" else self.shape[1]
        if method == "topk":
            return unit_basis(top_indices(squared_norms(grad, side), self.rank), size, side, self.dtype)
        if method == "uniform":
            keys = {"seed": self.seed, "tensor_id": self.tensor_id, "step": step}
            return unit_basis(random_indices(size, self.rank, device=grad.device, **keys), size, side, self.dtype)
        return hadamard_basis(
            size, self.rank, side, generator(grad.device, self.seed, self.tensor_id, step), self.dtype
        )

    def _clear(self, slot, found) -> None:
        """Sets the stored momentum to zero, unless nothing may be written."""
        codes, scale, form = self.stored(slot, "exp_avg")
        for t, zero in ((codes, form.zero_code(True)), (scale, 0)):
            if t is not None:
                t.copy_(torch.full_like(t, zero) if found is None else torch.where(found.view(()) != 0, t, zero))

    def before(self, grad, step, slot, steps) -> None:
        self.backend = slot.key.backend
        projection, basis = self.projection, self.entry["projector"]
        refresh = self.refreshes(step, steps)
        if refresh:
            fresh = self._fresh(grad, step)
            if fresh is not basis:
                basis.copy_(fresh)
            if not self.cold and not projection.official_refresh:
                self._clear(slot, steps.found)
        ops.project(self.backend, grad, basis, self.side, self.low_rank)
        if self.launches is None:
            self._make_launches(slot, steps, grad.dtype)
        average, _ = self.launches
        average.use(self.low_rank, steps.scale, steps.clip, steps.found)
        for i in range(len(average.works)):
            average.run(i)
        if refresh and not self.cold and projection.official_refresh:
            self._clear(slot, steps.found)

    def _make_launches(self, slot, steps, grad_dtype: torch.dtype) -> None:
        average = PieceLaunch(self.low_pieces, slot, steps.scalars, slot.row, EMA, Phase.DIRECTION, target=flat(self.average),
                              states=[self.stored(slot, "exp_avg")], grad_dtype=self.low_rank.dtype)  # fmt: skip
        scratch = self.pieces.scratch(steps)
        if self.moment is None:
            states = [in_scratch(scratch), self.stored(slot, "exp_avg_sq")]
            update = PieceLaunch(self.pieces, slot, steps.scalars, slot.row, ADAM_DENOMINATOR, Phase.FUSED, states=states,
                                 grad_dtype=grad_dtype)  # fmt: skip
        else:
            update = PieceLaunch(self.pieces, slot, steps.scalars, slot.plain_row, SGD_PLAIN, Phase.FUSED,
                                 grad_dtype=self.dtype)  # fmt: skip
        self.launches = average, update

    def after(self, grad, slot, steps) -> None:
        mul = steps.multiplier(slot)
        mul = mul.to(self.dtype) if isinstance(mul, torch.Tensor) else mul
        scratch, (_, update) = self.pieces.scratch(steps), self.launches
        plain = self.low_rank.to(self.dtype, copy=True).mul_(mul)
        difference = self.average.sub_(plain)  # momentum in place of the plain gradient
        del plain
        basis = self.entry["projector"].to(self.dtype)
        factors = None
        if self.moment is None:
            update.use(grad, steps.scale, steps.clip, steps.found)
        else:
            subsets, scalars = self.entry["exp_avg_sq_subset"], steps.scalars.numbers[slot.row].scalars
            factors = self.moment.factors(self.backend, grad, mul, subsets, scalars, steps.found)
            update.use(scratch, None, None, steps.found)
        left, right = (basis, difference) if self.side == "left" else (difference, basis)
        for i, piece in enumerate(self.pieces.pieces):
            rows = slice(piece.row, piece.stop)
            numerator = self.pieces.rows_of(piece, scratch)
            numerator.copy_(grad[rows]).mul_(mul)
            numerator.addmm_(left[rows], right)
            if factors is not None:
                self.moment.scale(self.pieces, piece, scratch, factors)
            update.run(i)


@dataclass(frozen=True)
class SubspaceMomentum(base.Projection):
    """Adam whose momentum lives in a low-rank subspace; outside of it the step takes the plain gradient.

    p -= lr * debias * (back(m) + g - back(project(g))) / (sqrt(v) + eps), with m the moving average of project(g), and v
    Adam's (full-size) or Subset-Norm's. `exp_avg` is low-rank and `exp_avg_sq` full-size, each in any state_format.

    Args:
        rank: dimension of the subspace; matrices whose smaller side is no larger are stepped as they are.
        update_every: the subspace is chosen anew in step 1 and in each whose number this divides.
        method: "randomized" (range finder), "svd", "topk" (coordinates of the largest norm), "uniform" (random
            coordinates) or "srht" (random rows of a Hadamard matrix with random signs).
        subset_size: None for Adam's second moment, else as of `SubsetNorm`.
        side: "std" projects the larger side of a matrix away, "reverse_std" the other, "left" and "right" always that one.
        official_refresh: in a step that chooses a subspace, take the average of the old momentum, as numbers, and the new
            gradient, and store zeros, as the authors' code does. By default the momentum is zero first, then averaged.

    eps lies beside sqrt(v) without bias correction, as in the paper. v is not reset. The projector is a dense matrix
    [side, rank] in the state for every method. Raises ValueError for options out of range, or a class other than Adam and AdamW.
    Source: arXiv 2411.07120, algorithms 2 and 3.
    """

    name: ClassVar[str] = "subspace_momentum"
    site: ClassVar[type] = SubspaceMomentumSite

    rank: int = 128
    update_every: int = 200
    method: str = "randomized"
    subset_size: int | str | None = None
    side: str = "std"
    official_refresh: bool = False

    def __post_init__(self):
        base.check_positive_int(self.rank, "rank")
        base.check_positive_int(self.update_every, "update_every")
        base.check_choice(self.side, "projection side", base.SIDES)
        base.check_choice(self.method, "projection method", METHODS)
        if self.subset_size is not None:
            check_subset_size(self.subset_size)

    def rank_for(self, shape):
        return min(self.rank, *shape)

    def side_for(self, shape):
        return base.resolve_side(self.side, shape)

    def rule_for(self, rule):
        adam_only("SubspaceMomentum", rule)
        return ADAM_DENOMINATOR if self.subset_size is None else EMA

    def state_like(self, p, name):
        return p if name == "exp_avg_sq" else super().state_like(p, name)

    def tensors(self, p):
        rows, cols = shape = base.matrix_shape(p)
        rank = self.rank_for(shape)
        kept = {"projector": ((rows, rank) if self.side_for(shape) == "left" else (rank, cols), base.basis_dtype(p))}
        if self.subset_size is not None:
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            kept["exp_avg_sq_subset"] = ((SubsetMoment(self.subset_size, shape).count,), dtype)
        return kept
