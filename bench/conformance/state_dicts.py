"""Checks of state dicts and copies: resuming, distributed checkpoints, torch.optim's dicts, pickle, deepcopy."""

from __future__ import annotations

import copy
import pickle

import torch
from torch.distributed.checkpoint import state_dict as dcp

from bench.conformance.base import (
    NotMeant,
    check,
    copies,
    need,
    need_near,
    need_same,
    parameters,
    saved_and_loaded,
    train,
    values,
)
from bench.conformance.subjects import DECAY, Subject


def resume(s: Subject, dtype, weights_only: bool) -> None:
    params = parameters(dtype=dtype)
    opt = s.make(params)
    train(opt, params, 0, 3)
    others = copies(params)
    loaded = s.make(others)
    loaded.load_state_dict(saved_and_loaded(opt.state_dict(), weights_only))
    train(opt, params, 3, 6)
    train(loaded, others, 3, 6)
    need_same(others, params, "after resuming")


@check("resumes bit for bit, fp32")
def resume_fp32(s: Subject) -> None:
    resume(s, torch.float32, False)


@check("resumes bit for bit, bf16")
def resume_bf16(s: Subject) -> None:
    resume(s, torch.bfloat16, False)


@check("state dict loads with weights_only=True (HF Trainer)")
def weights_only(s: Subject) -> None:
    resume(s, torch.float32, True)


@check("state dtypes survive a load")
def dtypes(s: Subject) -> None:
    params = parameters(dtype=torch.bfloat16)
    opt = s.make(params)
    train(opt, params, 0, 1)
    others = copies(params)
    loaded = s.make(others)
    loaded.load_state_dict(opt.state_dict())
    for p, q in zip(params, others, strict=True):
        for key, value in opt.state[p].items():
            if isinstance(value, torch.Tensor):
                got = loaded.state[q].get(key)
                need(
                    getattr(got, "dtype", None) == value.dtype,
                    f"{key} was {value.dtype} and is {getattr(got, 'dtype', got)}",
                )


@check("an empty state dict round trip makes no states (accelerate)")
def empty_round_trip(s: Subject) -> None:
    params, plain = parameters(), parameters()
    opt, other = s.make(params), s.make(plain)
    opt.load_state_dict(opt.state_dict())
    need(not any(opt.state.values()), "there are states before the first step")
    train(opt, params, 0, 2)
    train(other, plain, 0, 2)
    need_same(params, plain, "after it")


@check("older state dicts, without the newer keys of groups")
def older(s: Subject) -> None:
    params = parameters()
    opt = s.make(params)
    train(opt, params, 0, 2)
    saved = saved_and_loaded(opt.state_dict())
    for group in saved["param_groups"]:
        for key in (
            "foreach",
            "fused",
            "differentiable",
            "maximize",
            "capturable",
            "amsgrad",
            "decoupled_weight_decay",
        ):
            group.pop(key, None)
    others, start = copies(params), values(params)
    loaded = s.make(others)
    loaded.load_state_dict(saved)
    train(opt, params, 2, 4)
    train(loaded, others, 2, 4)
    # not bit for bit: torch's class forgets with the key that it was fused, and its loop rounds otherwise
    need_near(others, params, start, "after it", 1e-4)


@check("step counts that are Python numbers load")
def number_steps(s: Subject) -> None:
    params = parameters()
    opt = s.make(params)
    train(opt, params, 0, 2)
    saved = saved_and_loaded(opt.state_dict())
    found = False
    for entry in saved["state"].values():
        if "step" in entry:
            entry["step"], found = float(entry["step"]), True
    if not found:
        raise NotMeant("it keeps no step count by parameter")
    others = copies(params)
    loaded = s.make(others)
    loaded.load_state_dict(saved)
    train(opt, params, 2, 4)
    train(loaded, others, 2, 4)
    need_same(others, params, "after it")


def model_of(dtype=torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.LayerNorm(80), torch.nn.Linear(80, 3)).to(dtype)


def dcp_resume(s: Subject, flatten: bool) -> None:
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = model_of()
    opt = s.make(model.parameters())
    train(opt, list(model.parameters()), 0, 3)
    saved = saved_and_loaded(dcp.get_optimizer_state_dict(model, opt, options=options))
    other = model_of()
    other.load_state_dict(model.state_dict())
    loaded = s.make(other.parameters())
    dcp.set_optimizer_state_dict(other, loaded, saved, options=options)
    need_same(list(other.parameters()), list(model.parameters()), "loading moved")
    train(opt, list(model.parameters()), 3, 5)
    train(loaded, list(other.parameters()), 3, 5)
    need_same(list(other.parameters()), list(model.parameters()), "after resuming")


@check("distributed checkpoint, nested: exact resume")
def dcp_nested(s: Subject) -> None:
    dcp_resume(s, False)


@check("distributed checkpoint, flattened: exact resume")
def dcp_flattened(s: Subject) -> None:
    dcp_resume(s, True)


@check("distributed checkpoint of a new optimizer moves nothing")
def dcp_fresh(s: Subject) -> None:
    model = model_of()
    opt = s.make(model.parameters())
    before = values(model.parameters())
    dcp.get_optimizer_state_dict(model, opt)
    need_same(list(model.parameters()), before, "saving")


@check("pickled, and stepped on")
def pickled(s: Subject) -> None:
    params = parameters()
    opt = s.make(params)
    train(opt, params, 0, 2)
    twin = pickle.loads(pickle.dumps(opt))
    others = [p for group in twin.param_groups for p in group["params"]]
    order = [p for group in opt.param_groups for p in group["params"]]
    train(twin, others, 2, 4)
    train(opt, order, 2, 4)
    need_same(others, order, "the copy")


@check("deepcopy keeps all public attributes")
def copied(s: Subject) -> None:
    opt = s.make(parameters())
    public = {k for k in vars(opt) if not k.startswith("_")}
    lost = public - vars(copy.deepcopy(opt)).keys()
    need(not lost, f"lost {', '.join(sorted(lost))}")


def torch_class_of(s: Subject) -> type:
    if s.torch_class is None:
        raise NotMeant("torch.optim has no class of this rule")
    return s.torch_class


def torch_options(s: Subject) -> dict:
    return {"lr": s.lr, "weight_decay": DECAY, **({"momentum": 0.9} if s.torch_class is torch.optim.SGD else {})}


@check("a torch.optim state dict loads, and the steps are torch's")
def from_torch(s: Subject) -> None:
    theirs = parameters()
    other = torch_class_of(s)(theirs, **torch_options(s))
    train(other, theirs, 0, 4)
    params, start = copies(theirs), values(theirs)
    opt = s.make(params)
    opt.load_state_dict(saved_and_loaded(other.state_dict()))
    train(other, theirs, 4, 6)
    train(opt, params, 4, 6)
    need_near(params, theirs, start, "against torch", 0.1 if s.quantized else 1e-4)


@check("its state dict loads into torch.optim, and steps on")
def to_torch(s: Subject) -> None:
    params = parameters()
    cls = torch_class_of(s)
    opt = s.make(params)
    train(opt, params, 0, 4)
    theirs, start = copies(params), values(params)
    other = cls(theirs, **torch_options(s))
    other.load_state_dict(saved_and_loaded(opt.state_dict(**s.to_torch)))
    train(other, theirs, 4, 6)
    train(opt, params, 4, 6)
    need_near(theirs, params, start, "torch against it", 0.1 if s.quantized else 1e-4)
