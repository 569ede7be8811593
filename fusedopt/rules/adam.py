"""Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1), AdamW (arXiv 1711.05101, algorithm 2), AMSGrad (arXiv 1904.09237)."""

from __future__ import annotations

import torch

from fusedopt.kernels.arithmetic import div
from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer
from fusedopt.rules.cautious import agree, cautious, check_cautious, keep

NAMES = ("beta1", "weight1", "beta2", "weight2", "debias1", "debias2_sqrt", "eps")


def scalars(h, step):
    beta1, beta2 = h["betas"]
    return beta1, 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta1**step), (1 - beta2**step) ** -0.5, h["eps"]


def reference(g, p, m, v, *, beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps):
    m = torch.lerp(g, m, beta1)
    v = v * beta2 + g.square() * weight2
    m_hat, v_hat_root = m * debias1, v.sqrt() * debias2_sqrt
    return m_hat / (v_hat_root + eps), m, v


def reference_amsgrad(g, p, m, v, v_max, *, debias1, debias2_sqrt, eps, **rest):
    _, m, v = reference(g, p, m, v, debias1=debias1, debias2_sqrt=debias2_sqrt, eps=eps, **rest)
    v_max = torch.maximum(v_max, v)
    return m * debias1 / (v_max.sqrt() * debias2_sqrt + eps), m, v, v_max


@jit
def moments(g, exp_avg, exp_avg_sq, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g
    return exp_avg, exp_avg_sq


@jit
def ratio(exp_avg, second, c):
    return div(exp_avg * tl.load(c + 4), tl.sqrt(second) * tl.load(c + 5) + tl.load(c + 6))


@jit
def direction(g, p, exp_avg, exp_avg_sq, c):
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, c)
    return ratio(exp_avg, exp_avg_sq, c), exp_avg, exp_avg_sq


@jit
def direction_amsgrad(g, p, exp_avg, exp_avg_sq, max_exp_avg_sq, c):
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, c)
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    return ratio(exp_avg, max_exp_avg_sq, c), exp_avg, exp_avg_sq, max_exp_avg_sq


MOMENTS = (State("exp_avg"), State("exp_avg_sq", signed=False))
ADAM = register(Rule("adam", MOMENTS, NAMES, scalars, reference, direction))
AMSGRAD = register(
    Rule(
        "adam_amsgrad",
        (*MOMENTS, State("max_exp_avg_sq", signed=False)),
        NAMES,
        scalars,
        reference_amsgrad,
        direction_amsgrad,
    )
)


@jit
def direction_cautious(g, p, exp_avg, exp_avg_sq, c):
    u, exp_avg, exp_avg_sq = direction(g, p, exp_avg, exp_avg_sq, c)
    return keep(u, g), exp_avg, exp_avg_sq


@jit
def direction_amsgrad_cautious(g, p, exp_avg, exp_avg_sq, max_exp_avg_sq, c):
    u, exp_avg, exp_avg_sq, max_exp_avg_sq = direction_amsgrad(g, p, exp_avg, exp_avg_sq, max_exp_avg_sq, c)
    return keep(u, g), exp_avg, exp_avg_sq, max_exp_avg_sq


@jit
def terms(g, p, exp_avg, exp_avg_sq, c):
    u, _, _ = direction(g, p, exp_avg, exp_avg_sq, c)
    return p * 0.0 + 1.0, agree(u, g)


@jit
def terms_amsgrad(g, p, exp_avg, exp_avg_sq, max_exp_avg_sq, c):
    u, _, _, _ = direction_amsgrad(g, p, exp_avg, exp_avg_sq, max_exp_avg_sq, c)
    return p * 0.0 + 1.0, agree(u, g)


ADAM_CAUTIOUS = register(cautious(ADAM, "mean", direction_cautious, terms))
AMSGRAD_CAUTIOUS = register(cautious(AMSGRAD, "mean", direction_amsgrad_cautious, terms_amsgrad, heavy=("plain",)))


@register_optimizer("adam")
class Adam(FusedOptimizer):
    """Adam with coupled (L2) weight decay, as `torch.optim.Adam`.

    p -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps), with moments m, v of g + weight_decay p.

    For results that must compare with published Adam runs. Where weights are decayed, AdamW: L2 decay here is divided by
    sqrt(v) as the gradient is, and so acts least where gradients are large.

    Args:
        params: parameters, named parameters, or groups of them, as for any `torch.optim.Optimizer`.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the first and second moment.
        eps: added to the denominator.
        weight_decay: L2 coefficient.
        amsgrad: use the running maximum of v in the denominator.
        cautious: move only where the update has the gradient's sign, scaled by 1 / max(kept / n, 1e-3) of a tensor's n elements
            ("mean", also True) or n / (kept + 1) ("count"). Takes a second pass over the states and no projection.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 1412.6980, algorithm 1; AMSGrad: arXiv 1904.09237, algorithm 2 (with torch's bias correction); cautious: arXiv
        2411.16085, algorithm 1.
    """

    decay_mode = "coupled"

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, *,
                 cautious=False, **options):  # fmt: skip
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        check_cautious(cautious)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, {**defaults, "cautious": cautious}, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        if group["cautious"]:
            return AMSGRAD_CAUTIOUS if group["amsgrad"] else ADAM_CAUTIOUS
        return AMSGRAD if group["amsgrad"] else ADAM


@register_optimizer("adamw")
class AdamW(Adam):
    """Adam with decoupled weight decay, as `torch.optim.AdamW`: p -= lr * weight_decay * p apart from the Adam update.

    The default for transformers, from pretraining to fine-tuning; with state_format="int8" a quarter of its state.

    Arguments and errors are those of `Adam`; `weight_decay` is 1e-2 by default. Source: arXiv 1711.05101, algorithm 2.
    """

    decay_mode = "decoupled"

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, *,
                 cautious=False, **options):  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, cautious=cautious, **options)
