"""projected_linear: its trajectories against full gradients and an oracle, what it never allocates, what it refuses."""

import copy
import io
import math
import pickle
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedopt
from fusedopt import SGD, AdamW, GaLore, Lion, projected_linear
from fusedopt.projections import lowrank
from fusedopt.projections.lowrank import LowRankGradient, accumulate, random_matrix, sketch_basis
from fusedopt.projections.subspace import random_basis, svd_basis
from tests.oracles.projected_linear import SketchedGaLoreAdamW


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(dtype=torch.float64, bias=True):
    torch.manual_seed(1)
    layers = OrderedDict(
        wide=torch.nn.Linear(24, 40, bias=bias), act=torch.nn.Tanh(), narrow=torch.nn.Linear(40, 20, bias=bias),
        norm=torch.nn.LayerNorm(20), last=torch.nn.Linear(20, 30, bias=bias),
    )  # fmt: skip
    return torch.nn.Sequential(layers).to(dtype)


def batches(steps, dtype=torch.float64, micro=2):
    torch.manual_seed(2)
    target = torch.randn(24, 30, dtype=dtype)
    for _ in range(steps):
        xs = [torch.randn(3, 5, 24, dtype=dtype) for _ in range(micro)]
        yield [(x, x @ target) for x in xs]


def backward(model, data, times=1.0):
    for x, y in data:
        (functional.mse_loss(model(x), y) * times).backward()


def train(model, opt, steps=30, dtype=torch.float64, skip=0):
    for i, data in enumerate(batches(steps, dtype)):
        if i >= skip:
            backward(model, data)
            opt.step()
            opt.zero_grad()


def distance(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(((p - q).abs().max() / q.abs().max()).item() for p, q in pairs)


OPTIMIZERS = {
    "adamw": lambda params, **kw: AdamW(params, lr=1e-2, weight_decay=0.1, **kw),
    "lion": lambda params, **kw: Lion(params, lr=1e-3, weight_decay=0.1, **kw),
    "sgd": lambda params, **kw: SGD(params, lr=1e-2, momentum=0.9, maximize=True, **kw),
}
CASES = [
    ("adamw", "randomized", "std", torch.float64),
    ("adamw", "randomized", "std", torch.float32),
    ("adamw", "svd", "left", torch.float64),
    ("adamw", "random", "right", torch.float64),
    ("lion", "random", "reverse_std", torch.float64),
    ("sgd", "svd", "right", torch.float64),
]


@pytest.mark.parametrize(("rule", "method", "side", "dtype"), CASES)
def test_full_refresh_is_the_step_of_the_full_gradient(rule, method, side, dtype):
    """30 steps of two micro-batches with staggered refreshes, against the same optimizer on full gradients."""
    plain, ours = make_model(dtype), make_model(dtype)
    start = copy.deepcopy(plain)
    projection = GaLore(rank=4, update_every=7, method=method, side=side)
    before, after = (OPTIMIZERS[rule](m.parameters(), projection=projection) for m in (plain, ours))
    handle = projected_linear(ours, after, refresh="full")
    assert handle.names == ["wide", "narrow", "last"] and handle.skipped == {}
    train(plain, before, dtype=dtype)
    train(ours, after, dtype=dtype)
    limit = 1e-9 if dtype == torch.float64 else 2e-5
    assert distance(ours, plain) < limit < 1e-3 < distance(start, plain)


def test_random_bases_need_no_refresh_pass():
    """Random bases do not depend on the gradient, so refresh="sketch" is the step of the full gradient too."""
    plain, ours = make_model(), make_model()
    projection = GaLore(rank=4, update_every=7, method="random")
    before, after = (AdamW(m.parameters(), lr=1e-2, projection=projection) for m in (plain, ours))
    projected_linear(ours, after)
    train(plain, before)
    train(ours, after)
    assert distance(ours, plain) < 1e-9


@pytest.mark.parametrize("side", ["left", "right"])
def test_sketched_refresh_against_the_oracle(side):
    """Every matrix of a model over 30 steps with four refreshes each, against the transcription on full fp64 gradients."""
    model = make_model()
    projection = GaLore(rank=4, update_every=7, side=side, scale=0.5)
    opt = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, projection=projection, seed=5)
    projected_linear(model, opt, sketch_width=3)
    names = [n for n, p in model.named_parameters() if p.dim() == 2]
    ids = {n: i for i, (n, _) in enumerate(model.named_parameters())}
    left, oracles = side == "left", {}
    for place, name in enumerate(names):
        w = model.get_parameter(name).detach()
        keys = {"seed": 5, "tensor_id": ids[name]}
        first = random_basis(tuple(w.shape), 4, side, **keys, step=1).double()

        def omega(step, shape=tuple(w.shape), keys=keys):
            drawn = random_matrix(shape, min(12, *shape), side, "cpu", **keys, step=step).double()
            return drawn.T if left else drawn

        def due(step, place=place):
            return step == 1 or (step - 1) % 7 == place * 7 // 3

        basis = first if left else first.T
        oracles[name] = SketchedGaLoreAdamW(w, 4, left, 0.5, 1e-2, (0.9, 0.999), 1e-8, 0.1, basis, omega, due)
    shadow = copy.deepcopy(model)
    for data in batches(30):
        shadow.load_state_dict(model.state_dict())
        shadow.zero_grad()
        backward(shadow, data)
        for name in names:
            oracles[name].w = model.get_parameter(name).detach().clone()  # one step at a time: no drift to hide behind
            oracles[name].step(shadow.get_parameter(name).grad)
        backward(model, data)
        opt.step()
        opt.zero_grad()
        for name in names:
            torch.testing.assert_close(model.get_parameter(name).detach(), oracles[name].w, rtol=1e-9, atol=1e-11)
            basis = opt.state[model.get_parameter(name)]["projector"]
            torch.testing.assert_close(basis if left else basis.T, oracles[name].p, rtol=1e-6, atol=1e-8)


