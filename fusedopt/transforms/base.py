"""Gradient transforms: maps of the gradients just before a step, and of the weights just after it, for any rule.

A step with transforms copies its gradients to fp32 (fp64 of fp64), divides them by the loss scale, hands the copies to each
transform in order, and then to the plan in place of p.grad, which is never written. The copies cost 4 bytes per element for
the time of the step. States of transforms lie in the optimizer's state beside the rule's, in the parameter's memory layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from fusedopt.checks import describe
from fusedopt.distributed import add_up, is_dtensor, is_partial, local, partition_of, sharded_dims
from fusedopt.memory import empty_like, flat, is_dense, strides_match
from fusedopt.numbers import ScalarTable
from fusedopt.weights import Int8Weight

Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]  # what torch's foreach functions take and give

# Elements that a transform with temporaries works on at a time: few launches on a GPU, what fits in a cache on the CPU
CHUNK, CPU_CHUNK = 1 << 25, 1 << 19
SCOPES = ("element", "row", "tensor", "model")


class Transform:
    """Base of the gradient transforms, which are frozen dataclasses: options only, no tensors.

    name: begins the name of its count. keeps: names of its states. codes: those of them that are uint8. scope: what it sums
    over: nothing ("element"), dimensions but the first ("row"), a tensor, or all tensors ("model"). counts: keeps the number of
    its steps of each parameter. whole: needs tensors that are not split. reads_weights: looks at the weights, which int8
    weights do not have in floating point. after_step: has `after`. shares: names of states of the model as a whole, which lie in
    the state of one of its parameters (`shared`). needs_finite: a step with gradients that are not finite is left out.
    """

    name = ""
    keeps: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    scope = "element"
    counts = False
    whole = False
    reads_weights = False
    after_step = False
    needs_finite = False

    def shapes(self, p: torch.Tensor) -> dict[str, tuple[int, ...]]:
        """States it keeps for a parameter, by name, all zero at first."""
        return dict.fromkeys(self.keeps, tuple(p.shape))

    def shared_shapes(self) -> dict[str, tuple[int, ...]]:
        """Those that it keeps once, all zero at first."""
        return dict.fromkeys(self.shares, ())

    def dtype(self, name: str, p: torch.Tensor) -> torch.dtype:
        """Of a state of a parameter."""
        if name in self.codes:
            return torch.uint8
        return torch.float64 if p.dtype == torch.float64 else torch.float32

    def check_loaded(self, what: str, p: torch.Tensor, entry: dict) -> None:
        """Raises ValueError for a loaded state dict of a parameter whose states are of another kind than its own."""

    def ready(self, batches: list[Batch]) -> None:
        """Raises ValueError where something that the step needs is missing; called before any transform changes anything."""

    def before(self, batches: list[Batch]) -> None:
        """Changes the gradients, in place."""
        for batch in batches:
            self.each(batch)

    def each(self, batch: Batch) -> None:
        """`before` for one batch; transforms of scope "model" define `before` itself."""

    def after(self, batches: list[Batch]) -> None:
        """Changes the weights that the step has made."""

    def tensors(self, p: torch.Tensor) -> dict[str, tuple[int, ...]]:
        """All states, with the count."""
        return {**self.shapes(p), **({f"{self.name}_steps": ()} if self.counts else {})}

    @classmethod
    def owns(cls, entry: dict) -> bool:
        """Whether a parameter's state dict has states of this class."""
        return any(name in entry for name in cls.names())

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of everything it keeps."""
        return (*cls.keeps, *cls.shares, *((f"{cls.name}_steps",) if cls.counts else ()))

    def refuses(self, p: torch.Tensor) -> str | None:
        """Why a parameter cannot be transformed, or None."""
        if self.reads_weights and isinstance(p, Int8Weight):
            return "is an int8 weight, whose values it cannot read or write"
        if owner := partition_of(p):
            if self.scope != "element" or self.whole:
                return f"is a flat partition of {owner}, which does not know where its tensors begin"
        if not is_dtensor(p):
            return None
        if is_partial(p):
            return "has Partial placements. Redistribute it to Shard or Replicate"
        if self.whole:
            return "is a DTensor, and it needs the whole tensor"
        if self.scope == "row" and any(dim != 0 for _, dim in sharded_dims(p)):
            return "is a DTensor split along another dimension than the first, and it sums over that dimension"
        return None


@dataclass
class Batch:
    """Slots of a plan on one device with gradients of one dtype; transforms change `grads` in place.

    skip: bool, 0-dim on the device, where the device alone knows whether found_inf skips the step; gradients are zero then.
    on_device: whether counts live on the device and must not be looked at. constants: of the plan, see `constant`.
    scalars: the plan's numbers on the device, in `after` those of the step.
    """

    opt: torch.optim.Optimizer
    device: torch.device
    slots: list
    grads: Tensors
    skip: torch.Tensor | None
    on_device: bool
    constants: dict
    scalars: ScalarTable
    kept: dict = field(default_factory=dict)  # what `before` leaves for `after`

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def groups(self) -> list[dict]:
        return [self.opt.param_groups[slot.group] for slot in self.slots]

    @property
    def names(self) -> list[str | None]:
        """The names of the parameters, None where the optimizer was not given named ones."""
        every = [n for g in self.opt.param_groups for n in g.get("param_names") or [None] * len(g["params"])]
        return [every[slot.tensor_id] for slot in self.slots]

    @property
    def dtype(self) -> torch.dtype:
        return self.grads[0].dtype

    def only(self, which: list[int]) -> Batch:
        """A batch of some of its slots."""
        slots, grads = [self.slots[i] for i in which], [self.grads[i] for i in which]
        return Batch(self.opt, self.device, slots, grads, self.skip, self.on_device, self.constants, self.scalars)

    def chunks(self) -> Iterator[Batch]:
        """Batches of at most a chunk of elements, or of one tensor; of whole tensors, so that every process of a mesh makes the
        same ones."""
        which: list[int] = []
        count = 0
        most = CPU_CHUNK if self.device.type == "cpu" else CHUNK
        for i, slot in enumerate(self.slots):
            if which and count + slot.owner.numel() > most:
                yield self.only(which)
                which, count = [], 0
            which.append(i)
            count += slot.owner.numel()
        if which:
            yield self.only(which)

    def constant(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        """A list of numbers on the device; kept with the plan, as a captured graph can copy nothing from the host."""
        key = (self.device, dtype, tuple(values))
        if key not in self.constants:
            self.constants[key] = torch.tensor(values, dtype=dtype).to(self.device)
        return self.constants[key]

    # States

    def states(self, name: str) -> list[torch.Tensor]:
        return [slot.entry[name] for slot in self.slots]

    def put(self, states: Tensors, values: Tensors) -> None:
        """Sets states, unless the step is skipped."""
        if self.skip is None:
            torch._foreach_copy_(states, values)
            return
        for state, value in zip(states, values, strict=True):
            torch.where(self.skip, state, value.to(state.dtype), out=state)

    def count(self, name: str) -> list[int] | torch.Tensor:
        """How many steps each of its tensors has been through before this one: ints, or fp32 [n] on the device; counts this
        one."""
        counts = self.states(f"{name}_steps")
        if not self.on_device:
            before = [int(x) for x in torch.stack([c.cpu() for c in counts]).tolist()]
            torch._foreach_add_(counts, 1)
            return before
        counted = torch.stack(counts)
        step = torch.ones((), device=self.device) if self.skip is None else (~self.skip).float()
        torch._foreach_copy_(counts, list((counted + step).unbind()))
        return counted

    # Weights

    def weights(self) -> list[torch.Tensor]:
        """The weights in the dtype of the gradients, with what is kept beside 16-bit ones: new tensors where they differ, and
        the parameters themselves where they do not."""
        out = []
        for slot, g in zip(self.slots, self.grads, strict=True):
            p = slot.param.detach()
            if slot.precision.companion:
                dense = p if is_dense(p) else p.contiguous()
                companion = empty_like(dense, slot.companion.dtype).copy_(slot.companion)
                wide = empty_like(dense, g.dtype)
                flat(wide).copy_(slot.precision.load(flat(dense), flat(companion), g.dtype))
                p = wide
            out.append(_laid_out(p.to(g.dtype), g))
        return out

    def set_weights(self, values: Tensors) -> None:
        """Sets weights and what is kept beside them, unless the step is skipped. Rounds to nearest."""
        for slot, value in zip(self.slots, values, strict=True):
            p = slot.param.detach()
            kept = None
            if slot.precision.companion:
                like = slot.companion
                wide = empty_like(like, value.dtype).copy_(value)
                rounded, low = slot.precision.store(flat(wide), p.dtype)
                kept = empty_like(like, like.dtype)
                flat(kept).copy_(low)
                stored = empty_like(like, p.dtype)
                flat(stored).copy_(rounded)
                value = stored
            for target, new in ((p, value), (slot.companion, kept)):
                if new is not None:
                    new = new.to(target.dtype)
                    target.copy_(new if self.skip is None else torch.where(self.skip, target, new))

    # Sums

    def add_up(self, sums: torch.Tensor) -> torch.Tensor:
        """fp64 [n], one sum for each tensor: completed over the processes that hold its shards."""
        split: dict[tuple, list[int]] = {}
        for i, slot in enumerate(self.slots):
            if slot.groups:
                split.setdefault(slot.groups, []).append(i)
        for groups, which in split.items():
            index = self.constant(which, torch.int64)
            sums.index_copy_(0, index, add_up(sums.index_select(0, index), groups))
        return sums

    def sums(self, tensors: Tensors) -> torch.Tensor:
        """fp64 [n]: the sum of each tensor's elements, over all its shards. torch.sum adds in a tree, also on the CPU."""
        return self.add_up(torch.stack([x.sum() for x in tensors]).double())

    def dots(self, xs: Tensors, ys: Tensors) -> torch.Tensor:
        """fp64 [n]: the inner product of each pair."""
        return self.sums(torch._foreach_mul(xs, ys))

    def square_norms(self, tensors: Tensors) -> torch.Tensor:
        """fp64 [n]: |x|^2 of each tensor. The CPU's norms add in fp32 one by one: 4 % off at 10^8 elements."""
        if self.device.type == "cpu":
            return self.add_up(torch.stack([x.square().sum() for x in tensors]).double())
        return self.add_up(torch.stack(torch._foreach_norm(tensors)).double().square())

    def scale(self, factors: torch.Tensor) -> None:
        """Multiplies each gradient by its factor, [n] on the device."""
        torch._foreach_mul_(self.grads, list(factors.to(self.dtype).unbind()))

    def tensor_sizes(self) -> torch.Tensor:
        """fp64 [n]: elements of each whole tensor."""
        return self.constant([float(s.owner.numel()) for s in self.slots], torch.float64)


