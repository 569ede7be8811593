"""Plan: which launches step which tensors. Built at the first step and whenever something it was built from changes.

Parameters with a gradient become slots; slots that share a BucketKey share launches, across parameter groups. Per device
there is one scalar table, one set of reduction buffers and one clip coefficient.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from operator import is_

import torch

from fusedopt import states as st
from fusedopt.abi import Phase
from fusedopt.backends import select
from fusedopt.backends.base import BucketKey, Work
from fusedopt.bucket import Bucket, Slot
from fusedopt.checks import (
    check_distinct,
    check_layout,
    check_parameter,
    check_positions,
    check_precision,
    check_projected,
    check_quantized,
    check_states,
    describe,
)
from fusedopt.distributed import (
    MeshSums,
    check_partition,
    check_sharded,
    first_octet,
    is_dtensor,
    local,
    partition_of,
    split_groups,
)
from fusedopt.masters import configured_precision
from fusedopt.measures import Measured, check_devices
from fusedopt.memory import is_dense, strides_match
from fusedopt.numbers import Row, ScalarTable
from fusedopt.options import check_clip
from fusedopt.precision import get_precision
from fusedopt.projections.base import kept_tensors, places, states_like
from fusedopt.projections.steps import ProjectedSteps, ScratchPool
from fusedopt.rule import get_rule
from fusedopt.transforms import base as transforms
from fusedopt.weights import storage


def _buckets(slots: list[Slot], apart: bool) -> list[Bucket]:
    """apart: slots whose shards are spread over different processes share no bucket."""
    by_key: dict[tuple, list[Slot]] = {}
    for slot in slots:
        by_key.setdefault((slot.key, slot.groups if apart else ()), []).append(slot)
    return [Bucket(group, select.get_backend(key.backend)) for (key, _), group in by_key.items()]


class DevicePlan:
    """Everything of one device: buckets, scalar rows, step counters, reduction buffers."""

    def __init__(self, device: torch.device, slots: list[Slot], opt, tensor_count: int, max_norm: float | None, pool):
        """max_norm: None without clipping; 0 where norms are summed and the coefficient comes from elsewhere."""
        self.device, self.slots = device, slots
        self.kept: list[torch.Tensor] = []  # host buffers that a captured graph reads again
        self._bind_steps(opt)
        clipping = max_norm is not None
        launched = [s for s in slots if s.target.numel() and (s.site is None or s.site.launched)]
        self.buckets = _buckets(launched, apart=clipping)
        projected = [s for s in slots if s.site is not None]
        self.projected = ProjectedSteps(projected, self.scalars, opt.param_groups, pool)
        self.wholes: list[Bucket] = []  # of projected slots: the global norm is that of their full gradients
        if clipping:
            self.wholes = _buckets([s.whole() for s in self.projected.slots if s.param.numel()], apart=True)
        for bucket in (*self.buckets, *self.wholes):
            rule, form, precision = bucket.slots[0].rule, bucket.slots[0].formats, get_precision(bucket.key.precision)
            base = Work(bucket.key, rule, form, precision, bucket.items(None) if bucket.native else [], bucket.table,
                        bucket.chunks, self.scalars.table, [], bucket.chunk, bucket.grains)  # fmt: skip
            phases: tuple[Phase, ...] = (Phase.APPLY if rule.trust_on == "update" else Phase.FUSED,)
            phases = (Phase.PROBE, *phases) if rule.probes else phases
            phases = (Phase.NORM, *phases)
            if bucket.key.projected:
                phases = (Phase.DIRECTION,)
            elif bucket in self.wholes:
                phases = (Phase.NORM,)
            bucket.works = {phase: replace(base, phase=phase, cache={}) for phase in phases}
        live = isinstance(max_norm, torch.Tensor)  # then the coefficient is not the kernel's to compute
        self._bind_reductions(clipping, 0.0 if live else max_norm or 0.0, tensor_count)
        measured = [s for s in slots if s.rule.measures is not None]
        self.measured = Measured(measured, self.scalars, self.sums, opt) if measured else None

    def _bind_steps(self, opt) -> None:
        """Moves the step counters of the slots into one tensor (host, and device where capturable), and assigns scalar rows."""
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        self.counters: list[torch.Tensor] = []
        rows: list[Row] = []
        for on_device in (True, False):
            mine = [s for s in self.slots if opt.steps_on_device(s.param, opt.param_groups[s.group]) == on_device]
            if not mine:
                continue
            values = [s.entry["step"] for s in mine]
            if values[0].device.type != "cpu" and all(isinstance(v, torch.Tensor) for v in values):
                values = torch.stack([v.to(values[0].device) for v in values]).tolist()
            counts = [int(v) for v in values]
            counter = torch.tensor(counts, dtype=dtype, device=self.device if on_device else "cpu")
            known: dict[tuple, int] = {}
            place: tuple
            for i, (slot, count) in enumerate(zip(mine, counts, strict=True)):
                slot.entry["step"] = counter[i]
                mode = opt.decay_mode_for(opt.param_groups[slot.group])
                place = (slot.group, slot.rule.name, count, None if slot.site is None else slot.site.counting)
                if place not in known:
                    known[place] = len(rows)
                    view = counter[i] if on_device else None
                    rows.append(Row(slot.group, slot.rule, mode, count, view, site=slot.site))
                slot.row = known[place]
                if slot.rule.measures is not None:
                    rows.append(replace(rows[slot.row], like=slot.row))
                    slot.row = len(rows) - 1
                if slot.site is not None and slot.site.plain_rule is not None:
                    place = (slot.group, count, "plain", slot.site.counting)
                    if place not in known:
                        known[place] = len(rows)
                        view = counter[i] if on_device else None
                        rule = get_rule(slot.site.plain_rule)
                        rows.append(Row(slot.group, rule, mode, count, view, plain=True, site=slot.site))
                    slot.plain_row = known[place]
            self.counters.append(counter)
        self.versions = [c._version for c in self.counters]
        self.counts_on_host = any(row.view is None for row in rows)
        self.scalars = ScalarTable(rows, self.device)

    def _bind_reductions(self, clipping: bool, max_norm: float, tensor_count: int) -> None:
        reducing = any(s.rule.reduces for s in self.slots)
        own = [b for b in self.buckets if Phase.NORM in b.works]
        self.normed = [b for b in own if clipping or b.slots[0].rule.takes_norms] + self.wholes
        self.sums = self.clip = self.norm = self.totals = self.shards = None
        if (clipping or reducing) and any(s.groups for s in self.slots):
            self.shards = MeshSums(self.slots, self.normed, self.device)
        if not reducing and not self.normed and self.shards is None:
            return
        every = [*self.buckets, *self.wholes]
        native = any(b.native for b in every)
        dtype = torch.float32 if native else torch.float64

        def zeros(*shape, dtype=dtype):
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.sums = zeros(tensor_count, 2) if reducing else None
        self.totals, self.norm = zeros(max(1, len(self.normed))), zeros(1)
        self.clip = zeros(1) if clipping else None
        partials = zeros(max((b.grains for b in every), default=0), 2)
        counters = zeros(max((len(b.slots) for b in every), default=0) + 1, dtype=torch.int32)
        for bucket in every:
            for phase, work in bucket.works.items():
                needs = phase in (Phase.NORM, Phase.PROBE)
                work.partials, work.counters = (partials, counters) if needs else (None, None)
                rule = bucket.slots[0].rule
                work.sums = self.sums if rule.trust_on or needs and rule.measures is not None else None
                work.clip, work.max_norm = self.clip, max_norm
                if phase == Phase.NORM:
                    work.totals, work.norm = self.totals, self.norm
        for i, bucket in enumerate(self.normed):
            work = bucket.works[Phase.NORM]
            work.total_index, work.total_count = i, len(self.normed)

    def upload(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        pinned = torch.empty_like(source, pin_memory=self.device.type == "cuda").copy_(source)
        destination.copy_(pinned, non_blocking=True)
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.kept.append(pinned)

    def steps_untouched(self) -> bool:
        return all(c._version == v for c, v in zip(self.counters, self.versions, strict=True))

    def advance(self, groups: list[dict]) -> None:
        self.count(1)
        try:
            self.scalars.update(groups, self.upload)
        except Exception:  # of an option that was changed to something else than a number
            self.count(-1)
            raise

    def count(self, steps: int) -> None:
        for counter in self.counters:
            counter.add_(steps)
        self.versions = [c._version for c in self.counters]
        for row in self.scalars.rows:
            row.step += steps

    def take_back(self, found_inf: torch.Tensor) -> None:
        """Undoes the count of a step that found_inf skipped on the device."""
        if not self.counts_on_host:
            for counter in self.counters:
                counter.sub_(found_inf.to(counter.device, counter.dtype).view(()))
            for row in self.scalars.rows:
                row.uncertain = True
            self.versions = [c._version for c in self.counters]

    def set_amp(self, grad_scale, found_inf) -> None:
        scale = None if grad_scale is None else grad_scale.to(self.device, torch.float32)
        found = None if found_inf is None else found_inf.to(self.device, torch.float32)
        self.projected.begin(scale, found, self.clip)
        if self.measured is not None:
            self.measured.begin(scale, found, self.clip)
        for bucket in (*self.buckets, *self.wholes):
            for work in bucket.works.values():
                work.grad_scale, work.found_inf = scale, found
                work.numbers = self.scalars.numbers

    def norms(self) -> None:
        for bucket in self.normed:
            bucket.backend.launch(bucket.works[Phase.NORM])
        if self.shards is not None:
            self.shards.trust("gradient", self.sums)

    def square_sum(self) -> torch.Tensor:
        """Of the gradients as stored: fp64 [1], over all processes."""
        totals = self.totals.double().sum(0, True) if self.shards is None else self.shards.square_sum(self.totals)
        return totals

    def take_clip(self, clip: torch.Tensor) -> None:
        """Instead of `norms`, where this plan is a part of a step whose global norm is known: sums of tensors only."""
        for bucket in self.normed:
            if bucket.slots[0].rule.takes_norms:
                bucket.backend.launch(bucket.works[Phase.NORM])
        if self.clip is not None:
            self.clip.copy_(clip)

    def _spared(self, bucket: Bucket) -> bool:
        """Whether no tensor of a bucket needs the sums of a probe any more."""
        measures = bucket.slots[0].rule.measures
        if measures is None or measures.last_step is None:
            return False
        rows = self.scalars.rows
        return all(rows[s.row].view is None and rows[s.row].step > measures.last_step for s in bucket.slots)

    def step(self, grads: list[torch.Tensor]) -> None:
        self.projected.before(grads)
        if self.measured is not None:
            self.measured.take_norms()
        for phases in ((Phase.PROBE,), (Phase.FUSED, Phase.APPLY, Phase.DIRECTION)):
            for bucket in self.buckets:
                for phase, work in bucket.works.items():
                    if phase in phases and not (phase == Phase.PROBE and self._spared(bucket)):
                        bucket.backend.launch(work)
            if self.shards is not None and Phase.PROBE in phases:
                self.shards.trust("update", self.sums)
            if self.measured is not None and Phase.PROBE in phases:
                self.measured.take_sums()
        self.projected.after(grads)


class Plan:
    """The launches of one optimizer for the parameters that have gradients now."""

    constants: dict  # of gradient transforms, on the devices
    pool: ScratchPool | None = None  # what the projected steps of several plans share

    def __init__(self, opt, params: list[torch.Tensor], grads: list[torch.Tensor | None]):
        self.opt, self.constants = opt, {}
        self.params = params
        self.missing = [g is None for g in grads]
        live = [g for g in grads if g is not None]
        self.signature = self._flags()
        self.max_norm = self._max_norm()
        slots = self._slots(opt, grads)
        self.slots = slots
        devices: dict[torch.device, list[Slot]] = {}
        for slot in slots:
            devices.setdefault(slot.param.device, []).append(slot)
        check_devices(type(opt).__name__, devices)
        count = max((s.tensor_id for s in slots), default=-1) + 1
        self.devices = [DevicePlan(d, mine, opt, count, self.max_norm, self.pool) for d, mine in devices.items()]
        self.live_params = [s.owner for s in slots]
        self.plain = all(type(p) in (torch.nn.Parameter, torch.Tensor) for p in self.live_params)
        self.param_facts = self._param_facts()
        self.grad_facts = [(g.dtype, g.stride()) for g in live]
        self.gapped = [s for s in slots if s.work_param is not storage(s.param)]
        self.copied = [s for s in slots if s.copy_grad]
        self.scratch: list[torch.Tensor] = []
        self.grad_pointers: list[int] = []
        self.all_aligned = all(s.key.aligned for s in slots if s.key)
        self.remember_states()

    # What a plan of a part of the parameters says in its own way (fusedopt.parts)

    def _flags(self) -> tuple:
        return self.opt.flags()

    def _max_norm(self) -> float | None:
        clip = self.opt.clip_grad_norm
        if not isinstance(clip, torch.Tensor):  # whose value may be looked at on the device only
            check_clip(clip)
        return clip

    def _entries(self) -> list[dict]:
        return list(self.opt.state.values())

    def _places(self) -> dict:
        return places(self.opt)

    def _owners(self) -> Iterable[tuple[int, int, torch.Tensor]]:
        """(tensor id, group, parameter), in the order of the gradients."""
        owners = ((i, p) for i, group in enumerate(self.opt.param_groups) for p in group["params"])
        return ((tensor_id, i, p) for tensor_id, (i, p) in enumerate(owners))

    def remember_states(self) -> None:
        self.entries = self._entries()
        self.state_values = [v for e in self.entries for v in e.values()]
        self.state_tensors = [local(v) for v in self.state_values if isinstance(v, torch.Tensor) and v.dim()]
        self.state_pointers = [v.data_ptr() for v in self.state_tensors]

    def _slots(self, opt, grads) -> list[Slot]:
        found: list[tuple] = []
        for (tensor_id, group_index, p), g in zip(self._owners(), grads, strict=True):
            if g is None:
                continue
            group = opt.param_groups[group_index]
            low_rank = opt._low_rank is not None and opt._low_rank.of(p) is not None
            check_parameter(type(opt).__name__, tensor_id, p, p.detach() if low_rank else g)
            check_precision(type(opt).__name__, tensor_id, p, group)
            check_positions(type(opt).__name__, tensor_id, p, opt.rule_for(group), opt.projection_for(p, group))
            transforms.check_parameter(opt, tensor_id, p, group)
            if owner := partition_of(p):
                check_partition(opt, describe(type(opt).__name__, tensor_id, p), owner, group)
            if is_dtensor(p):
                formats = st.configured_formats(p, group, opt.rule_for(group))
                check_sharded(describe(type(opt).__name__, tensor_id, p), p, opt.projection_for(p, group), formats)
            found.append((tensor_id, len(found), group_index, p, g))
        check_distinct(type(opt).__name__, [(args[0], args[3]) for args in found])
        slots = [self._slot(opt, *args) for args in found]  # nothing is allocated before every tensor has passed
        self._make_sites(opt, slots)
        asked = select.requested(opt.backend_for_step())
        for slot, (*_, g) in zip(slots, found, strict=True):
            self._assign(opt, slot, g, asked)
        return slots

    def _make_sites(self, opt, slots: list[Slot]) -> None:
        """Sites of the projected slots. Their places count every projected parameter, with a gradient or without."""
        found = self._places()
        for slot in slots:
            if slot.tensor_id in found:
                projection, place = found[slot.tensor_id]
                group = opt.param_groups[slot.group]
                check_projected(type(opt).__name__, opt.decay_mode_for(group), slot.tensor_id, slot.param, group)
                if slot.quantized:
                    check_quantized(type(opt).__name__, slot.tensor_id, slot.param, slot.rule, projection)
                kind, p = projection.site, slot.param if slot.quantized else slot.work_param
                if is_dtensor(slot.owner):
                    kind, p = projection.sharded_site(), slot.owner
                slot.site = kind(projection, p, slot.entry, slot.grad_dtype, slot.tensor_id, group, place)

    def _slot(self, opt, tensor_id, position, group_index, p, g) -> Slot:
        group = opt.param_groups[group_index]
        rule = opt.kept_rule(p, group)
        precision = configured_precision(p, group)
        entry = opt.init_state(p, group, rule)
        projection = opt.projection_for(p, group)
        likes = states_like(p, projection, rule)
        wanted = st.configured_formats(p, group, rule, likes)
        owner, p = p, local(p)
        octet = first_octet(likes[0] if projection is not None and likes else owner)
        likes = [p if like is owner else local(like) for like in likes]
        check_states(type(opt).__name__, tensor_id, p, entry, rule, kept_tensors(owner, projection))
        formats = tuple(st.stored_format(entry, s.name, form) for s, form in zip(rule.states, wanted, strict=True))
        dense = is_dense(p)
        work_param = storage(p) if dense else torch.empty(p.shape, dtype=p.dtype, device=p.device)
        for state, form, like in zip(rule.states, formats, likes, strict=True):
            shaped = work_param if like is p else like
            check_layout(type(opt).__name__, tensor_id, p, shaped, entry, state.name, form)
        if precision.companion:
            check_layout(type(opt).__name__, tensor_id, p, work_param, entry, precision.companion, None)
        source = None if opt._low_rank is None else opt._low_rank.of(owner)
        return Slot(tensor_id, position, group_index, p, entry, rule, formats, precision, work_param,
                    copy_grad=source is None and not strides_match(g, work_param), grad_dtype=g.dtype, source=source, owner=owner,
                    groups=split_groups(owner), first_octet=octet)  # fmt: skip

    def _assign(self, opt, slot: Slot, g: torch.Tensor, asked: str | None) -> None:
        site = slot.site
        pointers = [slot.work_param.data_ptr(), *(t.data_ptr() for t in slot.state_tensors)]
        if slot.companion is not None:
            pointers.append(slot.companion.data_ptr())
        if not slot.copy_grad:
            pointers.append(g.data_ptr())
        rule = slot.rule.parts[0] if slot.rule.parts else slot.rule.name
        key = BucketKey(slot.param.device, "", rule, slot.target.dtype, site.projected.dtype if site else g.dtype,
                        tuple(f.name for f in slot.formats), "nearest" if site else slot.precision.name,
                        all(x % 16 == 0 for x in pointers), site is not None)  # fmt: skip
        try:
            name, slot.reasons = select.choose(key, asked)
        except RuntimeError as error:
            raise RuntimeError(
                f"{type(opt).__name__}: backend {asked!r} cannot step parameter {slot.tensor_id} (shape "
                f"{tuple(slot.param.shape)}, {slot.param.dtype}, device {slot.param.device}): {error}"
            ) from None
        slot.key = key._replace(backend=name)

    def _param_facts(self) -> list[tuple]:
        """Addresses and layouts of the parameters, which a plan depends on."""
        mine = self.live_params
        if not self.plain:
            mine = [storage(local(p)) for p in mine]
        return [(p.data_ptr(), p.dtype, p.shape, p.stride()) for p in mine]

    def still_valid(self, params: list[torch.Tensor], grads: list[torch.Tensor | None]) -> bool:
        """Whether everything this plan was built from is unchanged; also takes note of the gradients' addresses."""
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        if [g is None for g in grads] != self.missing or self._flags() != self.signature:
            return False
        live = [g for g in grads if g is not None] if True in self.missing else grads
        try:
            pointers = [g.data_ptr() for g in live]
        except RuntimeError:  # a sparse gradient has no storage: the new plan refuses it
            return False
        if [(g.dtype, g.stride()) for g in live] != self.grad_facts:
            return False
        if self._param_facts() != self.param_facts:
            return False
        entries = self._entries()
        if len(entries) != len(self.entries) or not all(map(is_, entries, self.entries)):
            return False
        values = [v for e in self.entries for v in e.values()]
        if len(values) != len(self.state_values) or not all(map(is_, values, self.state_values)):
            return False
        if [v.data_ptr() for v in self.state_tensors] != self.state_pointers:
            return False
        if not all(d.steps_untouched() for d in self.devices):
            return False
        return pointers == self.grad_pointers or not self.all_aligned or not any(x & 15 for x in pointers)

    def run(self, grads: list[torch.Tensor], grad_scale, found_inf, clip: torch.Tensor | None = None) -> None:
        """One step of every slot. grads: the gradients that are not None, in parameter order. clip: the coefficient, of a
        global norm that covers more than this plan; None: that of its own gradients."""
        opt = self.opt
        if found_inf is not None and any(d.counts_on_host for d in self.devices) and bool(found_inf):
            return
        if self.copied:
            grads = list(grads)
            for slot in self.copied:
                g = grads[slot.position]
                grads[slot.position] = torch.empty_strided(
                    slot.work_param.shape, slot.work_param.stride(), dtype=g.dtype, device=g.device
                ).copy_(g)
        for slot in self.gapped:
            slot.work_param.copy_(slot.param)
        pointers = [g.data_ptr() for g in grads]
        for i, device in enumerate(self.devices):
            try:
                device.advance(opt.param_groups)
            except Exception:
                for counted in self.devices[:i]:
                    counted.count(-1)
                raise
        for device in self.devices:
            device.set_amp(grad_scale, found_inf)
            for bucket in (*device.buckets, *device.wholes):
                bucket.set_gradients(grads, pointers, device.upload)
        self.grad_pointers = pointers
        for device in self.devices:
            device.norms() if clip is None else device.take_clip(clip)
        spread = len(self.devices) > 1 or any(d.shards is not None for d in self.devices)
        if clip is None and (isinstance(self.max_norm, torch.Tensor) or spread and self.max_norm):
            self._combine_norms(grad_scale)
        for device in self.devices:
            device.step(grads)
            if found_inf is not None:
                device.take_back(found_inf)
        for slot in self.gapped:
            slot.param.copy_(slot.work_param)
        for device in self.devices:
            for bucket in (*device.buckets, *device.wholes):
                bucket.clear_gradients()

    def _combine_norms(self, grad_scale) -> None:
        """The global norm over several devices and processes, each of which holds the square of its own, and the clip
        coefficient."""
        home = self.devices[0].device
        total = sum(d.square_sum().to(home, non_blocking=True) for d in self.devices)
        norm = total.sqrt()
        if grad_scale is not None:
            norm = norm / grad_scale.to(home).double().view(1)
        limit = self.max_norm
        limit = limit.to(home).double().view(1) if isinstance(limit, torch.Tensor) else limit
        clip = (limit / (norm + 1e-6)).clamp(max=1.0)
        for device in self.devices:
            device.norm.copy_(norm, non_blocking=True)
            device.clip.copy_(clip, non_blocking=True)

    def grad_norm(self) -> torch.Tensor | None:
        return self.devices[0].norm if self.devices else None
