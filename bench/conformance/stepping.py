"""Checks of stepping: losses, closures, learning rates, groups, schedulers, scalers, hooks."""

from __future__ import annotations

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from bench.conformance.base import (
    NotMeant,
    check,
    copies,
    need,
    need_near,
    need_same,
    parameters,
    set_grads,
    set_lr,
    train,
    values,
)
from bench.conformance.subjects import DECAY, Subject


@check("steps on the CPU, the loss falls")
def steps(s: Subject) -> None:
    gen = torch.Generator().manual_seed(0)
    weight, bias = (torch.nn.Parameter(torch.randn(shape, generator=gen)) for shape in ((10, 5), (10,)))
    x = torch.randn(5, generator=gen)
    opt, losses = s.make([weight, bias]), []
    for _ in range(20):
        opt.zero_grad()
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    need(losses[-1] < losses[0], f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g}")
    need(any(opt.state.values()), "there is no state after a step")


@check("closure= is called with gradients on, its value comes back")
def closure(s: Subject) -> None:
    params = parameters()
    opt = s.make(params)

    def run():
        need(torch.is_grad_enabled(), "gradients are off in the closure")
        set_grads(params, 0)
        return torch.tensor(2.5)

    with torch.no_grad():
        result = opt.step(closure=run)
    need(result is not None and float(result) == 2.5, f"step returned {result}")


@check("a tensor as lr steps as the float, changes in place count")
def tensor_lr(s: Subject) -> None:
    one, two = parameters(), parameters()
    start = values(one)
    lr = torch.tensor(s.lr)
    a = s.make(one)
    try:
        b = s.make(two, lr=lr)
    except ValueError as error:
        if s.options.get("foreach") and "not supported for capturable=False and foreach=True" in str(error):
            raise NotMeant("foreach=True refuses it, as torch documents") from None
        raise
    for step in range(4):
        if step == 2:
            lr.fill_(s.lr / 4)
            set_lr(a, s.lr / 4)
        train(a, one, step, step + 1)
        train(b, two, step, step + 1)
    need_near(two, one, start, "tensor lr", 0.01)


@check("named parameters")
def named(s: Subject) -> None:
    one, two = parameters(), parameters()
    a = s.make(one)
    if s.matrices:
        parts = [(f"p{i}", p) for i, p in enumerate(two)]
        groups = [
            {"params": [x for x in parts if x[1].dim() == 2], **s.matrices},
            {"params": [x for x in parts if x[1].dim() != 2]},
        ]
        b = s.cls()(groups, lr=s.lr, weight_decay=DECAY, **s.options)
    else:
        b = s.make([(f"p{i}", p) for i, p in enumerate(two)])
    train(a, one, 0, 2)
    train(b, two, 0, 2)
    need_same(two, one, "named")
    need("param_names" in b.state_dict()["param_groups"][0], "the names are not in the state dict")


@check("parameters without gradients are left alone")
def no_gradients(s: Subject) -> None:
    params = parameters()
    opt = s.make(params)
    before = values(params)
    opt.step()
    need_same(params, before, "no gradient at all")
    set_grads(params, 0)
    params[1].grad = None
    opt.step()
    opt.step()  # ADOPT's first step moves nothing
    need(torch.equal(params[1], before[1]), "moved without a gradient")
    need(not torch.equal(params[0], before[0]), "the others did not move")


@check("each parameter counts its own steps")
def own_counts(s: Subject) -> None:
    together, apart = parameters(), parameters()
    a, b = s.make(together), s.make([apart[1]])
    if s.joint:  # then the steps of one tensor alone are others, and the counts themselves are looked at
        for step in range(5):
            set_grads(together, step)
            if step in (1, 2):
                together[1].grad = None
            a.step()
        counts = [int(a.state[p]["step"]) for p in together]
        need(counts == [3 if p is together[1] else 5 for p in together], f"counts are {counts}")
        return
    for step in range(5):
        set_grads(together, step)
        set_grads(apart, step)
        if step in (1, 2):
            together[1].grad = apart[1].grad = None
        a.step()
        b.step()
    need_same([together[1]], [apart[1]], "gradients missing for two steps")


@check("layers frozen and unfrozen")
def frozen(s: Subject) -> None:
    params = parameters()
    opt = s.make(params)
    train(opt, params, 0, 2)
    params[0].requires_grad_(False)
    params[0].grad = None
    before = values(params)
    train(opt, params[1:], 2, 4)
    need(torch.equal(params[0], before[0]), "a frozen layer moved")
    params[0].requires_grad_(True)
    train(opt, params, 4, 5)
    need(not torch.equal(params[0], before[0]), "an unfrozen layer did not move")


@check("tensors of 0 dimensions and of 0 elements")
def tiny(s: Subject) -> None:
    params = parameters(((), (0,), (1,), (3, 0), (4, 4)))
    opt = s.make(params)
    before = values(params)
    train(opt, params, 0, 2)
    need(all(p.shape == b.shape for p, b in zip(params, before, strict=True)), "a shape changed")
    need(all(not torch.equal(p, b) for p, b in zip(params, before, strict=True) if p.numel()), "a tensor did not move")


