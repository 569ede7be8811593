"""Gradient release with clipping by the previous norm and with micro-batches, and step_parameter as trainers call it."""

import pytest
import torch
from configs import CONFIGS, assert_same_bits, each_config, parameters, set_grads, tensors
from release_models import Tied, assert_equal, everything, loss_of, tokens, train
from torch import nn

import fusedopt
from fusedopt import GaLore

# clip="previous"


def clipped_by_the_previous_norm(model, opt, first, last, limit, norm=None):
    """The published loop: gradients scaled by min(1, limit / norm of the step before), through AMP's scale."""
    opt.amp_fused = True
    for step in range(first, last):
        loss_of(model, step).backward()
        clip = 1.0 if norm is None else min(1.0, limit / (float(norm) + 1e-6))
        norm = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).norm()
        opt.grad_scale, opt.found_inf = torch.tensor([1 / clip]), torch.zeros(1)
        opt.step()
        opt.zero_grad()
        del opt.grad_scale, opt.found_inf
    return norm


@pytest.mark.parametrize("projection", [None, GaLore(rank=4, update_every=2)])
def test_clip_previous(projection):
    limit = 0.05
    one, two = Tied(), Tied()
    plain = fusedopt.AdamW(one.parameters(), lr=0.01, eps=1e-3, projection=projection)
    released = fusedopt.AdamW(two.parameters(), lr=0.01, eps=1e-3, projection=projection, clip_grad_norm=limit)
    fusedopt.release_gradients(two, released, collect=0, clip="previous")
    assert released.grad_norm is None
    norm = clipped_by_the_previous_norm(one, plain, 0, 4, limit)
    train(two, released, 0, 4)
    assert released.grad_norm.shape == (1,) and float(norm) > limit
    torch.testing.assert_close(released.grad_norm.double()[0], norm, rtol=1e-4, atol=0)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_clip_previous_resumes_bit_for_bit(tmp_path):
    def make(seed):
        model = Tied(seed=seed)
        opt = fusedopt.AdamW(model.parameters(), lr=0.01, eps=1e-3, clip_grad_norm=0.05)
        fusedopt.release_gradients(model, opt, clip="previous")
        return model, opt

    one = make(0)
    train(*one, 0, 3)
    torch.save([one[0].state_dict(), one[1].state_dict()], tmp_path / "run.pt")
    weights, states = torch.load(tmp_path / "run.pt", weights_only=True)
    two = make(1)
    two[0].load_state_dict(weights)
    two[1].load_state_dict(states)
    train(*one, 3, 6)
    train(*two, 3, 6)
    assert_equal(one, two)
    without = make(1)
    without[0].load_state_dict(weights)
    del states["param_groups"][0]["previous_grad_norm"]
    without[1].load_state_dict(states)
    train(*without, 3, 6)
    assert not torch.equal(without[0].embed.weight, one[0].embed.weight)


def test_a_norm_that_is_not_finite_clips_nothing():
    model = nn.Linear(3, 1, bias=False)
    opt = fusedopt.SGD(model.parameters(), lr=0.1, clip_grad_norm=1.0)
    fusedopt.release_gradients(model, opt, clip="previous")
    model(torch.tensor([[3.0, 0.0, 4.0]])).sum().backward()
    opt.step()
    assert float(opt.grad_norm) == 5.0 and float(opt.param_groups[0]["previous_grad_norm"]) == 5.0
    model(torch.tensor([[float("inf"), 0.0, 0.0]])).sum().backward()
    opt.step()
    assert float(opt.grad_norm) == float("inf") and float(opt.param_groups[0]["previous_grad_norm"]) == 5.0


# Micro-batches


def accumulated(model, opt, steps: int, count: int, handle=None):
    """Steps of `count` micro-batches; without a handle, gradients are added up in .grad."""
    for step in range(steps):
        for part in range(count):
            data = tokens(10 * step + part)
            (loss_of(model, step, data) / count).backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("maximize", [False, True])
