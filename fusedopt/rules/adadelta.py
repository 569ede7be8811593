"""Adadelta: Zeiler, "ADADELTA: An Adaptive Learning Rate Method" (arXiv 1212.5701), algorithm 1."""

from __future__ import annotations

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer


def scalars(h, step):
    return h["rho"], 1 - h["rho"], h["eps"]


def reference(g, p, v, w, *, rho, weight, eps):
    v = v * rho + g.square() * weight
    u = ((w + eps) / (v + eps)).sqrt() * g
    return u, v, w * rho + u.square() * weight


@jit
def direction(g, p, square_avg, acc_delta, c):
    square_avg = tl.load(c) * square_avg + tl.load(c + 1) * g * g
    eps = tl.load(c + 2)
    u = tl.sqrt(acc_delta + eps) / tl.sqrt(square_avg + eps) * g
    return u, square_avg, tl.load(c) * acc_delta + tl.load(c + 1) * u * u


ADADELTA = register(
    Rule(
        "adadelta",
        (State("square_avg", signed=False), State("acc_delta", signed=False)),
        ("rho", "weight", "eps"),
        scalars,
        reference,
        direction,
    )
)


@register_optimizer("adadelta")
class Adadelta(FusedOptimizer):
    """Adadelta, as `torch.optim.Adadelta`: u = sqrt(w + eps) / sqrt(v + eps) * g with v the moving mean of g^2 and w that of
    u^2 before this step; p -= lr * u.

    Needs no learning rate to be found: updates have the parameters' own units. Slow to start, since w begins at zero.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        rho: decay rate of both means.
        eps: under both roots; it sets the size of the first steps.
        weight_decay: L2 coefficient.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 1212.5701, algorithm 1.
    """

    def __init__(self, params, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0, **options):
        if not 0.0 <= rho <= 1.0:
            raise ValueError(f"Invalid rho value: {rho}")
        check_nonnegative(eps, "epsilon value")
        super().__init__(params, {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay}, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return ADADELTA
