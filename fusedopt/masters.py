"""Companions: what a parameter's state keeps beside a 16-bit parameter, and the fp32 weights that the two stand for."""

from __future__ import annotations

import torch

from fusedopt.distributed import as_dtensor, is_dtensor, local, shard_of
from fusedopt.memory import empty_like, flat, is_dense
from fusedopt.precision import NEAREST, ParamPrecision, get_precision, list_precisions
from fusedopt.sharded_states import entry_of
from fusedopt.states import option_overrides
from fusedopt.weights import Int8Weight


def configured_precision(p: torch.Tensor, group: dict) -> ParamPrecision:
    """The precision of a parameter: its override, else the group's; nearest for fp32 and fp64. ValueError where it cannot be."""
    precision = get_precision(option_overrides(p).get("param_precision", group["param_precision"]))
    if isinstance(p, Int8Weight):
        if precision.companion:
            raise ValueError(
                f"param_precision {precision.name!r} keeps a companion of a 16-bit weight, which an int8 weight is not: it is "
                "rounded stochastically; use 'nearest' or 'stochastic', or override() its param_precision"
            )
        return NEAREST
    return precision.for_dtype(p.dtype)


def stored_precision(p: torch.Tensor, entry: dict) -> ParamPrecision:
    """The precision whose companion is in a parameter's state dict."""
    for precision in map(get_precision, list_precisions()):
        companion = entry.get(precision.companion) if precision.companion else None
        if companion is not None and companion.dtype == precision.companion_dtype(p.dtype):
            return precision
    return NEAREST


def _dense(t: torch.Tensor) -> torch.Tensor:
    return t.detach() if is_dense(t) else t.detach().contiguous()


def weights(p: torch.Tensor, entry: dict) -> torch.Tensor:
    """The fp32 weights (fp64 of an fp64 parameter) a parameter and its companion stand for, a new tensor shaped like p."""
    precision = stored_precision(p, entry)
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    dense = _dense(p)
    out = empty_like(dense, wide)
    companion = entry[precision.companion] if precision.companion else None
    flat(out).copy_(precision.load(flat(dense), None if companion is None else _in_layout(companion, dense), wide))
    return out


def _in_layout(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t, flat, in the memory order of a dense tensor of its shape."""
    out = empty_like(like, t.dtype)
    return flat(out.copy_(t))


def bind(p: torch.Tensor, entry: dict, precision: ParamPrecision) -> None:
    """Gives a parameter's state dict the companion of a precision, and no other. Weights that another one kept are taken over."""
    found = stored_precision(p, entry)
    if found is precision or not (found.companion or precision.companion):
        return
    dense = _dense(p)
    exact = weights(p, entry)
    if found.companion:
        del entry[found.companion]
    if precision.companion:
        companion = empty_like(dense, precision.companion_dtype(p.dtype))
        flat(companion).copy_(precision.attach(flat(dense), flat(exact)))
        entry[precision.companion] = companion


@torch.no_grad()
def set_weights(p: torch.Tensor, entry: dict, precision: ParamPrecision, values: torch.Tensor) -> None:
    """Sets a parameter and its companion to fp32 weights shaped like it."""
    dense = _dense(p)
    wide = empty_like(dense, torch.float32).copy_(values)
    stored, kept = precision.store(flat(wide), p.dtype)
    rounded = empty_like(dense, p.dtype)
    flat(rounded).copy_(stored)
    p.copy_(rounded)
    if precision.companion:
        companion = empty_like(dense, precision.companion_dtype(p.dtype))
        flat(companion).copy_(kept)
        entry[precision.companion] = companion


def _managed(opt, model: torch.nn.Module, what: str) -> dict[str, tuple[torch.nn.Parameter, dict]]:
    """The parameters of a model that the optimizer steps, by every name they have in its state dict, with their group."""
    groups = {p: group for group in opt.param_groups for p in group["params"]}
    named = dict(model.named_parameters(remove_duplicate=False))
    found = {name: (p, groups[p]) for name, p in named.items() if p in groups}
    if not found:
        raise ValueError(
            f"{what}: none of the model's parameters belongs to this {type(opt).__name__}. Pass its model."
        )
    return found


@torch.no_grad()
def fp32_state_dict(opt, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """model.state_dict() with the weights of every parameter the optimizer steps in fp32. See FusedOptimizer.fp32_state_dict."""
    out = model.state_dict()
    for name, (p, _) in _managed(opt, model, "fp32_state_dict").items():
        if name in out and p.dtype != torch.float64:
            exact = weights(local(p), entry_of(p, opt.state.get(p, {})))
            out[name] = as_dtensor(exact, p, p.shape, p.stride()) if is_dtensor(p) else exact
    return out


@torch.no_grad()
def load_fp32_state_dict(opt, model: torch.nn.Module, state_dict: dict[str, torch.Tensor], strict: bool = True):
    """The reverse. See FusedOptimizer.load_fp32_state_dict."""
    managed = _managed(opt, model, "load_fp32_state_dict")
    for name, (p, group) in managed.items():
        if name in state_dict:
            configured_precision(p, group)
            if state_dict[name].shape != p.shape:
                raise ValueError(
                    f"load_fp32_state_dict: {name!r} has shape {tuple(state_dict[name].shape)}, the parameter "
                    f"{tuple(p.shape)}. Load the weights of the same model."
                )
    result = model.load_state_dict(state_dict, strict=strict)
    for name, (p, group) in managed.items():
        if name in state_dict and p.dtype in (torch.bfloat16, torch.float16):
            values = state_dict[name].detach()
            if is_dtensor(p):
                values = (
                    local(values.redistribute(placements=p.placements)) if is_dtensor(values) else shard_of(p, values)
                )
            set_weights(local(p), entry_of(p, opt.state[p]), configured_precision(p, group), values)
    return result
