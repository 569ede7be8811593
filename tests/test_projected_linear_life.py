"""projected_linear: the life of its buffers, mixed precision, copies and resuming, what it refuses."""

import copy
import io
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from linear_models import backward, batches, distance, make_model, one_thread, train  # noqa: F401
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fusedopt
from fusedopt import AdamW, GaLore, projected_linear
from fusedopt.projections import lowrank
from fusedopt.projections.lowrank import LowRankGradient, accumulate

# The life of the buffers


def stepped(refresh="sketch", steps=3, **options):
    model = make_model()
    opt = AdamW(model.parameters(), lr=1e-2, projection=GaLore(rank=4, update_every=7), **options)
    handle = projected_linear(model, opt, refresh=refresh)
    train(model, opt, steps)
    return model, opt, handle


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model, before):
    return {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}


def test_zero_grad_and_steps_without_backward():
    model, opt, handle = stepped()
    (data,) = batches(1)
    before = snapshot(model)
    opt.step()
    backward(model, data)
    opt.zero_grad()
    assert handle.bytes() == 0
    opt.step()
    assert same(model, before) == set(before)
    backward(model, data)
    opt.zero_grad(set_to_none=False)
    source = model.wide.__dict__["_low_rank"]
    assert isinstance(source, LowRankGradient) and not source.gradient.any() and handle.bytes()
    count = opt.state[model.wide.weight]["step"].item()
    opt.step()  # a zero gradient is one, as in torch: the momentum goes on
    assert opt.state[model.wide.weight]["step"].item() == count + 1
    assert "wide.weight" not in same(model, before)


def test_a_layer_without_backward_stays():
    model, opt, _ = stepped()
    before = snapshot(model)
    model.last(torch.randn(5, 20, dtype=torch.float64)).square().sum().backward()
    opt.step()
    assert same(model, before) == set(before) - {"last.weight", "last.bias"}


def test_each_micro_batch_counts():
    """Two micro-batches give the step of one batch of both, and another step than either."""
    ends = []
    for parts in ([0, 1], [0], [1]):
        model, opt, _ = stepped()
        (data,) = batches(1)
        for i in parts:
            backward(model, [data[i]])
        opt.step()
        ends.append(model)
    model, opt, _ = stepped()
    (data,) = batches(1)
    whole = [torch.cat(t) for t in zip(*data, strict=True)]
    backward(model, [whole], 2.0)
    opt.step()
    assert distance(ends[0], model) < 1e-12
    assert min(distance(ends[1], model), distance(ends[2], model)) > 1e-6


def test_one_weight_in_two_layers():
    """Two Linear layers that share a weight add to one buffer."""
    models = []
    for early in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.Tanh(), torch.nn.Linear(20, 20)).double()
        model[2].weight = model[0].weight
        opt = AdamW(model.parameters(), lr=1e-2, projection=GaLore(rank=4, update_every=3))
        if early:
            assert projected_linear(model, opt, refresh="full").names == ["0", "2"]
        for i in range(5):
            torch.manual_seed(i)
            model(torch.randn(9, 20, dtype=torch.float64)).square().sum().backward()
            opt.step()
            opt.zero_grad()
        models.append(model)
    assert distance(*models) < 1e-9


def test_a_frozen_layer_and_no_grad():
    model, opt, handle = stepped()
    model.wide.weight.requires_grad_(False)
    (data,) = batches(1)
    with torch.no_grad():
        plain = model(data[0][0])
    model(data[0][0]).sum().backward()
    assert model.wide.__dict__["_low_rank"].gradient is None and handle.bytes() > 0
    assert torch.equal(plain, model(data[0][0]))


