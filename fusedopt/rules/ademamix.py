"""AdEMAMix: Pagliardini, Ablin and Grangier, "The AdEMAMix Optimizer: Better, Faster, Older" (arXiv 2409.03137), algorithm 1."""

from __future__ import annotations

import math

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("beta1", "weight1", "beta2", "weight2", "beta3", "weight3", "debias1", "debias2_sqrt", "alpha", "eps")


def warmed_up(h, step):
    """alpha and beta3 at a step: alpha grows linearly, the half-life of beta3 grows linearly from that of beta1."""
    (beta1, _, beta3), alpha = h["betas"], h["alpha"]
    if h["alpha_warmup"]:
        done = 1.0 * (step >= h["alpha_warmup"])
        alpha = alpha * (done + (1 - done) * step / h["alpha_warmup"])
    if h["beta3_warmup"]:
        share = step / h["beta3_warmup"]
        first, last = (math.log(0.5) / math.log(beta + 1e-8) - 1 for beta in (beta1, beta3))
        done = 1.0 * (share >= 1)
        now = (1 - share * (1 - done)) * first + share * (1 - done) * last
        beta3 = done * beta3 + (1 - done) * 0.5 ** (1 / (now + 1))
    return alpha, beta3


def scalars(h, step):
    beta1, beta2, _ = h["betas"]
    alpha, beta3 = warmed_up(h, step)
    debias1, debias2_sqrt = 1 / (1 - beta1**step), (1 - beta2**step) ** -0.5
    return beta1, 1 - beta1, beta2, 1 - beta2, beta3, 1 - beta3, debias1, debias2_sqrt, alpha, h["eps"]


def reference(
    g, p, fast, slow, v, *, beta1, weight1, beta2, weight2, beta3, weight3, debias1, debias2_sqrt, alpha, eps
):
    fast, slow = fast * beta1 + g * weight1, slow * beta3 + g * weight3
    v = v * beta2 + g.square() * weight2
    return (fast * debias1 + slow * alpha) / (v.sqrt() * debias2_sqrt + eps), fast, slow, v


@jit
def direction(g, p, exp_avg, exp_avg_slow, exp_avg_sq, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    exp_avg_slow = tl.load(c + 4) * exp_avg_slow + tl.load(c + 5) * g
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g
    mixed = exp_avg * tl.load(c + 6) + tl.load(c + 8) * exp_avg_slow
    u = mixed / (tl.sqrt(exp_avg_sq) * tl.load(c + 7) + tl.load(c + 9))
    return u, exp_avg, exp_avg_slow, exp_avg_sq


ADEMAMIX = register(
    Rule(
        "ademamix",
        (State("exp_avg"), State("exp_avg_slow"), State("exp_avg_sq", signed=False)),
        NAMES,
        scalars,
        reference,
        direction,
    )
)


@register_optimizer("ademamix")
class AdEMAMix(FusedOptimizer):
    """AdEMAMix: AdamW with a second, slow momentum: p -= lr * (m_hat + alpha * s) / (sqrt(v / (1 - beta2^t)) + eps),
    s = beta3 s + (1 - beta3) g, without bias correction.

    For long runs: gradients of tens of thousands of steps ago still help. Give both warm-ups the length of the run.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the fast momentum, the second moment and the slow momentum.
        alpha: weight of the slow momentum; the paper takes 5 to 10.
        beta3_warmup: steps over which beta3 grows from betas[0]; None for none.
        alpha_warmup: steps over which alpha grows from 0; None for none.
        eps: added to the denominator.
        weight_decay: decoupled.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2409.03137, algorithm 1, with the schedules and the default alpha of the authors' code.
    """

    decay_mode = "decoupled"

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=2.0, beta3_warmup=None, alpha_warmup=None,
                 eps=1e-8, weight_decay=0.0, **options):  # fmt: skip
        check_betas(betas, options, 3)
        check_nonnegative(eps, "epsilon value")
        check_nonnegative(alpha, "alpha value")
        defaults = {"lr": lr, "betas": betas, "alpha": alpha, "beta3_warmup": beta3_warmup, "eps": eps}
        defaults |= {"alpha_warmup": alpha_warmup, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return ADEMAMIX
