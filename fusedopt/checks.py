"""What a step refuses, each with the parameter it is about and what to do; all checks run before anything is changed."""

from __future__ import annotations

import torch

from fusedopt import states
from fusedopt.distributed import local
from fusedopt.formats import Format
from fusedopt.masters import configured_precision
from fusedopt.memory import is_dense, overlaps, strides_match
from fusedopt.options import check_storage_numbers
from fusedopt.precision import get_precision
from fusedopt.rule import known_states
from fusedopt.states import WIDE, scale_name, stored_shape

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(name: str, index: int, p: torch.Tensor, label: str | None = None) -> str:
    """label: the parameter's name, where it is known."""
    named = "" if label is None else f" {label!r}"
    return f"{name}: parameter {index}{named} (shape {tuple(p.shape)}, {p.dtype}, device {p.device})"


def check_parameter(name: str, index: int, p: torch.Tensor, g: torch.Tensor) -> None:
    what = describe(name, index, p)
    p = local(p)
    if p.layout != torch.strided:
        raise RuntimeError(f"{what} is sparse. Make it dense with .to_dense().")
    if g.layout != torch.strided:
        raise RuntimeError(
            f"{what} has a sparse gradient: {name} does not support sparse gradients. "
            "Use sparse=False in the embedding, or torch.optim.SparseAdam for this parameter."
        )
    if p.is_complex() or g.is_complex():
        raise RuntimeError(
            f"{what} is complex: {name} does not support complex parameters. Optimise torch.view_as_real(parameter)."
        )
    if p.dtype not in FLOATING or g.dtype not in FLOATING:
        raise RuntimeError(
            f"{what} with a gradient of {g.dtype}: only float32, bfloat16, float16 and float64 are stepped."
        )
    if p.is_meta or g.is_meta:
        raise RuntimeError(
            f"{what} is on the meta device and has no data. Materialise the model with to_empty() first."
        )
    if g.device != p.device:
        raise RuntimeError(f"{what} has its gradient on {g.device}. Move it to {p.device}.")
    if g.shape != p.shape:
        raise RuntimeError(f"{what} has a gradient of shape {tuple(g.shape)}. The shapes must be equal.")
    if overlaps(p):
        raise RuntimeError(
            f"{what} has elements that share memory (strides {p.stride()}). Use .clone() to give each its own."
        )


def check_distinct(name: str, found: list[tuple[int, torch.Tensor]]) -> None:
    """Raises RuntimeError for a parameter that is listed twice: one launch would step it twice at once."""
    first: dict[int, int] = {}
    for index, p in found:
        if first.setdefault(id(p), index) != index:
            raise RuntimeError(f"{describe(name, index, p)} is parameter {first[id(p)]} too. List it once.")


def check_precision(name: str, index: int, p: torch.Tensor, group: dict) -> None:
    """Raises RuntimeError for a parameter whose dtype its param_precision cannot keep."""
    try:
        configured_precision(p, group)
    except ValueError as error:
        raise RuntimeError(f"{describe(name, index, p)}: {error}") from None


def check_layout(
    name: str, index: int, p: torch.Tensor, work: torch.Tensor, entry: dict, key: str, form: Format | None
) -> None:
    """A state that was put in place from outside must have the parameter's shape, device, dtype and layout: launches go by
    addresses. The layout is mended, and so is a floating-point dtype that the format does not store (model.double(), .half()).

    form: the state's format; None for a companion.
    """
    tensor = entry[key]
    if form is not None:
        tensor = entry[key] = _in_storage(describe(name, index, p), p, work, entry, key, form)
    shape = tuple(p.shape) if form is None else stored_shape(form, work)
    if tensor.shape != shape or tensor.device != p.device:
        raise RuntimeError(
            f"{describe(name, index, p)}: its state {key!r} has shape {tuple(tensor.shape)} on {tensor.device}. "
            "Load a state dict of the same model, or move the state to the parameter's device."
        )
    packed = form is not None and form.bits < 8
    if not (tensor.is_contiguous() if packed else strides_match(tensor, work)):
        if form is not None and form.block or not is_dense(tensor) and overlaps(tensor):
            raise RuntimeError(
                f"{describe(name, index, p)}: its state {key!r} has strides {tensor.stride()}, the parameter "
                f"{p.stride()}. Load the state dict again so that it takes the parameter's layout."
            )
        entry[key] = torch.empty_strided(work.shape, work.stride(), dtype=tensor.dtype, device=tensor.device).copy_(
            tensor
        )


def check_states(name: str, index: int, p: torch.Tensor, entry: dict, rule, kept: dict) -> None:
    """Raises RuntimeError for what is no tensor among a rule's states and what a projection keeps, (shape, dtype) by name; a dtype
    of the latter that the parameter had before (model.double()) is mended."""
    for key in (*rule.state_names, *kept):
        tensor = entry[key]
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise RuntimeError(
                f"{describe(name, index, p)}: its state {key!r} is no dense tensor but {type(tensor).__name__}. Load a state "
                "dict, or delete the state to begin anew."
            )
        if key in kept and tensor.dtype != kept[key][1]:
            entry[key] = tensor.to(kept[key][1])


