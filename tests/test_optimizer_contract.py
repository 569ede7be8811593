"""The behaviours that torch tests its own optimizers with, for every class and backend."""

import copy

import pytest
import torch
from configs import (
    BACKENDS,
    COMPRESSED,
    CONFIGS,
    EVERY,
    WITH_TORCH,
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
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedopt

SHAPES = ((6, 5), (4,), (3, 2, 2), ())


def least_squares(strided: bool = False):
    """A linear model's parameters, and a closure-like loss of them; `strided` makes both views [..., 0]."""
    gen = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(10, 5, generator=gen), torch.randn(10, generator=gen)
    if strided:
        weight, bias = torch.stack([weight, weight], -1)[..., 0], torch.stack([bias, bias], -1)[..., 0]
    params = [torch.nn.Parameter(weight), torch.nn.Parameter(bias)]
    assert params[0].is_contiguous() != strided
    x = torch.randn(5, generator=gen)

    def loss():
        return (params[0].mv(x) + params[1]).square().sum()

    return params, loss


SCHEDULERS = {
    "none": lambda opt: [],
    "StepLR": lambda opt: [lr_scheduler.StepLR(opt, gamma=0.9, step_size=10)],
    "two": lambda opt: [lr_scheduler.StepLR(opt, gamma=0.9, step_size=5), lr_scheduler.ReduceLROnPlateau(opt)],
    "exponential": lambda opt: [lr_scheduler.ExponentialLR(opt, 0.95)],
}


@each_backend
@each_config(EVERY)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("maximize", [False, True], ids=["minimise", "maximise"])
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_goes_in_the_right_direction(config, strided, maximize, schedule, backend):
    params, loss = least_squares(strided)
    opt = config.make(params, backend=backend, maximize=maximize, lr=config.options["lr"] / 10)
    schedulers = SCHEDULERS[schedule](opt)
    first = loss().item()
    for _ in range(20):
        opt.zero_grad()
        value = loss()
        value.backward()
        opt.step()
        for s in schedulers:
            s.step(value) if isinstance(s, lr_scheduler.ReduceLROnPlateau) else s.step()
    assert (loss().item() > first) if maximize else (loss().item() < first)


@each_backend
@each_config(WITH_TORCH)
def test_schedulers_and_groups_equal_torch(config, backend):
    """OneCycleLR cycles lr and betas or momentum of two groups with their own maxima."""
    mine, theirs = parameters(*SHAPES), parameters(*SHAPES)
    opts = [config.make(_groups(mine), backend=backend), config.make_torch(_groups(theirs))]
    seen = set()
    cycles = "momentum" in config.options or "betas" in opts[0].defaults
    cycles &= config.name != "nadam"  # its product of all mu so far is that of the present betas
    schedulers = [
        lr_scheduler.OneCycleLR(o, max_lr=[0.03, 0.01], total_steps=12, cycle_momentum=cycles, base_momentum=0.7)
        for o in opts
    ]
    for step in range(11):
        for ps, o, s in zip((mine, theirs), opts, schedulers, strict=True):
            set_grads(ps, step)
            o.step()
            s.step()
        seen.add(str(opts[0].param_groups[0].get("betas", opts[0].param_groups[0].get("momentum"))))
    assert len(seen) > 5 or not cycles, "the scheduler changed nothing"
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=5e-6, atol=1e-6)


def _groups(params):
    return [{"params": params[:2], "weight_decay": 0.2}, {"params": params[2:]}]


@each_backend
@each_config(EVERY)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("capturable", [False, True])
def test_tensor_lr(config, shape, capturable, backend):
    plain, other = parameters(*SHAPES), parameters(*SHAPES)
    lr = torch.full(shape, config.options["lr"], dtype=torch.float64)
    one, two = config.make(plain, backend=backend), config.make(other, backend=backend, lr=lr, capturable=capturable)
    for step in range(5):
        if step == 3:
            lr.fill_(0.5 * config.options["lr"])  # in place, as schedulers do it
            one.param_groups[0]["lr"] = 0.5 * config.options["lr"]
        train(one, plain, step, step + 1)
        train(two, other, step, step + 1)
    for p, q in zip(plain, other, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)
    assert two.param_groups[0]["lr"] is lr


@each_backend
@pytest.mark.parametrize("capturable", [False, True])
@each_config([c for c in CONFIGS if c.optimizer in ("adam", "adamw", "lion", "lamb")])
def test_tensor_betas(config, capturable, backend):
    plain, other = parameters(*SHAPES), parameters(*SHAPES)
    betas = tuple(torch.tensor([[b]], dtype=torch.float64) for b in (0.8, 0.95))
    one = config.make(plain, backend=backend, betas=(0.8, 0.95))
    two = config.make(other, backend=backend, betas=betas, capturable=capturable)
    train(one, plain, 0, 4)
    train(two, other, 0, 4)
    for p, q in zip(plain, other, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)


