"""Metrics of a step: gradient norms, update ratios, updates lost to rounding, codes of quantised states, skipped steps.

Sums are made on the device, next to the step, and copied to the host without waiting; who asks for a number waits for that copy.
A step that comes in parts (gradient release) adds up its parts; shards of DTensors are added up over their mesh.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch

from fusedopt.distributed import add_up
from fusedopt.formats import get_format
from fusedopt.memory import flat, is_dense
from fusedopt.norms import square_sums
from fusedopt.projections.base import check_positive_int
from fusedopt.states import stored_scale

SIXTEEN = (torch.bfloat16, torch.float16)


def watched_offload(opt, who: str) -> ValueError:
    """The error for an optimizer that is offloaded and watched."""
    return ValueError(
        f"{who}: record_metrics and check_numerics read states where they are stepped, and do not see those of an offloaded "
        f"{type(opt).__name__}. Use one of both."
    )


def sampled(t: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` elements of a tensor, evenly spaced in memory; of a dense one a view."""
    flattened = flat(t) if is_dense(t) else t.reshape(-1)
    return flattened[:: max(1, -(-flattened.numel() // count))]


def names_of(opt, model: torch.nn.Module | None) -> list[str]:
    """A name for every parameter of an optimizer, by tensor id."""
    known = {} if model is None else {p: name for name, p in model.named_parameters()}
    names: list[str] = []
    for group in opt.param_groups:
        given = group.get("param_names") or [None] * len(group["params"])
        for p, name in zip(group["params"], given, strict=True):
            names.append(known.get(p) or name or str(len(names)))
    return names


@cache
def code_kinds(form_name: str, signed: bool) -> torch.Tensor:
    """int64 [256, codes in a byte]: 1 where a code is that of elements too small for their block, 2 of the largest, 0 of others."""
    form = get_format(form_name)
    signs = (1.0, -1.0) if signed else (1.0,)
    # as they are encoded: a first moment that is too small becomes 0, a second moment takes the smallest code that is not
    x = torch.tensor([sign * size for sign in signs for size in (1.0, 1e-12)] * form.block)[: form.block]
    codes = form.encode(x, signed)[0].long()
    kinds = torch.zeros(2**form.bits, dtype=torch.int64)
    if form.bits == 8:
        kinds[codes[1::2]], kinds[codes[::2]] = 1, 2
        return kinds[:, None]
    kinds[codes & 15], kinds[codes >> 4] = 1, 2  # the even element is in the high half
    every = torch.arange(256)
    return torch.stack([kinds[every >> 4], kinds[every & 15]], 1)


class Metrics(Mapping):
    """Names to floats of one recorded step. `step`: its number since record_metrics, from 1; None before the first."""

    def __init__(self, step: int | None = None, layout=(), vectors=(), finish=None):
        self.step = step
        self._layout, self._finish, self._values = layout, finish, None
        self._vectors: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []
        for vector in vectors:
            if vector.device.type != "cuda":
                self._vectors.append((vector.clone(), None))
                continue
            host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True).copy_(vector, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(vector.device))
            self._vectors.append((host, event))

    def ready(self) -> bool:
        """Whether the numbers are on the host already."""
        return all(event is None or event.query() for _, event in self._vectors)

    def _read(self) -> dict[str, float]:
        if self._values is None:
            lists = []
            for host, event in self._vectors:
                if event is not None:
                    event.synchronize()
                lists.append(host.tolist())
            self._values = self._finish(self._layout, lists) if self._finish is not None else {}
            self._vectors = []
        return self._values

    def __getitem__(self, name: str) -> float:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return f"Metrics(step={self.step}, {self._read()})"


Row = tuple[str, object, float]


@dataclass
class _Sums:
    """What the runs of a step's plans add to it: rows of (kind, key, weight), and their numbers, by device and by the process
    groups over which a tensor is split."""

    rows: dict[tuple, list[Row]] = field(default_factory=dict)
    numbers: dict[tuple, list[torch.Tensor]] = field(default_factory=dict)
    expected: dict[tuple, dict[tuple[str, object], None]] = field(
        default_factory=dict
    )  # of split tensors, on every process

    def add(self, device: torch.device, slots: list, rows: list[Row], numbers: torch.Tensor) -> None:
        """slots: of whose tensors the rows are."""
        numbers = numbers.detach().double().view(-1)
        split = {slot.groups for slot in slots}
        for groups in split:
            mine = [i for i, slot in enumerate(slots) if slot.groups == groups]
            self.rows.setdefault((device, groups), []).extend(rows[i] for i in mine)
            chosen = numbers if len(split) == 1 else numbers[torch.tensor(mine, device=device)]
            self.numbers.setdefault((device, groups), []).append(chosen)

    def expect(self, slot) -> None:
        """The rows of a split tensor: a process may have none of it, and must take part in the sum nevertheless."""
        if slot.groups:
            mine = self.expected.setdefault((slot.param.device, slot.groups), {})
            kinds = ["grad", "change", "weight", *(("stayed", "moved") if rounds(slot) else ())]
            mine.update(dict.fromkeys((kind, slot.tensor_id) for kind in kinds))
            blockwise = [s.name for s, form in zip(slot.rule.states, slot.formats, strict=True) if form.block]
            mine.update(dict.fromkeys((kind, name) for name in blockwise for kind in ("small", "top", "codes")))

    def sums(self) -> tuple[list[list[Row]], list[torch.Tensor]]:
        """All rows and their numbers, those of split tensors summed over their mesh."""
        layout = [rows for (_, groups), rows in self.rows.items() if not groups]
        vectors = [torch.cat(numbers) for (_, groups), numbers in self.numbers.items() if not groups]
        for key, expected in self.expected.items():
            device, groups = key
            place = {row: i for i, row in enumerate(expected)}
            total = torch.zeros(len(place), dtype=torch.float64, device=device)
            if rows := self.rows.get(key):
                weights = torch.tensor([weight for *_, weight in rows], dtype=torch.float64).to(device)
                where = torch.tensor([place[kind, name] for kind, name, _ in rows]).to(device)
                total.index_add_(0, where, torch.cat(self.numbers[key]) * weights)
            layout.append([(kind, name, 1.0) for kind, name in place])
            vectors.append(add_up(total, groups))
        return layout, vectors


def rounds(slot) -> bool:
    """Whether updates of a tensor may be lost to rounding."""
    return slot.param.dtype in SIXTEEN and slot.precision.name == "nearest" and not slot.quantized


class Recorder:
    """Records the metrics of chosen steps of one optimizer. Made by `FusedOptimizer.record_metrics`."""

    def __init__(self, opt, every: int, sample: int, model: torch.nn.Module | None):
        if opt.offloading is not None:
            raise watched_offload(opt, "record_metrics")
        check_positive_int(every, "every")
        check_positive_int(sample, "sample")
        self._opt, self._every, self._count, self._model = opt, every, sample, model
        self.steps = 0
        self._open = self._on = False
        self._skipped: torch.Tensor | None = None
        self._metrics = Metrics()
        opt._watchers = (*(w for w in opt._watchers if not isinstance(w, Recorder)), self)

    def stop(self) -> None:
        self._opt._watchers = tuple(w for w in self._opt._watchers if w is not self)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def metrics(self) -> Metrics:
        return self._metrics

    # Called around each run of a plan

    def before(self, plan, grads: list[torch.Tensor], scale, found) -> None:
        if not self._open:
            self._open, self._part = True, _Sums()
            self.steps += 1
            self._on = (self.steps - 1) % self._every == 0
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        self._now = self._on and not capturing
        if found is not None and not capturing:
            skipped = (found.detach() != 0).double().view(1)
            self._skipped = skipped if self._skipped is None else self._skipped + skipped
        if not self._now:
            return
        for slot in plan.slots:
            self._part.expect(slot)
        slots = [s for s in plan.slots if s.source is None]
        for device, (which, sums) in square_sums([grads[s.position] for s in slots]).items():
            inverse = 1.0 if scale is None else scale.to(device, torch.float64).view(()).reciprocal()
            mine = [slots[i] for i in which]
            self._part.add(device, mine, [("grad", s.tensor_id, 1.0) for s in mine], sums.double() * inverse**2)
        self._weights = [(s, self._weight(s, copy=True)) for s in plan.slots if not s.quantized and s.param.numel()]
        self._moved = [
            (s, s.param.detach(), sampled(grads[s.position], self._count) != 0) for s in slots if self._rounds(s)
        ]
        self._old = [sampled(p, self._count).clone() for _, p, _ in self._moved]

    def _weight(self, slot, copy: bool) -> torch.Tensor:
        """Sampled weights in fp32 or fp64, with what is kept beside a 16-bit parameter."""
        p = sampled(slot.param.detach(), self._count)
        companion = None if slot.companion is None else sampled(slot.companion, self._count)
        wide = slot.precision.load(p, companion, torch.float64 if p.dtype == torch.float64 else torch.float32)
        return wide.clone() if copy else wide

    @staticmethod
    def _rounds(slot) -> bool:
        """Whether lost updates can be seen: element by element, weights are compared with their gradients."""
        return rounds(slot) and slot.param.numel() > 0 and is_dense(slot.param) and not slot.copy_grad

    def after(self, plan, found) -> None:
        if not self._now:
            return
        self._changes()
        self._lost(found)
        self._codes(plan)

    def _changes(self) -> None:
        """|change|^2 and |weights|^2 of each tensor, in proportion to its size."""
        by_kind: dict[tuple, list] = {}
        for slot, old in self._weights:
            by_kind.setdefault((old.device, old.dtype), []).append((slot, old))
        for (device, _), mine in by_kind.items():
            old = [x for _, x in mine]
            change = torch._foreach_sub([self._weight(slot, copy=False) for slot, _ in mine], old)
            shares = [slot.param.numel() / x.numel() for slot, x in mine]
            for kind, tensors in (("change", change), ("weight", old)):
                norms = torch.stack(torch._foreach_norm(tensors)).double()
                rows = [(kind, slot.tensor_id, share) for (slot, _), share in zip(mine, shares, strict=True)]
                self._part.add(device, [slot for slot, _ in mine], rows, norms.square())
        self._weights = []

    def _lost(self, found) -> None:
        for (slot, p, moved), old in zip(self._moved, self._old, strict=True):
            stayed = (sampled(p, self._count) == old) & moved
            counts = torch.stack([stayed.sum(), moved.sum()])
            if found is not None:
                counts = counts * (found.to(p.device).view(()) == 0)
            share = p.numel() / old.numel()
            rows = [("stayed", slot.tensor_id, share), ("moved", slot.tensor_id, share)]
            self._part.add(p.device, [slot] * 2, rows, counts)
        self._moved, self._old = [], []

    def _codes(self, plan) -> None:
        """Codes of blockwise states, in blocks that hold anything."""
        for slot in plan.slots:
            for state, form in zip(slot.rule.states, slot.formats, strict=True):
                if not form.block or not slot.entry[state.name].numel():
                    continue
                codes = flat(slot.entry[state.name])
                stride = max(1, -(-codes.numel() // self._count))
                chosen = codes[::stride]
                elements = torch.arange(0, codes.numel(), stride, device=codes.device) * (8 // form.bits)
                scale = stored_scale(slot.entry, state.name, form)
                live = (scale[elements // form.block] > 0)[:, None]
                kinds = code_kinds(form.name, state.signed).to(codes.device)[chosen.long()]
                counts = torch.stack(
                    [((kinds == 1) & live).sum(), ((kinds == 2) & live).sum(), live.sum() * kinds.shape[1]]
                )
                share = codes.numel() / chosen.numel()
                rows = [(kind, state.name, share) for kind in ("small", "top", "codes")]
                self._part.add(codes.device, [slot] * 3, rows, counts)

    def finish(self) -> None:
        """All parts of a step have been run."""
        if self._open and self._on and (self._part.numbers or self._part.expected):
            names = names_of(self._opt, self._model)
            layout, vectors = self._part.sums()
            if self._skipped is not None:
                layout.append([("skipped", None, 1.0)])
                vectors.append(self._skipped)
            self._metrics = Metrics(self.steps, (layout, names), vectors, _evaluate)
        self._open, self._part = False, None


def _evaluate(layout, lists: list[list[float]]) -> dict[str, float]:
    """Names to numbers, from rows and their numbers."""
    rows, names = layout
    sums: dict[str, dict[object, float]] = {}
    for device_rows, numbers in zip(rows, lists, strict=True):
        for (kind, key, weight), number in zip(device_rows, numbers, strict=True):
            mine = sums.setdefault(kind, {})
            mine[key] = mine.get(key, 0.0) + weight * number
    out: dict[str, float] = {}

    def each(kind: str, below: str | None, what: str, root: bool) -> None:
        """A metric of the whole and of every tensor, in order: a sum, or a quotient of two."""
        top = sums.get(kind, {})
        bottom = None if below is None else sums.get(below, {})

        def value(x: float, y: float | None) -> float:
            quotient = x if y is None else x / y if y else (math.nan if x else 0.0)
            return math.sqrt(quotient) if root and quotient >= 0 else quotient

        if top:
            out[what] = value(sum(top.values()), None if bottom is None else sum(bottom.values()))
        for key in sorted(top):
            out[f"{what}/{names[key]}"] = value(top[key], None if bottom is None else bottom[key])

    each("grad", None, "grad_norm", True)
    each("change", "weight", "update_ratio", True)
    each("stayed", "moved", "lost_updates", False)
    for kind, what in (("small", "underflow"), ("top", "saturated")):
        for state, count in sorted(sums.get(kind, {}).items()):
            total = sums["codes"][state]
            out[f"{what}/{state}"] = count / total if total else 0.0
    out["skipped_steps"] = sums.get("skipped", {}).get(None, 0.0)
    return out


class Recorded:
    """The methods of an optimizer that record metrics."""

    def record_metrics(self, every: int = 1, sample: int = 1 << 16, model: torch.nn.Module | None = None) -> Recorder:
        """Records metrics of every `every`-th step from the next one on, for `metrics()`; replaces an earlier recording.

        A recorded step reads the gradients once more and copies a sample of the weights; results are the same bit for bit.
        Nothing is recorded while a CUDA graph is captured.

        Args:
            sample: weights of each tensor, evenly spaced, that update ratios, lost updates and codes are taken from; tensors
                with fewer are taken whole.
            model: names the parameters where the optimizer was not given named ones; they go by their index otherwise.

        Returns a handle with stop(), usable in a with statement. Raises ValueError: every or sample is not
        positive; the optimizer is offloaded.
        """
        return Recorder(self, every, sample, model)

    def metrics(self) -> Metrics:
        """Metrics of the last recorded step, as a mapping from names to floats; they are taken from the device when the first one
        is asked for. `for k, v in opt.metrics().items(): writer.add_scalar(k, v, step)`. Empty before the first recorded step.

        grad_norm, grad_norm/NAME: before clipping, without the loss scale. update_ratio, update_ratio/NAME: norm of the step's
        change of the weights by that of the weights. lost_updates, lost_updates/NAME: share of 16-bit weights (nearest
        rounding) with a gradient that did not change. underflow/STATE, saturated/STATE: share of the elements of a blockwise
        state that are too small for their block (coded as 0, or raised to the smallest code), and at its largest code (one
        in a block is normal). skipped_steps: steps since record_metrics that found_inf skipped.

        Raises:
            RuntimeError: record_metrics has not been called.
        """
        recorder = next((w for w in self._watchers if isinstance(w, Recorder)), None)
        if recorder is None:
            raise RuntimeError(
                f"{type(self).__name__}: nothing is recorded. Call opt.record_metrics() before the step."
            )
        if self._parts is not None:
            self._parts.end_round()
        return recorder.metrics()
