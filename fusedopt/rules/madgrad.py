"""MADGRAD: Defazio and Jelassi, "Adaptivity without Compromise: A Momentumized, Adaptive, Dual Averaged Gradient Method for
Stochastic Optimization" (arXiv 2101.11075), algorithm 1."""

from __future__ import annotations

from typing import Any

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_fraction, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("weight", "pull", "eps")


def rate(h):
    """eps also keeps a learning rate that a schedule brings near zero from weighing gradients with nothing."""
    return h["lr"] + h["eps"] * (h["lr"] != 0)


def scalars(h, step):
    return rate(h) * step**0.5, 1 - h["momentum"], h["eps"]


def displacement(h, step):
    return 1.0


def decay(h, step):
    return rate(h) * h["weight_decay"]


def distance(total, squares, eps):
    root = squares.pow(1 / 3) + eps
    return torch.where(root > 0, total / root, 0 * total)


def reference(g, p, squares, total, *, weight, pull, eps):
    before = distance(total, squares, eps)
    squares, total = squares + weight * g.square(), total + weight * g
    return distance(total, squares, eps) - before, squares, total


def reference_momentum(g, p, squares, total, start, *, weight, pull, eps):
    squares, total = squares + weight * g.square(), total + weight * g
    z = start - distance(total, squares, eps)
    return pull * (p - z), squares, total, start.clone()


@jit
def cube_root(x):
    """Of x >= 0: exp2 of a third of log2 loses 3 bits, which a step of Newton brings back."""
    some = x > 1e-37
    y = tl.exp2(tl.log2(tl.where(some, x, 1.0)) * 0.3333333333333333)
    y = y - (y - x / (y * y)) * 0.3333333333333333
    return tl.where(some, y, x * 0.0)


@jit
def distance_triton(s, grad_sum_sq, c):
    root = cube_root(grad_sum_sq) + tl.load(c + 2)
    some = root > 0.0
    return tl.where(some, s / tl.where(some, root, 1.0), s * 0.0)


@jit
def direction(g, p, grad_sum_sq, s, c):
    before = distance_triton(s, grad_sum_sq, c)
    grad_sum_sq = grad_sum_sq + tl.load(c) * g * g
    s = s + tl.load(c) * g
    return distance_triton(s, grad_sum_sq, c) - before, grad_sum_sq, s


@jit
def direction_momentum(g, p, grad_sum_sq, s, x0, c):
    grad_sum_sq = grad_sum_sq + tl.load(c) * g * g
    s = s + tl.load(c) * g
    return tl.load(c + 1) * ((p - x0) + distance_triton(s, grad_sum_sq, c)), grad_sum_sq, s, x0


SUMS = (State("grad_sum_sq", signed=False, wide=True), State("s", wide=True))
RATES: dict[str, Any] = {"step_size": displacement, "decay": decay}
MADGRAD_PLAIN = register(Rule("madgrad", SUMS, NAMES, scalars, reference, direction, **RATES))
MADGRAD_MOMENTUM = register(
    Rule(
        "madgrad_momentum",
        (*SUMS, State("x0", position=lambda h: 1.0)),
        NAMES,
        scalars,
        reference_momentum,
        direction_momentum,
        **RATES,
        heavy=("plain",),
    )
)


@register_optimizer("madgrad")
class MADGRAD(FusedOptimizer):
    """MADGRAD: p = momentum p + (1 - momentum) z, z = x0 - s / (v^(1/3) + eps), with s and v the sums of all
    (lr + eps) sqrt(t) g and (lr + eps) sqrt(t) g^2 so far and x0 the parameter before the first step.

    For problems where SGD generalises better than Adam: dual averaging with a cube root in place of the square root. Needs less
    weight decay than either, often none.

    The states are sums and a point, which stay in fp32 under every state_format, and it takes no projection.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        momentum: share of the parameter that stays; 0 needs no x0.
        eps: added to the cube root, and to the learning rate where that is not 0.
        weight_decay: coefficient of the decay.
        decoupled_weight_decay: take the decay from the parameter instead of adding it to the gradient.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2101.11075, algorithm 1, with eps as in the authors' code, whose state names these are.
    """

    def __init__(
        self, params, lr=1e-2, momentum=0.9, weight_decay=0.0, eps=1e-6, decoupled_weight_decay=False, **options
    ):
        check_nonnegative(eps, "epsilon value")
        check_fraction(momentum, "momentum value")
        defaults = {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "decoupled_weight_decay": decoupled_weight_decay}, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return MADGRAD_MOMENTUM if group["momentum"] else MADGRAD_PLAIN
