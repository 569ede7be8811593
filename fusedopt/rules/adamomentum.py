"""AdaMomentum: Wang et al., "Rethinking Adam: A Twofold Exponential Moving Average Approach" (arXiv 2106.11514), algorithm 1."""

from __future__ import annotations

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("beta1", "weight1", "beta2", "weight2", "debias", "eps")


def scalars(h, step):
    beta1, beta2 = h["betas"]
    return beta1, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** 0.5 / (1 - beta1**step), h["eps"]


def reference(g, p, m, s, *, beta1, weight1, beta2, weight2, debias, eps):
    m = m * beta1 + g * weight1
    s = s * beta2 + m.square() * weight2 + eps
    return debias * m / s.sqrt(), m, s


@jit
def direction(g, p, exp_avg, exp_avg_sq, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * exp_avg * exp_avg + tl.load(c + 5)
    return exp_avg * tl.load(c + 4) / tl.sqrt(exp_avg_sq), exp_avg, exp_avg_sq


ADAMOMENTUM = register(
    Rule("adamomentum", (State("exp_avg"), State("exp_avg_sq", signed=False)), NAMES, scalars, reference, direction)
)


@register_optimizer("adamomentum")
class AdaMomentum(FusedOptimizer):
    """AdaMomentum: Adam whose second moment is that of the momentum: s = beta2 s + (1 - beta2) m^2 + eps;
    p -= lr * m_hat / sqrt(s / (1 - beta2^t)). eps is added to s at every step and there is none outside.

    For noisy gradients: the denominator follows the smoothed gradient and not its noise.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the moments.
        eps: added to s at every step; it must be positive.
        weight_decay: decoupled.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2106.11514, algorithm 1.
    """

    decay_mode = "decoupled"

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **options):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        if eps == 0:
            raise ValueError("Invalid epsilon value: 0; it keeps the denominator positive, so it must be")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return ADAMOMENTUM