def _laid_out(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x in the strides of another tensor of its shape, as foreach operations want them."""
    return x if strides_match(x, like) else torch.empty_like(like).copy_(x)


# What an optimizer calls


def listed(transforms) -> tuple:
    """What was given as gradient_transforms, as a tuple: one transform, or several in order."""
    return (transforms,) if isinstance(transforms, Transform) else tuple(transforms)


def check(opt_name: str, transforms, differentiable: bool) -> tuple[Transform, ...]:
    """The transforms as a tuple. Raises ValueError for what cannot be used together."""
    transforms = listed(transforms)
    for t in transforms:
        if not isinstance(t, Transform):
            raise ValueError(
                f"{opt_name}: gradient_transforms holds {t!r}, which is no transform; use e.g. [fusedopt.OrthoGrad()]"
            )
    if transforms and differentiable:
        raise ValueError(f"{opt_name}: differentiable=True does not differentiate through gradient_transforms.")
    like = torch.empty(1)
    stateful = [t.name for t in transforms if t.tensors(like)]
    for name in stateful:
        if stateful.count(name) > 1:
            raise ValueError(f"{opt_name}: gradient_transforms holds {name} twice, whose states share their names.")
    return transforms


def applied(opt, group: dict) -> tuple[Transform, ...]:
    """The transforms of a group."""
    return opt.gradient_transforms if group.get("transform_gradients", True) else ()


def check_parameter(opt, tensor_id: int, p: torch.Tensor, group: dict) -> None:
    """Raises RuntimeError for a parameter that a transform cannot have."""
    for t in applied(opt, group):
        if reason := t.refuses(p):
            raise RuntimeError(
                f"{describe(type(opt).__name__, tensor_id, p)} {reason}: {type(t).__name__} cannot transform it. Put it in a "
                "group with transform_gradients=False, or do without this transform."
            )


def tensors_of(opt, p: torch.Tensor, group: dict, entry=()) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the states that transforms keep for a parameter (a DTensor's shard), and of those that they keep once
    if this parameter's state dict, `entry`, has them."""
    return {name: shape for _, name, shape in _kept(opt, p, group, entry)}


def _kept(opt, p: torch.Tensor, group: dict, entry) -> Iterator[tuple[Transform, str, tuple[int, ...]]]:
    for t in applied(opt, group):
        shared = t.shared_shapes().items()
        for name, shape in (*t.tensors(local(p)).items(), *(item for item in shared if item[0] in entry)):
            yield t, name, shape


def _new_state(t: Transform, p: torch.Tensor, name: str, shape: tuple[int, ...], on_device: bool) -> torch.Tensor:
    dtype = t.dtype(name, p)
    if shape == tuple(p.shape) and p.dim():
        return empty_like(p, dtype).zero_()
    return torch.zeros(shape, dtype=dtype, device=p.device if shape or on_device else "cpu")


def allocate(opt, p: torch.Tensor, group: dict, entry) -> None:
    """Gives a parameter's state dict what its transforms need and it does not have yet, and what they keep once if no other
    parameter has it. entry: as a step sees it."""
    missing = [n for t in applied(opt, group) for n in t.shares if not any(n in mine for mine in opt.state.values())]
    for t, name, shape in _kept(opt, p, group, missing):
        if name not in entry:
            entry[name] = _new_state(t, local(p), name, shape, _on_device(opt, p, group, name))


def shared(opt, name: str) -> torch.Tensor:
    """A state that a transform of an optimizer keeps once."""
    return next(entry[name] for entry in opt.state.values() if name in entry)


def _on_device(opt, p: torch.Tensor, group: dict, name: str) -> bool:
    return not name.endswith("_steps") or opt.steps_on_device(local(p), group)


def take(opt, what: str, p: torch.Tensor, group: dict, entry: dict, out) -> None:
    """Copies loaded states of transforms. Those that are not there begin anew. Raises ValueError where one does not fit."""
    for t in applied(opt, group):
        t.check_loaded(what, local(p), entry)
    for t, name, shape in _kept(opt, p, group, entry):
        tensor = entry.get(name)
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
            found = tuple(getattr(tensor, "shape", ()))
            raise ValueError(
                f"{what}: the loaded {name!r} has shape {found}, its gradient transform keeps one of shape {shape}. Load a "
                "state dict of the same model and transforms."
            )
        new = _new_state(t, local(p), name, shape, _on_device(opt, p, group, name))
        if tensor.dtype.is_floating_point != new.dtype.is_floating_point:
            raise ValueError(f"{what}: the loaded {name!r} is {tensor.dtype}, not {new.dtype}.")
        out[name] = new.copy_(tensor)


@torch.no_grad()
def widened(opt, params: list[torch.Tensor], grads: list[torch.Tensor | None], scale) -> list[torch.Tensor | None]:
    """Copies of the gradients in fp32 (fp64 where they or their parameters are), divided by the loss scale, in the
    parameters' layouts. What a step would refuse is left as it is.

    With capturable they are kept between steps: a captured graph and eager steps in turn write the same tables of addresses.
    """
    out = list(grads)
    kept = opt._widened if any(group["capturable"] for group in opt.param_groups) else None
    if kept is not None and len(kept) > sum(len(group["params"]) for group in opt.param_groups):
        kept.clear()  # parameters have been replaced
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for i, (owner, g) in enumerate(zip(params, grads, strict=True)):
        p = local(owner)
        if g is None or g.layout != torch.strided or not g.dtype.is_floating_point or g.shape != p.shape or g.is_meta:
            continue
        wide = torch.float64 if torch.float64 in (p.dtype, g.dtype) else torch.float32
        like = p if p.layout == torch.strided and not isinstance(p, Int8Weight) else g
        buffer = None if kept is None else kept.get(owner)
        if buffer is None or buffer.dtype != wide or buffer.device != g.device or not strides_match(buffer, like):
            buffer = empty_like(like, wide).to(g.device)
            if kept is not None:
                kept[owner] = buffer
        out[i] = buffer.copy_(g)
        by_device.setdefault(g.device, []).append(out[i])
    if scale is not None:
        for device, mine in by_device.items():
            inverse = scale.to(device, torch.float64).view(()).reciprocal().float()
            torch._foreach_mul_(mine, inverse)
    return out


def batches(opt, plan, grads: list[torch.Tensor], found) -> list[Batch]:
    """The slots of a plan whose gradients are transformed, as batches."""
    chosen: dict[tuple, list] = {}
    for slot in plan.slots:
        group = opt.param_groups[slot.group]
        if applied(opt, group) and (slot.param.numel() or slot.groups):
            on_device = opt.steps_on_device(slot.param, group)
            chosen.setdefault((slot.param.device, grads[slot.position].dtype, on_device), []).append(slot)
    # a step whose counts are on the host has waited for found_inf
    unknown = found is not None and all(on_device for *_, on_device in chosen)
    tables = {part.device: part.scalars for part in plan.devices}
    out = []
    for (device, _, on_device), slots in chosen.items():
        skip = (found.to(device).view(()) != 0) if unknown else None
        mine = [grads[s.position] for s in slots]
        if skip is not None:
            for g in mine:
                g.copy_(torch.where(skip, torch.zeros((), dtype=g.dtype, device=device), g))
        out.append(Batch(opt, device, slots, mine, skip, on_device, plan.constants, tables[device]))
    return out


class Applied:
    """The transforms of one run of a plan: made before it, `after` called after it. found: what skips the step, or None."""

    @torch.no_grad()
    def __init__(self, opt, plan, grads: list[torch.Tensor], found):
        self._transforms, self._batches = opt.gradient_transforms, []
        if any(t.needs_finite for t in self._transforms):
            found = _skips(grads, found)
        self.found = found
        if found is not None and any(d.counts_on_host for d in plan.devices) and bool(found):
            return  # the plan will not run either
        self._batches = batches(opt, plan, grads, found)
        if self._batches:
            for t in self._transforms:
                t.ready(self._batches)
            for t in self._transforms:
                t.before(self._batches)

    @torch.no_grad()
    def after(self) -> None:
        if self._batches:
            for t in self._transforms:
                if t.after_step:
                    t.after(self._batches)


def _skips(grads: list[torch.Tensor], found) -> torch.Tensor:
    """found_inf (1 where a step is to be skipped), and 1 where a gradient is not finite."""
    live = [g for g in grads if g.numel()]
    home = grads[0].device
    largest = [torch.stack(torch._foreach_norm(gs, float("inf"))).to(home) for gs in _by_kind(live)]
    bad = sum(((~torch.isfinite(x)).sum() for x in largest), torch.zeros((), dtype=torch.int64, device=home)) > 0
    return (bad if found is None else bad | (found.to(home).view(()) != 0)).float()


def _by_kind(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """By device and dtype, as foreach operations and torch.stack want them."""
    out: dict[tuple, list[torch.Tensor]] = {}
    for x in tensors:
        out.setdefault((x.device, x.dtype), []).append(x)
    return list(out.values())


def state_bytes(opt) -> int:
    """Bytes of the states of its transforms."""
    names = {name for t in opt.gradient_transforms for name in t.names()}
    return sum(
        x.numel() * x.element_size() for entry in opt.state.values() for name, x in entry.items() if name in names
    )


def check_parts(opt, who: str, error: type[Exception] = ValueError) -> None:
    """Raises an error for transforms that need all gradients at once, where they come one by one."""
    for t in opt.gradient_transforms:
        if t.scope == "model" or t.after_step:
            raise error(
                f"{who}: {type(t).__name__} of this {type(opt).__name__} needs all gradients of a step at once. Step in "
                "opt.step(), or do without it."
            )


def check_none(opt, who: str, why: str) -> None:
    """Raises ValueError for any transform."""
    if opt.gradient_transforms:
        names = ", ".join(type(t).__name__ for t in opt.gradient_transforms)
        raise ValueError(f"{who}: {why}, which gradient_transforms ({names}) change. Use one of both.")
