"""Yogi: Zaheer et al., "Adaptive Methods for Nonconvex Optimization" (NeurIPS 2018), algorithm 2, with bias correction."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("beta1", "weight1", "weight2", "debias1", "debias2_sqrt", "eps")


def scalars(h, step):
    beta1, beta2 = h["betas"]
    return beta1, 1 - beta1, 1 - beta2, 1 / (1 - beta1**step), (1 - beta2**step) ** -0.5, h["eps"]


def reference(g, p, m, v, *, beta1, weight1, weight2, debias1, debias2_sqrt, eps):
    m, square = m * beta1 + g * weight1, g.square()
    v = v - weight2 * square * torch.sign(v - square)
    return m * debias1 / (v.sqrt() * debias2_sqrt + eps), m, v


@jit
def direction(g, p, exp_avg, exp_avg_sq, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    square = g * g
    change = tl.load(c + 2) * square
    above = (exp_avg_sq > square).to(tl.float32) - (exp_avg_sq < square).to(tl.float32)
    exp_avg_sq = exp_avg_sq - change * above
    u = exp_avg * tl.load(c + 3) / (tl.sqrt(exp_avg_sq) * tl.load(c + 4) + tl.load(c + 5))
    return u, exp_avg, exp_avg_sq


def initial(h):
    return h["initial_accumulator"]


YOGI = register(
    Rule(
        "yogi",
        (State("exp_avg", initial=initial), State("exp_avg_sq", signed=False, initial=initial)),
        NAMES,
        scalars,
        reference,
        direction,
    )
)


@register_optimizer("yogi")
class Yogi(FusedOptimizer):
    """Yogi: Adam with v = v - (1 - beta2) g^2 sign(v - g^2); p -= lr * m_hat / (sqrt(v / (1 - beta2^t)) + eps).

    The second moment changes by at most (1 - beta2) g^2, so that the effective rate does not jump up when gradients become
    small: for sparse gradients and heavy-tailed noise.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the moments.
        eps: added to the denominator.
        initial_accumulator: what both moments start at.
        weight_decay: coefficient of the decay.
        decoupled_weight_decay: take the decay from the parameter instead of adding it to the gradient.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: Zaheer et al., NeurIPS 2018, algorithm 2; bias correction and initial value as its implementations have them.
    """

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.999), eps=1e-3, initial_accumulator=1e-6, weight_decay=0.0,
                 decoupled_weight_decay=False, **options):  # fmt: skip
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        check_nonnegative(initial_accumulator, "initial_accumulator value")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "initial_accumulator": initial_accumulator}
        defaults |= {"weight_decay": weight_decay, "decoupled_weight_decay": decoupled_weight_decay}
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return YOGI
