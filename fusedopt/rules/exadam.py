"""EXAdam: Adly, "EXAdam: The Power of Adaptive Cross-Moments" (arXiv 2412.20302), algorithm 1."""

from __future__ import annotations

import math

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("beta1", "weight1", "beta2", "weight2", "debias1", "debias2", "power1", "power2", "gain", "eps")


def scalars(h, step):
    """power1 and power2 are beta1^t and beta2^t; gain is 1, or log(sqrt(2 (t + 1))) for the growing step."""
    beta1, beta2 = h["betas"]
    power1, power2 = beta1**step, beta2**step
    gain = 1.0
    if h["dynamic_step"]:
        gain = 0.5 * (2 * (step + 1)).log() if isinstance(step, torch.Tensor) else 0.5 * math.log(2 * (step + 1))
    return beta1, 1 - beta1, beta2, 1 - beta2, 1 / (1 - power1), 1 / (1 - power2), power1, power2, gain, h["eps"]


def reference(g, p, m, v, *, beta1, weight1, beta2, weight2, debias1, debias2, power1, power2, gain, eps):
    m, v = m * beta1 + g * weight1, v * beta2 + g.square() * weight2
    d1 = 1 + v / (v + eps) * power2
    d2 = 1 + m.square() / (m.square() + eps) * power1
    return gain * (m + g) * debias1 * d1 / ((v * debias2 * d2).sqrt() + eps), m, v


@jit
def direction(g, p, exp_avg, exp_avg_sq, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g
    eps, square = tl.load(c + 9), exp_avg * exp_avg
    d1 = 1.0 + exp_avg_sq / (exp_avg_sq + eps) * tl.load(c + 7)
    d2 = 1.0 + square / (square + eps) * tl.load(c + 6)
    u = (exp_avg + g) * (tl.load(c + 4) * tl.load(c + 8)) * d1
    return u / (tl.sqrt(exp_avg_sq * tl.load(c + 5) * d2) + eps), exp_avg, exp_avg_sq


EXADAM = register(
    Rule(
        "exadam",
        (State("exp_avg"), State("exp_avg_sq", signed=False)),
        NAMES,
        scalars,
        reference,
        direction,
        heavy=("plain",),
    )
)


@register_optimizer("exadam")
class EXAdam(FusedOptimizer):
    """EXAdam: Adam with bias corrections that cross the moments and the present gradient beside the momentum:
    p -= lr * (m + g) / (1 - beta1^t) * d1 / (sqrt(v d2 / (1 - beta2^t)) + eps),
    d1 = 1 + v / (v + eps) * beta2^t, d2 = 1 + m^2 / (m^2 + eps) * beta1^t.

    For short runs: the present gradient counts as much as the momentum, so steps react at once and are up to twice Adam's.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the moments.
        eps: added to the denominators.
        weight_decay: decoupled.
        dynamic_step: multiply the rate by log(sqrt(2 (t + 1))), as the paper does; the released code has it constant.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2412.20302, algorithm 1.
    """

    decay_mode = "decoupled"

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, dynamic_step=False, **options):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "dynamic_step": dynamic_step}
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return EXADAM