@each_backend
@each_config(EVERY)
@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_capturable_equals_plain(config, form, backend):
    """capturable=True takes step counts, corrections and lr through device tensors."""
    shapes = ((40, 130), *SHAPES)
    plain, other = parameters(*shapes), parameters(*shapes)
    options = {"backend": backend, "state_format": form, "param_precision": "stochastic"}
    one, two = config.make(plain, **options), config.make(other, capturable=True, **options)
    for step in range(5):
        set_grads(plain, step)
        set_grads(other, step)
        if step == 2:  # a parameter falls behind in its count
            plain[1].grad = other[1].grad = None
        one.step()
        two.step()
    assert [int(two.state[p]["step"]) for p in other] == [5, 4, 5, 5, 5]
    for p, q in zip(plain, other, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)


TOLERANCE = {
    torch.float64: {"rtol": 0, "atol": 0},
    torch.float32: {"rtol": 3e-6, "atol": 3e-7},
    torch.bfloat16: {"rtol": 2.0**-7, "atol": 1e-5},
    torch.float16: {"rtol": 2.0**-10, "atol": 1e-5},
}


def backends(opt) -> set[str]:
    plan = opt.plan()
    return {part["backend"] for part in (*plan.buckets, *plan.operations)}


@each_config(EVERY)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}])
def test_default_path_equals_fused_false(config, dtype, flags):
    """7 iterations: no gradients at iteration 2 for some, a layer frozen at 3 and back at 5, a 0-dim parameter last."""
    scalar_eps = isinstance(config.cls([torch.zeros(1)]).defaults.get("eps"), float)
    changes = {"eps": 0.1} if dtype == torch.float16 and scalar_eps else {}
    runs = []
    for own in (flags, {"fused": False}):
        params = parameters(*SHAPES, dtype=dtype)
        opt = config.make(params, **own, **changes)
        for step in range(7):
            set_grads(params, step)
            if step == 2:
                params[0].grad = params[3].grad = None
            if 3 <= step < 5:
                params[1].requires_grad_(False)
                params[1].grad = None
            else:
                params[1].requires_grad_(True)
            opt.step()
        runs.append((params, opt))
    (params, opt), (slow, reference) = runs
    assert backends(reference) == {"reference"}
    if dtype != torch.float64 and "cpu" in BACKENDS:
        assert backends(opt) == {"cpu"}
    assert [int(opt.state[p]["step"]) for p in params] == [6, 5, 7, 6]
    for p, q in zip(params, slow, strict=True):
        torch.testing.assert_close(p, q, **TOLERANCE[dtype])
        assert opt.state[p].keys() == reference.state[q].keys()
        for key in opt.state[p]:
            mine, want = opt.state[p][key], reference.state[q][key]
            exact = dtype == torch.float64
            torch.testing.assert_close(mine, want, rtol=0 if exact else 3e-6, atol=0 if exact else 3e-7, msg=key)


@each_config(EVERY)
def test_step_dtype_follows_the_default_dtype(config):
    before = torch.get_default_dtype()
    for default in (torch.float64, torch.float16, torch.bfloat16, torch.float32):
        try:
            torch.set_default_dtype(default)
            params = parameters((5, 4), dtype=torch.float32)
            opt = config.make(params)
            train(opt, params, 0, 1)
            expected = torch.float64 if default == torch.float64 else torch.float32
            assert opt.state[params[0]]["step"].dtype == expected
            loaded = config.make(params)
            loaded.load_state_dict(opt.state_dict())
            assert loaded.state[params[0]]["step"].dtype == expected
        finally:
            torch.set_default_dtype(before)


@each_backend
@each_config(EVERY)
def test_groups_have_their_own_lr_and_weight_decay(config, backend):
    params = parameters((5, 4), (5, 4))
    other = copies(params)
    opt = config.make(
        [{"params": [params[0]], "lr": 1e-28, "weight_decay": 0.0}, {"params": [params[1]]}], backend=backend
    )
    alone = config.make([other[1]], backend=backend)
    before = params[0].detach().clone()
    for step in range(5):
        set_grads(params, step)
        other[1].grad = params[1].grad.clone()
        opt.step()
        alone.step()
    assert torch.equal(params[0], before)
    if config.optimizer != "lamb":  # LAMB clips by the norm of all gradients
        assert torch.equal(params[1], other[1])


@each_backend
@each_config(EVERY)
def test_weight_decay_of_a_group(config, backend):
    """With a small gradient decay dominates: the group that has it ends nearer to zero."""
    params = parameters((6, 5), (6, 5), seed=1)
    with torch.no_grad():
        params[1].copy_(params[0])
    opt = config.make(
        [{"params": [params[0]], "weight_decay": 0.0}, {"params": [params[1]], "weight_decay": 0.9}], backend=backend
    )
    for _ in range(5):
        for p in params:
            p.grad = torch.full_like(p, 1e-6)
        opt.step()
    assert params[1].norm() < params[0].norm()


@each_backend
@each_config(EVERY)
def test_no_gradients_is_a_no_op(config, backend):
    params = parameters(*SHAPES)
    opt = config.make(params, backend=backend)
    before = [p.detach().clone() for p in params]
    assert opt.step() is None and opt.step(lambda: torch.tensor(3.0)) == 3.0
    assert_same_bits([p.detach() for p in params], before)
    assert not opt.state


