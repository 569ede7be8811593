"""Federated averaging with the server's rules: pseudo-gradients, a small run, what is refused."""

import pytest
import torch
from configs import parameters
from oracles.elementwise import FedYogi as Oracle

import fusedopt

SHAPES = ((4, 3), (5,))
SERVERS = {
    "sgd": {"lr": 1.0},
    "fed_adam": {"lr": 0.1},
    "fed_yogi": {"lr": 0.1},
    "fed_adagrad": {"lr": 1.0},
}


def clients(count: int = 3) -> list[list[torch.Tensor]]:
    """Where each client's loss has its minimum."""
    gen = torch.Generator().manual_seed(4)
    return [[torch.randn(s, generator=gen) + 2 for s in SHAPES] for _ in range(count)]


def local_run(params, goal, steps: int = 4) -> list[torch.Tensor]:
    """A client's parameters after a few steps of SGD on |p - goal|^2 / 2 from the server's."""
    mine = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt = fusedopt.SGD(mine, lr=0.1)
    for _ in range(steps):
        for p, g in zip(mine, goal, strict=True):
            p.grad = p.detach() - g
        opt.step()
    return [p.detach() for p in mine]


def loss(params, goals, weights) -> float:
    each = [sum(float((p.detach() - g).square().sum()) for p, g in zip(params, goal, strict=True)) for goal in goals]
    return sum(w * x for w, x in zip(weights, each, strict=True)) / sum(weights)


@pytest.mark.parametrize("name", SERVERS)
def test_a_federated_run_ends_at_the_weighted_mean(name):
    params, goals, weights = parameters(*SHAPES), clients(), [1.0, 2.0, 5.0]
    start = loss(params, goals, weights)
    opt = fusedopt.create(name, params, **SERVERS[name])
    for _ in range(60):
        fusedopt.pseudo_gradient(params, [local_run(params, goal) for goal in goals], weights)
        opt.step()
    best = [sum(w * goal[i] for w, goal in zip(weights, goals, strict=True)) / 8 for i in range(2)]
    least = loss(best, goals, weights)
    assert loss(params, goals, weights) - least < 0.02 * (start - least)


def test_rounds_against_the_equations():
    """FedYogi's rounds, the clients' runs in between, with an oracle that takes the change itself."""
    params, twins, goals = parameters(*SHAPES, dtype=torch.float64), parameters(*SHAPES, dtype=torch.float64), clients()
    goals = [[g.double() for g in goal] for goal in goals]
    opt, oracle = fusedopt.FedYogi(params, lr=0.05, backend="reference"), Oracle(twins, lr=0.05)
    for _ in range(12):
        fusedopt.pseudo_gradient(params, [local_run(params, goal) for goal in goals])
        for i, q in enumerate(twins):
            runs = [local_run(twins, goal)[i] - q.detach() for goal in goals]
            q.grad = -torch.stack(runs).mean(0)
        opt.step()
        oracle.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weights", [None, [1, 3], [0.0, 2.0]])
def test_sgd_at_rate_one_averages(weights):
    params, ends = parameters(*SHAPES), clients(2)
    fusedopt.pseudo_gradient(params, iter([iter(end) for end in ends]), weights)
    fusedopt.SGD(params, lr=1.0).step()
    w = [0.5, 0.5] if weights is None else [x / sum(weights) for x in weights]
    for i, p in enumerate(params):
        torch.testing.assert_close(p.detach(), w[0] * ends[0][i] + w[1] * ends[1][i], rtol=1e-5, atol=1e-6)


def test_sixteen_bits_are_summed_in_fp32():
    p = torch.nn.Parameter(torch.full((3,), 256.0, dtype=torch.bfloat16))
    ends = [[torch.full((3,), 256.0 - 0.25)] for _ in range(8)]  # one of them is less than bf16's next value
    fusedopt.pseudo_gradient([p], ends)
    assert p.grad.dtype == torch.bfloat16 and p.grad.tolist() == [0.25] * 3


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: ([], None), "there is no client"),
        (lambda p: ([p[:1]], None), "client 0 has 1 parameters, the server 2"),
        (lambda p: ([p, [p[0], p[0]]], None), r"parameter 1 of client 1 has shape \(4, 3\), the server's \(5,\)"),
        (lambda p: ([p], [1.0, 2.0]), "2 weights for 1 clients"),
        (lambda p: ([p], [0.0]), "weights .*; they are 0 or more, and not all 0"),
        (lambda p: ([p, p], [2.0, -1.0]), "weights .*; they are 0 or more"),
        (lambda p: ([p], [float("nan")]), "weights .*; they are 0 or more"),
    ],
)
def test_what_is_refused_sets_no_gradient(make, message):
    params = parameters(*SHAPES)
    with pytest.raises(ValueError, match=message):
        fusedopt.pseudo_gradient(params, *make(params))
    assert all(p.grad is None for p in params)


def test_options_out_of_range():
    for cls in (fusedopt.FedAdam, fusedopt.FedYogi, fusedopt.FedAdagrad):
        with pytest.raises(ValueError, match="Invalid tau value: 0.0"):
            cls(parameters((2,)), tau=0.0)
    with pytest.raises(ValueError, match="Invalid beta parameter at index 0: 1.0"):
        fusedopt.FedAdagrad(parameters((2,)), beta1=1.0)
