"""What torch's own tests expect of an optimizer and the other test files do not ask: dtypes in a group, meta tensors,
flags flipped across a load, schedulers, memory of a step, zero gradients, closures, one optimizer's many ways to be loaded."""

import copy

import pytest
import torch
from configs import (
    CONFIGS,
    EVERY,
    assert_same_bits,
    copies,
    each_backend,
    each_config,
    parameters,
    set_grads,
    tensors,
    train,
)
from torch.optim import lr_scheduler

SHAPES = ((6, 5), (4,), (3, 2, 2), ())
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@each_backend
@each_config(EVERY)
def test_dtypes_mixed_in_a_group(config, backend):
    """fp64, fp32, fp16 and bf16 parameters and an int64 one without a gradient: each steps as it does alone."""
    if config.optimizer == "lamb":
        pytest.skip("LAMB clips by the norm of all gradients: no tensor steps as it does alone")
    together = [parameters((6, 5), dtype=dtype, seed=3)[0] for dtype in DTYPES]
    apart = copies(together)
    counts = torch.nn.Parameter(torch.arange(4), requires_grad=False)
    opt = config.make([*together[:2], counts, *together[2:]], backend=backend)
    alone = [config.make([p], backend=backend) for p in apart]
    for step in range(7):
        for p, q, o in zip(together, apart, alone, strict=True):
            set_grads([p], step)
            q.grad = p.grad.clone()
            o.step()
        opt.step()
    for p, q, o in zip(together, apart, alone, strict=True):
        entry, other = opt.state[p], o.state[q]
        if config.optimizer == "lars":  # its norms are summed by the bucket, in fp32 once one bucket is native
            torch.testing.assert_close(p, q, rtol=2.0**-7 if p.dtype.itemsize == 2 else 3e-6, atol=1e-6)
            continue
        assert_same_bits([p.detach(), *entry.values()], [q.detach(), *other.values()], str(p.dtype))
    assert torch.equal(counts, torch.arange(4)) and counts not in opt.state