SPECTRA = {
    "1/i": (lambda i: 1 / i, 0.985),
    "i^-1.5": (lambda i: i**-1.5, 0.999),
    "exp(-i/8)": (lambda i: torch.exp(-i / 8), 0.97),
    "slow": (lambda i: i**-0.5, 0.80),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", SPECTRA)
def test_energy_of_a_sketched_subspace(name, side):
    """The share of the best rank-r subspace's energy, over several sketches accumulated in two backward passes."""
    spectrum, least = SPECTRA[name]
    torch.manual_seed(0)
    rows, cols, rank, width = 192, 256, 16, 64
    u, v = torch.linalg.qr(torch.randn(rows, rows))[0], torch.linalg.qr(torch.randn(cols, rows))[0]
    root = spectrum(torch.arange(rows) + 1.0).sqrt()
    dy, x = (u * root).T.contiguous(), (v * root).T.contiguous()  # G = dY^T X

    def energy(basis):
        projected = basis.T @ (dy.T @ x) if side == "left" else dy.T @ x @ basis.T
        return projected.square().sum().item()

    best = energy(svd_basis(dy.T @ x, rank, side))
    old = random_basis((rows, cols), rank, side, seed=0, tensor_id=0, step=1)
    for step in range(3):
        sketch = torch.zeros((rows, width) if side == "left" else (width, cols))
        omega = random_matrix((rows, cols), width, side, "cpu", seed=0, tensor_id=3, step=step)
        for part in (slice(0, 100), slice(100, None)):
            accumulate(sketch, dy[part], x[part], omega, "right" if side == "left" else "left")
        basis = sketch_basis(sketch, rank, side, old)
        gram = basis.T @ basis if side == "left" else basis @ basis.T
        assert (gram - torch.eye(rank)).abs().max() < 1e-5
        assert least < energy(basis) / best <= 1 + 1e-5
        assert energy(old) / best < 0.3


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_useless_sketch_keeps_the_basis(value):
    old = random_basis((20, 30), 4, "left", seed=0, tensor_id=0, step=1)
    assert torch.equal(sketch_basis(torch.full((20, 16), value), 4, "left", old), old)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", [3, 60])
def test_a_sketch_basis_is_that_of_its_svd(side, tokens):
    """Singular vectors in order, and an orthonormal completion where fewer tokens than the rank made the gradient."""
    torch.manual_seed(0)
    scale = 10.0 ** -(torch.arange(tokens) / tokens * 3).unsqueeze(1)
    grad = (scale * torch.randn(tokens, 40)).T @ torch.randn(tokens, 50)
    sketch = grad @ torch.randn(50, 24) if side == "left" else torch.randn(24, 40) @ grad
    old = random_basis((40, 50), 6, side, seed=0, tensor_id=0, step=1)
    new = sketch_basis(sketch, 6, side, old)
    gram = new.T @ new if side == "left" else new @ new.T
    assert (gram - torch.eye(6)).abs().max() < 1e-5
    u, _, v = torch.linalg.svd(sketch.double(), full_matrices=False)
    wanted, found = (u.T, new.T) if side == "left" else (v, new)
    count = min(tokens, 6)
    cosines = (wanted[:count] * found[:count]).sum(1).abs()
    assert (1 - cosines).abs().max() < 1e-6
    assert ((new * old).sum(0 if side == "left" else 1) >= 0).all()


# What is allocated


class Sizes(TorchDispatchMode):
    """The numbers of elements of every tensor that operations make."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.data_ptr() not in given:
                self.seen.add(t.numel())
        return out


@pytest.mark.parametrize("side", ["left", "right"])
def test_no_full_gradient_is_made(side):
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 80))
    opt = AdamW(model.parameters(), projection=GaLore(rank=4, update_every=2, side=side))
    data = torch.randn(10, 96)
    with Sizes() as sizes:
        model(data).sum().backward()
    assert 64 * 96 in sizes.seen and 80 * 64 in sizes.seen  # the instrument sees ordinary gradients
    opt.zero_grad()
    handle = projected_linear(model, opt)
    for _ in range(4):
        with Sizes() as sizes:
            model(data).sum().backward()
        opt.step()
        assert max(sizes.seen) < 80 * 64, sizes.seen
        opt.zero_grad()
    assert handle.bytes() == 0


def test_bytes_of_gradients():
    """Prediction: fp32 [rank, in] or [out, rank] in place of [out, in]; sketches only where a refresh is due."""
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 80))
    opt = AdamW(model.parameters(), projection=GaLore(rank=4, update_every=10))
    handle = projected_linear(model, opt, sketch_width=2)
    found = []
    for _ in range(8):
        model(torch.randn(10, 96)).sum().backward()
        assert all(layer.weight.grad is None and layer.bias.grad is not None for layer in model)
        found.append(handle.bytes())
        opt.step()
        assert handle.bytes() == 0
        opt.zero_grad()
    low_rank = 4 * 4 * (96 + 80)  # left of 64 x 96, right of 80 x 64
    sketches = [4 * 8 * 64, 4 * 8 * 64]  # [64, 8] and [8, 64]
    basis = 4 * 4 * (64 + 64)  # of step 1
    assert found == [low_rank + sum(sketches) + basis] + 4 * [low_rank] + [low_rank + sketches[1]] + 2 * [low_rank]


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
