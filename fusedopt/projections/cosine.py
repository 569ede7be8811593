"""DCT: "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models" (Modoranu et al., arXiv 2505.17967):
the columns of one fixed cosine basis that align best with the gradient; per matrix only their numbers are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fusedopt.backends.base import MatrixWork
from fusedopt.projections import base, ops
from fusedopt.projections.dct import carry_state, dct_columns, match_indices, select_columns
from fusedopt.projections.feedback import BITS, ErrorFeedback, error_tensors


class DctSite(base.Site):
    """Columns of the cosine basis, made anew from their numbers at every step."""

    takes_int8 = True

    def __init__(self, *args):
        super().__init__(*args)
        form = self.projection.error_feedback
        wide = torch.float64 if self.basis_dtype == torch.float64 else torch.float32
        self.feedback = None if form is None else ErrorFeedback(self.shape, self.entry, form, wide)
        self.columns: torch.Tensor | None = None

    def due(self, step: int) -> bool:
        """As in the paper at every `update_every`-th step, counted from 1, and at the first one."""
        return step == 1 or (step - self.offset) % self.projection.update_every == 0

    def operations(self, slot) -> list[base.Operation]:
        """The columns are made and read twice; an error is read and written. Selections are refreshes, also at every step."""
        project, update = super().operations(slot)
        errors = [t for name, t in self.entry.items() if name.startswith("error")]
        more = self.basis_bytes() + 2 * base.nbytes(*errors)
        return [base.Operation("projection", project.bytes + more), update]

    def select(self, grad, step: int, slot) -> None:
        """New columns, and the states carried over to them: what leaves the selection is forgotten."""
        kept = self.entry["indices"]
        old = None if self.cold else kept.long()
        new = select_columns(grad, None, self.rank, self.side, self.projection.norm, old)
        if not self.cold and self.projection.rotate:
            source, same = match_indices(old, new)
            base.change_states(slot, self.projected, lambda x: carry_state(x, source, same, self.side))
        kept.copy_(new)

    def before(self, grad: torch.Tensor, step: int, slot, steps) -> None:
        if self.feedback is not None:
            self.feedback.begin(grad, steps)
        if self.refreshes(step, steps):
            self.select(grad if self.feedback is None else self.feedback, step, slot)
        n = self.shape[0] if self.side == "left" else self.shape[1]
        basis = dct_columns(n, self.entry["indices"].long(), self.basis_dtype)
        self.columns = basis if self.side == "left" else basis.t().contiguous()
        if self.feedback is None:
            ops.project(slot.key.backend, grad, self.columns, self.side, self.projected)
            return
        self.feedback.project(self.columns, self.side, self.projected)
        self.feedback.keep(self.columns, self.side, self.projected)
        self.feedback.end()

    def work(self, base: MatrixWork) -> MatrixWork:
        columns, self.columns = self.columns, None
        left, right = (columns, self.update) if self.side == "left" else (self.update, columns)
        return replace(base, left=left, right=right, scale=self.projection.scale)


@dataclass(frozen=True)
class DCT(base.Subspace):
    """Steps matrices in the span of `rank` columns of the orthonormal cosine basis: no singular value decomposition, and
    4 bytes per column of state instead of a projector.

    Args:
        rank: number of columns.
        update_every: steps between selections; 1 selects at every step, as in the paper.
        scale: of the projected-back update.
        norm: how alignment is measured: 1 or 2, the norm of G's coefficients for a column.
        rotate: carry states over to a new selection: columns that stay keep theirs, new ones start at zero. Off: states stay
            where they are, whatever column they belong to now.
        error_feedback: add to each gradient what the last projection left out: None, "fp32", "int8" or "int4", the storage of
            that error (full size).
        side: as in `GaLore`.
        stagger: spread the selections of many matrices over the steps.

    Raises ValueError for options out of range. Source: arXiv 2505.17967, algorithm 1 (DCT-AdamW).
    """

    name: ClassVar[str] = "dct"
    site: ClassVar[type] = DctSite

    rank: int = 256
    update_every: int = 1
    norm: int = 1
    rotate: bool = True
    error_feedback: str | None = None

    def __post_init__(self):
        super().__post_init__()
        base.check_choice(self.norm, "norm", (1, 2))
        base.check_choice(self.error_feedback, "error_feedback", (None, *BITS))

    def tensors(self, p):
        shape = base.matrix_shape(p)
        out = {"indices": ((self.rank_for(shape),), torch.int32)}
        if self.error_feedback is not None:
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            out |= error_tensors(shape, self.error_feedback, wide)
        return out
