"""Adam with critical momenta: Malviya et al., "Promoting Exploration in Memory-Augmented Adam using Critical Momenta"
(arXiv 2307.09638), algorithm 1. A transform that follows the step keeps the buffer (fusedopt/transforms/critical.py).
"""

from __future__ import annotations

from fusedopt.kernels.language import jit, tl
from fusedopt.measures import after
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer
from fusedopt.transforms.base import listed
from fusedopt.transforms.critical import CriticalMomenta

NAMES = ("beta1", "weight1", "beta2", "weight2", "debias1", "debias2", "eps")


def scalars(h, step):
    beta1, beta2 = h["betas"]
    later = after(step, 1)  # the first step only fills the buffer
    return (
        beta1, (1 - beta1) * later, beta2, 1 - beta2, 1 / (1 - beta1**step), (1 - beta2**step) ** -0.5, h["eps"],
    )  # fmt: skip


def reference(g, p, m, v, mean, *, beta1, weight1, beta2, weight2, debias1, debias2, eps):
    m = m * beta1 + g * weight1
    u = m + mean
    v = v * beta2 + u.square() * weight2
    return debias1 * u / (v.sqrt() * debias2 + eps), m, v, mean.clone()


@jit
def direction(g, p, exp_avg, exp_avg_sq, critical_mean, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    moved = exp_avg + critical_mean
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * moved * moved
    u = tl.load(c + 4) * moved / (tl.sqrt(exp_avg_sq) * tl.load(c + 5) + tl.load(c + 6))
    return u, exp_avg, exp_avg_sq, critical_mean


ADAM_CM = register(
    Rule(
        "adam_cm",
        (State("exp_avg"), State("exp_avg_sq", signed=False), State("critical_mean", estimate=True)),
        NAMES,
        scalars,
        reference,
        direction,
    )
)


@register_optimizer("adam_cm")
class AdamCM(FusedOptimizer):
    """Adam with critical momenta: u = m + the mean of a buffer of earlier momenta, in place of m, with
    m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) u^2; p -= lr (u / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).
    The buffer keeps the momenta of the steps with the largest gradients, measured as `CriticalMomenta` says.

    For losses with sharp minima: the buffered momenta carry the parameters over them. The first step only enters its
    gradient into the buffer and decays. Memory: 4 (1 + capacity) bytes per element beside Adam's moments.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled.
        capacity: momenta in the buffer.
        decay: of their weights, from step to step.
        **options: shared options, see `FusedOptimizer`; gradient_transforms act before the buffer sees gradients. No projection,
            gradient release or offload, and no DTensors.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2307.09638, algorithm 1 (Adam+CM), with its published code's weights.
    """

    decay_mode = "decoupled"

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        capacity=5,
        decay=0.7,
        gradient_transforms=(),
        **options,
    ):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        buffer = CriticalMomenta(capacity, decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, gradient_transforms=(*listed(gradient_transforms), buffer), **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return ADAM_CM
