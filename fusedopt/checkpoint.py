"""State dicts: loading that keeps every dtype, conversion between formats, and the torch.optim form."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from itertools import chain
from numbers import Real
from typing import Any

import torch

from fusedopt import states as st
from fusedopt.checks import describe
from fusedopt.conversion import convert, for_loading, to_bitsandbytes
from fusedopt.distributed import as_dtensor, is_dtensor, local
from fusedopt.masters import bind, configured_precision
from fusedopt.memory import empty_like, flat, is_dense, strides_match
from fusedopt.precision import COMPANIONS, companion_dtypes
from fusedopt.projections.base import kept_tensors, sharded_likes, states_like
from fusedopt.sharded_states import Loader, LocalEntry, entry_of, gathered, portable
from fusedopt.states import OWN_OPTIONS, STORAGE_OPTIONS
from fusedopt.transforms import TRANSFORMS
from fusedopt.transforms import base as transforms

__all__ = ["convert", "prepare", "to_bitsandbytes", "to_torch"]


def to_torch(opt, native: dict) -> dict:
    """The state dict as the torch.optim class of the same rule would give it: fp32 states, no scales, no own options."""
    indices = {}
    start = 0
    for group in opt.param_groups:
        for i, p in enumerate(group["params"]):
            indices[start + i] = (p, group)
        start += len(group["params"])
    out = {}
    for index, entry in native["state"].items():
        _, group = indices[index]
        rule = opt.rule_for(group)
        converted = {"step": entry["step"].clone()} if opt.torch_counts_steps else {}
        p, projection = indices[index][0], opt.projection_for(indices[index][0], group)
        if projection is not None and (
            projection.tensors(p) or any(s is not p for s in states_like(p, projection, rule))
        ):
            raise ValueError(
                f"{describe(type(opt).__name__, index, p)}: its states are projected and have no torch.optim "
                "form. Use state_dict()."
            )
        for name, number in rule.derived.items():
            converted[name] = torch.as_tensor(number(group, float(entry["step"])), dtype=_step_dtype()).view(())
        for name in rule.memory:
            if name in entry:
                converted[name] = entry[name].clone()
        for state in rule.states:
            if state.name in entry:
                converted[state.name] = _decoded(p, entry, state)
        out[index] = converted
    groups = [{k: v for k, v in g.items() if k not in OWN_OPTIONS} for g in native["param_groups"]]
    return {"state": out, "param_groups": groups}


def _decoded(p: torch.Tensor, entry: dict, state) -> torch.Tensor:
    if not is_dtensor(p):
        return st.decode(p, entry, state)
    return as_dtensor(st.decode(local(p), entry_of(p, entry), state), p, p.shape, p.stride())


def to_portable(opt, native: dict) -> None:
    """Makes the states of DTensor parameters ones that any number of processes can load; the dict's, not the optimizer's."""
    owners = [(p, group) for group in opt.param_groups for p in group["params"]]
    for index, (p, group) in enumerate(owners):
        if is_dtensor(p) and index in native["state"]:
            likes = sharded_likes(p, opt.projection_for(p, group), opt.rule_for(group))
            native["state"][index] = portable(p, native["state"][index], likes)


def _load_entry(opt, index: int, p: torch.Tensor, group: dict, entry: dict, label: str | None = None) -> dict:
    """One parameter's state in this optimizer's formats, on its device. Raises ValueError where it does not fit."""
    what = describe(type(opt).__name__, index, p, label)
    rule = opt.kept_rule(p, group, entry)
    entry = {k: v for k, v in entry.items() if v is not None}
    step = entry.get("step", 0)
    if not (step.numel() == 1 if isinstance(step, torch.Tensor) else isinstance(step, Real)):
        raise ValueError(f"{what}: the loaded 'step' is {step!r}. Load one number for each parameter.")
    present = [s for s in rule.states if s.name in entry]
    missing = [s.name for s in rule.states if s.name not in entry]
    stepped = bool(rule.states) and float(step) > 0
    projection = opt.projection_for(p, group)
    kept = kept_tensors(p, projection)
    likes = states_like(p, projection, rule)
    formats = st.configured_formats(p, group, rule, likes)  # by the size of the whole, on every process the same
    transformed = transforms.tensors_of(opt, p, group, entry)
    if _others(rule, entry, {**kept, **transformed}) or missing and (present or stepped):
        raise ValueError(
            f"{what}: the loaded state holds {sorted(entry)}, but rule {rule.name!r} keeps "
            f"{[*rule.state_names, *rule.memory, *kept, *transformed]}. Load a state dict of the same "
            f"optimizer{_and_transforms(entry)}."
        )
    out: Any = {}
    owner = p
    if is_dtensor(p):
        others = sharded_likes(p, projection, rule)
        entry, out, p = Loader(what, p, entry, others, kept).load(rule), LocalEntry(p, {}, others), local(p)
        likes = [local(like) for like in likes]
    else:
        entry = gathered(likes, entry, rule)
    step = entry.get("step", 1.0 if present else 0.0)  # torch.optim.SGD counts no steps
    step = step.detach().clone() if isinstance(step, torch.Tensor) else torch.tensor(float(step))
    on_device = opt.steps_on_device(p, group)
    out["step"] = step.to(device=p.device if on_device else "cpu", dtype=_step_dtype()).view(())
    _take_memory(what, p, rule, entry, out, stepped)
    for state, form, like in zip(rule.states, formats, likes, strict=True):
        if state.name in entry:
            _check_state(what, like, entry, state.name)
            _take(like, out, entry, state, form)
    _take_kept(what, p, kept, () if projection is None else projection.on_host(), entry, out, stepped)
    _take_companion(what, owner, p, group, entry, out)
    transforms.take(opt, what, p, group, entry, out)
    return out.stored if isinstance(out, LocalEntry) else out


def _check_state(what: str, p: torch.Tensor, entry: dict, name: str) -> None:
    """Raises ValueError where a loaded state does not have the shape or the scales its format asks for."""
    tensor = entry[name]
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{what}: the loaded state {name!r} is a {type(tensor).__name__}. Load tensors.")
    coded = tensor.dtype == torch.uint8
    found = st.stored_format(entry, name)
    if coded and not found.block:
        raise ValueError(
            f"{what}: the loaded state {name!r} is in codes, but none of its scales ({', '.join(st.scale_names(name))}) is "
            "there. Load a complete state dict."
        )
    if not (coded or tensor.dtype.is_floating_point):
        raise ValueError(f"{what}: the loaded state {name!r} has dtype {tensor.dtype}, which no format stores.")
    n, flat_size = p.numel(), tensor.numel() if tensor.dim() == 1 else -1
    packed = coded and found.bits < 8
    fits = tensor.numel() == found.stored_count(n) if packed else tensor.shape == p.shape or flat_size in (n, n + n % 2)
    if not fits:
        raise ValueError(
            f"{what}: the loaded state {name!r} has shape {tuple(tensor.shape)}. Load a state dict of the same model."
        )
    scale = st.stored_scale(entry, name, found)
    if coded and not (isinstance(scale, torch.Tensor) and scale.dtype.is_floating_point):
        raise ValueError(
            f"{what}: the loaded scales {st.scale_name(name, found)!r} are {getattr(scale, 'dtype', type(scale).__name__)}, not "
            "floating point. Load a complete state dict."
        )
    if coded and (count := scale.numel()) != found.scale_count(n):
        raise ValueError(
            f"{what}: the loaded {found.name} state {name!r} needs {found.scale_count(n)} scales under "
            f"{st.scale_name(name, found)!r}, not {count}. Load a complete state dict."
        )


def _take(p: torch.Tensor, out: dict, entry: dict, state, form) -> None:
    """Copies a state as it is where format and layout agree, else decodes and stores it anew.

    A flat state (a converted int4 state that has lost its shape) lies in p's memory order.
    """
    tensor, found = entry[state.name], st.stored_format(entry, state.name, form)
    if found.block and found.bits < 8 and tensor.dim() > 1 and is_dense(p) and not p.is_contiguous():
        # Packed in a shape: it was a contiguous parameter's, and this one lies in memory in another order.
        scale = st.stored_scale(entry, state.name, found)
        values = found.decode(tensor.reshape(-1), scale, state.signed, torch.float32, p.numel())
        st.store(p, out, state, form, values.view(p.shape).to(p.device))
        return
    if found is form and tensor.dtype == st.storage_dtype(form, p):
        st.allocate(p, out, state, form)
        mine = out[state.name]
        if not form.block and tensor.shape == mine.shape:
            mine.copy_(tensor)
            return
        if form.bits < 8 or strides_match(tensor, mine) or tensor.shape != mine.shape:
            codes = flat(tensor) if strides_match(tensor, mine) else tensor.reshape(-1)
            flat(mine).copy_(codes[: mine.numel()])
            if form.block:
                out[st.scale_name(state.name, form)].copy_(st.stored_scale(entry, state.name, form))
            return
    if tensor.shape != p.shape and not (found.block and found.bits < 8):
        tensor = flat_to_shape(tensor, p)
        entry = {**entry, state.name: tensor}
    like = p if tensor.device == p.device else p.detach().to(tensor.device)
    values = st.decode(like, entry, state) if found.block else tensor
    st.store(p, out, state, form, values.to(p.device))


def flat_to_shape(tensor: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A flat tensor in the shape and memory layout of p, without the element an odd number of packed codes leaves over."""
    out = empty_like(p, tensor.dtype).to(tensor.device)
    flat(out).copy_(tensor[: p.numel()])
    return out


