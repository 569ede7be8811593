"""NAdam: Dozat, "Incorporating Nesterov Momentum into Adam" (ICLR 2016 workshop), algorithm 2, as torch.optim.NAdam."""

from __future__ import annotations

import math

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("beta1", "weight1", "beta2", "weight2", "debias2_sqrt", "look_grad", "look_avg", "eps")
TERMS = 60  # of a series whose terms fall by half: fp64 sees no more
RATE = 0.96  # to the power of momentum_decay a step, mu comes nearer to beta1


def mu(h, step):
    return h["betas"][0] * (1 - 0.5 * RATE ** (step * h["momentum_decay"]))


def mu_product(h, step):
    """mu_1 mu_2 ... mu_t from t alone, with q = 0.96^momentum_decay:
    sum_k log(1 - q^k / 2) = -sum_j q^j (1 - q^(j t)) / (j 2^j (1 - q^j)), the logarithm's series summed over k first."""
    beta1, log_q = h["betas"][0], math.log(RATE) * h["momentum_decay"]
    if log_q == 0:
        return (beta1 / 2) ** step
    if isinstance(step, torch.Tensor):  # arithmetic on its device, so that a graph can capture it
        j = torch.arange(1, TERMS + 1, dtype=torch.float64, device=step.device)
        terms = (j * log_q).exp() / (j * 2**j * torch.expm1(j * log_q)) * torch.expm1(j * log_q * step)
        return beta1**step * (-terms.sum()).exp()
    total = 0.0
    for j in range(1, TERMS + 1):
        total += math.exp(j * log_q) / (j * 2**j * math.expm1(j * log_q)) * math.expm1(j * log_q * step)
    return beta1**step * math.exp(-total)


def scalars(h, step):
    beta1, beta2 = h["betas"]
    now, after, product = mu(h, step), mu(h, step + 1), mu_product(h, step)
    look_grad, look_avg = (1 - now) / (1 - product), after / (1 - product * after)
    return beta1, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** -0.5, look_grad, look_avg, h["eps"]


def reference(g, p, m, v, *, beta1, weight1, beta2, weight2, debias2_sqrt, look_grad, look_avg, eps):
    m, v = m * beta1 + g * weight1, v * beta2 + g.square() * weight2
    return (g * look_grad + m * look_avg) / (v.sqrt() * debias2_sqrt + eps), m, v


@jit
def direction(g, p, exp_avg, exp_avg_sq, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g
    ahead = tl.load(c + 5) * g + tl.load(c + 6) * exp_avg
    return ahead / (tl.sqrt(exp_avg_sq) * tl.load(c + 4) + tl.load(c + 7)), exp_avg, exp_avg_sq


NADAM = register(
    Rule(
        "nadam",
        (State("exp_avg"), State("exp_avg_sq", signed=False)),
        NAMES,
        scalars,
        reference,
        direction,
        derived={"mu_product": mu_product},
    )
)


@register_optimizer("nadam")
class NAdam(FusedOptimizer):
    """Adam with Nesterov momentum, as `torch.optim.NAdam`:
    p -= lr * ((1 - mu_t) / (1 - M_t) * g + mu_{t+1} / (1 - M_t mu_{t+1}) * m) / (sqrt(v / (1 - beta2^t)) + eps),
    mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2), M_t = mu_1 ... mu_t.

    A drop-in for Adam that reacts to a change of the gradient one step earlier; also where Adam oscillates.

    M_t is computed from t in closed form and not stored, so all steps count as taken with the present betas and momentum_decay.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: coefficient of the decay.
        momentum_decay: how fast mu grows from beta1 / 2 to beta1; 0 for not at all.
        decoupled_weight_decay: take the decay from the parameter instead of adding it to the gradient.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: Dozat (2016), algorithm 2, with the schedule of mu of Sutskever's thesis as torch.optim has it.
    """

    def __init__(self, params, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, momentum_decay=4e-3,
                 decoupled_weight_decay=False, **options):  # fmt: skip
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        check_nonnegative(momentum_decay, "momentum_decay value")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"momentum_decay": momentum_decay, "decoupled_weight_decay": decoupled_weight_decay}
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return NADAM
