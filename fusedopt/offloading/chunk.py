"""Chunk: whole tensors that are brought, stepped and taken back together; Buffer: the staging memory of one at a time."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import Future

import torch

from fusedopt.checks import check_layout
from fusedopt.masters import configured_precision
from fusedopt.memory import is_dense
from fusedopt.offloading import Offloading, host_copy
from fusedopt.offloading.storage import (
    FileSegment,
    MemorySegment,
    Place,
    ScratchFile,
    lay_out,
    padded,
    release_freed_memory,
)
from fusedopt.plan import Plan
from fusedopt.states import configured_formats, option_overrides


def shadow(opt, groups: list[dict]):
    """An optimizer of the same class with groups that are given and states of its own, for plans over staged tensors."""
    view = object.__new__(type(opt))
    view.__dict__.update({k: v for k, v in opt.__dict__.items() if k != "step"})  # a scheduler's wrapper
    view.state, view.param_groups = defaultdict(dict), groups
    view._plan = view._offload = view.offloading = None
    return view


def full_entry(opt, index: int, p: torch.Tensor, group: dict) -> dict:
    """A parameter's state on the CPU, in its formats and layout: what it has, and what it needs and has not yet.

    Raises RuntimeError where a state does not fit the parameter.
    """
    kept = {k: v.to("cpu") if isinstance(v, torch.Tensor) else v for k, v in opt.state.get(p, {}).items()}
    precision = configured_precision(p, group)
    home = p
    if p.device.type != "cpu":
        begins = any(s.position is not None and s.name not in kept for s in opt.kept_rule(p, group).states)
        home = host_copy(p, values=begins or bool(precision.companion) and precision.companion not in kept)
    view = shadow(opt, opt.param_groups)
    if kept:
        view.state[home] = kept
    rule = view.kept_rule(home, group)
    entry = view.init_state(home, group, rule, index)
    work = home if is_dense(home) else torch.empty(home.shape, dtype=home.dtype)
    name = type(opt).__name__
    for state, form in zip(rule.states, configured_formats(home, group, rule), strict=True):
        check_layout(name, index, home, work, entry, state.name, form)
    if precision.companion:
        check_layout(name, index, home, work, entry, precision.companion, None)
    return entry


class Buffer:
    """Staging memory of one chunk at a time. done: event of the last copy out of it or into its home; flushed: the write-back
    under way, where a thread does it."""

    def __init__(self, host: int, device: int, where: torch.device):
        pin = where.type == "cuda"
        self.host = torch.empty(host, dtype=torch.uint8, pin_memory=pin) if host else None
        self.device = torch.empty(device, dtype=torch.uint8, device=where) if device else None
        self.done: torch.cuda.Event | None = None
        self.flushed: Future | None = None

    def wait(self) -> None:
        """Until what was in it is where it belongs. Raises what the write-back raised."""
        if self.flushed is not None:
            self.flushed.result()
        if self.done is not None:
            self.done.synchronize()
        self.flushed = self.done = None


class Chunk:
    """Some parameters of one device, the segment of their states, and a plan that steps them where these are staged.

    members: tensor ids. home: for each the dict of its state tensors in the segment; entries: its dict in opt.state.
    streams: whether gradients and parameters are staged too, because the CPU steps what lies elsewhere.
    """

    def __init__(self, settings: Offloading, device: torch.device, streams: bool):
        self.settings, self.device, self.streams = settings, device, streams
        self.members: list[int] = []
        self.params: list[torch.Tensor] = []
        self.entries: list[dict] = []
        self.layouts: list[list[Place]] = []
        self.staged: list[tuple[Place, Place]] = []  # gradient and parameter
        self.nbytes = self.extra = self.room = 0
        self.segment: MemorySegment | FileSegment | None = None
        self.buffer: Buffer | None = None
        self.view = None  # the optimizer that the plan belongs to
        self.plan: Plan | None = None
        self.live: list[int] = []  # which of the members have a gradient in this step

    # Building

    def room_for(self, p: torch.Tensor, grad: torch.Tensor | None, entry: dict) -> int:
        """Bytes of staging that a parameter adds in the memory that it adds more to."""
        _, states = lay_out(entry, 0)
        grad_size = (p if grad is None else grad).dtype.itemsize
        extra = padded(p.numel() * grad_size) + padded(p.numel() * p.dtype.itemsize) if self.streams else 0
        return extra + (states if self.settings.folder is not None or self.settings.step_on == "device" else 0)

    def add(self, index: int, p: torch.Tensor, grad: torch.Tensor | None, entry: dict) -> None:
        self.room += self.room_for(p, grad, entry)
        places, self.nbytes = lay_out(entry, self.nbytes)
        self.members.append(index)
        self.params.append(p)
        self.entries.append(entry)
        self.layouts.append(places)
        if self.streams:
            stride = p.stride() if is_dense(p) else torch.empty(p.shape, device="meta").stride()
            dtype = (p if grad is None else grad).dtype
            mine = Place("grad", self.extra, tuple(p.shape), stride, dtype)
            after = mine.offset + padded(p.numel() * dtype.itemsize)
            self.staged.append((mine, Place("param", after, tuple(p.shape), stride, p.dtype)))
            self.extra = after + padded(p.numel() * p.dtype.itemsize)

    def settle(self, file: ScratchFile | None) -> None:
        """Makes the segment and moves the states there."""
        self.segment = (
            MemorySegment(self.nbytes, self.device.type == "cuda") if file is None else file.segment(self.nbytes)
        )
        self.home = []
        for places, entry in zip(self.layouts, self.entries, strict=True):
            for place in places:
                self.segment.put(place, entry[place.name])
            self.home.append({place.name: self.segment.tensor(place) for place in places})
        self.entries = [
            {k: mine.get(k, v) for k, v in entry.items()} for mine, entry in zip(self.home, self.entries, strict=True)
        ]
        if file is not None:
            release_freed_memory()

    # Staging

    @property
    def in_file(self) -> bool:
        return isinstance(self.segment, FileSegment)

    @property
    def device_room(self) -> int:
        """Bytes it needs in a buffer of its parameters' device. What a file gives the CPU is stepped where it was read."""
        paged = self.settings.step_on == "device" and not (self.in_file and self.device.type == "cpu")
        return self.nbytes if paged else 0

    @property
    def host_room(self) -> int:
        return (self.nbytes if self.in_file else 0) + self.extra

    def attach(self, buffer: Buffer | None, opt, groups: list[dict]) -> dict[torch.Tensor, torch.Tensor]:
        """Takes a buffer of its own or shared in turn. Returns the stand-ins of its parameters, where it has any."""
        self.buffer, self.plan = buffer, None
        self.view = shadow(opt, groups)
        states = self.home
        if self.device_room or self.host_room > self.extra:
            room = buffer.device if self.device_room else buffer.host
            states = [{place.name: place.view(room) for place in places} for places in self.layouts]
        self.stepped = self.params
        if self.streams:
            room = buffer.host[self.host_room - self.extra :]
            self.grads = [grad.view(room) for grad, _ in self.staged]
            self.stepped = [param.view(room) for _, param in self.staged]
            for mine, p in zip(self.stepped, self.params, strict=True):
                if options := option_overrides(p):
                    mine._fusedopt_options = options
        self.states = [
            {k: mine.get(k, v) for k, v in entry.items()} for mine, entry in zip(states, self.entries, strict=True)
        ]
        self.view.state.update(zip(self.stepped, self.states, strict=True))
        return dict(zip(self.params, self.stepped, strict=True)) if self.streams else {}

    def detach(self) -> None:
        """Lets go of the buffer. A view and its plan refer to each other: what they hold would stay until a collection."""
        if self.view is not None:
            self.view._plan = None
        self.buffer = self.plan = self.view = None
        self.states, self.stepped, self.grads, self.given = [], [], [], []

    def intact(self, opt, params: list[torch.Tensor], grads: list[torch.Tensor | None]) -> bool:
        """Whether parameters and states are those it was made of."""
        for j, (i, p) in enumerate(zip(self.members, self.params, strict=True)):
            entry = opt.state.get(p)
            if i >= len(params) or params[i] is not p or p.device != self.device or entry is not self.entries[j]:
                return False
            home = self.home[j]
            if any(entry.get(name) is not t for name, t in home.items()):
                return False
            if len(entry) != len(self.states[j]):
                return False
            if self.streams:
                grad, param = self.staged[j]
                if (
                    p.shape != param.shape
                    or p.dtype != param.dtype
                    or grads[i] is not None
                    and grads[i].dtype != grad.dtype
                ):
                    return False
        return True

    def prepare(self, params: list[torch.Tensor], grads: list[torch.Tensor | None]) -> None:
        """The plan for the gradients of this step. params: with stand-ins. Raises RuntimeError as a step does."""
        self.live = [j for j, i in enumerate(self.members) if grads[i] is not None]
        if not self.live:
            return
        mine: list[torch.Tensor | None] = [None] * len(params)
        for j in self.live:
            mine[self.members[j]] = self.grads[j] if self.streams else grads[self.members[j]]
            if self.states[j]["step"] is not self.entries[j]["step"]:
                self.states[j]["step"] = self.entries[j]["step"]
        self.plan = self.view._current_plan(params, mine)
        for j in self.live:
            self.entries[j]["step"] = self.states[j]["step"]
        self.given = [mine[self.members[j]] for j in self.live]

    def reads_params(self) -> list[bool]:
        """For each live member whether a step reads the parameter itself: a master weight is read in its place, except by the
        norms of LARS."""
        return [s.precision.name != "master" or s.rule.takes_norms for s in self.plan.slots]
