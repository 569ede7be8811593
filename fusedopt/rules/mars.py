"""MARS-AdamW and MARS-Lion: Yuan et al., "MARS: Unleashing the Power of Variance Reduction" (arXiv 2411.10438), algorithms 2, 3."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer
from fusedopt.rules.adam import ADAM
from fusedopt.rules.lion import LION

CORRECTED = ("beta1", "weight1", "change", "shrink")


def corrected_scalars(h, step):
    beta1 = h["betas"][0]
    return beta1, 1 - beta1, h["gamma"] * beta1 / (1 - beta1), 1.0


def adamw_scalars(h, step):
    beta2 = h["betas"][1]
    debias1, debias2 = 1 / (1 - h["betas"][0] ** step), 1 / (1 - beta2**step) ** 0.5
    return (*corrected_scalars(h, step), beta2, 1 - beta2, debias1, debias2, h["eps"])


def sums(memory, square, nothing, c):
    return {}, {"shrink": 1 / square.sqrt().clamp(min=1.0)}


def adamw_terms(g, p, m, v, previous, *, change, **_):
    square = (g + (g - previous) * change).square()
    return square, torch.zeros_like(square)


def lion_terms(g, p, m, previous, *, change, **_):
    square = (g + (g - previous) * change).square()
    return square, torch.zeros_like(square)


def adamw_reference(
    g, p, m, v, previous, *, beta1, weight1, change, shrink, beta2, weight2, debias1, debias2_sqrt, eps
):
    corrected = (g + (g - previous) * change) * shrink
    m, v = m * beta1 + corrected * weight1, v * beta2 + corrected.square() * weight2
    return m * debias1 / (v.sqrt() * debias2_sqrt + eps), m, v, g.clone()


def lion_reference(g, p, m, previous, *, beta1, weight1, change, shrink):
    m = m * beta1 + (g + (g - previous) * change) * shrink * weight1
    return m.sign(), m, g.clone()


@jit
def adamw_terms_triton(g, p, exp_avg, exp_avg_sq, previous_grad, c):
    corrected = g + tl.load(c + 2) * (g - previous_grad)
    return corrected * corrected, g * 0.0


@jit
def lion_terms_triton(g, p, exp_avg, previous_grad, c):
    corrected = g + tl.load(c + 2) * (g - previous_grad)
    return corrected * corrected, g * 0.0


@jit
def adamw_direction(g, p, exp_avg, exp_avg_sq, previous_grad, c):
    corrected = (g + tl.load(c + 2) * (g - previous_grad)) * tl.load(c + 3)
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * corrected
    exp_avg_sq = tl.load(c + 4) * exp_avg_sq + tl.load(c + 5) * corrected * corrected
    u = exp_avg * tl.load(c + 6) / (tl.sqrt(exp_avg_sq) * tl.load(c + 7) + tl.load(c + 8))
    return u, exp_avg, exp_avg_sq, g


@jit
def lion_direction(g, p, exp_avg, previous_grad, c):
    corrected = (g + tl.load(c + 2) * (g - previous_grad)) * tl.load(c + 3)
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * corrected
    return (exp_avg > 0).to(tl.float32) - (exp_avg < 0).to(tl.float32), exp_avg, g


MARS_ADAMW = register(
    Rule(
        "mars_adamw",
        (State("exp_avg"), State("exp_avg_sq", signed=False), State("previous_grad")),
        (*CORRECTED, "beta2", "weight2", "debias1", "debias2_sqrt", "eps"),
        adamw_scalars,
        adamw_reference,
        adamw_direction,
        measures=Measures(("shrink",), sums=sums, terms=adamw_terms, terms_triton=adamw_terms_triton),
    )
)
MARS_LION = register(
    Rule(
        "mars_lion",
        (State("exp_avg"), State("previous_grad")),
        CORRECTED,
        corrected_scalars,
        lion_reference,
        lion_direction,
        measures=Measures(("shrink",), sums=sums, terms=lion_terms, terms_triton=lion_terms_triton),
    )
)


class _Mars(FusedOptimizer):
    decay_mode = "decoupled"

    def __init__(self, params, lr, betas, gamma, eps, weight_decay, variance_reduction, options):
        check_betas(betas, options)
        check_nonnegative(gamma, "gamma value")
        check_nonnegative(eps, "epsilon value")
        defaults = {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "variance_reduction": variance_reduction, "amsgrad": False}, **options)


@register_optimizer("mars_adamw")
class MARSAdamW(_Mars):
    """MARS-AdamW: AdamW on c = g + gamma beta1 / (1 - beta1) (g - g'), g' the last step's gradient, with c / max(1, |c|) in its
    place, |c| per tensor: m = beta1 m + (1 - beta1) c, v = beta2 v + (1 - beta2) c^2,
    p -= lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p).

    Pretraining of transformers with fewer steps than AdamW's; one state more. Meant for matrices: give biases, norms and
    embeddings a group with variance_reduction=False, which steps AdamW.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the moments.
        gamma: strength of the variance reduction; 0 leaves AdamW with gradients clipped per tensor.
        eps: added to the denominator.
        weight_decay: decoupled decay.
        variance_reduction: False steps AdamW with the group's numbers. Per group.
        **options: shared options, see `FusedOptimizer`. With variance_reduction no projection and no differentiable=True.

    g' is zero at the first step, so c is then g (1 + gamma beta1 / (1 - beta1)), as in the published code.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2411.10438, algorithm 2, with the last step's gradient for that of the last parameters ("MARS-approx").
    """

    def __init__(
        self,
        params,
        lr=3e-3,
        betas=(0.95, 0.99),
        gamma=0.025,
        eps=1e-8,
        weight_decay=0.0,
        variance_reduction=True,
        **options,
    ):
        super().__init__(params, lr, betas, gamma, eps, weight_decay, variance_reduction, options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return MARS_ADAMW if group["variance_reduction"] else ADAM


@register_optimizer("mars_lion")
class MARSLion(_Mars):
    """MARS-Lion: p -= lr (sign(m) + weight_decay p), m = beta1 m + (1 - beta1) c with the corrected and clipped gradient c of
    `MARSAdamW`.

    As Lion, for large batches and small learning rates (a tenth of AdamW's); as many bytes of states as AdamW.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rate of m, and that of a group without variance reduction for Lion's m.
        gamma, weight_decay: as in `MARSAdamW`.
        variance_reduction: False steps Lion with the group's numbers. Per group.
        **options: shared options, see `FusedOptimizer`. With variance_reduction no projection and no differentiable=True.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2411.10438, algorithm 3, with the last step's gradient for that of the last parameters ("MARS-approx").
    """

    def __init__(
        self, params, lr=3e-4, betas=(0.95, 0.99), gamma=0.025, weight_decay=0.0, variance_reduction=True, **options
    ):
        super().__init__(params, lr, betas, gamma, 1e-8, weight_decay, variance_reduction, options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return MARS_LION if group["variance_reduction"] else LION
