"""Adamax: Kingma and Ba (arXiv 1412.6980), algorithm 2, with torch.optim's eps inside the maximum."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer


def scalars(h, step):
    beta1, beta2 = h["betas"]
    return beta1, 1 - beta1, beta2, 1 / (1 - beta1**step), h["eps"]


def reference(g, p, m, v, *, beta1, weight1, beta2, debias1, eps):
    m = m * beta1 + g * weight1
    v = torch.maximum(v * beta2, g.abs() + eps)
    return m * debias1 / v, m, v


@jit
def direction(g, p, exp_avg, exp_inf, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    size = tl.abs(g) + tl.load(c + 4)
    exp_inf = tl.maximum(tl.load(c + 2) * exp_inf, size, propagate_nan=tl.PropagateNan.ALL)
    return exp_avg * tl.load(c + 3) / exp_inf, exp_avg, exp_inf


ADAMAX = register(
    Rule(
        "adamax",
        (State("exp_avg"), State("exp_inf", signed=False)),
        ("beta1", "weight1", "beta2", "debias1", "eps"),
        scalars,
        reference,
        direction,
    )
)


@register_optimizer("adamax")
class Adamax(FusedOptimizer):
    """Adamax, as `torch.optim.Adamax`: p -= lr / (1 - beta1^t) * m / v, v = max(beta2 v, |g| + eps).

    Adam with the largest recent gradient in place of the root mean square: steadier where gradients come in bursts.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the first moment and of the maximum.
        eps: added to |g|.
        weight_decay: L2 coefficient.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 1412.6980, algorithm 2 (which has no eps).
    """

    def __init__(self, params, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **options):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return ADAMAX