@each_config(EVERY)
def test_meta_parameters(config):
    """A step before the model has data is refused by name and leaves no state; after to_empty the optimizer works."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 4, device="meta"), torch.nn.Linear(4, 3, device="meta"))
    opt = config.make(model.parameters())
    model(torch.ones(2, 5, device="meta")).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"parameter 0 \(shape \(4, 5\).*on the meta device and has no data.*to_empty"
    ):
        opt.step()
    assert not opt.state
    opt.load_state_dict(opt.state_dict())
    model.to_empty(device="cpu")
    real = parameters((4, 5), (4,), (3, 4), (3,))
    with torch.no_grad():
        for p, q in zip(model.parameters(), real, strict=True):
            p.copy_(q)
    opt.param_groups[0]["params"] = list(model.parameters())
    expected = config.make(real)
    train(opt, list(model.parameters()), 0, 2)
    train(expected, real, 0, 2)
    assert_same_bits(tensors(opt, list(model.parameters())), tensors(expected, real))


@each_backend
@each_config(EVERY)
@pytest.mark.parametrize("flag", ["capturable", "fused"])
def test_flags_flipped_across_a_load(config, flag, backend):
    """A state dict saved with a flag loads into an optimizer made without, and the other way round, and steps on."""
    for saved_with in (False, True):
        params = parameters(*SHAPES)
        opt = config.make(params, backend=backend, **{flag: saved_with})
        train(opt, params, 0, 3)
        others = copies(params)
        loaded = config.make(others, backend=backend, **{flag: not saved_with})
        saved = copy.deepcopy(opt.state_dict())
        saved["param_groups"][0][flag] = not saved_with
        loaded.load_state_dict(saved)
        train(opt, params, 3, 5)
        train(loaded, others, 3, 5)
        assert loaded.param_groups[0][flag] is (not saved_with)
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(q, p, rtol=3e-6, atol=3e-7)


def momentum_of(opt):
    group = opt.param_groups[0]
    return "betas" if "betas" in group else "momentum" if group.get("momentum") else None


SCHEDULERS = {
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(
        opt, max_lr=0.05, total_steps=8, cycle_momentum=momentum_of(opt) is not None, base_momentum=0.7
    ),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=6, eta_min=1e-4),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.LinearLR(opt, start_factor=0.1, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.7)],
        milestones=[3],
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.3, patience=0),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
}


@each_backend
@each_config(EVERY)
@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
def test_schedulers_are_followed(config, schedule, tensor_lr, backend):
    """Every step uses what the scheduler wrote: the bits are those of an optimizer that is told each value by hand."""
    scheduled, told = parameters(*SHAPES), parameters(*SHAPES)
    lr = config.options["lr"]
    one = config.make(scheduled, backend=backend, lr=torch.tensor(lr, dtype=torch.float64) if tensor_lr else lr)
    two = config.make(told, backend=backend)
    scheduler = SCHEDULERS[schedule](one)
    cycled, seen = momentum_of(one), set()
    for step in range(7):
        rate = float(one.param_groups[0]["lr"])
        seen.add(rate)
        two.param_groups[0]["lr"] = rate
        if cycled:
            two.param_groups[0][cycled] = one.param_groups[0][cycled]
        train(one, scheduled, step, step + 1)
        train(two, told, step, step + 1)
        scheduler.step(1.0) if schedule == "ReduceLROnPlateau" else scheduler.step()
    assert len(seen) >= 5, "the scheduler changed nothing"
    assert_same_bits(tensors(one, scheduled), tensors(two, told))
    restored = SCHEDULERS[schedule](config.make(copies(told), lr=lr))
    restored.load_state_dict(scheduler.state_dict())
    if hasattr(scheduler, "get_last_lr"):
        assert [float(x) for x in restored.get_last_lr()] == [float(x) for x in scheduler.get_last_lr()]


@each_backend
@each_config(EVERY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["fp32", "int8", "int4"])
def test_zero_gradients_without_decay_move_nothing(config, dtype, form, backend):
    params = parameters((70, 80), (4,), (), dtype=dtype)
    before = [p.detach().clone() for p in params]
    opt = config.make(params, backend=backend, weight_decay=0.0, state_format=form)
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()
    assert_same_bits([p.detach() for p in params], before)
    assert all(int(opt.state[p]["step"]) == 2 for p in params)


@each_config(EVERY)
def test_state_is_there_after_a_step(config):
    params = parameters(*SHAPES)
    opt = config.make(params)
    train(opt, params, 0, 1)
    assert set(opt.state) == set(params)
    for p in params:
        kept = {k: v for k, v in opt.state[p].items() if k != "step"}
        assert opt.state[p]["step"].shape == () and opt.state[p]["step"].device.type == "cpu"
        assert bool(kept) != (config.name in ("sgd", "lars_plain")), "these two keep a step count and nothing else"
        assert config.name in ("sgd", "lars_plain") or any((v != 0).any() for v in kept.values())


class Peak:
    """Bytes that torch's CPU allocator hands out above what is there at the start, at the highest point."""

    def __enter__(self):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        level = self.bytes = 0
        for event in sorted(self.profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                level += event.nbytes()
                self.bytes = max(self.bytes, level)


@each_config(CONFIGS)
@pytest.mark.parametrize("form", ["fp32", "int8"])
@pytest.mark.parametrize("dtype, precision", [(torch.float32, "nearest"), (torch.bfloat16, "stochastic")], ids=str)
def test_a_step_needs_no_memory(config, form, dtype, precision):
    """No intermediate: tables and partial sums of a launch only. (Adafactor and MicroAdam go through a tensor in pieces of a
    fixed size; their own tests bound those.)"""
    params = parameters((1200, 500), (300, 1000), dtype=dtype)
    opt = config.make(params, state_format=form, param_precision=precision, foreach=True)
    train(opt, params, 0, 2)
    with Peak() as check:
        held = torch.ones(1000, 1000)
    assert check.bytes == held.nbytes, "the profiler does not see allocations"
    set_grads(params, 3)
    with Peak() as peak:
        opt.step()
    assert peak.bytes <= 0.01 * sum(p.nbytes for p in params)


@each_config(EVERY)
def test_closures(config):
    """The value of the closure comes back, whatever it is; gradients may be made or taken away in it."""
    params = parameters((3, 4))
    opt = config.make(params)

    def closure(value, gradient):
        def run():
            opt.zero_grad()
            params[0].grad = gradient
            return value

        return run

    before = params[0].detach().clone()
    for value in (1.5, None, torch.tensor(2.0)):
        assert opt.step(closure(value, None)) is value
    assert torch.equal(params[0], before) and not opt.state
    assert opt.step(closure=closure(0.25, torch.ones(3, 4))) == 0.25
    assert not torch.equal(params[0], before)

    def failing():
        raise KeyError("in the closure")

    kept = tensors(opt, params)
    with pytest.raises(KeyError, match="in the closure"):
        opt.step(failing)
    assert_same_bits(tensors(opt, params), kept)


@each_config(EVERY)
def test_hooks_of_a_step_see_and_change_arguments(config):
    """A pre-hook may replace the closure; post-hooks run once the parameters have moved; removed hooks stay away."""
    params = parameters((3, 4))
    opt = config.make(params)
    start = params[0].detach().clone()
    seen = []

    def replace(optimizer, args, kwargs):
        return args, {**kwargs, "closure": lambda: 7.0}

    def moved(optimizer, args, kwargs):
        seen.append((optimizer is opt, not torch.equal(params[0], start), "closure" in kwargs))

    handles = [opt.register_step_pre_hook(replace), opt.register_step_post_hook(moved)]
    set_grads(params, 0)
    assert opt.step() == 7.0 and seen == [(True, True, True)]
    for handle in handles:
        handle.remove()
    set_grads(params, 1)
    assert opt.step() is None and len(seen) == 1


@each_config(EVERY)
def test_load_hooks_in_order(config):
    params = parameters((3, 4))
    opt = config.make(params)
    train(opt, params, 0, 1)
    order = []
    opt.register_load_state_dict_pre_hook(lambda o, d: order.append("pre"))
    opt.register_load_state_dict_pre_hook(lambda o, d: order.append("pre, first"), prepend=True)
    opt.register_load_state_dict_post_hook(lambda o: order.append("post"))
    opt.register_load_state_dict_post_hook(lambda o: order.append("post, first"), prepend=True)
    opt.load_state_dict(opt.state_dict())
    assert order == ["pre, first", "pre", "post, first", "post"]
    twin = copy.deepcopy(opt)  # torch keeps no hooks in a copy
    twin.load_state_dict(twin.state_dict())
    assert len(order) == 4
