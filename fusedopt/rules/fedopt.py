"""FedAdam, FedYogi, FedAdagrad: Reddi et al., "Adaptive Federated Optimization" (arXiv 2003.00295), algorithm 2, server side."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("beta1", "weight1", "keep", "enter", "tau")
STATES = (State("exp_avg"), State("exp_avg_sq", signed=False, initial=lambda h: h["tau"] ** 2))


def scalars(h, step):
    """v <- keep v + enter g^2: a mean, or a sum."""
    beta1, beta2 = h["betas"]
    return beta1, 1 - beta1, *((1.0, 1.0) if h["accumulate"] else (beta2, 1 - beta2)), h["tau"]


def reference(g, p, m, v, *, beta1, weight1, keep, enter, tau):
    m, v = m * beta1 + g * weight1, v * keep + g.square() * enter
    return m / (v.sqrt() + tau), m, v


def reference_yogi(g, p, m, v, *, beta1, weight1, keep, enter, tau):
    m, square = m * beta1 + g * weight1, g.square()
    v = v - enter * square * torch.sign(v - square)
    return m / (v.sqrt() + tau), m, v


@jit
def direction(g, p, exp_avg, exp_avg_sq, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g
    return exp_avg / (tl.sqrt(exp_avg_sq) + tl.load(c + 4)), exp_avg, exp_avg_sq


@jit
def direction_yogi(g, p, exp_avg, exp_avg_sq, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    square = g * g
    change = tl.load(c + 3) * square
    above = (exp_avg_sq > square).to(tl.float32) - (exp_avg_sq < square).to(tl.float32)
    exp_avg_sq = exp_avg_sq - change * above
    return exp_avg / (tl.sqrt(exp_avg_sq) + tl.load(c + 4)), exp_avg, exp_avg_sq


FED_ADAM = register(Rule("fed_adam", STATES, NAMES, scalars, reference, direction))
FED_YOGI = register(Rule("fed_yogi", STATES, NAMES, scalars, reference_yogi, direction_yogi))


def check_tau(tau) -> None:
    if not tau > 0:
        raise ValueError(f"Invalid tau value: {tau}")


@register_optimizer("fed_adam")
class FedAdam(FusedOptimizer):
    """FedAdam, a server's step in federated learning: with D the mean change of the clients' parameters and g = -D,
    m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2; p -= lr m / (sqrt(v) + tau). v starts at tau^2, without bias
    correction.

    For the server of a federated run; `fusedopt.pseudo_gradient` puts -D into p.grad. The paper tunes lr and tau
    together, tau in powers of ten from 1e-5 to 0.1.

    Args:
        params: the server's parameters, or groups of them.
        lr: the server's learning rate, a float or a 1-element tensor.
        betas: decay rates of m and v.
        tau: degree of adaptivity, added to the denominator: smaller is more adaptive.
        weight_decay: L2 coefficient (not in the paper).
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2003.00295, algorithm 2 (FedAdam).
    """

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.99), tau=1e-3, weight_decay=0.0, **options):
        check_betas(betas, options)
        check_tau(tau)
        defaults = {"lr": lr, "betas": betas, "tau": tau, "weight_decay": weight_decay, "accumulate": False}
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return FED_ADAM


@register_optimizer("fed_yogi")
class FedYogi(FedAdam):
    """FedYogi, a server's step in federated learning: `FedAdam` with v = v - (1 - beta2) g^2 sign(v - g^2) and the same
    p -= lr m / (sqrt(v) + tau).

    For the server of a federated run whose clients differ much: v, which then jumps, changes by at most
    (1 - beta2) g^2 in a round.

    Args:
        params: the server's parameters, or groups of them.
        lr, betas, tau, weight_decay: as in `FedAdam`.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2003.00295, algorithm 2 (FedYogi).
    """

    @classmethod
    def rule_for(cls, group) -> Rule:
        return FED_YOGI


@register_optimizer("fed_adagrad")
class FedAdagrad(FusedOptimizer):
    """FedAdagrad, a server's step in federated learning: `FedAdam` with v = v + g^2 and the same
    p -= lr m / (sqrt(v) + tau).

    For the server of a federated run with sparse features; steps only ever shrink. beta1 is 0 by default, as in the
    paper's experiments.

    Args:
        params: the server's parameters, or groups of them.
        lr, tau, weight_decay: as in `FedAdam`.
        beta1: decay rate of m.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2003.00295, algorithm 2 (FedAdagrad).
    """

    def __init__(self, params, lr=1e-2, beta1=0.0, tau=1e-3, weight_decay=0.0, **options):
        check_betas((beta1, 0.0), options)
        check_tau(tau)
        defaults = {"lr": lr, "betas": (beta1, 0.0), "tau": tau, "weight_decay": weight_decay, "accumulate": True}
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return FED_ADAM
