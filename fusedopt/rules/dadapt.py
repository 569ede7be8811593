"""D-Adaptation for Adam: Defazio and Mishchenko, "Learning-Rate-Free Learning by D-Adaptation" (arXiv 2301.07733), algorithm 5."""

from __future__ import annotations

import math

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer

NAMES = ("beta1", "weight1", "beta2", "weight2", "beta3", "weight3", "eps", "rate", "d0", "growth_rate", "step_size")


def check_d(d0, growth_rate) -> None:
    """Raises ValueError for a first d, or a limit of its growth, that is none."""
    if not d0 > 0:
        raise ValueError(f"Invalid d0 value: {d0}")
    if not growth_rate > 1:
        raise ValueError(f"Invalid growth_rate value: {growth_rate}; it must be above 1")


def present(memory, c):
    """d, which its memory holds from the first step on."""
    return torch.where(memory["d"] > 0, memory["d"], c["d0"])


def grown(memory, c, above, below):
    """The next d: above / below, where that is larger than d, and no more than its limit."""
    d, seen = present(memory, c), below > 0
    estimate = torch.where(seen, above / torch.where(seen, below, 1.0), 0.0)
    return torch.maximum(d, torch.minimum(estimate, d * c["growth_rate"]))


def rate(h, step):
    """What multiplies d in the step."""
    beta1, beta2 = h["betas"]
    return h["lr"] * ((1 - beta2**step) ** 0.5 / (1 - beta1**step) if h["bias_correction"] else 1.0)


def scalars(h, step):
    beta1, beta2 = h["betas"]
    beta3 = beta2**0.5
    size = rate(h, step)
    return (
        beta1, 1 - beta1, beta2, 1 - beta2, beta3, 1 - beta3, h["eps"], size, h["d0"], h["growth_rate"], h["d0"] * size,
    )  # fmt: skip


def start(memory, c):
    d = present(memory, c)
    return {"step_size": d * c["rate"], "decay_factor": d}


def sums(memory, dot, size, c):
    numerator = c["beta3"] * memory["d_numerator"] + c["weight3"] * dot
    return {"d": grown(memory, c, numerator, c["weight3"] * size), "d_numerator": numerator}, {}


def terms(g, p, m, v, s, *, beta3, weight3, eps, step_size, **_):
    scaled = g * step_size
    return scaled * s / (v.sqrt() + eps), (s * beta3 + scaled * weight3).abs()


def reference(g, p, m, v, s, *, beta1, weight1, beta2, weight2, beta3, weight3, eps, step_size, **_):
    scaled = g * step_size
    m, v = m * beta1 + scaled * weight1, v * beta2 + g.square() * weight2
    return m / (v.sqrt() + eps), m, v, s * beta3 + scaled * weight3


@jit
def terms_triton(g, p, exp_avg, exp_avg_sq, grad_sum, c):
    scaled = tl.load(c + 10) * g
    dot = scaled * grad_sum / (tl.sqrt(exp_avg_sq) + tl.load(c + 6))
    return dot, tl.abs(tl.load(c + 4) * grad_sum + tl.load(c + 5) * scaled)


@jit
def direction(g, p, exp_avg, exp_avg_sq, grad_sum, c):
    scaled = tl.load(c + 10) * g
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * scaled
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g
    u = exp_avg / (tl.sqrt(exp_avg_sq) + tl.load(c + 6))
    return u, exp_avg, exp_avg_sq, tl.load(c + 4) * grad_sum + tl.load(c + 5) * scaled


DADAPT_ADAM = register(
    Rule(
        "dadapt_adam",
        (State("exp_avg"), State("exp_avg_sq", signed=False), State("grad_sum")),
        NAMES,
        scalars,
        reference,
        direction,
        step_size=lambda h, step: 1.0,
        decay=lambda h, step: rate(h, step) * h["weight_decay"],
        measures=Measures(
            ("step_size", "decay_factor"),
            {"d": 0.0, "d_numerator": 0.0},
            scope="optimizer",
            start=start,
            sums=sums,
            terms=terms,
            terms_triton=terms_triton,
        ),
        heavy=("plain",),
    )
)


@register_optimizer("dadapt_adam")
class DAdaptAdam(FusedOptimizer):
    """Adam with D-Adaptation: d, one number for all parameters, is a lower bound of the distance to the solution and takes the
    learning rate's place. With k = d lr (times sqrt(1 - beta2^t) / (1 - beta1^t) with bias_correction), s and v of before the
    step in the first sum and w = 1 - sqrt(beta2): r = (1 - w) r + w sum k <g, s / (sqrt(v) + eps)>; s = (1 - w) s + w k g;
    m = beta1 m + (1 - beta1) k g; v = beta2 v + (1 - beta2) g^2; p -= m / (sqrt(v) + eps); d = max(d, r / (w sum |s|)), used
    from the next step on.

    Leave lr at 1 and let schedules multiply it. d grows more slowly than `Prodigy`'s, which came after it.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: multiplies d, a float or a 1-element tensor. Groups may differ in it.
        betas: decay rates of m and v.
        eps: added to the denominators.
        weight_decay: coefficient of the decay.
        decoupled_weight_decay: take k weight_decay p from the parameter instead of adding weight_decay p to the gradient.
        bias_correction: Adam's, as above.
        d0: the first d.
        growth_rate: the most by which d grows in a step.
        **options: shared options, see `FusedOptimizer`. No projection, offload, gradient release or differentiable=True, and all
            parameters on one device.

    d and r are `d` and `d_numerator` in the state of every parameter: the same 0-dim float64 tensors. A step reads everything
    twice. Where all of s is 0, as with gradients of zero from the start, d stays as it is.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2301.07733, algorithm 5, with the published code's weights and growth cap.
    """

    def __init__(
        self,
        params,
        lr=1.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        decoupled_weight_decay=False,
        bias_correction=False,
        d0=1e-6,
        growth_rate=math.inf,
        **options,
    ):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        check_d(d0, growth_rate)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "bias_correction": bias_correction,
            "d0": d0,
            "growth_rate": growth_rate,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return DADAPT_ADAM