@check("groups have their own lr and weight decay")
def groups(s: Subject) -> None:
    of_groups(s, still=False)
    if s.joint:  # then only a group without gradients leaves the steps of another what they are
        of_groups(s, still=True)


def of_groups(s: Subject, still: bool) -> None:
    params, alone = parameters(((6, 5), (6, 5))), parameters(((6, 5), (6, 5)))
    more = s.matrices
    opt = s.cls()(
        [{"params": [params[0]], "lr": 1e-28, "weight_decay": 0.0, **more}, {"params": [params[1]], **more}],
        lr=s.lr, weight_decay=DECAY, **s.options,
    )  # fmt: skip
    other = s.make([alone[1]])
    before = values(params)
    for step in range(3):
        set_grads(params, step)
        if still:
            params[0].grad.zero_()
        alone[1].grad = params[1].grad.clone()
        opt.step()
        other.step()
    need(not s.still or torch.equal(params[0], before[0]), "a group with lr=1e-28 moved")
    if s.alone and (still or not s.joint):
        need_same([params[1]], [alone[1]], "the other group")


@check("add_param_group after steps")
def added(s: Subject) -> None:
    params = parameters()
    opt = s.make(params[:2])
    train(opt, params[:2], 0, 2)
    before = values(params)
    opt.add_param_group({"params": [params[2]], "lr": s.lr, **s.matrices})
    train(opt, params, 2, 4)
    need(all(not torch.equal(p, b) for p, b in zip(params, before, strict=True)), "a tensor did not move")


@check("parameters replaced in their groups (accelerate, FSDP2)")
def replaced(s: Subject) -> None:
    old, expected = parameters(), parameters()
    opt, plain = s.make(old), s.make(expected)
    new = dict(zip(old, copies(old), strict=True))
    for group in opt.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    before = values(old)
    train(opt, list(new.values()), 0, 3)
    train(plain, expected, 0, 3)
    need_same(list(new.values()), expected, "after the switch")
    need_same(old, before, "the replaced ones")


@check("OneCycleLR")
def one_cycle(s: Subject) -> None:
    params, told = parameters(), parameters()
    opt, plain = s.make(params), s.make(told)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=2 * s.lr, total_steps=8, cycle_momentum=s.momentum)
    key = "betas" if "betas" in opt.param_groups[0] else "momentum"
    seen = set()
    for step in range(6):
        set_lr(plain, float(opt.param_groups[0]["lr"]))
        for mine, theirs in zip(opt.param_groups, plain.param_groups, strict=True):
            seen.add((float(mine["lr"]), str(mine.get(key))))
            if s.momentum:
                theirs[key] = mine[key]
        train(opt, params, step, step + 1)
        train(plain, told, step, step + 1)
        schedule.step()
    need(len(seen) >= 5, "nothing was cycled")
    need_same(params, told, "scheduled and told by hand")


@check("GradScaler skips an overflow and undoes the scale")
def scaler(s: Subject) -> None:
    params, plain = parameters(((6, 5),)), parameters(((6, 5),))
    start = values(params)
    opt, other = s.make(params), s.make(plain)
    scaling = torch.amp.GradScaler("cpu", init_scale=256.0)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    for step in range(4):
        opt.zero_grad()
        before = values(params)
        loss = (x @ params[0]).square().sum() * (float("inf") if step == 1 else 1.0)
        scaling.scale(loss).backward()
        scaling.step(opt)
        scaling.update()
        if step == 1:
            need_same(params, before, "an overflow")
            continue
        other.zero_grad()
        (x @ plain[0]).square().sum().backward()
        other.step()
    need(scaling.get_scale() == 128.0, "the scale was not halved")
    need_near(params, plain, start, "scaled and unscaled", 0.01)


@check("step hooks in order, global ones too")
def hooks(s: Subject) -> None:
    params = parameters()
    opt = s.make(params)
    order = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: order.append(0)),
        opt.register_step_pre_hook(lambda *_: order.append(1)),
        opt.register_step_post_hook(lambda *_: order.append(2)),
        register_optimizer_step_post_hook(lambda *_: order.append(5)),
    ]
    try:
        train(opt, params, 0, 1)
    finally:
        for handle in handles:
            handle.remove()
    need(order == [0, 1, 2, 5], f"the order was {order}")


@check("state-dict hooks, before and after saving and loading")
def state_hooks(s: Subject) -> None:
    params = parameters()
    opt = s.make(params)
    train(opt, params, 0, 1)
    order = []
    opt.register_state_dict_pre_hook(lambda o: order.append("save"))
    opt.register_state_dict_post_hook(lambda o, d: {**d, "note": 1})
    opt.register_load_state_dict_pre_hook(lambda o, d: order.append("load"))
    opt.register_load_state_dict_post_hook(lambda o: order.append("loaded"))
    saved = opt.state_dict()
    need(saved.pop("note", None) == 1, "the hook's state dict was not returned")
    opt.load_state_dict(saved)
    need(order == ["save", "load", "loaded"], f"the order was {order}")


@check("repr")
def printed(s: Subject) -> None:
    need("lr" in repr(s.make(parameters())), "lr is not in it")
