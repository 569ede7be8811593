"""Per-sample gradients: clipping, noise, error feedback and batch-size tests, against a loop over samples."""

import math

import pytest
import torch
from configs import assert_same_bits
from torch import nn

import fusedopt
from fusedopt import transforms as tf
from fusedopt.transforms.noise import add_noise_, key_of
from fusedopt.transforms.private import PURPOSE, per_sample_gradients


def model(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).to(dtype)
    net[2].bias.requires_grad_(False)
    return net


def batch(seed: int = 0, count: int = 7, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=gen).to(dtype), torch.randint(0, 3, (count,), generator=gen)


LOSS = nn.functional.cross_entropy


def each_gradient(net, x, y) -> torch.Tensor:
    """[samples, parameters], one backward pass each."""
    params = [p for p in net.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(LOSS(net(x[i : i + 1]), y[i : i + 1]), params) for i in range(len(x))]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def flat_grad(net, name: str = "grad") -> torch.Tensor:
    return torch.cat([getattr(p, name).flatten() for p in net.parameters() if p.requires_grad])


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("normalise", [False, True])
def test_clips_each_sample(chunk, normalise):
    net, (x, y) = model(), batch()
    each = each_gradient(net, x, y)
    norms = each.norm(dim=1)
    bound = float(norms.median())
    assert bool((norms > bound).any()) and bool((norms < bound).any())
    fusedopt.private_gradients(net, LOSS, x, y, bound, normalise=normalise, chunk=chunk, keep_mean=True)
    clipped = [g / (g.norm() + 0.01) if normalise else g * min(1.0, bound / float(g.norm())) for g in each]
    torch.testing.assert_close(flat_grad(net), torch.stack(clipped).mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(flat_grad(net, "mean_grad"), each.mean(0), rtol=1e-10, atol=1e-12)
    assert net[2].bias.grad is None


def test_without_clipping_it_is_backward():
    net, (x, y) = model(torch.float32), batch(dtype=torch.float32)
    LOSS(net(x), y).backward()
    want = flat_grad(net)
    fusedopt.private_gradients(net, LOSS, x, y, 1e6)
    torch.testing.assert_close(flat_grad(net), want, rtol=1e-5, atol=1e-6)
    assert all(p.mean_grad is None for p in net.parameters() if p.requires_grad)


def test_sixteen_bit_models():
    net, (x, y) = model(torch.bfloat16), batch(dtype=torch.bfloat16)
    fusedopt.private_gradients(net, LOSS, x, y, 0.5, chunk=2)
    assert all(p.grad.dtype == torch.bfloat16 for p in net.parameters() if p.requires_grad)
    assert sum(len(g["0.weight"]) for g in per_sample_gradients(net, LOSS, x, y, 2)) == 7


# Noise


@pytest.mark.parametrize("capturable", [False, True])
def test_noise_is_new_at_each_step_and_comes_back(capturable):
    def run(first, last, state=None, weights=None):
        params = [nn.Parameter(torch.zeros(500)), nn.Parameter(torch.zeros(20, 30))]
        opt = fusedopt.SGD(params, lr=1.0, capturable=capturable, gradient_transforms=[tf.PrivacyNoise(0.5, seed=3)])
        if state is not None:
            opt.load_state_dict(state)
            for p, w in zip(params, weights, strict=True):
                p.data.copy_(w)
        trace = []
        for _ in range(first, last):
            for p in params:
                p.grad = torch.zeros_like(p)
            before = [p.detach().clone() for p in params]
            opt.step()
            trace.append([b - p.detach() for p, b in zip(params, before, strict=True)])
        return params, opt, trace

    params, opt, trace = run(0, 3)
    for step, row in enumerate(trace):
        for tensor_id, noise in enumerate(row):
            want = add_noise_(torch.zeros_like(noise), 0.5, key_of(3, PURPOSE), tensor_id, step)
            torch.testing.assert_close(noise, want, rtol=1e-5, atol=1e-6)
            assert float(noise.std()) == pytest.approx(0.5, rel=0.15)
    assert abs(float(torch.corrcoef(torch.stack([trace[0][0], trace[1][0]]))[0, 1])) < 0.2
    half = run(0, 1)
    resumed = run(1, 3, half[1].state_dict(), [p.detach() for p in half[0]])
    assert_same_bits([p.detach() for p in resumed[0]], [p.detach() for p in params])


# Error feedback


@pytest.mark.parametrize("steps, dtype, bound", [(10, torch.float64, 1e-9), (200, torch.float32, 1e-5)])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_dice_sgd(rule, steps, dtype, bound):
    """arXiv 2311.14632: clipping of what is fed back, on flat vectors; both see the same gradients of samples."""
    net = model(dtype)
    params = [p for p in net.parameters() if p.requires_grad]
    theirs = [nn.Parameter(p.detach().double()) for p in params]
    start = torch.cat([p.detach().flatten() for p in theirs])
    lr = 0.5 if rule == "sgd" else 0.02  # far enough that rounding of the weights is small beside it
    opt = fusedopt.create(rule, params, lr=lr, gradient_transforms=[tf.ErrorFeedback(max_norm=0.4)])
    other = fusedopt.create(rule, theirs, lr=lr, backend="reference")
    error, limited = torch.zeros_like(start), 0
    for step in range(steps):
        if steps == 10:
            fusedopt.private_gradients(net, LOSS, *batch(step, dtype=dtype), 0.3, keep_mean=True)
        else:  # 200 times 40 ms would be long
            gen = torch.Generator().manual_seed(step)
            for p in params:
                p.mean_grad = 0.1 * torch.randn(p.shape, generator=gen).to(dtype)
                p.grad = 0.5 * p.mean_grad
        clipped, mean = flat_grad(net).double(), flat_grad(net, "mean_grad").double()
        limited += float(error.norm()) > 0.4
        v = clipped + error * min(1.0, 0.4 / max(float(error.norm()), 1e-300))
        error = error + mean - v
        for q, g in zip(theirs, v.split([q.numel() for q in theirs]), strict=True):
            q.grad = g.view(q.shape)
        opt.step()
        other.step()
        assert all(p.mean_grad is None for p in params)
    assert limited > 0
    mine, want = (torch.cat([p.detach().double().flatten() for p in ps]) for ps in (params, theirs))
    assert (mine - want).abs().max() <= bound * (want - start).abs().max()


def test_error_feedback_needs_the_mean():
    net, (x, y) = model(torch.float32), batch(dtype=torch.float32)
    opt = fusedopt.SGD(
        [p for p in net.parameters() if p.requires_grad],
        lr=0.1,
        gradient_transforms=[tf.Grokfast(), tf.ErrorFeedback(1.0)],
    )
    fusedopt.private_gradients(net, LOSS, x, y, 0.3)
    with pytest.raises(ValueError, match="parameter 0 has no mean_grad. Call private_gradients"):
        opt.step()
    assert all(opt.state[p]["grokfast_steps"] == 0 for p in opt.param_groups[0]["params"])


# Batch sizes


def test_batch_size_tests():
    net, (x, y) = model(), batch(count=9)
    each = each_gradient(net, x, y)
    mean = each.mean(0)
    square = float(mean.square().sum())
    dots = each @ mean
    rest = each - dots[:, None] / square * mean
    got = fusedopt.batch_size_tests(net, LOSS, x, y, eta=0.3, theta=0.8, nu=1.5, chunk=4)
    want = {
        "norm": float(each.var(0).sum()) / (0.09 * square),
        "inner_product": float(dots.var()) / (0.64 * square**2),
        "orthogonality": float(rest.var(0).sum()) / (2.25 * square),
    }
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-9)
    assert got["batch_size"] == math.ceil(max(9, want["norm"]))
    assert got["augmented"] == math.ceil(max(9, want["inner_product"], want["orthogonality"]))
    assert all(p.grad is None for p in net.parameters())


def test_refusals():
    net, (x, y) = model(), batch()
    with pytest.raises(ValueError, match="max_norm"):
        fusedopt.private_gradients(net, LOSS, x, y, 0.0)
    with pytest.raises(ValueError, match="no samples"):
        fusedopt.private_gradients(net, LOSS, x[:0], y[:0], 1.0)
    with pytest.raises(ValueError, match="1 samples"):
        fusedopt.batch_size_tests(net, LOSS, x[:1], y[:1])
    for make in (lambda: tf.PrivacyNoise(-1.0), lambda: tf.ErrorFeedback(0.0)):
        with pytest.raises(ValueError, match="invalid"):
            make()