def _take_companion(what: str, owner: torch.Tensor, p: torch.Tensor, group: dict, entry: dict, out) -> None:
    """The companion of p's precision, from the loaded one; p itself stays as it is. owner: p, or the DTensor it is of."""
    try:
        precision = configured_precision(owner, group)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    loaded = {name: entry[name] for name in COMPANIONS if name in entry}
    for name, tensor in loaded.items():
        if not isinstance(tensor, torch.Tensor) or tensor.shape != p.shape:
            raise ValueError(
                f"{what}: the loaded {name!r} has shape {tuple(getattr(tensor, 'shape', ()))}. Load a state dict of the same "
                "model."
            )
        if tensor.dtype not in companion_dtypes(name):
            kinds = " or ".join(str(d).removeprefix("torch.") for d in companion_dtypes(name))
            raise ValueError(
                f"{what}: the loaded {name!r} is {tensor.dtype}, not {kinds}. Load a state dict of this package."
            )
        out[name] = empty_like(p, tensor.dtype).copy_(tensor)
    bind(p, out, precision)


def _take_kept(
    what: str, p: torch.Tensor, kept: dict, on_host: tuple[str, ...], entry: dict, out: dict, stepped: bool
) -> None:
    """What a projection keeps: tensors of a given shape and dtype."""
    for name, (shape, dtype) in kept.items():
        tensor = entry.get(name)
        if tensor is None and not stepped:
            continue
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
            found = "missing" if tensor is None else f"of shape {tuple(getattr(tensor, 'shape', ()))}"
            raise ValueError(
                f"{what}: the loaded {name!r} is {found}, the projection keeps one of shape {shape}. Load a state dict of "
                "the same model and projection."
            )
        if tensor.dtype.is_floating_point != dtype.is_floating_point:
            raise ValueError(
                f"{what}: the loaded {name!r} is {tensor.dtype}, the projection keeps {dtype}. Load a state dict of the same "
                "projection."
            )
        device = "cpu" if name in on_host else p.device
        out[name] = torch.empty(shape, dtype=dtype, device=device).copy_(tensor)


