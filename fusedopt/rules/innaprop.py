"""INNAprop: Bolte, Boustany, Pauwels and Purica, "A second-order-like optimizer with adaptive gradient scaling for deep
learning" (arXiv 2410.05871), algorithm 1."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = (
    "decay",
    "beta2",
    "weight2",
    "debias2_sqrt",
    "eps",
    "psi_keep",
    "psi_weight",
    "share",
    "speed",
    "rate",
)


def share(h):
    return 1 - h["alpha"] * h["beta"]


def scalars(h, step):
    lr, alpha, beta, sigma = h["lr"], h["alpha"], h["beta"], h["sigma"]
    return (
        lr * h["weight_decay"],
        sigma,
        1 - sigma,
        (1 - sigma**step) ** -0.5,
        h["eps"],
        1 - lr / beta,
        lr * (1 / beta - alpha),
        share(h),
        lr / (beta - lr),
        lr * beta,
    )


def reference(g, p, psi, v, *, decay, beta2, weight2, debias2_sqrt, eps, psi_keep, psi_weight, share, speed, rate):
    theta = (1 - decay) * p
    v = beta2 * v + weight2 * g.square()
    psi = psi_keep * psi + psi_weight * theta
    after = theta + speed * (share * theta - psi) - rate * g / (v.sqrt() * debias2_sqrt + eps)
    return p - after, psi, v


@jit
def direction(g, p, psi, exp_avg_sq, c):
    pulled = tl.load(c) * p
    shrunk = p - pulled
    exp_avg_sq = tl.load(c + 1) * exp_avg_sq + tl.load(c + 2) * g * g
    psi = tl.load(c + 5) * psi + tl.load(c + 6) * shrunk
    scaled = g / (tl.sqrt(exp_avg_sq) * tl.load(c + 3) + tl.load(c + 4))
    u = pulled + tl.load(c + 9) * scaled - tl.load(c + 8) * (tl.load(c + 7) * shrunk - psi)
    return u, psi, exp_avg_sq


INNAPROP = register(
    Rule(
        "innaprop",
        (State("psi", position=share), State("exp_avg_sq", signed=False)),
        NAMES,
        scalars,
        reference,
        direction,
        step_size=lambda h, step: 1.0,
    )
)


@register_optimizer("innaprop")
class INNAprop(FusedOptimizer):
    """INNAprop: a damped second-order dynamic (INNA) on gradients scaled as in RMSprop, without second derivatives:
    p = (1 - lr weight_decay) p, psi = (1 - lr / beta) psi + lr (1 / beta - alpha) p,
    p = p + lr / (beta - lr) * ((1 - alpha beta) p - psi) - lr beta g / (sqrt(v / (1 - sigma^t)) + eps).

    In place of AdamW where its loss curve is bumpy: beta damps along the curvature, alpha along the velocity, with two states.

    psi starts as (1 - alpha beta) p and stays in fp32 under every state_format; there is no projection.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, below beta; a float or a 1-element tensor.
        alpha: viscous damping. The paper finds (0.1, 0.9) fast early, (2, 2) better at the end.
        beta: damping by curvature.
        sigma: decay rate of the second moment v.
        eps: added to the denominator.
        weight_decay: decoupled.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2410.05871, algorithm 1.
    """

    decay_mode = "rule"

    def __init__(self, params, lr=1e-3, alpha=0.1, beta=0.9, sigma=0.999, eps=1e-8, weight_decay=1e-2, **options):
        check_nonnegative(eps, "epsilon value")
        check_nonnegative(alpha, "alpha value")
        if not 0 < beta:
            raise ValueError(f"Invalid beta value: {beta}; it must be positive")
        if not 0 <= sigma < 1:
            raise ValueError(f"Invalid sigma value: {sigma}; it must be in [0, 1)")
        if not isinstance(lr, torch.Tensor) and lr >= beta:
            raise ValueError(f"Invalid learning rate: {lr}; it must be below beta={beta}, by which INNAprop divides it")
        defaults = {"lr": lr, "alpha": alpha, "beta": beta, "sigma": sigma, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return INNAPROP
