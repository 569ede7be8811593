"""Optimizer states in their formats: allocation, storage on a parameter's state dict, decoding and conversion.

A state `exp_avg` is stored under its own name, with the parameter's shape and memory layout; a blockwise format, say int8,
adds `exp_avg_int8_scale`, fp32 [ceil(numel / block)], blocks counted in memory order. int4 packs two elements that are
neighbours in memory into a byte.
"""

from __future__ import annotations

from functools import wraps

import torch

from fusedopt.formats import BF16, FP32, Format, get_format, list_formats
from fusedopt.memory import empty_like, flat, is_dense
from fusedopt.rule import Rule, State

STORAGE_OPTIONS = ("state_format", "param_precision", "projection", "min_quantized_numel")
OVERRIDABLE = ("state_format", "param_precision", "projection")
WIDE = (
    "state_format: {state!r} of rule {rule!r} stays in fp32, since {form!r} would round its small increments away. "
    "Leave it out of the dict."
)
OWN_OPTIONS = (*STORAGE_OPTIONS, "seed", "transform_gradients")


def undisturbed(method):
    """Wraps a method that makes states and tables: under torch.inference_mode they would be tensors that no later step may
    change, and after torch.set_default_device those of the host would lie elsewhere."""

    @wraps(method)
    def wrapped(*args, **kwargs):
        redirected = torch._C._len_torch_function_stack() > 0  # default devices are modes; asking for theirs takes 5 us
        if not redirected and not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        grad = torch.is_grad_enabled()  # inference_mode(False) turns it on
        with torch.inference_mode(False), torch.set_grad_enabled(grad), torch.device("cpu"):
            return method(*args, **kwargs)

    return wrapped


def override(target, **options) -> None:
    """Gives one parameter, or every parameter of a module, its own options, e.g. `override(model.embed, state_format="fp32")`.

    Args:
        target: a tensor or a torch.nn.Module.
        options: state_format (a name, or a dict by state name), param_precision, projection (None for none).
    Raises:
        ValueError: an unknown option or value. Call it before the first step: existing states keep their format.
    """
    from fusedopt.precision import get_precision

    unknown = options.keys() - set(OVERRIDABLE)
    if unknown:
        raise ValueError(f"override: unknown options {sorted(unknown)}; it takes {', '.join(OVERRIDABLE)}")
    if "state_format" in options:
        check_state_format(options["state_format"])
    if "param_precision" in options:
        get_precision(options["param_precision"])
    if "projection" in options:
        check_projection(options["projection"], overriding=True)
    for tensor in target.parameters() if isinstance(target, torch.nn.Module) else [target]:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"override: expected a tensor or a module, got {type(tensor).__name__}")
        tensor._fusedopt_options = {**option_overrides(tensor), **options}


def option_overrides(p: torch.Tensor) -> dict:
    return getattr(p, "_fusedopt_options", {})


def check_projection(value, overriding: bool = False) -> None:
    from fusedopt.projections.base import Projection

    if value is not None and not isinstance(value, Projection):
        raise ValueError(f"projection={value!r} is no projection; use e.g. fusedopt.GaLore(rank=128), or None for none")
    if value is not None and value.turns and overriding:
        raise ValueError("override: tensors that take turns are chosen from a group. Give the projection to the group.")


def check_state_format(value) -> None:
    for name in value.values() if isinstance(value, dict) else [value]:
        get_format(name)


def configured_formats(
    p: torch.Tensor, group: dict, rule: Rule, likes: list[torch.Tensor] | None = None
) -> tuple[Format, ...]:
    """The format of each state of a rule for a parameter: its override, else the group's, small tensors fp32.

    likes: for each state a tensor of its shape, where that is not the parameter's (a projection).
    Raises ValueError for a narrow format that is given to a wide state by its name; under one for all it stays fp32.
    """
    chosen = option_overrides(p).get("state_format", group["state_format"])
    formats = []
    for i, state in enumerate(rule.states):
        name = chosen.get(state.name, "fp32") if isinstance(chosen, dict) else chosen
        form = get_format(name)
        if state.wide and form is not FP32:
            if isinstance(chosen, dict):
                raise ValueError(WIDE.format(rule=rule.name, state=state.name, form=name))
            form = FP32
        numel = p.numel() if likes is None else likes[i].numel()
        if form.block and numel < group["min_quantized_numel"] or p.dtype == torch.float64:
            form = FP32
        formats.append(form)
    return tuple(formats)


