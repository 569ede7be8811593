"""ADOPT: Taniguchi et al., "ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal Rate" (arXiv 2411.02853),
algorithm 2 with the clipping of the authors' code."""

from __future__ import annotations

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("beta1", "weight1", "beta2", "weight2", "limit", "eps")


def scalars(h, step):
    """The first step only takes v = g^2: with limit 0 and weight 0 the momentum stays as it is."""
    beta1, beta2 = h["betas"]
    later = 1.0 * (step > 1)
    limit = (step - 1.0) ** h["clip_exponent"] if h["clip_exponent"] is not None else later * 3e38
    keep1, keep2 = later * beta1 + (1 - later), later * beta2
    return keep1, later * (1 - beta1), keep2, later * (1 - beta2) + (1 - later), limit, h["eps"]


def decay(h, step):
    """Nothing decays at the first step."""
    return h["lr"] * h["weight_decay"] * (step > 1)


def reference(g, p, m, v, *, beta1, weight1, beta2, weight2, limit, eps):
    q = (g / v.sqrt().clamp(min=eps)).clamp(-limit, limit)
    m = m * beta1 + q * weight1
    return m, m, v * beta2 + g.square() * weight2


@jit
def direction(g, p, exp_avg, exp_avg_sq, c):
    limit = tl.load(c + 4)
    q = g / tl.maximum(tl.sqrt(exp_avg_sq), tl.load(c + 5), propagate_nan=tl.PropagateNan.ALL)
    q = tl.minimum(tl.maximum(q, -limit, propagate_nan=tl.PropagateNan.ALL), limit, propagate_nan=tl.PropagateNan.ALL)
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * q
    return exp_avg, exp_avg, tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g


ADOPT_RULE = register(
    Rule(
        "adopt",
        (State("exp_avg"), State("exp_avg_sq", signed=False)),
        NAMES,
        scalars,
        reference,
        direction,
        decay=decay,
    )
)


@register_optimizer("adopt")
class ADOPT(FusedOptimizer):
    """ADOPT: momentum of gradients that are divided by the second moment of the steps before:
    m = beta1 m + (1 - beta1) clip(g / max(sqrt(v), eps), (t - 1)^clip_exponent); p -= lr * m; v = beta2 v + (1 - beta2) g^2.
    The first step only sets v = g^2 and changes no parameter.

    Adam with a convergence guarantee whatever beta2: for large beta2, or where Adam is unstable.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the momentum and of the second moment.
        eps: least denominator.
        weight_decay: coefficient of the decay.
        clip_exponent: of the clipping bound; None does not clip.
        decoupled_weight_decay: take the decay from the parameter instead of adding it to the gradient.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2411.02853, algorithm 2; clipping as in the authors' code.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.9999), eps=1e-6, weight_decay=0.0, clip_exponent=0.25,
                 decoupled_weight_decay=False, **options):  # fmt: skip
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        if clip_exponent is not None:
            check_nonnegative(clip_exponent, "clip_exponent value")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clip_exponent": clip_exponent}
        super().__init__(params, {**defaults, "decoupled_weight_decay": decoupled_weight_decay}, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return ADOPT_RULE
