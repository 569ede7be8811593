"""Optimizer states in their formats: allocation, storage on a parameter's state dict, decoding and conversion.

A state `exp_avg` is stored under its own name, with the parameter's shape and memory layout; a blockwise format adds
`exp_avg_scale`, fp32 [ceil(numel / block)], blocks counted in memory order.
"""

from __future__ import annotations

import torch

from fusedopt.formats import FP32, Format, get_format
from fusedopt.memory import empty_like, flat
from fusedopt.rule import Rule, State


def override(target, **options) -> None:
    """Gives one parameter, or every parameter of a module, its own options, e.g. `override(model.embed, state_format="fp32")`.

    Args:
        target: a tensor or a torch.nn.Module.
        options: state_format (a name, or a dict by state name) and/or param_precision.
    Raises:
        ValueError: an unknown option or value. Call it before the first step: existing states keep their format.
    """
    from fusedopt.precision import get_precision

    unknown = options.keys() - {"state_format", "param_precision"}
    if unknown:
        raise ValueError(f"override: unknown options {sorted(unknown)}; it takes state_format and param_precision")
    if "state_format" in options:
        check_state_format(options["state_format"])
    if "param_precision" in options:
        get_precision(options["param_precision"])
    for tensor in target.parameters() if isinstance(target, torch.nn.Module) else [target]:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"override: expected a tensor or a module, got {type(tensor).__name__}")
        tensor._fusedopt_options = {**option_overrides(tensor), **options}


def option_overrides(p: torch.Tensor) -> dict:
    return getattr(p, "_fusedopt_options", {})


def check_state_format(value) -> None:
    for name in value.values() if isinstance(value, dict) else [value]:
        get_format(name)


def configured_formats(p: torch.Tensor, group: dict, rule: Rule) -> tuple[Format, ...]:
    """The format of each state of a rule for a parameter: its override, else the group's, small tensors fp32."""
    chosen = option_overrides(p).get("state_format", group["state_format"])
    formats = []
    for state in rule.states:
        name = chosen.get(state.name, "fp32") if isinstance(chosen, dict) else chosen
        form = get_format(name)
        if form.block and p.numel() < group["min_quantized_numel"] or p.dtype == torch.float64:
            form = FP32
        formats.append(form)
    return tuple(formats)


def storage_dtype(form: Format, p: torch.Tensor) -> torch.dtype:
    """fp64 parameters keep fp64 states, as in torch.optim."""
    return torch.float64 if p.dtype == torch.float64 else form.storage


def scale_name(name: str) -> str:
    return f"{name}_scale"


def allocate(p: torch.Tensor, entry: dict, state: State, form: Format) -> None:
    """Puts an all-zero state into a parameter's state dict."""
    stored = empty_like(p, storage_dtype(form, p)).fill_(form.zero_code(state.signed))
    entry[state.name] = stored
    if form.block:
        entry[scale_name(state.name)] = torch.zeros(form.scale_count(p.numel()), dtype=torch.float32, device=p.device)


def stored_format(entry: dict, name: str) -> Format:
    """The format a state of a parameter's state dict is in, from its tensors."""
    if scale_name(name) in entry:
        return get_format("int8")
    return get_format("bf16") if entry[name].dtype == torch.bfloat16 else FP32


def decode(entry: dict, state: State) -> torch.Tensor:
    """A state as fp32 (fp64 of an fp64 parameter), with the stored tensor's shape and memory layout."""
    stored = entry[state.name]
    form = stored_format(entry, state.name)
    if not form.block:
        return stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32)
    out = empty_like(stored, torch.float32)
    flat(out).copy_(form.decode(flat(stored), entry[scale_name(state.name)], state.signed, torch.float32))
    return out


def store(p: torch.Tensor, entry: dict, state: State, form: Format, values: torch.Tensor) -> None:
    """Puts values (shaped like p) into a parameter's state dict in a format, in p's memory layout."""
    aligned = empty_like(p, torch.float64 if p.dtype == torch.float64 else torch.float32)
    aligned.copy_(values)
    allocate(p, entry, state, form)
    codes, scale = form.encode(flat(aligned), state.signed) if form.block else (flat(aligned), None)
    flat(entry[state.name]).copy_(codes)
    if scale is not None:
        entry[scale_name(state.name)].copy_(scale)


def state_bytes(opt: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors of an optimizer except step counters."""
    return sum(
        t.numel() * t.element_size()
        for entry in opt.state.values()
        for name, t in entry.items()
        if isinstance(t, torch.Tensor) and name != "step"
    )
