"""Adaptive Braking: Venigalla et al., "Adaptive Braking for Mitigating Gradient Delay" (arXiv 2007.01397), with SGD's momentum."""

from __future__ import annotations

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_fraction, check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer


def scalars(h, step):
    return h["momentum"], h["rho"], h["eps"], 1.0


def sums(memory, dot, grad_sq, c):
    old = memory["velocity_sq"]
    cosine = (dot / (old * grad_sq).sqrt().clamp(min=c["eps"])).clamp(-1.0, 1.0)
    brake = 1 - c["rho"] * cosine
    # |momentum b + brake g|^2: a third sum, which the two terms give
    new = c["momentum"] ** 2 * old + 2 * c["momentum"] * brake * dot + brake.square() * grad_sq
    return {"velocity_sq": new.clamp(min=0.0)}, {"brake": brake}


def terms(g, p, b, **_):
    return g * b, g.square()


def reference(g, p, b, *, momentum, brake, **_):
    b = b * momentum + g * brake
    return b, b


@jit
def terms_triton(g, p, momentum_buffer, c):
    return g * momentum_buffer, g * g


@jit
def direction(g, p, momentum_buffer, c):
    momentum_buffer = tl.load(c) * momentum_buffer + tl.load(c + 3) * g
    return momentum_buffer, momentum_buffer


BRAKING = register(
    Rule(
        "adaptive_braking",
        (State("momentum_buffer"),),
        ("momentum", "rho", "eps", "brake"),
        scalars,
        reference,
        direction,
        measures=Measures(("brake",), {"velocity_sq": 0.0}, sums=sums, terms=terms, terms_triton=terms_triton),
    )
)


@register_optimizer("adaptive_braking")
class AdaptiveBraking(FusedOptimizer):
    """SGD with adaptive braking: b = momentum b + (1 - rho cos) g, p -= lr b, with cos = <g, b> / max(|g| |b|, eps) of each tensor
    and the b of before the step.

    For delayed gradients (asynchronous and pipelined training): gradients along the velocity count less, those against it
    more, which damps the oscillations that delay causes. With rho = 0 it is SGD with momentum.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        momentum: decay rate of b.
        rho: strength of the brake, 0 to 2.
        eps: the least |g| |b|.
        weight_decay: L2 coefficient; the decayed gradient is braked.
        **options: shared options, see `FusedOptimizer`. No projection, offload or differentiable=True.

    |b|^2 is `velocity_sq` in each tensor's state (0-dim, float64), carried on from <g, b> and |g|^2: of a b in 8 bits it is that
    of the b that was stored, before its rounding.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2007.01397, section 3, per tensor.
    """

    def __init__(self, params, lr=0.01, momentum=0.9, rho=2.0, eps=1e-8, weight_decay=0.0, **options):
        check_fraction(momentum, "momentum value")
        if not 0.0 <= rho <= 2.0:
            raise ValueError(f"Invalid rho value: {rho}")
        check_nonnegative(eps, "epsilon value")
        defaults = {"lr": lr, "momentum": momentum, "rho": rho, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return BRAKING
