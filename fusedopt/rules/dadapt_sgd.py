"""D-Adaptation for SGD: Defazio and Mishchenko, "Learning-Rate-Free Learning by D-Adaptation" (arXiv 2301.07733), algorithm 4."""

from __future__ import annotations

import math

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_fraction
from fusedopt.rule import Measures, Rule, State, register, register_optimizer
from fusedopt.rules.dadapt import check_d, grown, present

NAMES = ("momentum", "weight", "rate", "d0", "growth_rate", "scale")


def scalars(h, step):
    return h["momentum"], 1 - h["momentum"], h["lr"], h["d0"], h["growth_rate"], h["d0"]


def norms(memory, param_sq, grad_sq, c):
    """The first gradient that is not zero gives the unit of d."""
    unit = torch.where(memory["d_unit"] > 0, memory["d_unit"], grad_sq.sqrt())
    d = present(memory, c)
    return {"d_unit": unit}, {"scale": torch.where(unit > 0, d / torch.where(unit > 0, unit, 1.0), 0.0)}


def sums(memory, dot, square, c):
    numerator = memory["d_numerator"] + dot
    return {"d": grown(memory, c, 2 * numerator, square.sqrt()), "d_numerator": numerator}, {}


def terms(g, p, s, initial, *, rate, scale, **_):
    scaled = g * (rate * scale)
    return scaled * s, (s + scaled).square()


def reference(g, p, s, initial, *, weight, rate, scale, **_):
    s = s + g * (rate * scale)
    return (p - initial + s) * weight, s, initial.clone()


@jit
def terms_triton(g, p, step_sum, initial_param, c):
    scaled = tl.load(c + 2) * tl.load(c + 5) * g
    new = step_sum + scaled
    return scaled * step_sum, new * new


@jit
def direction(g, p, step_sum, initial_param, c):
    step_sum = step_sum + tl.load(c + 2) * tl.load(c + 5) * g
    return tl.load(c + 1) * ((p - initial_param) + step_sum), step_sum, initial_param


DADAPT_SGD = register(
    Rule(
        "dadapt_sgd",
        (State("step_sum", wide=True), State("initial_param", position=lambda h: 1.0)),
        NAMES,
        scalars,
        reference,
        direction,
        step_size=lambda h, step: 1.0,
        measures=Measures(
            ("scale",),
            {"d": 0.0, "d_numerator": 0.0, "d_unit": 0.0},
            scope="optimizer",
            norms=norms,
            sums=sums,
            terms=terms,
            terms_triton=terms_triton,
        ),
    )
)


@register_optimizer("dadapt_sgd")
class DAdaptSGD(FusedOptimizer):
    """SGD with D-Adaptation: d, one number for all parameters, is a lower bound of the distance to the solution and takes the
    learning rate's place. With G the norm of the first gradient of all parameters, k = lr d / G and s of before the step in the
    first sum: r = r + sum k <g, s>; s = s + k g; p = momentum p + (1 - momentum) (p_0 - s); d = max(d, 2 r / |s|), used from the
    next step on.

    For convolutional networks that SGD with momentum trains well. Leave lr at 1 and let schedules multiply it.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: multiplies d, a float or a 1-element tensor. Groups may differ in it.
        momentum: below 1; of the average of iterates that p is.
        weight_decay: L2 coefficient; the decayed gradient enters s and r, not G.
        d0: the first d.
        growth_rate: the most by which d grows in a step.
        **options: shared options, see `FusedOptimizer`. No projection, offload, gradient release or differentiable=True, and all
            parameters on one device.

    d, r and G are `d`, `d_numerator` and `d_unit` in the state of every parameter: the same 0-dim float64 tensors. s and p_0,
    the parameter when its states are made, at its first step, are kept in fp32 under every state_format. Nothing moves before
    the first gradient that is not zero. A step reads gradients three times, and everything else twice.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2301.07733, algorithm 4, with the published code's growth cap and d.
    """

    def __init__(self, params, lr=1.0, momentum=0.9, weight_decay=0.0, d0=1e-6, growth_rate=math.inf, **options):
        check_fraction(momentum, "momentum value")
        check_d(d0, growth_rate)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "d0": d0, "growth_rate": growth_rate}
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return DADAPT_SGD
