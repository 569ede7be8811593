"""AdaMod: Ding et al., "An Adaptive and Momental Bound Method for Stochastic Learning" (arXiv 1910.12249), algorithm 1."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("beta1", "weight1", "beta2", "weight2", "beta3", "weight3", "rate", "eps")


def scalars(h, step):
    (beta1, beta2), beta3 = h["betas"], h["beta3"]
    rate = h["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    return beta1, 1 - beta1, beta2, 1 - beta2, beta3, 1 - beta3, rate, h["eps"]


def step_size(h, step):
    """1: the learning rate is in the step sizes whose mean is kept."""
    return 1.0


def reference(g, p, m, v, mean, *, beta1, weight1, beta2, weight2, beta3, weight3, rate, eps):
    m, v = m * beta1 + g * weight1, v * beta2 + g.square() * weight2
    size = rate / (v.sqrt() + eps)
    mean = mean * beta3 + size * weight3
    return torch.minimum(size, mean) * m, m, v, mean


@jit
def direction(g, p, exp_avg, exp_avg_sq, exp_avg_lr, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g
    size = tl.load(c + 6) / (tl.sqrt(exp_avg_sq) + tl.load(c + 7))
    exp_avg_lr = tl.load(c + 4) * exp_avg_lr + tl.load(c + 5) * size
    return tl.minimum(size, exp_avg_lr) * exp_avg, exp_avg, exp_avg_sq, exp_avg_lr


ADAMOD = register(
    Rule(
        "adamod",
        (State("exp_avg"), State("exp_avg_sq", signed=False), State("exp_avg_lr", signed=False)),
        NAMES,
        scalars,
        reference,
        direction,
        step_size=step_size,
        heavy=("plain",),
    )
)


@register_optimizer("adamod")
class AdaMod(FusedOptimizer):
    """AdaMod: Adam whose step size per element a = lr * sqrt(1 - beta2^t) / (1 - beta1^t) / (sqrt(v) + eps) is at most its own
    moving mean: e = beta3 e + (1 - beta3) a; p -= min(a, e) * m.

    Needs no warm-up: the mean starts at zero and holds back the large rates of early steps.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the moments.
        beta3: decay rate of the mean of step sizes.
        eps: added to the root of the second moment before its bias is corrected.
        weight_decay: decoupled.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 1910.12249, algorithm 1.
    """

    decay_mode = "decoupled"

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), beta3=0.999, eps=1e-8, weight_decay=0.0, **options):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        if not 0.0 <= beta3 < 1.0:
            raise ValueError(f"Invalid beta3 value: {beta3}")
        defaults = {"lr": lr, "betas": betas, "beta3": beta3, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return ADAMOD
