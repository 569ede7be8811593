"""AdaBound and AMSBound: Luo et al., "Adaptive Gradient Methods with Dynamic Bound of Learning Rate" (arXiv 1902.09843),
algorithms 2 and 3, in the form of the authors' code (bias correction, no 1 / sqrt(t))."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("beta1", "weight1", "beta2", "weight2", "rate", "lower", "upper", "eps")


def scalars(h, step):
    """The bounds are shares of the learning rate: a schedule moves them with it."""
    beta1, beta2 = h["betas"]
    rate, final = (1 - beta2**step) ** 0.5 / (1 - beta1**step), h["final_lr"] / h["base_lr"]
    lower, upper = final * (1 - 1 / (h["gamma"] * step + 1)), final * (1 + 1 / (h["gamma"] * step))
    return beta1, 1 - beta1, beta2, 1 - beta2, rate, lower, upper, h["eps"]


def reference(g, p, m, v, *, beta1, weight1, beta2, weight2, rate, lower, upper, eps):
    m, v = m * beta1 + g * weight1, v * beta2 + g.square() * weight2
    return (rate / (v.sqrt() + eps)).clamp(lower, upper) * m, m, v


def reference_amsbound(g, p, m, v, largest, *, beta1, weight1, beta2, weight2, rate, lower, upper, eps):
    m, v = m * beta1 + g * weight1, v * beta2 + g.square() * weight2
    largest = torch.maximum(largest, v)
    return (rate / (largest.sqrt() + eps)).clamp(lower, upper) * m, m, v, largest


@jit
def moments(g, exp_avg, exp_avg_sq, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    return exp_avg, tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g


@jit
def bounded(exp_avg, second, c):
    rate = tl.load(c + 4) / (tl.sqrt(second) + tl.load(c + 7))
    return tl.minimum(tl.maximum(rate, tl.load(c + 5)), tl.load(c + 6)) * exp_avg


@jit
def direction(g, p, exp_avg, exp_avg_sq, c):
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, c)
    return bounded(exp_avg, exp_avg_sq, c), exp_avg, exp_avg_sq


@jit
def direction_amsbound(g, p, exp_avg, exp_avg_sq, max_exp_avg_sq, c):
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, c)
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    return bounded(exp_avg, max_exp_avg_sq, c), exp_avg, exp_avg_sq, max_exp_avg_sq


MOMENTS = (State("exp_avg"), State("exp_avg_sq", signed=False))
ADABOUND = register(Rule("adabound", MOMENTS, NAMES, scalars, reference, direction))
AMSBOUND = register(
    Rule(
        "amsbound",
        (*MOMENTS, State("max_exp_avg_sq", signed=False)),
        NAMES,
        scalars,
        reference_amsbound,
        direction_amsbound,
        heavy=("plain",),
    )
)


@register_optimizer("adabound")
class AdaBound(FusedOptimizer):
    """AdaBound: Adam whose rate per element is clipped between bounds that close in on SGD's final_lr:
    p -= clip(lr * sqrt(1 - beta2^t) / (1 - beta1^t) / (sqrt(v) + eps), lo, hi) * m,
    lo, hi = final_lr * lr / base_lr * (1 - 1 / (gamma t + 1)), (... 1 + 1 / (gamma t)).

    Starts like Adam and ends like SGD with momentum; for image classifiers, where SGD generalises better.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the moments.
        final_lr: the rate of SGD that the bounds close in on.
        gamma: how fast.
        eps: added to the root of the second moment before its bias is corrected.
        weight_decay: coefficient of the decay.
        amsbound: divide by the running maximum of v.
        decoupled_weight_decay: take the decay from the parameter instead of adding it to the gradient.
        base_lr: the rate at which final_lr is meant; a group's own lr when it is added.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 1902.09843, algorithms 2 and 3, as in package adabound 0.0.5; AdaBoundW with decoupled decay.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), final_lr=0.1, gamma=1e-3, eps=1e-8, weight_decay=0.0,
                 amsbound=False, decoupled_weight_decay=False, base_lr=None, **options):  # fmt: skip
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        check_nonnegative(final_lr, "final_lr value")
        if not 0.0 < gamma < 1.0:
            raise ValueError(f"Invalid gamma value: {gamma}; it must be between 0 and 1")
        defaults = {"lr": lr, "betas": betas, "final_lr": final_lr, "gamma": gamma, "eps": eps, "base_lr": base_lr}
        defaults |= {"weight_decay": weight_decay, "amsbound": amsbound}
        super().__init__(params, {**defaults, "decoupled_weight_decay": decoupled_weight_decay}, **options)

    def add_param_group(self, param_group: dict) -> None:
        if isinstance(param_group, dict) and param_group.get("base_lr", self.defaults["base_lr"]) is None:
            base_lr = float(param_group.get("lr", self.defaults["lr"]))
            if base_lr == 0:
                raise ValueError("AdaBound: base_lr, by default the group's lr, is 0. Give base_lr=.")
            param_group["base_lr"] = base_lr
        super().add_param_group(param_group)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return AMSBOUND if group["amsbound"] else ADABOUND
