"""diffGrad: Dubey et al., "diffGrad: An Optimization Method for Convolutional Neural Networks" (arXiv 1909.11015), algorithm 1."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("beta1", "weight1", "beta2", "weight2", "rate", "eps")


def scalars(h, step):
    beta1, beta2 = h["betas"]
    return beta1, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** 0.5 / (1 - beta1**step), h["eps"]


def reference(g, p, m, v, previous, *, beta1, weight1, beta2, weight2, rate, eps):
    m, v = m * beta1 + g * weight1, v * beta2 + g.square() * weight2
    friction = torch.sigmoid((previous - g).abs())
    return rate * friction * m / (v.sqrt() + eps), m, v, g.clone()


@jit
def direction(g, p, exp_avg, exp_avg_sq, previous_grad, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g
    friction = 1.0 / (1.0 + tl.exp(-tl.abs(previous_grad - g)))
    return tl.load(c + 4) * friction * exp_avg / (tl.sqrt(exp_avg_sq) + tl.load(c + 5)), exp_avg, exp_avg_sq, g


DIFFGRAD = register(
    Rule(
        "diffgrad",
        (State("exp_avg"), State("exp_avg_sq", signed=False), State("previous_grad")),
        NAMES,
        scalars,
        reference,
        direction,
    )
)


@register_optimizer("diffgrad")
class DiffGrad(FusedOptimizer):
    """diffGrad: Adam times a friction 1 / (1 + exp(-|g' - g|)) of the change of the gradient since the last step:
    p -= lr * sqrt(1 - beta2^t) / (1 - beta1^t) * friction * m / (sqrt(v) + eps).

    For convolutional networks: where the gradient does not change, near a flat optimum, steps are half as long.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the moments.
        eps: added to the root of the second moment before its bias is corrected.
        weight_decay: coefficient of the decay.
        decoupled_weight_decay: take the decay from the parameter instead of adding it to the gradient.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 1909.11015, algorithm 1.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled_weight_decay=False, **options
    ):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "decoupled_weight_decay": decoupled_weight_decay}, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return DIFFGRAD
