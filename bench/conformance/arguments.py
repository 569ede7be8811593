"""Checks of arguments, of what is refused, and how."""

from __future__ import annotations

import re
import warnings

import torch

from bench.conformance.base import (
    Failed,
    NotMeant,
    check,
    need,
    need_near,
    need_same,
    parameters,
    saved_and_loaded,
    set_grads,
    train,
    values,
)
from bench.conformance.subjects import Subject


@check("fused, foreach, capturable, differentiable and maximize as torch's defaults")
def flags(s: Subject) -> None:
    params = parameters()
    own = {k: v for k, v in s.options.items() if k in ("fused", "foreach")}
    given = {"fused": None, "foreach": None, "capturable": False, "differentiable": False, "maximize": False, **own}
    train(s.make(params, **given), params, 0, 1)
    train(s.make(params, **{**given, **({} if own else {"fused": False, "foreach": False})}), params, 0, 1)


@check("fused=True passed blindly (torchtune recipes)")
def fused_flag(s: Subject) -> None:
    params, plain = parameters(), parameters()
    start = values(params)
    opt = s.make(params, **{**({"foreach": None} if "foreach" in s.options else {}), "fused": True})
    train(opt, params, 0, 2)
    train(s.make(plain), plain, 0, 2)
    need_near(params, plain, start, "fused=True", 0.01)


@check("an unknown argument is refused")
def unknown(s: Subject) -> None:
    try:
        s.make(parameters(), no_such_option=1)
    except TypeError:
        return
    raise Failed("it is swallowed")


@check("torch's error inputs (Adam's, or those for all rules): type and words")
def error_inputs(s: Subject) -> None:
    try:
        from torch.testing._internal import common_optimizers as common
    except ImportError as error:
        raise NotMeant(f"torch's test inputs cannot be imported: {error}") from None
    cases = (
        common.optim_error_inputs_func_adam("cpu", torch.float32)
        if s.adam
        else common.get_error_inputs_for_all_optims("cpu", torch.float32)
    )
    wrong = []
    for case in cases:
        given = case.optimizer_error_input
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                s.cls()(given.params, **given.kwargs)
        except Exception as error:
            if isinstance(error, case.error_type) and re.search(case.error_regex, str(error)):
                continue
        wrong.append(given.desc)
    need(not wrong, f"{len(cases) - len(wrong)} of {len(cases)}; e.g. {wrong[0] if wrong else ''}")


@check("a loaded state of the wrong shape is refused", beyond=True)
def wrong_shape(s: Subject) -> None:
    params = parameters()
    opt = s.make(params)
    train(opt, params, 0, 2)
    saved = saved_and_loaded(opt.state_dict())
    shapes = {}
    for entry in saved["state"].values():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor) and type(value) is torch.Tensor and value.dim() and not shapes:
                entry[key], shapes[key] = torch.zeros(3, 3, dtype=value.dtype), value.shape
    if not shapes:
        raise NotMeant("it keeps no tensor of its own type")
    try:
        opt.load_state_dict(saved)
    except (ValueError, RuntimeError, TypeError):
        return
    raise Failed(f"{next(iter(shapes))} of shape (3, 3) was loaded without a word")


@check("a refused gradient leaves every parameter as it was", beyond=True)
def nothing_half_done(s: Subject) -> None:
    params = parameters(((6, 4), (5, 4)))
    opt = s.make(params)
    train(opt, params, 0, 1)
    before = values(params)
    set_grads(params, 1)
    params[1].grad = torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 4), (5, 4), check_invariants=True)
    try:
        opt.step()
    except Exception:
        need_same(params, before, "half of the model was stepped")
        return
    raise NotMeant("a sparse gradient is no error")
