"""Adagrad: Duchi, Hazan and Singer, "Adaptive Subgradient Methods" (JMLR 12, 2011), in the form of torch.optim.Adagrad."""

from __future__ import annotations

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer


def scalars(h, step):
    return 1 / (1 + (step - 1) * h["lr_decay"]), h["eps"]


def reference(g, p, total, *, slow_down, eps):
    total = total + g.square()
    return g * slow_down / (total.sqrt() + eps), total


@jit
def direction(g, p, total, c):
    total = total + g * g
    return g * tl.load(c) / (tl.sqrt(total) + tl.load(c + 1)), total


ADAGRAD = register(
    Rule(
        "adagrad",
        (State("sum", signed=False, initial=lambda h: h["initial_accumulator_value"]),),
        ("slow_down", "eps"),
        scalars,
        reference,
        direction,
        heavy=("plain",),
    )
)


@register_optimizer("adagrad")
class Adagrad(FusedOptimizer):
    """Adagrad, as `torch.optim.Adagrad`: v += g^2; p -= lr / (1 + (t - 1) lr_decay) * g / (sqrt(v) + eps).

    For sparse features and convex problems: rates only ever fall, the faster the larger a coordinate's gradients were.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        lr_decay: how fast the rate falls with the step count.
        weight_decay: L2 coefficient.
        initial_accumulator_value: of v.
        eps: added to the denominator.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: Duchi et al., JMLR 12 (2011), figure 1 (diagonal), as torch.optim implements it.
    """

    def __init__(
        self, params, lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10, **options
    ):
        check_nonnegative(lr_decay, "lr_decay value")
        check_nonnegative(initial_accumulator_value, "initial_accumulator_value value")
        check_nonnegative(eps, "epsilon value")
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return ADAGRAD
