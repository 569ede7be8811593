"""RAdam: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond" (arXiv 1908.03265), algorithm 2."""

from __future__ import annotations

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("beta1", "weight1", "beta2", "weight2", "debias1", "adapt", "plain", "eps")


def scalars(h, step):
    """adapt = r sqrt(1 - beta2^t) where the length of the approximated mean exceeds 5, as torch.optim has it; else plain = 1."""
    beta1, beta2 = h["betas"]
    power, longest = beta2**step, 2 / (1 - beta2) - 1
    length = longest - 2 * step * power / (1 - power)
    known = 1.0 * (length > 5)
    r_sq = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    adapt = (known * r_sq * (1 - power)) ** 0.5
    return beta1, 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta1**step), adapt, 1 - known, h["eps"]


def reference(g, p, m, v, *, beta1, weight1, beta2, weight2, debias1, adapt, plain, eps):
    m, v = m * beta1 + g * weight1, v * beta2 + g.square() * weight2
    return m * debias1 * (adapt / (v.sqrt() + eps) + plain), m, v


@jit
def direction(g, p, exp_avg, exp_avg_sq, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g
    rate = tl.load(c + 5) / (tl.sqrt(exp_avg_sq) + tl.load(c + 7)) + tl.load(c + 6)
    return exp_avg * tl.load(c + 4) * rate, exp_avg, exp_avg_sq


RADAM = register(
    Rule("radam", (State("exp_avg"), State("exp_avg_sq", signed=False)), NAMES, scalars, reference, direction)
)


@register_optimizer("radam")
class RAdam(FusedOptimizer):
    """Rectified Adam, as `torch.optim.RAdam`: p -= lr * m_hat * r * sqrt(1 - beta2^t) / (sqrt(v) + eps) once the variance of
    1 / sqrt(v) is bounded (r from the step count alone), and p -= lr * m_hat before.

    Replaces a warm-up of Adam: early steps, whose second moments rest on few gradients, are not divided by them.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: coefficient of the decay.
        decoupled_weight_decay: take the decay from the parameter instead of adding it to the gradient.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 1908.03265, algorithm 2, with torch.optim's threshold of 5 in place of 4.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled_weight_decay=False, **options
    ):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "decoupled_weight_decay": decoupled_weight_decay}, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return RADAM
