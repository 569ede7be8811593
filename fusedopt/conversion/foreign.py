"""State dicts of bitsandbytes and torchao, read as fusedopt's names and formats, and bitsandbytes' written.

bitsandbytes' 8-bit states are our int8 (codes, scales and map agree); torchao's 8- and 4-bit states are our int8 and int4
where the block sizes agree. Only names and views change here; nothing is decoded, except torchao's fp8 and odd block sizes.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from fusedopt import states as st
from fusedopt.formats import INT8, dynamic_map, get_format
from fusedopt.rule import optimizers

WRAPPED = "__bnb_optimizer_quant_state__"
BITSANDBYTES_NAMES = ("adam", "adamw", "lamb", "lion", "sgd")
# Numbers in the groups of every bitsandbytes optimizer, whether its rule has them or not.
_BITSANDBYTES_OPTIONS = ("betas", "eps", "alpha", "t_alpha", "t_beta3")
OLD_BLOCK = 2048  # of bitsandbytes before 0.44


def kind(state_dict: dict) -> str | None:
    """ "bitsandbytes", "torchao", or None for names as in torch.optim."""
    for entry in state_dict["state"].values():
        if not isinstance(entry, dict):
            continue
        if "state1" in entry or WRAPPED in entry:
            return "bitsandbytes"
        if any(_is_torchao(value) for value in entry.values()):
            return "torchao"
    return None


def adopt(state_dict: dict, cls: Any, defaults: dict | None) -> dict:
    """A foreign state dict under our names, sharing its tensors. cls, defaults: the optimizer class and its group options."""
    if kind(state_dict) == "torchao":
        return _from_torchao(state_dict)
    if kind(state_dict) == "bitsandbytes":
        return _from_bitsandbytes(state_dict, cls, defaults)
    return state_dict


# bitsandbytes


def _unwrapped(entry: dict) -> dict:
    return {**{k: v for k, v in entry.items() if k != WRAPPED}, **entry.get(WRAPPED, {})}


def resolve(optimizer, state_dict: dict) -> tuple[type, dict]:
    """The class a bitsandbytes state dict is for and its group options. optimizer: an instance, a name or None (two moments)."""
    if optimizer is not None and not isinstance(optimizer, str):
        return type(optimizer), optimizer.defaults
    if optimizer is None:
        if any("state2" not in _unwrapped(e) for e in state_dict["state"].values() if e):
            raise ValueError(
                "convert: a bitsandbytes state dict with one state per parameter does not say which optimizer it is of. "
                "Pass optimizer='lion' or optimizer='sgd' (--optimizer)."
            )
        optimizer = "adamw"  # Adam, AdamW and LAMB keep the same states
    if optimizer not in BITSANDBYTES_NAMES:
        raise ValueError(
            f"convert: optimizer {optimizer!r} cannot be read from bitsandbytes; it is one of {', '.join(BITSANDBYTES_NAMES)}"
        )
    cls = optimizers()[optimizer]
    return cls, cls([torch.zeros(1)]).defaults


def _from_bitsandbytes(state_dict: dict, cls: Any, defaults: dict) -> dict:
    if "trust_coefficient" in defaults:
        raise ValueError(
            "LARS: bitsandbytes keeps gradients in the momentum buffer, this LARS keeps them scaled by its trust ratio. "
            "Start with fresh states."
        )
    groups = []
    for group in state_dict["param_groups"]:
        mine = {k: deepcopy(v) for k, v in group.items() if k in defaults or k not in _BITSANDBYTES_OPTIONS}
        if "betas" in mine:
            mine["betas"] = tuple(mine["betas"])
        if "momentum" in defaults:  # bitsandbytes takes dampening and nesterov and uses neither
            mine.update(momentum=group["betas"][0], dampening=0.0, nesterov=False)
        groups.append(mine)
    owners = {key: group for group in groups for key in group["params"]}
    state = {}
    for key, entry in state_dict["state"].items():
        if key not in owners or not entry:
            state[key] = entry
            continue
        rule = cls.rule_for({**defaults, **owners[key]})
        state[key] = _entry_from_bitsandbytes(f"convert: entry {key}", _unwrapped(entry), rule)
    return {**state_dict, "state": state, "param_groups": groups}


def _entry_from_bitsandbytes(what: str, entry: dict, rule) -> dict:
    if any(name in entry for name in ("max1", "new_max1")):
        raise ValueError(
            f"{what} has 8-bit states with one scale for all, of bitsandbytes before 0.38. Start with fresh states."
        )
    found = [name for name in ("state1", "state2") if entry.get(name) is not None]
    if len(found) != len(rule.states):
        raise ValueError(
            f"{what} holds {len(found)} states of bitsandbytes, but rule {rule.name!r} keeps {list(rule.state_names)}. "
            "Load the state dict of the same optimizer, or name it with optimizer= (--optimizer)."
        )
    out = {"step": torch.tensor(float(entry["step"]))}
    shapes = {tuple(entry[name].shape) for name in found}
    if len(shapes) > 1:
        raise ValueError(
            f"{what} has states of shapes {sorted(shapes)}: it is AdEMAMix's, which fusedopt does not have."
        )
    for number, (name, state) in enumerate(zip(found, rule.states, strict=True), 1):
        tensor = entry[name]
        if not tensor.is_contiguous():
            if tensor.device.type == "cpu":
                raise ValueError(
                    f"{what}: {name} is not contiguous, and whether its elements lie in the order of indices or of memory "
                    "depends on the device it was trained on. Make the parameter contiguous before training with "
                    "bitsandbytes, or pass the state dict on the device of its training."
                )
            tensor = tensor.as_strided((tensor.numel(),), (1,)).view(tensor.shape)  # kernels ignore the strides
        out[state.name] = tensor
        if tensor.dtype == torch.uint8:
            out[st.scale_name(state.name, INT8)] = _absmax(what, entry, number, tensor, state.signed)
    return out


def _absmax(what: str, entry: dict, number: int, codes: torch.Tensor, signed: bool) -> torch.Tensor:
    """One scale for each of our blocks."""
    qmap, absmax = entry[f"qmap{number}"].cpu(), entry[f"absmax{number}"]
    if qmap.shape != (256,) or (qmap.double() - dynamic_map(signed)).abs().max() > 1e-6:
        raise ValueError(
            f"{what}: qmap{number} is not the dynamic map. Only bitsandbytes' own 8-bit states can be read."
        )
    n = codes.numel()
    if absmax.numel() == INT8.scale_count(n):
        return absmax
    if absmax.numel() == -(-n // OLD_BLOCK):  # a scale need not be its block's maximum: codes stay as they are
        return absmax.repeat_interleave(OLD_BLOCK // INT8.block)[: INT8.scale_count(n)]
    raise ValueError(
        f"{what}: absmax{number} has {absmax.numel()} values for {n} elements; blocks of 256 and of {OLD_BLOCK} are known."
    )


def to_bitsandbytes(native: dict) -> dict:
    """The same tensors under bitsandbytes' names. native: int8 and fp32 states of contiguous parameters."""
    groups = [_bitsandbytes_group(i, group) for i, group in enumerate(native["param_groups"])]
    state = {}
    maps: dict = {}
    for key, entry in native["state"].items():
        names = [k for k in ("exp_avg", "momentum_buffer", "exp_avg_sq") if k in entry]
        mine: dict = {"step": int(entry.get("step", 1 if names else 0))}
        for number, name in enumerate(names, 1):
            mine[f"state{number}"] = entry[name]
            if entry[name].dtype == torch.uint8:
                signed, device = number == 1, entry[name].device
                qmap = maps.setdefault((signed, device), dynamic_map(signed, dtype=torch.float32).to(device))
                mine[f"qmap{number}"], mine[f"absmax{number}"] = qmap, entry[st.scale_name(name, INT8)]
        state[key] = mine
    return {"state": state, "param_groups": groups}


