"""The projected part of a step: refresh and project before the launches of directions, project back and update after them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fusedopt.backends.base import MatrixWork


@dataclass
class ScratchPool:
    """What plans of parts of a model share: scratch buffers, used in turn, and by device the elements of the largest tensor
    that is projected in any of them (`largest`), so that they step in the pieces that a plan of all of them would take."""

    buffers: dict[tuple, torch.Tensor] = field(default_factory=dict)
    largest: dict[torch.device, int] = field(default_factory=dict)


class ProjectedSteps:
    """The projected slots of one device, in parameter order."""

    def __init__(self, slots: list, scalars, groups: list[dict], pool: ScratchPool | None = None):
        self.slots, self.scalars, self.groups = slots, scalars, groups
        self.scale = self.found = self.clip = None
        self.buffers: dict[tuple, torch.Tensor] = {}
        self.shared: dict[tuple, object] = {}  # what sites of one kind have together
        self.pool = ScratchPool() if pool is None else pool
        for slot in slots:
            slot.site.bind(slot, self)

    def scratch(self, index: int, numel: int, dtype: torch.dtype, full: bool = False) -> torch.Tensor:
        """The first elements of scratch buffer `index`, which all slots of the device use in turn: as long as the largest
        `room` of their sites, or `full_room`. Launches may keep its address: it stays as long as the plan."""
        key = (index, dtype, full)
        if key not in self.buffers:
            room = max(slot.site.full_room if full else slot.site.room for slot in self.slots)
            device = self.slots[0].param.device
            shared = self.pool.buffers
            if (key, room, device) not in shared:
                shared[key, room, device] = torch.empty(room, dtype=dtype, device=device)
            self.buffers[key] = shared[key, room, device]
        return self.buffers[key][:numel]

    def largest(self) -> int:
        """Elements of the largest projected tensor."""
        return max(self.pool.largest.get(slot.param.device, 0) or slot.param.numel() for slot in self.slots)

    def begin(self, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None, clip: torch.Tensor | None) -> None:
        """Called before every step: the loss scale, the overflow flag and the clip coefficient, fp32 [1] or None."""
        self.scale, self.found, self.clip = grad_scale, found_inf, clip
        for slot in self.slots:
            if slot.source is not None:
                slot.site.projected = slot.source.gradient

    def step_of(self, slot) -> int:
        """The step count of this step, on the host."""
        return self.scalars.rows[slot.row].step

    def multiplier(self, slot):
        """What gradients are multiplied by: a number, or with a loss scale or clipping an fp32 0-dim tensor."""
        mul = self.scalars.numbers[slot.row].grad_sign
        if self.scale is not None:
            mul = mul / self.scale.view(())
        return mul if self.clip is None else mul * self.clip.view(())

    def before(self, grads: list[torch.Tensor]) -> None:
        """Fills the low-rank gradients. grads: of all slots, by position."""
        for slot in self.slots:
            self._count(slot)
        for slot in self.slots:
            if slot.source is None:
                slot.site.before(slot.site.matrix(grads[slot.position]), self.step_of(slot), slot, self)
            else:
                slot.source.before(slot, self.step_of(slot), self)

    def _count(self, slot) -> None:
        """Where steps may have been skipped on the device, takes the count from there as soon as the host's would refresh: that one
        is never behind, so no refresh is missed, and schedules are those of a run without the skipped steps."""
        row = self.scalars.rows[slot.row]
        if not row.uncertain or row.view.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if slot.site.owed or slot.site.due(row.step):
            row.step, row.uncertain = int(row.view), False

    def after(self, grads: list[torch.Tensor]) -> None:
        """Updates the parameters from the low-rank directions."""
        for slot in self.slots:
            if slot.source is None:
                slot.site.after(slot.site.matrix(grads[slot.position]), slot, self)
            else:
                slot.site.after(None, slot, self)
                slot.source.after(slot, self.step_of(slot))
                slot.site.projected = None  # the next backward pass makes another

    def work(self, slot, grad: torch.Tensor | None) -> MatrixWork:
        """The work of a slot's update, without the update itself."""
        matrix, companion = slot.site.matrix, slot.companion
        param = slot.param if slot.quantized else matrix(slot.work_param)
        return MatrixWork(
            param, None if companion is None else matrix(companion), slot.precision, None, None,
            self.scalars.table[slot.row], self.scalars.numbers[slot.row], slot.stream, grad=grad,
            grad_scale=self.scale, clip=self.clip, found_inf=self.found,
        )  # fmt: skip