def test_momentum_takes_micro_batches(maximize):
    """fp64: whole batches but for the order of additions; a branch that only some passes use included."""
    one, two = Tied(torch.float64), Tied(torch.float64)
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "maximize": maximize}
    plain, released = (fusedopt.SGD(m.parameters(), **options) for m in (one, two))
    fusedopt.release_gradients(two, released, micro_batches=3)
    for model, opt in ((one, plain), (two, released)):
        for step in range(4):
            for part in range(3):
                data = tokens(10 * step + part)
                (loss_of(model, part, data).double() / 3).backward()
                if opt is released:
                    assert all(p.grad is None for p in model.parameters())
            opt.step()
            opt.zero_grad()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)
        if p is not one.branch.weight:
            torch.testing.assert_close(released.state[q], plain.state[p], rtol=1e-6, atol=1e-8)


def adam_accumulation(weights, batches, lr, betas, eps, decay):
    """AdamA (arXiv 2305.19982, algorithm 1) with decoupled decay, transcribed, fp64. batches: gradients by step and part."""
    w = weights.double().clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, parts in enumerate(batches, 1):
        m, v = betas[0] * m, betas[1] * v
        for g in parts:
            m, v = m + (1 - betas[0]) * g.double(), v + (1 - betas[1]) * g.double() ** 2
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        w = w - lr * (m_hat / (v_hat.sqrt() + eps) + decay * w)
    return w


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_accumulation(count, amsgrad):
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    model = nn.Linear(7, 5, bias=False)
    start = model.weight.detach().clone()
    opt = fusedopt.AdamW(model.parameters(), amsgrad=amsgrad, **options)
    fusedopt.release_gradients(model, opt, micro_batches=count)
    gen, batches = torch.Generator().manual_seed(0), []
    for _ in range(3):
        batches.append([])
        for _ in range(count):
            x, y = torch.randn(5, 5, generator=gen), torch.randn(5, 7, generator=gen)
            model(y).mul(x).sum().backward()  # its gradient is x^T y
            batches[-1].append(x.t().double() @ y.double())
        opt.step()
    if not amsgrad:
        expected = adam_accumulation(start, batches, options["lr"], options["betas"], options["eps"], 0.1)
        torch.testing.assert_close(model.weight.double(), expected, rtol=1e-5, atol=1e-6)
    second = opt.state[model.weight]
    largest = second.get("max_exp_avg_sq", second["exp_avg_sq"])
    assert (largest >= second["exp_avg_sq"]).all() and float(second["step"]) == 3


def test_fewer_micro_batches_than_announced():
    """A last, shorter step uses what has come: the gradients that are in the states already."""
    one, two = Tied(torch.float64), Tied(torch.float64)
    plain, released = (fusedopt.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (one, two))
    fusedopt.release_gradients(two, released, micro_batches=3)
    for model, opt in ((one, plain), (two, released)):
        for step, count in enumerate((3, 2, 1, 3)):
            for part in range(count):
                (loss_of(model, 0, tokens(10 * step + part)).double() / 3).backward()
            opt.step()
            opt.zero_grad()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)
        assert torch.equal(plain.state[p]["step"], released.state[q]["step"])


@each_config(CONFIGS)
def test_accumulation_in_gradients_is_exact(config):
    one, two = Tied(torch.bfloat16), Tied(torch.bfloat16)
    options = {"param_precision": "stochastic", "clip_grad_norm": None, "state_format": "int8"}
    plain, released = (config.make(m.parameters(), **options) for m in (one, two))
    fusedopt.release_gradients(two, released, micro_batches=3, accumulate_in="gradients", collect=0)
    accumulated(one, plain, 3, 3)
    accumulated(two, released, 2, 3)
    for part in range(3):
        (loss_of(two, 2, tokens(20 + part)) / 3).backward()
        assert all((p.grad is None) == (part == 2) for p in two.parameters())
    released.step()
    assert_equal((one, plain), (two, released))


