"""int8 weights that are not projected: the rule's direction goes through a scratch buffer, a piece of the weight at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fusedopt.abi import Phase
from fusedopt.projections import base, ops
from fusedopt.projections.pieces import FullSite, PieceLaunch


class QuantizedSite(FullSite):
    """One int8 weight with full-size states."""

    takes_int8 = True

    def bind(self, slot, steps) -> None:
        self.pieces = self.pieces_of(slot, steps, self.shape, whole_rows=True)  # and whole groups: chunks are multiples
        self.launch: PieceLaunch | None = None

    def after(self, grad, slot, steps) -> None:
        scratch, numbers = self.pieces.scratch(steps), steps.scalars.numbers[slot.row]
        if self.launch is None:
            states = [self.stored(slot, name) for name in slot.rule.state_names]
            self.launch = PieceLaunch(self.pieces, slot, steps.scalars, slot.row, slot.rule, Phase.DIRECTION, target=scratch,
                                      states=states, grad_dtype=grad.dtype)  # fmt: skip
        self.launch.use(grad, steps.scale, steps.clip, steps.found)
        for i, piece in enumerate(self.pieces.pieces):
            self.launch.run(i)
            u = self.pieces.rows_of(piece, scratch)
            ops.step_rows(slot.key.backend, slot.param, piece.row, piece.stop, u, numbers,
                          steps.scalars.table[slot.row], slot.tensor_id, steps.found)  # fmt: skip


@dataclass(frozen=True)
class Unprojected(base.Projection):
    """How an int8 weight without a projection is stepped."""

    name: ClassVar[str] = "int8"
    site: ClassVar[type] = QuantizedSite

    def refuses(self, p):
        return None

    def state_like(self, p, name):
        return p


UNPROJECTED = Unprojected()