def test_autograd_grad_accumulates_nothing():
    model, opt, handle = stepped()
    x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    weight = model.wide.weight
    (found,) = torch.autograd.grad(model(x).square().sum(), [weight])
    torch.autograd.grad(model(x).square().sum(), [x])
    model(x).square().sum().backward(inputs=[x])
    assert handle.bytes() == 0
    model(x).square().sum().backward(inputs=[weight])
    assert handle.bytes() == model.wide.__dict__["_low_rank"].bytes() > 0
    handle.remove()
    torch.testing.assert_close(found, torch.autograd.grad(model(x).square().sum(), [weight])[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    ends = []
    for recompute in (False, True):
        model, opt, _ = stepped()
        (data,) = batches(1)
        for x, y in data:
            x.requires_grad_()
            out = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
            functional.mse_loss(out, y).backward()
        opt.step()
        ends.append(model)
    assert distance(*ends) == 0


def test_resuming_gives_the_same_trajectory():
    model, opt, _ = stepped(steps=20, state_format="int8", min_quantized_numel=0)
    weights, state = snapshot_at(10)
    again = make_model()
    again.load_state_dict(weights)
    other = AdamW(again.parameters(), lr=1e-2, projection=GaLore(rank=4, update_every=7), state_format="int8",
                  min_quantized_numel=0)  # fmt: skip
    other.load_state_dict(state)
    projected_linear(again, other)
    train(again, other, 20, skip=10)
    assert distance(again, model) == 0


def snapshot_at(steps):
    model, opt, _ = stepped(steps=steps, state_format="int8", min_quantized_numel=0)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
    buffer.seek(0)
    found = torch.load(buffer, weights_only=True)
    return found["model"], found["opt"]


def test_state_loaded_between_backward_and_step():
    model, opt, _ = stepped()
    (data,) = batches(1)
    backward(model, data)
    opt.load_state_dict(opt.state_dict())
    with pytest.raises(RuntimeError, match="zero_grad"):
        opt.step()
    opt.zero_grad()
    backward(model, data)
    opt.step()


# Copies and removal


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_plain(how):
    model, opt, handle = stepped()
    twin = how(model)
    assert type(twin.wide) is torch.nn.Linear and "_low_rank" not in twin.wide.__dict__
    assert type(model.wide) is not torch.nn.Linear and isinstance(model.wide, torch.nn.Linear)
    assert model.state_dict().keys() == twin.state_dict().keys() and distance(twin, model) == 0
    twin(torch.randn(3, 24, dtype=torch.float64)).sum().backward()
    assert twin.wide.weight.grad is not None and handle.bytes() == 0
    assert copy.deepcopy(opt)._low_rank is None and opt._low_rank is not None


def test_remove_and_again():
    model, opt, handle = stepped(refresh="full", steps=4)
    handle.remove()
    handle.remove()
    assert all(type(layer) is torch.nn.Linear for layer in (model.wide, model.narrow, model.last))
    plain = make_model()
    before = AdamW(plain.parameters(), lr=1e-2, projection=GaLore(rank=4, update_every=7))
    train(plain, before, 8)
    for i, data in enumerate(batches(8)):
        if 4 <= i < 6:
            backward(model, data)
            assert model.wide.weight.grad is not None
        elif i >= 6:
            if i == 6:
                projected_linear(model, opt, refresh="full")
            backward(model, data)
            assert model.wide.weight.grad is None
        else:
            continue
        opt.step()
        opt.zero_grad()
    assert distance(model, plain) < 1e-9


# Mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_autocast(side, dtype):
    """R of an fp32 weight under autocast against the projection of the exact gradient, to the activations' precision."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.Linear(32, 40))
    opt = AdamW(model.parameters(), projection=GaLore(rank=4, side=side, method="random"))
    x, weights = torch.randn(64, 48), torch.randn(64, 40)
    (model(x) * weights).sum().backward()
    exact = [layer.weight.grad.clone() for layer in model]
    biases = [layer.bias.grad.clone() for layer in model]
    opt.zero_grad()
    projected_linear(model, opt)
    with torch.autocast("cpu", dtype=dtype):
        out = model(x)
        assert out.dtype == dtype
        (out.float() * weights).sum().backward()  # inside, as some loops do
    for layer, grad, bias in zip(model, exact, biases, strict=True):
        source = layer.__dict__["_low_rank"]
        basis = source.basis
        wanted = basis.T @ grad if side == "left" else grad @ basis.T
        assert source.gradient.dtype == torch.float32 and layer.weight.grad is None
        assert (source.gradient - wanted).norm() / wanted.norm() < (0.02 if dtype == torch.bfloat16 else 0.004)
        assert (layer.bias.grad - bias).norm() / bias.norm() < 0.02
        assert layer.bias.grad.dtype == torch.float32


def test_projections_of_large_fp16_gradients_do_not_overflow():
    """Loss-scaled gradients near the end of fp16's range: their projection is beyond it, and finite in fp32."""
    out = torch.zeros(2, 8)
    dy, x = torch.full((4, 16), 6e4, dtype=torch.float16), torch.ones(4, 8, dtype=torch.float16)
    accumulate(out, dy, x, torch.ones(16, 2), "left")
    assert torch.equal(out, torch.full((2, 8), 6e4 * 16 * 4))


@pytest.mark.parametrize("precision", ["nearest", "stochastic", "kahan"])
def test_bf16_weights(precision):
    model = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.Linear(32, 40)).bfloat16()
    opt = AdamW(model.parameters(), lr=0.05, projection=GaLore(rank=4, update_every=3), param_precision=precision)
    projected_linear(model, opt)
    torch.manual_seed(0)
    x, target = torch.randn(64, 48).bfloat16(), torch.randn(48, 40).mul_(0.1).bfloat16()
    losses = []
    for _ in range(60):
        loss = functional.mse_loss(model(x), x @ target)
        loss.backward()
        losses.append(loss.item())
        opt.step()
        opt.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    assert opt.state[model[0].weight]["projector"].dtype == torch.bfloat16


@pytest.mark.parametrize("amp_fused", [False, True])
def test_grad_scaler(amp_fused):
    """GradScaler unscales inside the step, skips steps that overflow, and gives the unscaled trajectory."""
    plain, opt, _ = stepped(steps=0)
    ours, scaled, _ = stepped(steps=0, amp_fused=amp_fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for i, data in enumerate(batches(10)):
        backward(plain, data)
        opt.step()
        opt.zero_grad()
        if i == 4:  # an overflow in between is skipped, whichever gradients show it
            before = snapshot(ours)
            functional.mse_loss(ours(data[0][0]), data[0][1] * math.inf).backward()
            scaler.scale(torch.ones(()))
            scaler.step(scaled)
            scaler.update(2.0**12)
            scaled.zero_grad()
            assert same(ours, before) == set(before)
        for x, y in data:
            scaler.scale(functional.mse_loss(ours(x), y)).backward()
        scaler.step(scaled)
        scaler.update()
        scaled.zero_grad()
    assert distance(ours, plain) < 1e-9


def test_overflow_only_in_low_rank_gradients_is_seen():
    model, opt, _ = stepped()
    (data,) = batches(1)
    backward(model, data)
    model.wide.__dict__["_low_rank"].gradient[0, 0] = math.inf
    before = snapshot(model)
    opt.grad_scale, opt.found_inf = torch.ones(1), torch.zeros(1)
    opt.step()
    assert same(model, before) == set(before)


def test_unscale_is_refused():
    model, opt, _ = stepped()
    scaler = torch.amp.GradScaler("cpu")
    (data,) = batches(1)
    for x, y in data:
        scaler.scale(functional.mse_loss(model(x), y)).backward()
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.step(opt)


# What is refused


def test_refused_optimizers():
    model = make_model()
    projection = GaLore(rank=4)
    with pytest.raises(TypeError, match="Adam"):
        projected_linear(model, torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="clip_grad_norm"):
        projected_linear(model, AdamW(model.parameters(), projection=projection, clip_grad_norm=1.0))
    with pytest.raises(ValueError, match="no weight of a Linear"):
        projected_linear(model, AdamW(model.parameters()))
    opt = AdamW(model.parameters(), projection=projection)
    with pytest.raises(ValueError, match="refresh"):
        projected_linear(model, opt, refresh="none")
    with pytest.raises(ValueError, match="sketch_width"):
        projected_linear(model, opt, sketch_width=0)
    projected_linear(model, opt)
    with pytest.raises(ValueError, match="already"):
        projected_linear(model, opt)
    with pytest.raises(ValueError, match="another optimizer"):
        projected_linear(model, AdamW(model.parameters(), projection=projection))


def test_clip_grad_norm_set_afterwards():
    model, opt, _ = stepped()
    (data,) = batches(1)
    backward(model, data)
    opt.clip_grad_norm = 1.0
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="clip_grad_norm"):
        opt.step()
    assert same(model, before) == set(before)


@dataclass(frozen=True)
class Needy(GaLore):
    """Inherits GaLore and may use the residual; it has not said that R is enough."""


def test_refused_layers():
    model = make_model()
    model.embed = torch.nn.Embedding(30, 20)
    model.embed.weight = model.last.weight
    fusedopt.override(model.wide, projection=Needy(rank=4))
    fusedopt.override(model.norm, projection=None)
    handle = projected_linear(model, AdamW(model.parameters(), projection=GaLore(rank=4)))
    assert handle.names == ["narrow"]
    assert "full gradient" in handle.skipped["wide"] and "Embedding" in handle.skipped["last"]
    attention = torch.nn.MultiheadAttention(16, 2)  # uses out_proj.weight without calling the layer
    with pytest.raises(ValueError, match="out_proj: it is a NonDyn"):
        projected_linear(attention, AdamW(attention.parameters(), projection=GaLore(rank=4)))


def test_another_use_of_the_weight():
    model, opt, _ = stepped()
    (data,) = batches(1)
    backward(model, data)
    model.wide.weight.square().sum().backward()
    with pytest.raises(RuntimeError, match="another use"):
        opt.step()


def test_a_projection_taken_away_gives_full_gradients():
    model, opt, handle = stepped()
    opt.param_groups[0]["projection"] = None
    (data,) = batches(1)
    backward(model, data)
    assert model.wide.weight.grad is not None and handle.bytes() == 0


def test_plan_reports_low_rank_gradients():
    model, opt, _ = stepped()
    (data,) = batches(1)
    backward(model, data)
    assert "phases direction" in opt.plan().explain()
    opt.step()
    plan = opt._plan
    for data in batches(3):
        backward(model, data)
        opt.step()
        opt.zero_grad()
    assert opt._plan is plan  # built once, although every backward pass makes new buffers


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversion_in_blocks_of_tokens(side, dtype, monkeypatch):
    """Where products in 16 bits are slow or overflow, tokens are converted a few at a time; the last block is shorter."""
    monkeypatch.setattr(lowrank, "_BLOCK", 100)
    monkeypatch.setattr(lowrank, "_FAST_BF16", False)
    torch.manual_seed(0)
    dy, x = torch.randn(31, 12).to(dtype), torch.randn(31, 20).to(dtype)
    basis = torch.randn(12, 3) if side == "left" else torch.randn(3, 20)
    out = torch.ones((3, 20) if side == "left" else (12, 3))
    accumulate(out, dy, x, basis, side)
    grad = dy.double().T @ x.double()
    wanted = 1 + (basis.double().T @ grad if side == "left" else grad @ basis.double().T)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