def _bitsandbytes_group(index: int, group: dict) -> dict:
    lacking = [
        k for k in ("amsgrad", "nesterov", "dampening", "maximize", "trust_coefficient", "cautious") if group.get(k)
    ]
    if lacking or "momentum" in group and not group["momentum"]:
        raise ValueError(
            f"to_bitsandbytes: group {index} has {', '.join(lacking) or 'momentum=0'}, which bitsandbytes does not have. "
            "Change the option, or keep the state dict in fusedopt's form."
        )
    own = {
        "amsgrad", "nesterov", "dampening", "momentum", "maximize", "foreach", "fused", "capturable", "differentiable",
        "decoupled_weight_decay", "cautious", *st.OWN_OPTIONS,
    }  # fmt: skip
    out = {k: deepcopy(v) for k, v in group.items() if k not in own}
    betas = (group["momentum"], 0.0) if "momentum" in group else tuple(float(b) for b in group["betas"])
    out.update(lr=float(group["lr"]), betas=betas, eps=group.get("eps", 0.0))
    if "eps" in group:  # of the rules with two moments
        out = {"alpha": 0.0, "t_alpha": None, "t_beta3": None, **out}
    return {"weight_decay": 0.0, **out}


# torchao


def _is_torchao(value) -> bool:
    return type(value).__name__ in ("OptimState8bit", "OptimState4bit", "OptimStateFp8")


def _from_torchao(state_dict: dict) -> dict:
    state = {}
    for key, entry in state_dict["state"].items():
        mine: dict = {}
        for name, value in entry.items():
            mine.update(_from_subclass(name, value) if _is_torchao(value) else {name: value})
        state[key] = mine
    groups = []
    for group in state_dict["param_groups"]:
        lr = group["lr"]  # torchao keeps a tensor for torch.compile's sake
        groups.append({**deepcopy(group), "lr": float(lr) if isinstance(lr, torch.Tensor) else lr})
    return {**state_dict, "state": state, "param_groups": groups}


def _from_subclass(name: str, value) -> dict:
    form = get_format({"OptimState8bit": "int8", "OptimState4bit": "int4"}.get(type(value).__name__, "fp32"))
    if not form.block or value.block_size != form.block:
        return {name: value.dequantize().to(torch.float32)}
    codes = value.codes
    if form.bits == 4:
        shape = value.shape
        codes = codes.view(*shape[:-1], shape[-1] // 2) if len(shape) and shape[-1] % 2 == 0 else codes
    return {name: codes, st.scale_name(name, form): value.scale}
