"""SWATS: Keskar and Socher, "Improving Generalization Performance by Switching from Adam to SGD" (arXiv 1712.07628)."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.measures import after
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer

NAMES = (
    "beta1", "beta2", "weight2", "eps", "rate", "debias2", "later", "tolerance", "kept", "entering", "adam", "sgd",
)  # fmt: skip


def scalars(h, step):
    beta1, beta2 = h["betas"]
    debias2 = 1 - beta2**step
    rate = h["lr"] * debias2**0.5 / (1 - beta1**step)
    return (
        beta1, beta2, 1 - beta2, h["eps"], rate, 1 / debias2, after(step, 1), h["switch_tolerance"], beta1, 1 - beta1, rate,
        0.0,
    )  # fmt: skip


def start(memory, c):
    found = memory["sgd_lr"]
    switched, fresh = found > 0, memory["sgd_steps"] == 0
    one = torch.ones_like(found)
    return {
        "kept": torch.where(switched & fresh, 0 * one, c["beta1"] * one),  # the velocity starts at zero
        "entering": torch.where(switched, one, (1 - c["beta1"]) * one),
        "adam": torch.where(switched, 0 * one, c["rate"] * one),
        "sgd": (1 - c["beta1"]) * found,
    }


def sums(memory, dot, square, c):
    found, average = memory["sgd_lr"], memory["sgd_lr_avg"]
    switched, moves = found > 0, dot != 0  # of SGD both sums are 0
    estimate = square / torch.where(moves, dot, 1.0)
    new = c["beta2"] * average + c["weight2"] * estimate
    average = torch.where(switched | ~moves, average, new)
    debiased = average * c["debias2"]
    agree = moves & ((debiased - estimate).abs() < c["tolerance"]) & (debiased > 0) & (c["later"] > 0)
    return {
        "sgd_lr": torch.where(~switched & agree, debiased, found),
        "sgd_lr_avg": average,
        "sgd_steps": memory["sgd_steps"] + switched,
    }, {}


def terms(g, p, m, v, *, beta2, weight2, eps, kept, entering, adam, **_):
    u = (m * kept + g * entering) * adam / ((v * beta2 + g.square() * weight2).sqrt() + eps)
    return u * g, u.square()


def reference(g, p, m, v, *, beta2, weight2, eps, kept, entering, adam, sgd, **_):
    m, v = m * kept + g * entering, v * beta2 + g.square() * weight2
    return m * adam / (v.sqrt() + eps) + m * sgd, m, v


@jit
def terms_triton(g, p, exp_avg, exp_avg_sq, c):
    exp_avg_sq = tl.load(c + 1) * exp_avg_sq + tl.load(c + 2) * g * g
    u = (tl.load(c + 8) * exp_avg + tl.load(c + 9) * g) * tl.load(c + 10) / (tl.sqrt(exp_avg_sq) + tl.load(c + 3))
    return u * g, u * u


@jit
def direction(g, p, exp_avg, exp_avg_sq, c):
    exp_avg = tl.load(c + 8) * exp_avg + tl.load(c + 9) * g
    exp_avg_sq = tl.load(c + 1) * exp_avg_sq + tl.load(c + 2) * g * g
    u = exp_avg * tl.load(c + 10) / (tl.sqrt(exp_avg_sq) + tl.load(c + 3)) + exp_avg * tl.load(c + 11)
    return u, exp_avg, exp_avg_sq


def _rule(name: str, scope: str) -> Rule:
    return register(
        Rule(
            name,
            (State("exp_avg"), State("exp_avg_sq", signed=False)),
            NAMES,
            scalars,
            reference,
            direction,
            step_size=lambda h, step: 1.0,
            measures=Measures(
                ("kept", "entering", "adam", "sgd"),
                {"sgd_lr": 0.0, "sgd_lr_avg": 0.0, "sgd_steps": 0.0},
                scope=scope,
                start=start,
                sums=sums,
                terms=terms,
                terms_triton=terms_triton,
            ),
        )
    )


SWATS_RULE, SWATS_TENSOR = _rule("swats", "optimizer"), _rule("swats_per_tensor", "tensor")


@register_optimizer("swats")
class SWATS(FusedOptimizer):
    """SWATS: Adam that switches to SGD. At first, with Adam's s = lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps),
    the rate SGD would need is g' = <s, s> / <s, g>, and its mean a = beta2 a + (1 - beta2) g'; once, after the first step,
    |a / (1 - beta2^t) - g'| < switch_tolerance, it is SGD for good with that rate L > 0:
    b = beta1 b + g from b = 0, p -= (1 - beta1) L b.

    For image models that train faster with Adam and end better with SGD. Watch `sgd_lr` in the state: it is 0 until the switch.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: Adam's learning rate, a float or a 1-element tensor; after the switch it counts for decoupled decay only. Groups may
            differ in it, but share one switch and one L.
        betas: decay rates; beta1 is the momentum of SGD, beta2 also that of a.
        eps: added to sqrt(v).
        switch_tolerance: how closely the two rates must agree.
        per_tensor: sums over each tensor, which then switches on its own, in place of all parameters.
        weight_decay: coefficient of the decay.
        decoupled_weight_decay: take lr weight_decay p from the parameter instead of adding weight_decay p to the gradient.
        **options: shared options, see `FusedOptimizer`. No projection, offload or differentiable=True; without per_tensor no
            gradient release, and all parameters on one device.

    L, a and the steps since the switch are `sgd_lr`, `sgd_lr_avg` and `sgd_steps` in the state: 0-dim float64. m becomes b. A
    step reads everything twice, also after the switch, of which only the device knows.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 1712.07628, algorithm 1.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        switch_tolerance=1e-9,
        per_tensor=False,
        weight_decay=0.0,
        decoupled_weight_decay=False,
        **options,
    ):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        check_nonnegative(switch_tolerance, "switch_tolerance value")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "switch_tolerance": switch_tolerance,
            "per_tensor": per_tensor,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return SWATS_TENSOR if group["per_tensor"] else SWATS_RULE