def test_what_cannot_be_accumulated_in_states():
    def refused(match, cls=fusedopt.AdamW, **options):
        model = nn.Linear(80, 80)
        opt = cls(model.parameters(), **options)
        clip = {"clip": "previous"} if "clip_grad_norm" in options else {}
        with pytest.raises(ValueError, match=match):
            fusedopt.release_gradients(model, opt, micro_batches=2, **clip)
        assert opt._release is None

    name = r"parameter 0 \(shape \(80, 80\).*cannot accumulate gradients in its states: "
    refused(name + "Lion's update needs the sum", fusedopt.Lion)
    refused(name + "its states are int8, int8", state_format="int8")
    refused(name + "its states are fp32, bf16", state_format={"exp_avg_sq": "bf16"})
    refused(name + "L2 decay would enter the square", fusedopt.Adam, weight_decay=0.1)
    refused(name + "dampening", fusedopt.SGD, momentum=0.9, dampening=0.1)
    refused(name + ".*Nesterov", fusedopt.SGD, momentum=0.9, nesterov=True)
    refused(name + "rule 'sgd' has no states", fusedopt.SGD)
    refused(name + "a beta of 0", betas=(0.0, 0.99))
    refused(name + "its states are those of projected gradients", projection=GaLore(rank=4))
    refused("added to the states are not clipped", clip_grad_norm=1.0)
    model = nn.Linear(3, 3)
    opt = fusedopt.SGD(model.parameters(), momentum=0.9)
    fusedopt.release_gradients(model, opt, micro_batches=2)
    x = torch.randn(2, 3)
    for _ in range(2):
        model(x).sum().backward()
    with pytest.raises(RuntimeError, match="more than micro_batches=2 backward passes"):
        model(x).sum().backward()


# step_parameter


def fused_back_pass(opt) -> None:
    """What OneTrainer does with an optimizer that supports it."""
    assert opt.supports_fused_back_pass()
    for param_group in opt.param_groups:
        for i, parameter in enumerate(param_group["params"]):
            if parameter.requires_grad:

                def hook(tensor, param_group=param_group, i=i):
                    opt.step_parameter(tensor, param_group, i)
                    tensor.grad = None

                parameter.register_post_accumulate_grad_hook(hook)


@each_config()
@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_step_parameter_in_hooks(config, form):
    one, two = Tied(torch.bfloat16), Tied(torch.bfloat16)
    options = {"state_format": form, "param_precision": "stochastic", "clip_grad_norm": None, "min_quantized_numel": 64}

    def make(model):
        params = list(model.parameters())
        return config.make([{"params": params[:3]}, {"params": params[3:], "lr": 0.003}], **options)

    plain, fused = make(one), make(two)
    fused_back_pass(fused)
    for model, opt in ((one, plain), (two, fused)):
        train(model, opt, 0, 4, torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)))
    assert_equal((one, plain), (two, fused))


@pytest.mark.parametrize("projection", [GaLore(rank=4, update_every=3), fusedopt.Frugal(density=0.4, method="blocks")])
def test_step_parameter_with_projections(projection):
    one, two = Tied(), Tied()
    plain, fused = (fusedopt.AdamW(m.parameters(), lr=0.01, projection=projection) for m in (one, two))
    fused_back_pass(fused)
    train(one, plain, 0, 5)
    train(two, fused, 0, 5)
    assert_equal((one, plain), (two, fused))


def test_step_parameter_after_loading():
    """load_state_dict makes new groups: hooks that hold the old ones must not step with their learning rates."""
    one, two = Tied(), Tied()
    plain, fused = (fusedopt.AdamW(m.parameters(), lr=0.01) for m in (one, two))
    fused_back_pass(fused)
    for model, opt in ((one, plain), (two, fused)):
        train(model, opt, 0, 2)
        saved = opt.state_dict()
        saved["param_groups"][0]["lr"] = 0.1
        opt.load_state_dict(saved)
        train(model, opt, 2, 4)
    assert_equal((one, plain), (two, fused))