def _in_storage(what: str, p: torch.Tensor, work: torch.Tensor, entry: dict, key: str, form: Format) -> torch.Tensor:
    """A state in a dtype that its format is stored in; its scales must fit it. Raises RuntimeError where it cannot be."""
    tensor = entry[key]
    if form.block:
        scale = entry[scale_name(key, form)]
        fits = tensor.dtype == form.storage and scale.dtype == torch.float32 and scale.device == p.device
        if not (fits and scale.shape == (form.scale_count(work.numel()),) and scale.is_contiguous()):
            raise RuntimeError(
                f"{what}: its {form.name} state {key!r} is {tensor.dtype} with scales of {scale.dtype} and shape "
                f"{tuple(scale.shape)} on {scale.device}. Codes cannot be cast: load a state dict of the same model."
            )
        return tensor
    stored = (form.storage, torch.float64) if p.dtype == torch.float64 else (form.storage,)  # the reference steps both
    if tensor.dtype in stored:
        return tensor
    if not tensor.dtype.is_floating_point:
        raise RuntimeError(f"{what}: its state {key!r} is {tensor.dtype}. Load a state dict of the same optimizer.")
    return tensor.to(form.storage)


def check_group(opt, group: dict) -> None:
    """Raises ValueError for an option of a group that is out of range, or that only an optimizer as a whole can have and has
    not (ZeroRedundancyOptimizer's groups repeat all arguments)."""
    name = type(opt).__name__
    for option in ("clip_grad_norm", "gradient_transforms", "backend", "amp_fused"):
        kept, given = getattr(opt, option), group.get(option)
        if option in group and given is not kept and (tuple(given) if isinstance(given, list) else given) != kept:
            raise ValueError(f"{name}: {option} is of the whole optimizer, not of a group. Pass it to {name}(...).")
    states.check_state_format(group["state_format"])
    get_precision(group["param_precision"])
    check_storage_numbers(group)


def check_formats(name: str, rule, group: dict) -> None:
    """Raises ValueError for states that no rule has, and for a narrow format that a group gives to a wide state by its name."""
    chosen = group["state_format"]
    if isinstance(chosen, dict) and (unknown := chosen.keys() - known_states()):
        raise ValueError(
            f"{name}: state_format names {', '.join(map(repr, sorted(map(str, unknown))))}, which no rule keeps; rule "
            f"{rule.name!r} keeps {', '.join(rule.state_names) or 'none'}."
        )
    for state in rule.states if isinstance(chosen, dict) else ():
        if state.wide and chosen.get(state.name, "fp32") != "fp32":
            raise ValueError(f"{name}: {WIDE.format(rule=rule.name, state=state.name, form=chosen[state.name])}")


def check_projection(name: str, rule, group: dict) -> None:
    """Raises ValueError for what is no projection, and for one that a rule cannot have."""
    states.check_projection(group["projection"])
    if group["projection"] is None:
        return
    if rule.trust_on:
        raise ValueError(f"{name}: its trust ratio needs the full update, so it takes no projection. Use AdamW.")
    if rule.has_positions:
        raise ValueError(f"{name}: it steps points beside the parameter, so it takes no projection. Use AdamW.")
    if rule.reads_estimates:
        raise ValueError(
            f"{name}: its diagonal of the Hessian is that of whole matrices, so it takes no projection. Use AdamW."
        )
    group["projection"].rule_for(rule)


def check_positions(name: str, index: int, p: torch.Tensor, rule, projection) -> None:
    """Raises RuntimeError where a rule that steps points beside the parameter is given a projection or an int8 weight."""
    if rule.has_positions and projection is not None:
        points = ", ".join(state.name for state in rule.states if state.position is not None)
        raise RuntimeError(
            f"{describe(name, index, p)} is projected or an int8 weight, and {name} steps {points} beside the parameter. Use a "
            "rule of moments (AdamW), or a floating-point parameter without projection."
        )
    if rule.reads_estimates and projection is not None:
        raise RuntimeError(
            f"{describe(name, index, p)} is projected or an int8 weight, and {name} estimates the Hessian of whole matrices. Use "
            "AdamW, or a floating-point parameter without projection."
        )


def check_projected(name: str, decay_mode: str, index: int, p: torch.Tensor, group: dict) -> None:
    """Raises RuntimeError for what a projected parameter cannot have."""
    if decay_mode == "coupled" and group["weight_decay"] != 0:
        raise RuntimeError(
            f"{describe(name, index, p)} is projected, and L2 weight decay would be projected with its gradient. Use a rule "
            "with decoupled decay (AdamW), or weight_decay=0."
        )
    if group["differentiable"]:
        raise RuntimeError(f"{describe(name, index, p)} is projected, which differentiable=True cannot be.")


def check_quantized(name: str, index: int, p: torch.Tensor, rule, projection) -> None:
    """Raises RuntimeError for an int8 weight that its rule or projection cannot step."""
    if rule.reduces:
        raise RuntimeError(
            f"{describe(name, index, p)} is an int8 weight, and {name} needs sums over its values. Use a rule without one "
            "(AdamW), or keep the weight in floating point."
        )
    if not projection.site.takes_int8:
        raise RuntimeError(
            f"{describe(name, index, p)} is an int8 weight, which {type(projection).__name__} cannot step. Use GaLore, QGaLore, "
            "DCT, APOLLO or FRUGAL with a basis, no projection, or keep the weight in floating point."
        )
