"""LAMB: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (arXiv 1904.00962), algorithm 2."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = (
    "beta1",
    "weight1",
    "beta2",
    "weight2",
    "debias1",
    "debias2_sqrt",
    "eps",
    "weight_decay",
    "adapt",
    "trust_clip",
)


def scalars(h, step):
    beta1, beta2 = h["betas"]
    debias1, debias2_sqrt = 1.0, 1.0
    if h["bias_correction"]:
        debias1, debias2_sqrt = 1 / (1 - beta1**step), (1 - beta2**step) ** -0.5
    weight1 = 1 - beta1 if h["grad_averaging"] else 1.0
    adapt = float(h["weight_decay"] != 0 or h["always_adapt"])
    return (
        beta1,
        weight1,
        beta2,
        1 - beta2,
        debias1,
        debias2_sqrt,
        h["eps"],
        h["weight_decay"],
        adapt,
        float(h["trust_clip"]),
    )


def reference(g, p, m, v, *, beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps, weight_decay, **_):
    m = beta1 * m + weight1 * g
    v = beta2 * v + weight2 * g * g
    return debias1 * m / (eps + debias2_sqrt * torch.sqrt(v)) + weight_decay * p, m, v


def trust(param_sq, update_sq, *, adapt, trust_clip, **_):
    one = torch.ones_like(param_sq)
    if not adapt:
        return one
    ratio = torch.where((param_sq > 0) & (update_sq > 0), param_sq.sqrt() / update_sq.sqrt(), one)
    return torch.minimum(ratio, one) if trust_clip else ratio


@jit
def direction(g, p, exp_avg, exp_avg_sq, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g
    adam = exp_avg * tl.load(c + 4) / (tl.sqrt(exp_avg_sq) * tl.load(c + 5) + tl.load(c + 6))
    return adam + tl.load(c + 7) * p, exp_avg, exp_avg_sq


@jit
def trust_triton(param_sq, update_sq, c):
    both = (param_sq > 0) & (update_sq > 0)
    ratio = tl.where(both, tl.sqrt(param_sq) / tl.sqrt(tl.where(both, update_sq, 1.0)), 1.0)
    ratio = tl.where(tl.load(c + 9) > 0, tl.minimum(ratio, 1.0), ratio)
    return tl.where(tl.load(c + 8) > 0, ratio, 1.0)


LAMB_RULE = register(
    Rule(
        "lamb",
        (State("exp_avg"), State("exp_avg_sq", signed=False)),
        NAMES,
        scalars,
        reference,
        direction,
        trust=trust,
        trust_triton=trust_triton,
        trust_on="update",
    )
)


@register_optimizer("lamb")
class LAMB(FusedOptimizer):
    """LAMB: p -= lr * r * u, u = debiased Adam direction + weight_decay p, r = |p| / |u| per tensor (1 where either is 0).

    For transformers at batches of thousands (BERT at 32 k); at small batches AdamW does as well. Warm the learning rate up.

    Args:
        params: parameters, named parameters, or groups of them. Biases and norms usually go to a group with weight_decay=0.
        lr: learning rate.
        betas, eps: as in `Adam`.
        weight_decay: inside u; with 0 a group takes r = 1 unless always_adapt.
        bias_correction: debias the moments (off: the paper's first version).
        grad_averaging: weight the gradient by 1 - beta1 in the first moment (off: by 1).
        trust_clip: limit r to 1.
        always_adapt: scale groups without weight decay too.
        clip_grad_norm: global gradient norm to clip to; 1.0 as in the reference implementation, None turns it off.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 1904.00962, algorithm 2 with phi = identity.
    """

    decay_mode = "rule"

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        bias_correction=True,
        grad_averaging=True,
        trust_clip=False,
        always_adapt=False,
        *,
        clip_grad_norm=1.0,
        **options,
    ):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "grad_averaging": grad_averaging,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
        }
        super().__init__(params, defaults, clip_grad_norm=clip_grad_norm, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return LAMB_RULE