def test_step_parameter_and_step_mix():
    """Some parameters stepped one by one, the others in step(), in turn."""
    one, two = parameters((6, 5), (7,), (3, 3)), parameters((6, 5), (7,), (3, 3))
    plain, mixed = (fusedopt.AdamW(ps, param_precision="stochastic") for ps in (one, two))
    for step in range(5):
        set_grads(one, step)
        set_grads(two, step)
        plain.step()
        for i in range(step % 3):
            mixed.step_parameter(two[i], mixed.param_groups[0], i)
            assert two[i].grad is not None
            two[i].grad = None
        mixed.step()
    assert_same_bits(tensors(mixed, two), tensors(plain, one))


def test_step_param_and_what_does_nothing():
    params = parameters((6, 5), (7,))
    opt = fusedopt.AdamW(params, lr=0.1)
    opt.step_parameter(params[0], opt.param_groups[0], 0)
    assert not opt.state
    set_grads(params, 0)
    opt.step_param(params[1], opt.param_groups[0])
    assert list(opt.state) == [params[1]]
    params[0].requires_grad_(False)
    opt.step_parameter(params[0])
    assert list(opt.state) == [params[1]]


def test_step_parameter_refuses():
    params = parameters((6, 5), (7,))
    set_grads(params, 0)
    opt = fusedopt.AdamW(params)
    with pytest.raises(ValueError, match=r"parameter 1 .* has index 1 in its group, not 0"):
        opt.step_parameter(params[1], opt.param_groups[0], 0)
    stranger = parameters((2, 2))[0]
    stranger.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) is none of its parameters"):
        opt.step_parameter(stranger, opt.param_groups[0], 0)
    assert not opt.state
    for options, match in (
        ({"clip_grad_norm": 1.0}, "needs the norm of all gradients"),
        ({"amp_fused": True}, "overflow is known only after"),
    ):
        opt = fusedopt.AdamW(params, **options)
        assert not opt.supports_fused_back_pass()
        with pytest.raises(RuntimeError, match=match):
            opt.step_parameter(params[0], opt.param_groups[0], 0)
        assert not opt.state
    model = nn.Linear(3, 3)
    opt = fusedopt.AdamW(model.parameters())
    fusedopt.release_gradients(model, opt)
    model.weight.grad = torch.ones(3, 3)
    assert not opt.supports_fused_back_pass()
    with pytest.raises(RuntimeError, match="stepped by release_gradients already"):
        opt.step_parameter(model.weight)


def test_one_optimizer_for_each_parameter():
    """torchtune's optimizer_in_bwd, with its wrapper's way of saving."""
    one, two = Tied(), Tied()
    plain = fusedopt.AdamW(one.parameters(), lr=0.01, state_format="int8", min_quantized_numel=64)
    each = {
        p: fusedopt.AdamW([p], lr=0.01, state_format="int8", min_quantized_numel=64, fused=True)
        for p in two.parameters()
    }
    for p in two.parameters():

        def hook(p):
            each[p].step()
            each[p].zero_grad()

        p.register_post_accumulate_grad_hook(hook)
    for step in range(3):
        loss_of(one, step).backward()
        plain.step()
        plain.zero_grad()
        loss_of(two, step).backward()
    saved = {name: each[p].state_dict() for name, p in two.named_parameters()}
    for (name, p), q in zip(two.named_parameters(), one.parameters(), strict=True):
        assert torch.equal(p, q), name
        for key, value in plain.state[q].items():
            assert torch.equal(saved[name]["state"][0][key], value)
    assert everything(two, type("All", (), {"state": {p: each[p].state[p] for p in each}})())
