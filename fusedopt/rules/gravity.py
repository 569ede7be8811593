"""Gravity: Bahrami and Pourasad Zadeh, "Gravity Optimizer: a Kinematic Approach on Optimization in Deep Learning" (arXiv
2101.09192), algorithm 1."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer

NAMES = ("kept", "weight", "peak")


def scalars(h, step):
    kept = (h["beta"] * step + 1) / (step + 2)
    return kept, 1 - kept, 0.0


def spread(h):
    return h["alpha"] / h["base_lr"] if h["base_lr"] else 0.0


def terms(g, p, velocity, **_):
    return g.abs(), torch.zeros_like(g)


def sums(memory, largest, nothing, c):
    return {}, {"peak": largest}


def reference(g, p, velocity, *, kept, weight, peak):
    velocity = velocity * kept + weight * g / (1 + (g * peak).square())
    return velocity, velocity.clone()


@jit
def terms_triton(g, p, velocity, c):
    return tl.abs(g), g * 0.0


@jit
def direction(g, p, velocity, c):
    relative = g * tl.load(c + 2)
    velocity = tl.load(c) * velocity + tl.load(c + 1) * g / (1.0 + relative * relative)
    return velocity, velocity


GRAVITY = register(
    Rule(
        "gravity",
        (State("velocity", spread=spread),),
        NAMES,
        scalars,
        reference,
        direction,
        measures=Measures(("peak",), sums=sums, terms=terms, terms_triton=terms_triton, largest=True),
        heavy=("plain",),
    )
)


@register_optimizer("gravity")
class Gravity(FusedOptimizer):
    """Gravity: steps like those of a body on the loss surface. With M the largest |g| of the tensor and
    b_t = (beta t + 1) / (t + 2): V = b_t V + (1 - b_t) g / (1 + (g M)^2); p -= lr V. V starts as N(0, (alpha / base_lr)^2).

    The largest gradients of a tensor are held back, the more the larger they are: they mislead most. For small
    convolutional networks at large rates; one state.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        alpha: the first steps are random and about alpha large; 0 starts at rest.
        base_lr: the rate that alpha is divided by; a group's own lr when it is added, before any schedule. At 0 the start is at
            rest.
        beta: the decay rate of V in the long run.
        weight_decay: added to the gradient; the paper has none.
        **options: shared options, see `FusedOptimizer`; seed draws the start. No projection or differentiable=True.

    The start of element i of tensor k follows from the seed, i and k: it is the same on every device and for shards.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2101.09192, algorithm 1; where all gradients are 0, 0 in place of its 0 / 0.
    """

    def __init__(self, params, lr=0.1, alpha=0.01, beta=0.9, weight_decay=0.0, base_lr=None, **options):
        check_nonnegative(alpha, "alpha value")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta value: {beta}")
        defaults = {"lr": lr, "alpha": alpha, "beta": beta, "weight_decay": weight_decay, "base_lr": base_lr}
        super().__init__(params, defaults, **options)

    def add_param_group(self, param_group: dict) -> None:
        """As in torch.optim; a group without base_lr takes its lr."""
        if isinstance(param_group, dict) and param_group.get("base_lr", self.defaults["base_lr"]) is None:
            param_group["base_lr"] = float(param_group.get("lr", self.defaults["lr"]))
        super().add_param_group(param_group)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return GRAVITY
