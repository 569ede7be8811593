"""Grams: Cao et al., "Grams: Gradient Descent with Adaptive Momentum Scaling" (arXiv 2412.17107), algorithm 1."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("beta1", "weight1", "beta2", "weight2", "debias", "eps")


def scalars(h, step):
    beta1, beta2 = h["betas"]
    return beta1, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** 0.5 / (1 - beta1**step), h["eps"]


def reference(g, p, m, v, *, beta1, weight1, beta2, weight2, debias, eps):
    m, v = m * beta1 + g * weight1, v * beta2 + g.square() * weight2
    return torch.sign(g) * m.abs() * debias / (v.sqrt() + eps), m, v


@jit
def direction(g, p, exp_avg, exp_avg_sq, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g
    sign = (g > 0).to(tl.float32) - (g < 0).to(tl.float32)
    u = sign * tl.abs(exp_avg) * tl.load(c + 4) / (tl.sqrt(exp_avg_sq) + tl.load(c + 5))
    return u, exp_avg, exp_avg_sq


GRAMS = register(
    Rule("grams", (State("exp_avg"), State("exp_avg_sq", signed=False)), NAMES, scalars, reference, direction)
)


@register_optimizer("grams")
class Grams(FusedOptimizer):
    """Grams: Adam's magnitude with the gradient's sign:
    p -= lr * sqrt(1 - beta2^t) / (1 - beta1^t) * sign(g) |m| / (sqrt(v) + eps).

    For AdamW's settings as they are; a step never goes up the present gradient.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the moments.
        eps: added to the root of the second moment before its bias is corrected.
        weight_decay: decoupled.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2412.17107, algorithm 1.
    """

    decay_mode = "decoupled"

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, **options):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return GRAMS
