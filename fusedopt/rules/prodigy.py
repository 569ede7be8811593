"""Prodigy: Mishchenko and Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner" (arXiv 2306.06101), algorithm 4."""

from __future__ import annotations

import math

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer
from fusedopt.rules.dadapt import check_d, present

NAMES = (
    "beta1", "weight1", "beta2", "weight2", "beta3", "eps", "debias", "rate", "safeguard", "d0", "d_coef", "growth_rate",
    "d", "d_next", "sum_weight", "dot_weight",
)  # fmt: skip


def scalars(h, step):
    beta1, beta2 = h["betas"]
    beta3 = beta2**0.5 if h["beta3"] is None else h["beta3"]
    debias = (1 - beta2**step) ** 0.5 / (1 - beta1**step) if h["bias_correction"] else 1.0
    d0 = h["d0"]
    return (
        beta1, 1 - beta1, beta2, 1 - beta2, beta3, h["eps"], debias, h["lr"] * debias, float(h["safeguard_warmup"]),
        d0, h["d_coef"], h["growth_rate"], d0, d0, d0, d0,
    )  # fmt: skip


def start(memory, c):
    d = present(memory, c)
    step_size = d * c["rate"]
    entering = d * (c["rate"] > 0) if c["safeguard"] else step_size
    factor = d * c["debias"]
    return {
        "d": d,
        "sum_weight": d / c["d0"] * entering,
        "dot_weight": d / c["d0"] * step_size,
        "lr_factor": factor,
        "decay_factor": factor,
    }


def sums(memory, dot, size, c):
    d = present(memory, c)
    numerator = c["beta3"] * memory["d_numerator"] + dot
    seen = size > 0
    estimate = torch.where(seen, c["d_coef"] * numerator / torch.where(seen, size, 1.0), d)
    largest = torch.maximum(torch.maximum(memory["d_max"], torch.full_like(d, c["d0"])), estimate)
    raised = torch.where(d == c["d0"], torch.maximum(d, estimate), d)
    after = torch.minimum(largest, raised * c["growth_rate"])
    after = torch.where(seen, after, d)
    return {"d": after, "d_max": largest, "d_numerator": numerator}, {"d_next": after}


def terms(g, p, m, v, s, initial, *, beta3, sum_weight, dot_weight, **_):
    return g * (initial - p) * dot_weight, (s * beta3 + g * sum_weight).abs()


def reference(g, p, m, v, s, initial, *, beta1, weight1, beta2, weight2, beta3, eps, d, d_next, sum_weight, **_):
    m = m * beta1 + g * (d * weight1)
    v = v * beta2 + g.square() * (d * d * weight2)
    return m / (v.sqrt() + d_next * eps), m, v, s * beta3 + g * sum_weight, initial.clone()


@jit
def terms_triton(g, p, exp_avg, exp_avg_sq, grad_sum, initial_param, c):
    grad_sum = tl.load(c + 4) * grad_sum + tl.load(c + 14) * g
    return tl.load(c + 15) * g * (initial_param - p), tl.abs(grad_sum)


@jit
def direction(g, p, exp_avg, exp_avg_sq, grad_sum, initial_param, c):
    scaled = tl.load(c + 12) * g
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * scaled
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * scaled * scaled
    grad_sum = tl.load(c + 4) * grad_sum + tl.load(c + 14) * g
    u = exp_avg / (tl.sqrt(exp_avg_sq) + tl.load(c + 13) * tl.load(c + 5))
    return u, exp_avg, exp_avg_sq, grad_sum, initial_param


PRODIGY = register(
    Rule(
        "prodigy",
        (
            State("exp_avg"),
            State("exp_avg_sq", signed=False),
            State("grad_sum"),
            State("initial_param", position=lambda h: 1.0),
        ),
        NAMES,
        scalars,
        reference,
        direction,
        measures=Measures(
            ("d", "d_next", "sum_weight", "dot_weight", "lr_factor", "decay_factor"),
            {"d": 0.0, "d_max": 0.0, "d_numerator": 0.0},
            scope="optimizer",
            start=start,
            sums=sums,
            terms=terms,
            terms_triton=terms_triton,
        ),
        heavy=("plain",),
    )
)


@register_optimizer("prodigy")
class Prodigy(FusedOptimizer):
    """Prodigy: Adam that finds its learning rate. d, one number for all parameters, estimates the distance to the solution:
    with k = lr sqrt(1 - beta2^t) / (1 - beta1^t) (lr without bias_correction) and beta3 = sqrt(beta2),
    r = beta3 r + sum d / d0 d k <g, p_0 - p>; s = beta3 s + d / d0 d k g; m = beta1 m + (1 - beta1) d g;
    v = beta2 v + (1 - beta2) d^2 g^2; d' = max(d, d_coef r / sum |s|); p -= d k m / (sqrt(v) + d' eps).

    Leave lr at 1 and let schedules multiply it (cosine is recommended); d_coef scales what d finds. Fine-tuning and LoRA in
    particular. Four states: p_0 is kept in fp32 under every state_format, as d lives on small differences with it.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: multiplies d, a float or a 1-element tensor. Groups may differ in it; a group with 0 is left out.
        betas: decay rates of m and v.
        beta3: that of r and s; None for sqrt(beta2).
        eps: times d, added to the denominator.
        weight_decay: times d k, taken from the parameter.
        decoupled_weight_decay: False adds weight_decay p to the gradient instead.
        bias_correction: Adam's, as above; False: k = lr.
        safeguard_warmup: s takes d g in place of d k g, so that a warm-up of lr does not raise d.
        d0: the first d.
        d_coef: scales the estimate.
        growth_rate: the most by which d grows in a step.
        **options: shared options, see `FusedOptimizer`. No projection, offload, gradient release or differentiable=True, and all
            parameters on one device.

    d, the largest estimate and r are `d`, `d_max` and `d_numerator` in the state of every parameter: the same 0-dim float64
    tensors. p_0 is the parameter when its states are made: at its first step. A step reads everything twice.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2306.06101, algorithm 4, with the published code's growth cap and beta3.
    """

    decay_mode = "decoupled"

    def __init__(
        self,
        params,
        lr=1.0,
        betas=(0.9, 0.999),
        beta3=None,
        eps=1e-8,
        weight_decay=0.0,
        decoupled_weight_decay=True,
        bias_correction=False,
        safeguard_warmup=False,
        d0=1e-6,
        d_coef=1.0,
        growth_rate=math.inf,
        **options,
    ):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        check_d(d0, growth_rate)
        if not d_coef > 0:
            raise ValueError(f"Invalid d_coef value: {d_coef}")
        if beta3 is not None and not 0.0 <= beta3 < 1.0:
            raise ValueError(f"Invalid beta3 value: {beta3}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "beta3": beta3,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "bias_correction": bias_correction,
            "safeguard_warmup": safeguard_warmup,
            "d0": d0,
            "d_coef": d_coef,
            "growth_rate": growth_rate,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return PRODIGY
