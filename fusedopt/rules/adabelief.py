"""AdaBelief: Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients" (arXiv 2010.07468),
algorithm 2, with the rectification of its package."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("beta1", "weight1", "beta2", "weight2", "debias1", "root", "adapt", "plain", "eps")


def scalars(h, step):
    """u = m debias1 (adapt / (root sqrt(s) + eps) + plain). Rectified: root = 1, adapt = r sqrt(1 - beta2^t) or nothing."""
    beta1, beta2 = h["betas"]
    power = beta2**step
    root, adapt, plain = (1 - power) ** -0.5, 1.0, 0.0
    if h["rectify"]:
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * step * power / (1 - power)
        known = 1.0 * (length >= 5)
        r_sq = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        root, adapt, plain = 1.0, (known * r_sq * (1 - power)) ** 0.5, 1 - known
    return beta1, 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta1**step), root, adapt, plain, h["eps"]


def moments(g, m, s, beta1, weight1, beta2, weight2, eps):
    m = m * beta1 + g * weight1
    return m, s * beta2 + (g - m).square() * weight2 + eps


def reference(g, p, m, s, *, beta1, weight1, beta2, weight2, debias1, root, adapt, plain, eps):
    m, s = moments(g, m, s, beta1, weight1, beta2, weight2, eps)
    return m * debias1 * (adapt / (s.sqrt() * root + eps) + plain), m, s


def reference_amsgrad(g, p, m, s, largest, *, beta1, weight1, beta2, weight2, debias1, root, adapt, plain, eps):
    m, s = moments(g, m, s, beta1, weight1, beta2, weight2, eps)
    largest = torch.maximum(largest, s)
    return m * debias1 * (adapt / (largest.sqrt() * root + eps) + plain), m, s, largest


@jit
def belief(g, exp_avg, exp_avg_var, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    surprise = g - exp_avg
    exp_avg_var = tl.load(c + 2) * exp_avg_var + tl.load(c + 3) * surprise * surprise + tl.load(c + 8)
    return exp_avg, exp_avg_var


@jit
def ratio(exp_avg, variance, c):
    rate = tl.load(c + 6) / (tl.sqrt(variance) * tl.load(c + 5) + tl.load(c + 8)) + tl.load(c + 7)
    return exp_avg * tl.load(c + 4) * rate


@jit
def direction(g, p, exp_avg, exp_avg_var, c):
    exp_avg, exp_avg_var = belief(g, exp_avg, exp_avg_var, c)
    return ratio(exp_avg, exp_avg_var, c), exp_avg, exp_avg_var


@jit
def direction_amsgrad(g, p, exp_avg, exp_avg_var, max_exp_avg_var, c):
    exp_avg, exp_avg_var = belief(g, exp_avg, exp_avg_var, c)
    max_exp_avg_var = tl.maximum(max_exp_avg_var, exp_avg_var, propagate_nan=tl.PropagateNan.ALL)
    return ratio(exp_avg, max_exp_avg_var, c), exp_avg, exp_avg_var, max_exp_avg_var


MOMENTS = (State("exp_avg"), State("exp_avg_var", signed=False))
ADABELIEF = register(Rule("adabelief", MOMENTS, NAMES, scalars, reference, direction))
AMSGRAD = register(
    Rule(
        "adabelief_amsgrad",
        (*MOMENTS, State("max_exp_avg_var", signed=False)),
        NAMES,
        scalars,
        reference_amsgrad,
        direction_amsgrad,
    )
)


@register_optimizer("adabelief")
class AdaBelief(FusedOptimizer):
    """AdaBelief: Adam whose second moment is that of the surprise: s = beta2 s + (1 - beta2) (g - m)^2 + eps;
    p -= lr * m_hat / (sqrt(s / (1 - beta2^t)) + eps). eps is added to s at every step and stays in it.

    Takes large steps where gradients agree with their mean. The package's defaults (rectify, eps=1e-16) suit transformers;
    for image classifiers its authors give eps=1e-8.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the moments.
        eps: added to s at every step, and to the denominator.
        weight_decay: coefficient of the decay.
        amsgrad: divide by the running maximum of s.
        decoupled_weight_decay: take the decay from the parameter instead of adding it to the gradient.
        rectify: RAdam's factor in place of the bias correction; p -= lr * m_hat while it is undefined.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2010.07468, algorithm 2; rectification and defaults: package adabelief-pytorch 0.2.
    """

    decay_mode = "decoupled"

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-16, weight_decay=0.0, amsgrad=False,
                 decoupled_weight_decay=True, rectify=True, **options):  # fmt: skip
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        defaults |= {"decoupled_weight_decay": decoupled_weight_decay, "rectify": rectify}
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return AMSGRAD if group["amsgrad"] else ADABELIEF
