"""OPT-AMSGrad: Wang, Li, Karimi and Li, "An Optimistic Acceleration of AMSGrad for Nonconvex Optimization" (arXiv 1903.01435),
algorithm 2, with the last gradient as the prediction of the next."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("beta1", "weight1", "beta2", "weight2", "lr", "eps")


def scalars(h, step):
    beta1, beta2 = h["betas"]
    return beta1, 1 - beta1, beta2, 1 - beta2, h["lr"], h["eps"]


def reference(g, p, m, v, v_max, anchor, *, beta1, weight1, beta2, weight2, lr, eps):
    m, v = m * beta1 + g * weight1, v * beta2 + g.square() * weight2
    v_max = torch.maximum(v_max, v)
    anchor = anchor - lr * m / (v_max.sqrt() + eps)
    after = anchor - lr * (beta1 * m + weight1 * g) / (v_max.sqrt() + eps)
    return p - after, m, v, v_max, anchor


@jit
def direction(g, p, exp_avg, exp_avg_sq, max_exp_avg_sq, anchor, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    size = tl.load(c + 4) / (tl.sqrt(max_exp_avg_sq) + tl.load(c + 5))
    anchor = anchor - size * exp_avg
    ahead = tl.load(c) * exp_avg + tl.load(c + 1) * g
    return (p - anchor) + size * ahead, exp_avg, exp_avg_sq, max_exp_avg_sq, anchor


OPT_AMSGRAD = register(
    Rule(
        "opt_amsgrad",
        (
            State("exp_avg"),
            State("exp_avg_sq", signed=False),
            State("max_exp_avg_sq", signed=False),
            State("anchor", position=lambda h: 1.0),
        ),
        NAMES,
        scalars,
        reference,
        direction,
        step_size=lambda h, step: 1.0,
        heavy=("plain",),
    )
)


@register_optimizer("opt_amsgrad")
class OptAMSGrad(FusedOptimizer):
    """Optimistic AMSGrad: w = w - lr m / (sqrt(v_max) + eps), p = w - lr (beta1 m + (1 - beta1) g) / (sqrt(v_max) + eps):
    beside AMSGrad's own point w, the parameter is where the next step is expected to lead.

    For games and other problems whose gradients can be predicted, where plain momentum circles. Without bias correction.

    w ("anchor") starts as p and stays in fp32 under every state_format; there is no projection. The prediction is the last
    gradient; the paper's experiments extrapolate from several.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: L2 coefficient.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 1903.01435, algorithm 2 with m_{t+1} = g_t.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **options):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return OPT_AMSGRAD
