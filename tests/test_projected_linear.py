"""projected_linear: its trajectories against full gradients and an oracle, what it never allocates, what it refuses."""

import copy
import math

import pytest
import torch
from linear_models import backward, batches, distance, make_model, one_thread, train  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from fusedopt import SGD, AdamW, GaLore, Lion, projected_linear
from fusedopt.projections.lowrank import accumulate, random_matrix, sketch_basis
from fusedopt.projections.subspace import random_basis, svd_basis
from tests.oracles.projected_linear import SketchedGaLoreAdamW

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
