"""The projected part of a step: refresh and project before the launches of directions, project back and update after them."""

from __future__ import annotations

import torch

from fusedopt.backends.base import MatrixWork
from fusedopt.projections import ops


class ProjectedSteps:
    """The projected slots of one device, in parameter order."""

    def __init__(self, slots: list, scalars):
        self.slots, self.scalars = slots, scalars
        self.scale = self.found = self.clip = None

    def begin(self, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None, clip: torch.Tensor | None) -> None:
        """Called before every step: the loss scale, the overflow flag and the clip coefficient, fp32 [1] or None."""
        self.scale, self.found, self.clip = grad_scale, found_inf, clip

    def before(self, grads: list[torch.Tensor]) -> None:
        """Fills the low-rank gradients. grads: of all slots, by position."""
        for slot in self.slots:
            step = self.scalars.rows[slot.row].step
            slot.site.before(slot.site.matrix(grads[slot.position]), step, slot)

    def after(self, grads: list[torch.Tensor]) -> None:
        """Updates the parameters from the low-rank directions."""
        for slot in self.slots:
            ops.apply(slot.key.backend, slot.site.work(self._work(slot, grads[slot.position])))

    def _work(self, slot, grad: torch.Tensor) -> MatrixWork:
        matrix, companion = slot.site.matrix, slot.companion
        return MatrixWork(
            matrix(slot.work_param), None if companion is None else matrix(companion), slot.precision, None, None,
            self.scalars.table[slot.row], self.scalars.numbers[slot.row], slot.tensor_id, grad=matrix(grad),
            grad_scale=self.scale, clip=self.clip, found_inf=self.found,
        )  # fmt: skip