def _take_memory(what: str, p: torch.Tensor, rule, entry: dict, out, stepped: bool) -> None:
    """The numbers that a rule keeps of a tensor, or their first values where it has not been stepped."""
    keeper = out.stored if isinstance(out, LocalEntry) else out
    for name, first in rule.memory.items():
        value = entry.get(name)
        if value is None and stepped:
            raise ValueError(f"{what}: the loaded state lacks its {name!r}. Load a state dict of the same optimizer.")
        value = torch.as_tensor(first if value is None else value).detach()
        if value.numel() != 1:
            raise ValueError(f"{what}: the loaded {name!r} has shape {tuple(value.shape)}. Load one number.")
        keeper[name] = value.reshape(()).to(device=p.device, dtype=torch.float64, copy=True)


def _others(rule, entry: dict, kept) -> list[str]:
    """Tensors that belong to no state of the rule: another optimizer's."""
    scales = [name for state in rule.state_names for name in st.scale_names(state)]
    known = {"step", *rule.state_names, *rule.derived, *rule.memory, *scales, *COMPANIONS, *kept}
    return [k for k, v in entry.items() if isinstance(v, torch.Tensor) and k not in known]


def _and_transforms(entry: dict) -> str:
    """What to say of a loaded entry that has states of gradient transforms."""
    found = [t.__name__ for t in TRANSFORMS if t.owns(entry)]
    return f", with gradient_transforms={' and '.join(found)}" if found else ""


def _step_dtype() -> torch.dtype:
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


@st.undisturbed
def prepare(opt, state_dict: dict, labels: list[str] | None = None) -> dict:
    """What Optimizer.__setstate__ takes, from a loaded state dict; the optimizer is not touched.

    labels: names of the parameters for messages; None for those that the groups have.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"{type(opt).__name__}: what is loaded is not an optimizer's state dict: it holds {list(state_dict)[:8]}, not 'state' "
            "and 'param_groups'."
        )
    state_dict = for_loading(opt, state_dict)
    groups, saved_groups = opt.param_groups, deepcopy(state_dict["param_groups"])
    if len(groups) != len(saved_groups):
        raise ValueError("loaded state dict has a different number of parameter groups")
    if any(len(g["params"]) != len(s["params"]) for g, s in zip(groups, saved_groups, strict=True)):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
        )
    new_groups = []
    for group, saved in zip(groups, saved_groups, strict=True):
        merged = {**opt.defaults, **saved, "params": group["params"]}
        for option in STORAGE_OPTIONS:
            merged[option] = group[option]
        if "param_names" in group and "param_names" not in saved:
            merged["param_names"] = group["param_names"]
        new_groups.append(merged)
    ids = chain.from_iterable(g["params"] for g in saved_groups)
    owners = [(p, g) for g in new_groups for p in g["params"]]
    by_id = {saved_id: (i, *owner) for i, (saved_id, owner) in enumerate(zip(ids, owners, strict=True))}
    state: dict = {}
    labels = labels or [n for g in groups for n in g.get("param_names", [None] * len(g["params"]))]
    keeper = opt.offloading and opt.offloading.keeper()
    with torch.no_grad():
        for key, entry in state_dict["state"].items():
            if key in by_id:
                index, p, group = by_id[key]
                if keeper:
                    state[p] = keeper.keep(_load_entry(opt, index, keeper.home(p), group, entry, labels[index]))
                else:
                    state[p] = _load_entry(opt, index, p, group, entry, labels[index])
            else:
                state[key] = entry
    return {"state": defaultdict(dict, state), "param_groups": new_groups}
