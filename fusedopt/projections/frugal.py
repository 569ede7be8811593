"""FRUGAL: Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training"
(arXiv 2411.07837), algorithm 1: the rule in a subspace, signSGD or SGD without states in the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fusedopt.abi import Phase
from fusedopt.backends.base import MatrixWork
from fusedopt.options import check_nonnegative
from fusedopt.projections import base
from fusedopt.projections.basis import BasisSite
from fusedopt.projections.galore import METHODS
from fusedopt.projections.pieces import FullSite, PieceLaunch, pieces_of
from fusedopt.projections.selection import BLOCK_ORDERS, active_blocks, random_indices, squared_norms, top_indices
from fusedopt.rule import get_rule
from fusedopt.states import scale_names

RESIDUALS = {"sign": "sign", "sgd": "gradient", "none": None}
SELECTIONS = ("columns", "top_columns")


class FrugalSite(BasisSite):
    """A basis of the subspace; the residual goes into the update through a second product."""

    def __init__(self, *args):
        super().__init__(*args)
        self.counting = self.offset if self.projection.reset else None

    def rule_step(self, step):
        """Steps since the last refresh, which has reset the states; from 1."""
        if not self.projection.reset:
            return step
        every, since = self.projection.update_every, step - 1 - self.offset
        restarted = since % every + 1
        if isinstance(step, torch.Tensor):
            return torch.where(since < 0, step, restarted)
        return step if since < 0 else restarted

    def refreshed(self, slot, step: int) -> None:
        if self.projection.reset and not self.cold:
            base.reset_states(slot)

    def work(self, base: MatrixWork) -> MatrixWork:
        work = super().work(base)
        residual = RESIDUALS[self.projection.residual]
        if residual is None:
            return work
        left, right = self.pair(self.projected)
        return replace(
            work, residual=residual, residual_scale=self.projection.residual_scale, grad_left=left, grad_right=right
        )

    def operations(self, slot) -> list[base.Operation]:
        """The update reads the gradient again for its residual, and the projected one for what it leaves out."""
        project, update = super().operations(slot)
        if self.projection.residual == "none":
            return [project, update]
        more = slot.param.numel() * slot.grad_dtype.itemsize + base.nbytes(self.projected)
        return [project, base.Operation("update with residual", update.bytes + more)]


class SelectionSite(FrugalSite):
    """Whole columns (or rows) as the subspace: gathered and put back, without products."""

    takes_int8 = False
    plain_rule = "sgd"

    @property
    def along(self) -> int:
        """The dimension that is selected from: columns on the right, rows on the left."""
        return 1 if self.side == "right" else 0

    def fresh_indices(self, grad: torch.Tensor, step: int) -> torch.Tensor:
        if self.projection.method == "top_columns":
            norms = squared_norms(grad, self.side)
            total, chosen = norms.sum(), top_indices(norms, self.rank)
            useful = torch.isfinite(total) & (total > 0)
            return chosen if self.cold else torch.where(useful, chosen, self.entry["indices"].long())
        keys = {"seed": self.seed, "tensor_id": self.tensor_id, "step": step}
        return random_indices(self.shape[self.along], self.rank, device=grad.device, **keys)

    def before(self, grad: torch.Tensor, step: int, slot, steps) -> None:
        indices = self.entry["indices"]
        if self.refreshes(step, steps):
            indices.copy_(self.fresh_indices(grad, step))
            self.refreshed(slot, step)
        self.projected.copy_(grad.index_select(self.along, indices.long()))

    def bind(self, slot, steps) -> None:
        wide = torch.float64 if self.basis_dtype == torch.float64 else torch.float32
        self.pieces = pieces_of(self, slot, steps, self.shape, wide)
        self.launch = PieceLaunch(
            self.pieces, slot, steps.scalars, slot.plain_row, get_rule(self.plain_rule), Phase.FUSED
        )

    def after(self, grad: torch.Tensor, slot, steps) -> None:
        scratch = self.pieces.scratch(steps)
        options, indices = self.projection, self.entry["indices"].long()
        self.launch.use(scratch, None, None, steps.found)
        update = self.update.to(self.pieces.dtype) * options.scale
        if self.along == 0:  # where each row of U goes, or nowhere
            place = torch.full((self.shape[0],), -1, dtype=torch.int64, device=grad.device)
            place[indices] = torch.arange(self.rank, device=grad.device)
        for i, piece in enumerate(self.pieces.pieces):
            out = self.pieces.rows_of(piece, scratch)
            self._residual(grad[piece.row : piece.stop], slot, steps, out)
            if self.along == 1:
                out.index_copy_(1, indices, update[piece.row : piece.stop])
            else:
                mine = place[piece.row : piece.stop]
                torch.where((mine >= 0)[:, None], update[mine.clamp(min=0)], out, out=out)
            self.launch.run(i)

    def operations(self, slot) -> list[base.Operation]:
        """A selection reads as much as it writes; the pieces of an update stay in the caches."""
        grad = 0 if self.projection.residual == "none" else slot.param.numel() * slot.grad_dtype.itemsize
        update = sum(base.weight_bytes(slot)) + base.nbytes(self.update) + grad
        return [
            base.Operation("selection", 2 * base.nbytes(self.projected)),
            base.Operation("update in pieces", update),
        ]

    def _residual(self, grad: torch.Tensor, slot, steps, out: torch.Tensor) -> None:
        """The stateless update of a piece."""
        if self.projection.residual == "none":
            out.zero_()
        elif self.projection.residual == "sign":
            out.copy_(grad).sign_().mul_(self.projection.residual_scale * steps.scalars.numbers[slot.row].grad_sign)
        else:
            out.copy_(grad).mul_(steps.multiplier(slot) * self.projection.residual_scale)


class TurnSite(FullSite):
    """A whole tensor, stepped by the rule while it is its turn and by the stateless rule in between."""

    def __init__(self, projection, p, entry, grad_dtype, tensor_id, group, place):
        super().__init__(projection, p, entry, grad_dtype, tensor_id, group, place)
        self.counting = int(entry["active"])

    def rule_step(self, step):
        return (step - 1) % self.projection.update_every + 1 if self.projection.reset else step

    def bind(self, slot, steps) -> None:
        self.pieces = self.pieces_of(slot, steps, self.shape)
        self.launch: PieceLaunch | None = None

    def after(self, grad: torch.Tensor, slot, steps) -> None:
        if self.launch is None:
            states = [self.stored(slot, name) for name in slot.rule.state_names]
            self.launch = PieceLaunch(self.pieces, slot, steps.scalars, slot.row, slot.rule, Phase.FUSED, states=states,
                                      grad_dtype=grad.dtype)  # fmt: skip
        self.launch.use(grad, steps.scale, steps.clip, steps.found)
        for i in range(len(self.pieces.pieces)):
            self.launch.run(i)


@dataclass(frozen=True)
class Frugal(base.Projection):
    """The rule with its states in a subspace that changes now and then, a stateless rule in the rest of the gradient.

    W <- W - lr (scale P U + residual_scale sign(G - P P^T G)) with the direction U of P^T G.

    Args:
        density: share of the projected side that the subspace takes: rank = round(density * side).
        update_every: steps between new subspaces.
        scale: of the update in the subspace.
        residual: what the rest of the gradient goes through: "sign" (signSGD), "sgd" or "none".
        residual_scale: its learning rate relative to the group's.
        method: "randomized", "svd" (dominant subspace), "random" (orthogonal), "columns" (random columns, or rows on the
            left), "top_columns" (those with the largest gradients), "blocks" (whole matrices take turns: round(density * their
            number) of them have states at a time).
        order: of the turns with method="blocks": "random", "ascending", "descending" or "mirror".
        reset: zero the states at a new subspace and restart their bias correction.
        side: as in `GaLore`.
        stagger: spread the refreshes of many matrices over the steps.

    Raises ValueError for options out of range. Source: arXiv 2411.07837, algorithm 1.
    """

    name: ClassVar[str] = "frugal"

    density: float = 0.25
    update_every: int = 200
    scale: float = 1.0
    residual: str = "sign"
    residual_scale: float = 1.0
    method: str = "randomized"
    reset: bool = True
    side: str = "std"
    stagger: bool = True
    order: str = "random"

    def __post_init__(self):
        if not 0 < self.density < 1:
            raise ValueError(f"Invalid density: {self.density}; it is between 0 and 1")
        base.check_schedule(self)
        check_nonnegative(self.residual_scale, "residual_scale")
        base.check_choice(self.residual, "residual", RESIDUALS)
        base.check_choice(self.method, "projection method", (*METHODS, *SELECTIONS, "blocks"))
        base.check_choice(self.order, "order", BLOCK_ORDERS)
        if self.turns and self.scale != 1:
            raise ValueError(f"Invalid projection scale: {self.scale}; whole tensors are stepped with the group's lr")

    @property
    def site(self) -> type:
        if self.turns:
            return TurnSite
        return SelectionSite if self.method in SELECTIONS else FrugalSite

    @property
    def turns(self) -> bool:
        return self.method == "blocks"

    def refuses(self, p):
        if self.turns:
            return None if base.matrix_shape(p) else f"{p.dim()}-D tensors keep their states"
        return super().refuses(p)

    def rule_in(self, rule, entry):
        return get_rule("stateless") if self.turns and not int(entry.get("active", 1)) else rule

    def turn(self, entry, place, seed, step, rule):
        period, first = divmod(step - 1, self.update_every)
        if first == 0 or "active" not in entry:
            index, count = place
            active = index in active_blocks(count, self.density, period, self.order, seed)
            if self.reset or not active:
                for name in (kind for state in rule.state_names for kind in (state, *scale_names(state))):
                    entry.pop(name, None)
            entry["active"] = torch.tensor(active, dtype=torch.uint8)

    def on_host(self):
        return ("active",)

    def state_like(self, p, name):
        return p if self.turns else super().state_like(p, name)

    def rank_for(self, shape):
        side = shape[0] if self.side_for(shape) == "left" else shape[1]
        return max(1, int(self.density * side + 0.5))

    def side_for(self, shape):
        return base.resolve_side(self.side, shape)

    def tensors(self, p):
        if self.turns:
            return {"active": ((), torch.uint8)}
        shape = base.matrix_shape(p)
        rank = self.rank_for(shape)
        if self.method in SELECTIONS:
            return {"indices": ((rank,), torch.int32)}
        return {"projector": (base.basis_shape(shape, rank, self.side_for(shape)), base.basis_dtype(p))}