def storage_dtype(form: Format, p: torch.Tensor) -> torch.dtype:
    """fp64 parameters keep fp64 states, as in torch.optim."""
    return torch.float64 if p.dtype == torch.float64 else form.storage


def scale_name(name: str, form: Format) -> str:
    """Where a state's scales lie. The name says which format the codes are in."""
    return f"{name}_{form.name}_scale"


def scale_names(name: str) -> list[str]:
    """Every name a state's scales can have."""
    return [scale_name(name, form) for form in blockwise()]


def blockwise() -> list[Format]:
    return [form for form in map(get_format, list_formats()) if form.block]


def stored_shape(form: Format, p: torch.Tensor) -> tuple[int, ...]:
    """The shape of a stored state: p's; packed, its last dimension is halved where that is whole bytes, else it is flat. A
    view with gaps has the states of a contiguous tensor."""
    if form.bits >= 8:
        return tuple(p.shape)
    if p.dim() and (p.is_contiguous() or not is_dense(p)) and p.shape[-1] % 2 == 0:
        return (*p.shape[:-1], p.shape[-1] // 2)
    return (form.stored_count(p.numel()),)


def _empty_stored(p: torch.Tensor, form: Format) -> torch.Tensor:
    if form.bits >= 8:
        return empty_like(p, storage_dtype(form, p))
    return torch.empty(stored_shape(form, p), dtype=form.storage, device=p.device)


def allocate(p: torch.Tensor, entry: dict, state: State, form: Format) -> None:
    """Puts an all-zero state into a parameter's state dict."""
    entry[state.name] = _empty_stored(p, form).fill_(form.zero_code(state.signed))
    if form.block:
        scale = torch.zeros(form.scale_count(p.numel()), dtype=torch.float32, device=p.device)
        entry[scale_name(state.name, form)] = scale


def stored_format(entry: dict, name: str, configured: Format | None = None) -> Format:
    """The format a state of a parameter's state dict is in, from its tensors.

    How a bf16 state is rounded does not show in it: `configured` says, where it agrees in all else.
    """
    for form in blockwise():
        if scale_name(name, form) in entry:
            return form
    form = BF16 if entry[name].dtype == torch.bfloat16 else FP32
    return configured if configured is not None and configured.stochastic and form is BF16 else form


def stored_scale(entry: dict, name: str, form: Format) -> torch.Tensor | None:
    return entry[scale_name(name, form)] if form.block else None


def decode(p: torch.Tensor, entry: dict, state: State) -> torch.Tensor:
    """A state as fp32 (fp64 of an fp64 parameter), with the parameter's shape; its memory layout is the stored tensor's."""
    stored = entry[state.name]
    form = stored_format(entry, state.name)
    if not form.block:
        return stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32)
    out = empty_like(stored if form.bits >= 8 else p, torch.float32)
    scale = stored_scale(entry, state.name, form)
    flat(out).copy_(form.decode(flat(stored), scale, state.signed, torch.float32, p.numel()))
    return out


def store(p: torch.Tensor, entry: dict, state: State, form: Format, values: torch.Tensor) -> None:
    """Puts values (shaped like p) into a parameter's state dict in a format, in p's memory layout."""
    aligned = empty_like(p, torch.float64 if p.dtype == torch.float64 else torch.float32)
    aligned.copy_(values)
    allocate(p, entry, state, form)
    codes, scale = form.encode(flat(aligned), state.signed) if form.block else (flat(aligned), None)
    flat(entry[state.name]).copy_(codes)
    if scale is not None:
        entry[scale_name(state.name, form)].copy_(scale)


def state_bytes(opt: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors of an optimizer except step counters."""
    return sum(
        t.numel() * t.element_size()
        for entry in opt.state.values()
        for name, t in entry.items()
        if isinstance(t, torch.Tensor) and name != "step"
    )
