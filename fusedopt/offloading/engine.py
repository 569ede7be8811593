"""Engine: an offloaded optimizer's chunks, kept in step with its parameters and states, and the step over them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from fusedopt.backends import select
from fusedopt.checks import check_parameter, check_precision, describe
from fusedopt.offloading import Offloading, check_offloadable
from fusedopt.offloading.chunk import Buffer, Chunk, full_entry
from fusedopt.offloading.norms import GlobalNorm
from fusedopt.offloading.pipeline import Pipeline
from fusedopt.offloading.storage import ScratchFile, release_freed_memory

BUFFERS = 3  # one chunk is brought, one stepped, one taken back


def streams_to_cpu(settings: Offloading, device: torch.device) -> bool:
    """Whether gradients and parameters of a device are staged in host memory."""
    return settings.step_on == "cpu" and device.type != "cpu"


class Engine:
    """Steps one offloaded optimizer. Made at a step, from whatever states the optimizer has then."""

    def __init__(self, opt):
        self.opt, self.settings = opt, opt.offloading
        self.chunks: list[Chunk] = []
        self.groups: list[dict] = []
        self.staging = {"host": 0, "device": 0, "host_peak": 0, "device_peak": 0}
        self._stand_ins: dict[torch.Tensor, torch.Tensor] = {}
        self._file: ScratchFile | None = None
        self._options: list[tuple] = []
        self._placed: set[int] = set()
        self._plans: list = []
        self._norm: GlobalNorm | None = None
        self._pipeline = Pipeline()
        self._broken: str | None = None

    def grad_norm(self) -> torch.Tensor | None:
        return None if self._norm is None else self._norm.norm

    @property
    def slots(self) -> list:
        """Of the last prepared step, in parameter order, with the parameters themselves."""
        return self._slots

    def plan(self, params: list[torch.Tensor], grads: list[torch.Tensor | None]):
        """The plans of all chunks as one, for a report."""
        plans = [c.plan for c in self.prepare(params, grads)]
        return SimpleNamespace(
            opt=self.opt, devices=[d for p in plans for d in p.devices], slots=[s for p in plans for s in p.slots],
            gapped=[s for p in plans for s in p.gapped],
        )  # fmt: skip

    # Preparing

    def prepare(self, params: list[torch.Tensor], grads: list[torch.Tensor | None]) -> list[Chunk]:
        """The chunks to step, each with its plan. Raises before anything is changed where something cannot be stepped."""
        if self._broken is not None:
            raise RuntimeError(
                f"{type(self.opt).__name__}: a step broke off half-way ({self._broken}), so its offloaded states and its "
                "parameters are in between two steps. Load a checkpoint of both."
            )
        if self._options != self._signature()[: len(self._options)] or not all(
            c.intact(self.opt, params, grads) for c in self.chunks
        ):
            self.release()
        fresh = [i for i, g in enumerate(grads) if g is not None and i not in self._placed]
        if not self.chunks:
            fresh = [i for i, p in enumerate(params) if grads[i] is not None or self.opt.state.get(p)]
        if fresh:
            self._add(params, grads, fresh)
        self._follow_groups()
        standing = [p for group in self.groups for p in group["params"]]
        with torch.no_grad():
            for chunk in self.chunks:
                chunk.prepare(standing, grads)
        live = [c for c in self.chunks if c.live]
        plans = [c.plan for c in live]
        if len(plans) != len(self._plans) or any(a is not b for a, b in zip(plans, self._plans, strict=True)):
            self._plans, self._norm = plans, None
            self._slots = sorted(
                (replace(s, param=params[s.tensor_id]) for p in plans for s in p.slots), key=lambda s: s.tensor_id
            )
        return live

    def _signature(self) -> list[tuple]:
        """What the states of each group depend on."""
        out = []
        for g in self.opt.param_groups:
            formats = g["state_format"]
            formats = tuple(formats.items()) if isinstance(formats, dict) else formats
            out.append((self.opt.rule_for(g).name, g["param_precision"], formats, g["min_quantized_numel"]))
        return out

    def release(self) -> None:
        """Drops buffers and chunks now: plans and their optimizers refer to each other, which the collector sees late. The next
        step makes them anew, from the states that the optimizer has then."""
        self._release_buffers()
        self.chunks, self._placed, self._plans, self._norm = [], set(), [], None
        self._file = None
        if self.settings.folder is not None:
            release_freed_memory()

    def _add(self, params: list[torch.Tensor], grads: list[torch.Tensor | None], fresh: list[int]) -> None:
        """Moves the states of parameters into new chunks."""
        opt, name = self.opt, type(self.opt).__name__
        owners = [(p, group) for group in opt.param_groups for p in group["params"]]
        for i in fresh:
            p, group = owners[i]
            check_offloadable(opt, i, p, group)
            check_parameter(name, i, p, p.detach() if grads[i] is None else grads[i])
            check_precision(name, i, p, group)
        self._release_buffers()
        try:
            made, self._file = self._new_chunks(owners, grads, fresh)
            for chunk in made:
                for p, entry in zip(chunk.params, chunk.entries, strict=True):
                    opt.state[p] = entry
                self._placed.update(chunk.members)
            self.chunks += made
            self._options = self._signature()
        finally:
            self._allocate_buffers()

    @torch.no_grad()
    def _new_chunks(self, owners, grads, fresh: list[int]) -> tuple[list[Chunk], ScratchFile | None]:
        """Chunks of the given parameters, with their states in place; the optimizer is not touched."""
        opt, settings = self.opt, self.settings
        file = self._file
        if settings.folder is not None and file is None:
            file = ScratchFile(settings.folder)
        devices = list(dict.fromkeys([c.device for c in self.chunks] + [owners[i][0].device for i in fresh]))
        made: list[Chunk] = []
        for device in devices:
            streams = streams_to_cpu(settings, device)
            share = settings.memory_limit // (BUFFERS * len(devices))
            chunk: Chunk | None = None
            for i in fresh:
                p, group = owners[i]
                if p.device != device:
                    continue
                entry = full_entry(opt, i, p, group)
                chunk = chunk or Chunk(settings, device, streams)
                size = chunk.room_for(p, grads[i], entry)
                if size > share:
                    raise ValueError(
                        f"{describe(type(opt).__name__, i, p)} needs {size} bytes of staging, more than the {share} that a chunk "
                        f"has: offload with memory_limit={BUFFERS * len(devices) * size} or more, or with fewer bits of state."
                    )
                if chunk.members and chunk.room + size > share:
                    chunk.settle(file)
                    made.append(chunk)
                    chunk = Chunk(settings, device, streams)
                chunk.add(i, p, grads[i], entry)
            if chunk is not None:
                chunk.settle(file)
                made.append(chunk)
        return made, file

    def _release_buffers(self) -> None:
        for chunk in self.chunks:
            chunk.detach()
        self._stand_ins, self._plans, self._slots, self._norm = {}, [], [], None
        self.staging.update(host=0, device=0)

    def _allocate_buffers(self) -> None:
        self._release_buffers()
        self.groups = []
        for device in dict.fromkeys(c.device for c in self.chunks):
            mine = [c for c in self.chunks if c.device == device]
            host, room = max(c.host_room for c in mine), max(c.device_room for c in mine)
            count = min(BUFFERS, len(mine)) if host or room else 0
            ring = [Buffer(host, room, device) for _ in range(count)]
            self.staging["host"] += count * host
            self.staging["device"] += count * room
            for n, chunk in enumerate(mine):
                self._stand_ins.update(chunk.attach(ring[n % count] if count else None, self.opt, self.groups))
        for what in ("host", "device"):
            self.staging[f"{what}_peak"] = max(self.staging[f"{what}_peak"], self.staging[what])

    def _follow_groups(self) -> None:
        """The groups of the chunks' views: the optimizer's, with stand-ins; their numbers are those of this step."""
        theirs = self.opt.param_groups
        del self.groups[len(theirs) :]
        self.groups.extend({} for _ in range(len(theirs) - len(self.groups)))
        for mine, group in zip(self.groups, theirs, strict=True):
            mine.update(group)
            mine["params"] = [self._stand_ins.get(p, p) for p in group["params"]]
        for chunk in self.chunks:
            view, opt = chunk.view, self.opt
            view.clip_grad_norm, view.backend, view.amp_fused = opt.clip_grad_norm, opt.backend, opt.amp_fused
            view.defaults = opt.defaults

    # Stepping

    def step(self, chunks: list[Chunk], grads: list[torch.Tensor | None], scale, found) -> None:
        """One step of the chunks that `prepare` gave. scale, found: of an amp_fused step, or None."""
        if found is not None and any(d.counts_on_host for c in chunks for d in c.plan.devices):
            if bool(found):
                return
            found = None
        clips = self._clip(grads, scale)

        def one(chunk: Chunk) -> None:
            clip = None if clips is None else clips.get(chunk.device, next(iter(clips.values()), None))
            chunk.plan.run(chunk.given, scale, found, clip)

        try:
            self._pipeline.run(chunks, one)
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {error}"
            raise

    def _clip(self, grads: list[torch.Tensor | None], scale) -> dict[torch.device, torch.Tensor] | None:
        opt = self.opt
        if opt.clip_grad_norm is None:
            return None
        if self._norm is None:
            asked = select.requested(opt.backend_for_step())
            self._norm = GlobalNorm(self._slots, [s.param for s in self._slots], asked)
        clips = self._norm.run([grads[s.tensor_id] for s in self._slots], opt.clip_grad_norm, scale)
        cpu = torch.device("cpu")
        return {c.device: clips[c.device].to(cpu if c.streams else c.device) for c in self.chunks if c.device in clips}