@each_backend
@each_config(EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["nearest", "stochastic"])
def test_lr_zero_and_zero_gradients_change_no_parameter(config, dtype, precision, backend):
    """Distributed checkpoints create states this way."""
    params = parameters(*SHAPES, dtype=dtype)
    opt = config.make(params, backend=backend, lr=0.0, param_precision=precision, clip_grad_norm=1.0)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step(closure=None)
    assert_same_bits([p.detach() for p in params], before)
    assert all(torch.isfinite(v).all() for entry in opt.state.values() for v in entry.values())
    assert len(opt.state) == len(params)


@each_backend
@each_config(EVERY)
def test_closure(config, backend):
    params, loss = least_squares()
    opt = config.make(params, backend=backend)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        opt.zero_grad()
        value = loss()
        value.backward()
        calls.append(value.item())
        return value

    assert opt.step(closure).item() == calls[0]
    with torch.no_grad():
        opt.step(closure=closure)
    assert len(calls) == 2 and calls[1] < calls[0]


@each_config(EVERY)
def test_printing(config):
    text = repr(config.make(parameters((2,))))
    assert text.startswith(config.cls.__name__) and "state_format: fp32" in text and "lr: " in text


@each_config(EVERY)
def test_step_hooks_run_in_order(config):
    params = parameters((2,))
    opt = config.make(params)
    set_grads(params, 0)
    data = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: data.append(0)),
        opt.register_step_pre_hook(lambda *_: data.append(1)),
        opt.register_step_post_hook(lambda *_: data.append(2)),
        register_optimizer_step_post_hook(lambda *_: data.append(5)),
    ]
    opt.step()
    for h in handles:
        h.remove()
    opt.step()
    assert data == [0, 1, 2, 5]


@each_config(EVERY)
def test_state_dict_hooks(config):
    params = parameters((3,))
    opt = config.make(params)
    train(opt, params, 0, 2)
    order = []
    opt.register_state_dict_pre_hook(lambda o: order.append("pre"))
    opt.register_state_dict_post_hook(lambda o, d: {**d, "note": 1})
    opt.register_state_dict_pre_hook(lambda o: order.append("first"), prepend=True)
    assert opt.state_dict()["note"] == 1 and order == ["first", "pre"]

    other = config.make(copies(params))
    saved = opt.state_dict()

    def change_lr(o, d):
        groups = copy.deepcopy(d["param_groups"])
        groups[0]["lr"] = 0.125
        return {**d, "param_groups": groups}

    other.register_load_state_dict_pre_hook(change_lr)
    other.register_load_state_dict_post_hook(lambda o: order.append(float(o.param_groups[0]["lr"])))
    other.load_state_dict(saved)
    assert order[-1] == 0.125 and saved["param_groups"][0]["lr"] == config.options["lr"]


@each_config([c for c in CONFIGS if c.name != "adamw_cautious"])  # numbers of whole tensors have no graph
def test_differentiable(config):
    """Autograd through three steps, against finite differences of the same steps."""

    def run(start, scale, **flags):
        p = start.clone()
        opt = config.make([p], backend="reference", **flags)
        for step in range(3):
            wave = torch.linspace(0.2, 1 + step, 4, dtype=torch.float64)
            p.grad = (start * wave * scale).clone()
            opt.step()
        return p

    start = torch.tensor([0.3, -1.2, 0.7, 2.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    run(start, scale, differentiable=True).square().sum().backward()
    h = 1e-6
    with torch.no_grad():
        difference = (run(start, scale + h).square().sum() - run(start, scale - h).square().sum()) / (2 * h)
    torch.testing.assert_close(scale.grad, difference, rtol=1e-6, atol=1e-8)
    assert torch.isfinite(start.grad).all() and (start.grad != 0).any()


@each_config(COMPRESSED)
def test_differentiable_is_refused(config):
    with pytest.raises(ValueError, match=f"{config.cls.__name__}: differentiable=True is not supported"):
        config.make(parameters((3, 4)), differentiable=True)


@each_backend
@each_config(EVERY)
def test_two_optimizers_do_not_touch_each_other(config, backend):
    together, apart = parameters((6, 5), (4,)), parameters((6, 5), (4,))
    opts = [config.make([p], backend=backend) for p in together]
    single = [config.make([p], backend=backend) for p in apart]
    for step in range(3):
        set_grads(together, step)
        set_grads(apart, step)
        for o in opts:
            o.step()
    for i, o in enumerate(single):
        for step in range(3):
            set_grads(apart, step)
            o.step()
        assert_same_bits(tensors(opts[i], together[i : i + 1]), tensors(o, apart[i : i + 1]))


def test_default_options_are_torch_ones():
    for ours, theirs in (
        (fusedopt.SGD, torch.optim.SGD),
        (fusedopt.Adam, torch.optim.Adam),
        (fusedopt.AdamW, torch.optim.AdamW),
    ):
        mine, want = ours([torch.zeros(1)]).defaults, theirs([torch.zeros(1)]).defaults
        assert {k: mine[k] for k in want if k != "decoupled_weight_decay"} == {
            k: v for k, v in want.items() if k != "decoupled_weight_decay"
        }
