"""LaProp: Ziyin, Wang and Ueda, "LaProp: Separating Momentum and Adaptivity in Adam" (arXiv 2002.04839), algorithm 1."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("beta1", "weight1", "beta2", "weight2", "debias1", "debias2_sqrt", "eps", "centre")


def scalars(h, step):
    """centre: 1 once the mean of the gradients rests on enough of them."""
    beta1, beta2 = h["betas"]
    centre = 1.0 * (step > h["centered_after"])
    return beta1, 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta1**step), (1 - beta2**step) ** -0.5, h["eps"], centre


def _momentum(g, m, variance, beta1, weight1, debias1, debias2_sqrt, eps):
    m = beta1 * m + weight1 * g / (variance.sqrt() * debias2_sqrt + eps)
    return m * debias1, m


def reference(g, p, m, v, *, beta2, weight2, centre, **named):
    v = beta2 * v + weight2 * g.square()
    return *_momentum(g, m, v, **named), v


def reference_amsgrad(g, p, m, v, v_max, *, beta2, weight2, centre, **named):
    v = beta2 * v + weight2 * g.square()
    v_max = torch.maximum(v_max, v)
    return *_momentum(g, m, v_max, **named), v, v_max


def reference_centered(g, p, m, v, n, *, beta2, weight2, centre, **named):
    v, n = beta2 * v + weight2 * g.square(), beta2 * n + weight2 * g
    return *_momentum(g, m, (v - centre * n.square()).clamp(min=0), **named), v, n


@jit
def second(g, exp_avg_sq, c):
    return tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g


@jit
def blend(g, exp_avg, variance, c):
    scaled = g / (tl.sqrt(variance) * tl.load(c + 5) + tl.load(c + 6))
    return tl.load(c) * exp_avg + tl.load(c + 1) * scaled


@jit
def direction(g, p, exp_avg, exp_avg_sq, c):
    exp_avg_sq = second(g, exp_avg_sq, c)
    exp_avg = blend(g, exp_avg, exp_avg_sq, c)
    return exp_avg * tl.load(c + 4), exp_avg, exp_avg_sq


@jit
def direction_amsgrad(g, p, exp_avg, exp_avg_sq, max_exp_avg_sq, c):
    exp_avg_sq = second(g, exp_avg_sq, c)
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    exp_avg = blend(g, exp_avg, max_exp_avg_sq, c)
    return exp_avg * tl.load(c + 4), exp_avg, exp_avg_sq, max_exp_avg_sq


@jit
def direction_centered(g, p, exp_avg, exp_avg_sq, grad_avg, c):
    exp_avg_sq = second(g, exp_avg_sq, c)
    grad_avg = tl.load(c + 2) * grad_avg + tl.load(c + 3) * g
    variance = exp_avg_sq - tl.load(c + 7) * grad_avg * grad_avg
    variance = tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL)
    exp_avg = blend(g, exp_avg, variance, c)
    return exp_avg * tl.load(c + 4), exp_avg, exp_avg_sq, grad_avg


MOMENTS = (State("exp_avg"), State("exp_avg_sq", signed=False))
LARGEST = State("max_exp_avg_sq", signed=False)
LAPROP = register(Rule("laprop", MOMENTS, NAMES, scalars, reference, direction))
AMSGRAD = register(Rule("laprop_amsgrad", (*MOMENTS, LARGEST), NAMES, scalars, reference_amsgrad, direction_amsgrad))
CENTERED = register(
    Rule("laprop_centered", (*MOMENTS, State("grad_avg")), NAMES, scalars, reference_centered, direction_centered)
)


@register_optimizer("laprop")
class LaProp(FusedOptimizer):
    """LaProp: Adam that normalises before it averages: m = beta1 m + (1 - beta1) g / (sqrt(v / (1 - beta2^t)) + eps),
    p -= lr * m / (1 - beta1^t).

    Where Adam grows unstable: no gradient, however old its v, counts for more than its normalised size, so any betas converge.

    The learning rate stays outside m, as in timm and pytorch_optimizer. The authors' code has it inside, which is the same
    for a constant one; and it decays by weight_decay itself where this takes lr * weight_decay.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the momentum and of the second moment.
        eps: added to the denominator.
        weight_decay: decoupled.
        amsgrad: use the running maximum of v in the denominator.
        centered: divide by the estimated standard deviation, v less the square of the mean, after `centered_after` steps.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range, or both amsgrad and centered are asked for.
    Source: arXiv 2002.04839, algorithm 1.
    """

    decay_mode = "decoupled"

    def __init__(self, params, lr=4e-4, betas=(0.9, 0.999), eps=1e-15, weight_decay=0.0, amsgrad=False, centered=False,
                 centered_after=10, **options):  # fmt: skip
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        check_nonnegative(centered_after, "centered_after value")
        if amsgrad and centered:
            raise ValueError("LaProp: amsgrad takes the largest v and centered its variance. Choose one of them.")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, {**defaults, "centered": centered, "centered_after": centered_after}, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return CENTERED if group["centered"] else AMSGRAD if group["amsgrad"] else LAPROP
