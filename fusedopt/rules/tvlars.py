"""TVLARS: Do et al., "Revisiting LARS for Large Batch Training Generalization of Neural Networks" (arXiv 2309.14053)."""

from __future__ import annotations

import math

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.measures import choose
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer


def scalars(h, step):
    x = h["decay_rate"] * (step - h["delay"])
    power = torch.exp(x) if isinstance(x, torch.Tensor) else math.exp(x) if x < 700 else math.inf
    rate = 1 / (h["alpha"] + power) + h["gamma_min"]
    return h["momentum"], h["trust_coefficient"] * rate, 1.0


def sums(memory, param_sq, decayed_sq, c):
    param_norm, norm = param_sq.sqrt().clamp(max=10.0), decayed_sq.sqrt().clamp(max=10.0)
    moving = (param_norm > 0) & (norm > 0)
    return {}, {"q": choose(moving, c["coefficient"] * param_norm / choose(moving, norm, 1.0), 1.0)}


def terms(g, p, b, **_):
    return p.square(), g.square()


def reference(g, p, b, *, momentum, q, **_):
    b = b * momentum + g * q
    return b, b


@jit
def terms_triton(g, p, momentum_buffer, c):
    return p * p, g * g


@jit
def direction(g, p, momentum_buffer, c):
    momentum_buffer = tl.load(c) * momentum_buffer + tl.load(c + 2) * g
    return momentum_buffer, momentum_buffer


TVLARS_RULE = register(
    Rule(
        "tvlars",
        (State("momentum_buffer"),),
        ("momentum", "coefficient", "q"),
        scalars,
        reference,
        direction,
        measures=Measures(("q",), sums=sums, terms=terms, terms_triton=terms_triton),
    )
)


@register_optimizer("tvlars")
class TVLARS(FusedOptimizer):
    """TVLARS: LARS whose ratio starts large and falls over time: d = g + weight_decay p, b = momentum b + q d, p -= lr b with
    q = trust_coefficient rate(t) min(|p|, 10) / min(|d|, 10) per tensor (1 where a norm is 0) and
    rate(t) = 1 / (alpha + exp(decay_rate (t - delay))) + gamma_min, t from 1.

    For very large batches, in place of LARS with a warm-up: the high first ratio leaves sharp minima early.

    Args:
        params: parameters, named parameters, or groups of them. Biases and norms usually go to a group with weight_decay=0.
        lr: learning rate, a float or a 1-element tensor.
        momentum: decay rate of b.
        weight_decay: coupled, as above.
        trust_coefficient: scale of q.
        decay_rate: how fast the ratio falls (lambda of the paper), per step.
        alpha: the ratio begins near 1 / (alpha + 1) and is at most 1 / alpha.
        delay: steps by which the fall is put off.
        gamma_min: what is left of the ratio in the end.
        **options: shared options, see `FusedOptimizer`. No projection and no differentiable=True.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2309.14053, with the published code's norms: that of the decayed gradient, both at most 10.
    """

    def __init__(
        self,
        params,
        lr=1.0,
        momentum=0.9,
        weight_decay=5e-4,
        trust_coefficient=1e-3,
        decay_rate=1e-3,
        alpha=0.1,
        delay=0,
        gamma_min=0.0,
        **options,
    ):
        check_nonnegative(momentum, "momentum value")
        for name, value in (
            ("trust_coefficient", trust_coefficient),
            ("decay_rate", decay_rate),
            ("delay", delay),
            ("gamma_min", gamma_min),
        ):
            check_nonnegative(value, f"{name} value")
        if not alpha > 0:
            raise ValueError(f"Invalid alpha value: {alpha}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "decay_rate": decay_rate,
            "alpha": alpha,
            "delay": delay,
            "gamma_min": gamma_min,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return TVLARS_RULE
