"""PCGrad and Bloop against a package and their equations."""

import random

import pytest
import torch
from configs import assert_same_bits, parameters
from pytorch_optimizer import PCGrad as PackagePCGrad

import fusedopt
from fusedopt import transforms as tf
from fusedopt.transforms import losses as several

SHAPES = ((6, 4), (5,), (3, 2, 2))


def task_losses(params, count: int, seed: int = 0) -> list[torch.Tensor]:
    """Losses that pull in different directions."""
    gen = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        targets = [torch.randn(p.shape, generator=gen, dtype=torch.float64) for p in params]
        out.append(sum(((p.double() - 5 * t) ** 2).sum() for p, t in zip(params, targets, strict=True)))
    return out


def by_hand(grads: list[torch.Tensor], orders: list[list[int]]) -> torch.Tensor:
    """arXiv 2001.06782, algorithm 1, on flat vectors."""
    total = torch.zeros_like(grads[0])
    for g, order in zip(grads, orders, strict=True):
        g = g.clone()
        for j in order:
            if torch.dot(g, grads[j]) < 0:
                g = g - torch.dot(g, grads[j]) / torch.dot(grads[j], grads[j]) * grads[j]
        total += g
    return total


def orders_of(count: int, seed: int, step: int) -> list[list[int]]:
    gen = torch.Generator().manual_seed(several.mix(seed, step) >> 1)
    return [[j for j in torch.randperm(count, generator=gen).tolist() if j != i] for i in range(count)]


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pcgrad_is_algorithm_1(count, reduction, dtype):
    params, conflicts = parameters(*SHAPES, dtype=dtype), 0
    for step in range(5):
        made = task_losses(params, count, seed=step)
        each = [flat(torch.autograd.grad(loss, params, retain_graph=True)) for loss in made]
        conflicts += sum(bool(torch.dot(a, b) < 0) for a in each for b in each)
        fusedopt.pcgrad(made, params, reduction=reduction, seed=9, step=step)
        want = by_hand(each, orders_of(count, 9, step)) / (count if reduction == "mean" else 1)
        got = flat([p.grad for p in params])
        assert (got - want).norm() <= (1e-12 if dtype == torch.float64 else 1e-6) * want.norm()
    assert (conflicts > 0) == (count > 1)


def test_two_tasks_match_the_package():
    """With two tasks the order is no matter."""
    random.seed(0)
    one, two = parameters(*SHAPES, dtype=torch.float64), parameters(*SHAPES, dtype=torch.float64)
    opt = fusedopt.AdamW(one, lr=0.05, weight_decay=0.0)
    package = PackagePCGrad(torch.optim.AdamW(two, lr=0.05, weight_decay=0.0), reduction="mean")
    for step in range(10):
        fusedopt.pcgrad(task_losses(one, 2, seed=step), one, reduction="mean")
        opt.step()
        package.zero_grad()
        package.pc_backward(task_losses(two, 2, seed=step))
        package.step()
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_orders_differ_and_repeat():
    assert len({str(orders_of(4, 0, step)) for step in range(6)}) > 3
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    for params in (one, two):
        fusedopt.pcgrad(task_losses(params, 4), params, seed=1, step=3)
    assert_same_bits([p.grad for p in one], [p.grad for p in two])


def test_parameters_that_not_every_loss_reaches():
    a, b, c = parameters((3,), (4,), (2,), dtype=torch.float64)
    c.requires_grad_(False)
    unreached = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    first, second = (a**2).sum() + b.sum(), -(a * 3).sum()
    grads = [
        [2 * a.detach(), torch.ones(4, dtype=torch.float64)],
        [torch.full((3,), -3.0, dtype=torch.float64), torch.zeros(4)],
    ]
    want = by_hand([flat(g) for g in grads], [[1], [0]])
    fusedopt.pcgrad([first, second], [a, b, c, unreached])
    torch.testing.assert_close(flat([a.grad, b.grad]), want)
    assert c.grad is None and unreached.grad is None


def test_pcgrad_refusals():
    (p,) = parameters((3,))
    with pytest.raises(ValueError, match="0 losses"):
        fusedopt.pcgrad([], [p])
    with pytest.raises(ValueError, match="'max'"):
        fusedopt.pcgrad([p.sum()], [p], reduction="max")


# Bloop


def bloop(mains, auxiliaries, weight, decay):
    e, out = torch.zeros_like(mains[0]), []
    for g, a in zip(mains, auxiliaries, strict=True):
        e = decay * e + (1 - decay) * g
        out.append(g + weight * (a - torch.dot(a, e) / torch.dot(e, e) * e))
    return out


@pytest.mark.parametrize("rule", ["sgd", "adamw", "lion"])
@pytest.mark.parametrize("steps, dtype, bound", [(10, torch.float64, 1e-10), (200, torch.float32, 1e-5)])
def test_bloop(rule, steps, dtype, bound):
    options = {"sgd": {"lr": 0.002, "momentum": 0.9}, "adamw": {"lr": 0.01}, "lion": {"lr": 0.003}}[rule]
    mine, theirs = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=torch.float64)
    for p, q in zip(mine, theirs, strict=True):
        q.data.copy_(p.data)
    start = flat(theirs)
    transform = tf.Bloop(weight=0.7, decay=0.8)
    opt = fusedopt.create(rule, mine, gradient_transforms=[transform], **options)
    other = fusedopt.create(rule, theirs, backend="reference", **options)
    mains, auxiliaries = [], []
    for step in range(steps):
        main, auxiliary = task_losses(mine, 2, seed=step)
        for p in mine:
            p.grad = None
        main.backward()
        fusedopt.auxiliary_backward(auxiliary, mine)
        mains.append(flat([p.grad for p in mine]))
        auxiliaries.append(flat([p.auxiliary_grad for p in mine]))
        wanted = bloop(mains, auxiliaries, 0.7, 0.8)[-1].split([p.numel() for p in theirs])
        for q, g in zip(theirs, wanted, strict=True):
            q.grad = g.view(q.shape)
        opt.step()
        other.step()
        assert all(p.auxiliary_grad is None for p in mine)
    moved = (flat(theirs) - start).abs().max()
    assert (flat(mine) - flat(theirs)).abs().max() <= bound * moved


def test_bloop_without_an_auxiliary_loss_and_over_a_resume():
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    opts = [fusedopt.AdamW(ps, gradient_transforms=t) for ps, t in ((one, [tf.Bloop()]), (two, []))]
    for ps, opt in zip((one, two), opts, strict=True):
        task_losses(ps, 1)[0].backward()
        opt.step()
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    again = fusedopt.AdamW(one, gradient_transforms=[tf.Bloop()])
    again.load_state_dict(opts[0].state_dict())
    assert_same_bits([again.state[p]["bloop_ema"] for p in one], [opts[0].state[p]["bloop_ema"] for p in one])


def test_bloop_options():
    for make in (lambda: tf.Bloop(weight=0.0), lambda: tf.Bloop(decay=1.0)):
        with pytest.raises(ValueError, match="invalid"):
            make()
