"""Conda: Wang et al., "Column-Normalized Adam for Training Large Language Models Faster" (arXiv 2509.24218), algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fusedopt.abi import Phase
from fusedopt.formats import FP32
from fusedopt.options import check_nonnegative
from fusedopt.projections import base
from fusedopt.projections.pieces import FullSite, PieceLaunch, in_scratch
from fusedopt.projections.subset_norm import adam_only
from fusedopt.rules.adam_parts import ADAM_DENOMINATOR, EMA
from fusedopt.rules.sgd import SGD_PLAIN

METHODS = ("gram", "svd")


def full_basis(moment: torch.Tensor, side: str, method: str) -> torch.Tensor:
    """All singular vectors of a matrix on its smaller side, in descending order: [rows, rows] in columns (left) or
    [cols, cols] in rows (right). "gram" takes the eigenvectors of the smaller Gram matrix in fp64, the same up to sign.
    """
    if method == "svd":
        u, _, vh = torch.linalg.svd(moment, full_matrices=False)
        return u if side == "left" else vh
    gram = torch.zeros(min(moment.shape), min(moment.shape), dtype=torch.float64, device=moment.device)
    longer = moment if side == "right" else moment.t()
    for first in range(0, longer.shape[0], 1024):
        part = longer[first : first + 1024].double()
        gram.addmm_(part.t(), part)
    vectors = torch.linalg.eigh(gram)[1].flip(1).to(moment.dtype)
    return vectors if side == "left" else vectors.t()


class CondaSite(FullSite):
    """One matrix of Conda."""

    plain_rule = "sgd"
    gradient_reads = 2  # for the momentum and for its projection

    def __init__(self, projection, p, entry, grad_dtype, tensor_id, group, place):
        super().__init__(projection, p, entry, grad_dtype, tensor_id, group, place)
        self.side = projection.side_for(self.shape)

    def bind(self, slot, steps) -> None:
        self.pieces = self.pieces_of(slot, steps, self.shape, whole_rows=True)
        self.full_room = self.shape[0] * self.shape[1] if self.side == "left" else 0
        self.launches: tuple[PieceLaunch, PieceLaunch, PieceLaunch] | None = None

    def _make_launches(self, slot, steps, grad_dtype, whole: torch.Tensor | None) -> None:
        """whole: of a wide matrix, the buffer that holds its projected momentum."""
        first, second, third = (self.pieces.scratch(steps, i) for i in range(3))
        numerator = in_scratch(third) if whole is None else (whole.view(-1), None, FP32)
        average = PieceLaunch(self.pieces, slot, steps.scalars, slot.row, EMA, Phase.DIRECTION, target=first,
                              states=[self.stored(slot, "exp_avg")], grad_dtype=grad_dtype)  # fmt: skip
        divide = PieceLaunch(self.pieces, slot, steps.scalars, slot.row, ADAM_DENOMINATOR, Phase.DIRECTION, target=first,
                             states=[numerator, self.stored(slot, "exp_avg_sq")], grad_dtype=self.dtype)  # fmt: skip
        update = PieceLaunch(self.pieces, slot, steps.scalars, slot.plain_row, SGD_PLAIN, Phase.FUSED,
                             grad_dtype=self.dtype)  # fmt: skip
        self.launches = average, divide, update

    def _averages(self, slot, steps, grad):
        """Averages the gradient into the momentum, piece by piece; yields each piece with its decoded momentum in scratch."""
        average, scratch = self.launches[0], self.pieces.scratch(steps)
        average.use(grad, steps.scale, steps.clip, steps.found)
        for i, piece in enumerate(self.pieces.pieces):
            average.run(i)
            yield i, piece, self.pieces.rows_of(piece, scratch)

    def _refresh(self, moment: torch.Tensor, found) -> None:
        """A new basis from the momentum. One that is all zero or not finite leaves the old one, at first the unit matrix."""
        size, basis = min(self.shape), self.entry["projector"]
        total = moment.abs().sum(dtype=torch.float64)
        usable = torch.isfinite(total) & (total > 0)
        if found is not None:
            usable = usable & (found.view(()) == 0)
        sane = torch.where(usable, moment, torch.zeros_like(moment))
        unit = torch.eye(size, dtype=basis.dtype, device=basis.device)
        old = torch.where(basis.any(), basis, unit)
        basis.copy_(torch.where(usable, full_basis(sane, self.side, self.projection.method).to(basis.dtype), old))

    def due(self, step: int) -> bool:
        return (step - 1) % self.projection.update_every == 0

    def after(self, grad, slot, steps) -> None:
        wide, due = self.side == "left", self.refreshes(steps.step_of(slot), steps)
        whole = steps.scratch(0, self.full_room, self.dtype, full=True).view(self.shape) if wide else None
        if self.launches is None:
            self._make_launches(slot, steps, grad.dtype, whole)
        moment = None
        if due:
            moment = torch.empty(self.shape, dtype=self.dtype, device=grad.device)
            for _, piece, rows in self._averages(slot, steps, grad):
                moment[piece.row : piece.stop] = rows
            self._refresh(moment, steps.found)
        basis = self.entry["projector"].to(self.dtype)
        if wide:
            self._step_wide(slot, steps, grad, basis, whole, moment)
        else:
            self._step_tall(slot, steps, grad, basis, moment)

    def _step_tall(self, slot, steps, grad, basis, moment) -> None:
        """Rows are projected by themselves: everything happens piece by piece."""
        first, second, third = (self.pieces.scratch(steps, i) for i in range(3))
        _, divide, update = self.launches
        divide.use(second, steps.scale, steps.clip, steps.found)
        update.use(second, None, None, steps.found)
        averages = self._averages(slot, steps, grad)
        if moment is not None:
            averages = ((i, p, moment[p.row : p.stop]) for i, p in enumerate(self.pieces.pieces))
        for i, piece, rows in averages:
            torch.mm(rows, basis.t(), out=self.pieces.rows_of(piece, third))
            back = self.pieces.rows_of(piece, second)
            torch.mm(grad[piece.row : piece.stop].to(self.dtype), basis.t(), out=back)
            divide.run(i)
            torch.mm(self.pieces.rows_of(piece, first), basis, out=back).mul_(self.projection.scale)
            update.run(i)

    def _step_wide(self, slot, steps, grad, basis, whole, moment) -> None:
        """Columns are projected by themselves, and pieces are rows: the projected momentum is held as a whole."""
        first, second, _ = (self.pieces.scratch(steps, i) for i in range(3))
        _, divide, update = self.launches
        if moment is None:
            whole.zero_()
            for _, piece, rows in self._averages(slot, steps, grad):
                whole.addmm_(basis[piece.row : piece.stop].t(), rows)
        else:
            torch.mm(basis.t(), moment, out=whole)
        divide.use(second, steps.scale, steps.clip, steps.found)
        for i, piece in enumerate(self.pieces.pieces):
            projected, mine = self.pieces.rows_of(piece, second), slice(piece.row, piece.stop)
            if grad.dtype == self.dtype:
                torch.mm(basis[:, mine].t(), grad, out=projected)
            else:
                projected.zero_()
                for part in self.pieces.pieces:
                    rows = slice(part.row, part.stop)
                    projected.addmm_(basis[rows, mine].t(), grad[rows].to(self.dtype))
            divide.run(i)
            whole[mine] = self.pieces.rows_of(piece, first)
        update.use(second, None, None, steps.found)
        for i, piece in enumerate(self.pieces.pieces):
            back = self.pieces.rows_of(piece, second)
            torch.mm(basis[piece.row : piece.stop], whole, out=back).mul_(self.projection.scale)
            update.run(i)


@dataclass(frozen=True)
class Conda(base.Projection):
    """Adam whose second moment is taken in the singular basis of the momentum, a full basis of a matrix's smaller side.

    m averages g; every `update_every` steps P becomes the singular vectors of m; v averages project(g)^2;
    p -= lr * scale * debias * back(project(m) / (sqrt(v) + eps)). Both moments are full-size, in any state_format; the
    basis is [side, side] in bf16 for bf16 parameters, else fp32. Vectors are stepped as the class steps them.

    Temporary memory: of tall matrices three pieces of at most 1/150 of the largest parameter; of wide ones (fewer rows than
    columns) one fp32 matrix of the largest one's shape, kept between steps, and of a bf16 basis a fp32 copy. A
    refresh needs one or two more fp32 matrices, the Gram matrix of the smaller side in fp64 and what torch.linalg.eigh takes
    (method "svd": what torch.linalg.svd takes). Pieces hold whole rows and a multiple
    of 2048 elements: an odd number of columns makes them as long as 2048 rows.

    Args:
        update_every: steps between refreshes of a matrix's basis, the first at step 1.
        scale: of the update.
        method: "gram" (eigenvectors of the Gram matrix in fp64) or "svd", the paper's; the same basis up to signs, which cancel.

    eps lies beside sqrt(v) without bias correction, as in the paper. Raises ValueError for options out of range, or a class
    other than Adam and AdamW. Source: arXiv 2509.24218, algorithm 1.
    """

    name: ClassVar[str] = "conda"
    site: ClassVar[type] = CondaSite

    update_every: int = 2000
    scale: float = 1.0
    method: str = "gram"

    def __post_init__(self):
        base.check_positive_int(self.update_every, "update_every")
        check_nonnegative(self.scale, "projection scale")
        if self.method not in METHODS:
            raise ValueError(f"Invalid projection method: {self.method!r}; it is one of {', '.join(METHODS)}")

    def refuses(self, p):
        return None if base.matrix_shape(p) is not None else f"{p.dim()}-D tensors are not projected"

    def side_for(self, shape):
        return base.resolve_side("std", shape)

    def rule_for(self, rule):
        adam_only("Conda", rule)
        return ADAM_DENOMINATOR

    def state_like(self, p, name):
        return p

    def tensors(self, p):
        return {"projector": ((min(base.matrix_shape(p)),) * 2, base.basis_dtype(p))}
