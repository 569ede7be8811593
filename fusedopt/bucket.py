"""Slot: a parameter of a plan and how it is stepped; Bucket: slots that share launches, with the tables these read."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace

import torch

from fusedopt import states as st
from fusedopt.abi import GRAIN_SIZE, Column, Phase, chunk_size, chunk_table
from fusedopt.backends.base import BucketKey, Item, Work
from fusedopt.formats import Format
from fusedopt.precision import ParamPrecision
from fusedopt.projections.base import Site
from fusedopt.rule import Rule, get_rule
from fusedopt.weights import Int8Weight


@dataclass(slots=True, eq=False)
class Slot:
    """A parameter that has a gradient, and how it is stepped."""

    tensor_id: int
    position: int  # among the gradients of this step
    group: int
    param: torch.Tensor  # of a DTensor, its shard
    entry: dict  # its state dict
    rule: Rule
    formats: tuple[Format, ...]
    precision: ParamPrecision
    work_param: torch.Tensor  # param, or a dense copy of a view with gaps
    copy_grad: bool  # the gradient's layout differs and is copied before the launch
    grad_dtype: torch.dtype
    site: Site | None = None  # where it is projected: the launch steps site.projected into site.update
    source: object | None = None  # of a gradient that is low-rank from the start (LowRankGradient)
    key: BucketKey | None = None
    reasons: list[str] = field(default_factory=list)
    row: int = 0
    plain_row: int = 0  # a site's second scalar row, for launches over updates
    owner: torch.Tensor | None = None  # what the optimizer's groups hold: param, or the DTensor it is a shard of
    first_octet: int = 0  # where its random bits begin
    groups: tuple = ()  # process groups over which its shards are spread

    @property
    def quantized(self) -> bool:
        """Whether the parameter is an int8 weight; work_param is its codes."""
        return isinstance(self.param, Int8Weight)

    @property
    def stream(self) -> int:
        """The number of a projected tensor as its random bits see it: shards have bits of their own."""
        sharding = None if self.site is None else self.site.sharding
        return self.tensor_id if sharding is None else self.tensor_id + (sharding.number % 128 << 24)

    @property
    def target(self) -> torch.Tensor:
        """What a launch writes in place of the parameter."""
        return self.work_param if self.site is None else self.site.update

    @property
    def state_tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.entry[s.name] for s in self.rule.states)

    @property
    def scale_tensors(self) -> tuple[torch.Tensor | None, ...]:
        pairs = zip(self.rule.states, self.formats, strict=True)
        return tuple(st.stored_scale(self.entry, s.name, form) for s, form in pairs)

    @property
    def companion(self) -> torch.Tensor | None:
        return self.entry[self.precision.companion] if self.precision.companion else None

    def whole(self) -> Slot:
        """A projected slot without its projection and its states: the parameter and its full gradient, for norms."""
        rule = get_rule("sgd")
        key = self.key._replace(
            rule=rule.name, formats=(), param_dtype=self.param.dtype, grad_dtype=self.grad_dtype, projected=False
        )
        return replace(self, site=None, key=key, rule=rule, formats=())


class Bucket:
    """Slots of one key, with the tables their launches read."""

    def __init__(self, slots: list[Slot], backend):
        self.slots, self.key, self.backend = slots, slots[0].key, backend
        self.native = backend.name != "reference"
        numels = [slot.target.numel() for slot in slots]
        grains = [-(-n // GRAIN_SIZE) for n in numels]
        self.grains = sum(grains)
        device = self.key.device
        self.chunk = chunk_size(sum(numels), backend.units(device))
        self.pointers = array("q")
        if self.native:
            columns = array("q", bytes(8 * Column.COUNT * len(slots)))
            self._fill(columns, numels, grains)
            host = torch.frombuffer(columns, dtype=torch.int64).view(Column.COUNT, len(slots))
            self.columns = columns
            self.table = host if device.type == "cpu" else host.to(device)
            self.chunks = chunk_table(numels, self.chunk).to(device)
        else:
            self.table = self.chunks = torch.empty(0, dtype=torch.int64, device=device)
        self.works: dict[Phase, Work] = {}

    def _fill(self, columns: array, numels: list[int], grains: list[int]) -> None:
        rows, grain = len(self.slots), 0
        for i, slot in enumerate(self.slots):
            columns[Column.PARAM * rows + i] = slot.target.data_ptr()
            for k, (state, scale) in enumerate(zip(slot.state_tensors, slot.scale_tensors, strict=True)):
                columns[(Column.STATE + k) * rows + i] = state.data_ptr()
                columns[(Column.SCALE + k) * rows + i] = 0 if scale is None else scale.data_ptr()
            columns[Column.NUMEL * rows + i] = numels[i]
            columns[Column.META * rows + i] = slot.tensor_id << 32 | slot.row
            columns[Column.GRAIN * rows + i] = grain
            companion = None if slot.site is not None else slot.companion
            columns[Column.COMPANION * rows + i] = 0 if companion is None else companion.data_ptr()
            columns[Column.FIRST_OCTET * rows + i] = slot.first_octet
            grain += grains[i]

    def items(self, grads: list[torch.Tensor] | None) -> list[Item]:
        return [
            Item(
                s.target,
                self.gradient(s, grads) if grads else None,
                s.state_tensors,
                s.scale_tensors,
                s.tensor_id,
                s.row,
                s.companion if s.site is None else None,
                s.first_octet,
            )
            for s in self.slots
        ]

    @staticmethod
    def gradient(slot: Slot, grads: list):
        """A slot's own of a list over the gradients of a step; projected, its low-rank one."""
        return grads[slot.position] if slot.site is None else slot.site.projected

    def set_gradients(self, grads: list[torch.Tensor], pointers: list[int], upload) -> None:
        """Points the table at this step's gradients; the reference takes the tensors themselves."""
        if not self.native:
            items = self.items(grads)
            for work in self.works.values():
                work.items = items
            return
        mine = array("q", [pointers[s.position] if s.site is None else s.site.projected.data_ptr() for s in self.slots])
        if mine == self.pointers:
            return
        self.pointers = mine
        if self.key.device.type == "cpu":
            self.columns[: len(mine)] = mine
        else:
            upload(self.table[Column.GRAD], torch.frombuffer(mine, dtype=torch.int64))

    def clear_gradients(self) -> None:
        if not self.native:
            for work in self.works.values():
                work.items = []
