"""D-Adaptation for AdaGrad: Defazio and Mishchenko, "Learning-Rate-Free Learning by D-Adaptation" (arXiv 2301.07733),
algorithm 3."""

from __future__ import annotations

import math

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_fraction, check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer
from fusedopt.rules.dadapt import check_d, grown, present

NAMES = ("weight", "rate", "eps", "d0", "growth_rate", "step_size")


def scalars(h, step):
    return 1 - h["momentum"], h["lr"], h["eps"], h["d0"], h["growth_rate"], h["d0"] * h["lr"]


def start(memory, c):
    return {"step_size": present(memory, c) * c["rate"]}


def sums(memory, surplus, size, c):
    return {"d": grown(memory, c, surplus, size)}, {}


def advanced(g, total, s, spent, step_size, eps):
    total, scaled = total + g.square(), g * step_size
    root = total.sqrt() + eps
    return total, s + scaled, spent + scaled.square() / root, root


def terms(g, p, total, s, spent, initial, *, step_size, eps, **_):
    _, s, spent, root = advanced(g, total, s, spent, step_size, eps)
    return s.square() / root - spent, s.abs()


def reference(g, p, total, s, spent, initial, *, weight, step_size, eps, **_):
    total, s, spent, root = advanced(g, total, s, spent, step_size, eps)
    return (p - initial + s / root) * weight, total, s, spent, initial.clone()


@jit
def terms_triton(g, p, total, step_sum, spent, initial_param, c):
    scaled = tl.load(c + 5) * g
    root = tl.sqrt(total + g * g) + tl.load(c + 2)
    step_sum = step_sum + scaled
    return (step_sum * step_sum - scaled * scaled) / root - spent, tl.abs(step_sum)


@jit
def direction(g, p, total, step_sum, spent, initial_param, c):
    scaled = tl.load(c + 5) * g
    total = total + g * g
    root = tl.sqrt(total) + tl.load(c + 2)
    step_sum = step_sum + scaled
    u = tl.load(c) * ((p - initial_param) + step_sum / root)
    return u, total, step_sum, spent + scaled * scaled / root, initial_param


DADAPT_ADAGRAD = register(
    Rule(
        "dadapt_adagrad",
        (
            State("sum", signed=False, initial=lambda h: h["initial_accumulator_value"]),
            State("step_sum", wide=True),
            State("spent", signed=False, wide=True),
            State("initial_param", position=lambda h: 1.0),
        ),
        NAMES,
        scalars,
        reference,
        direction,
        step_size=lambda h, step: 1.0,
        measures=Measures(
            ("step_size",),
            {"d": 0.0},
            scope="optimizer",
            start=start,
            sums=sums,
            terms=terms,
            terms_triton=terms_triton,
        ),
    )
)


@register_optimizer("dadapt_adagrad")
class DAdaptAdaGrad(FusedOptimizer):
    """Adagrad with D-Adaptation: d, one number for all parameters, is a lower bound of the distance to the solution and takes the
    learning rate's place. With k = lr d: a = a + g^2; s = s + k g; q = q + k^2 g^2 / (sqrt(a) + eps);
    p = momentum p + (1 - momentum) (p_0 - s / (sqrt(a) + eps)); d = max(d, sum (s^2 / (sqrt(a) + eps) - q) / sum |s|), used from
    the next step on.

    For sparse features and convex problems without a rate to find; for networks `DAdaptAdam` or `Prodigy`. Leave lr at 1 and
    let schedules multiply it.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: multiplies d, a float or a 1-element tensor. Groups may differ in it.
        momentum: below 1; of the average of iterates that p is.
        eps: added to the roots.
        weight_decay: L2 coefficient.
        initial_accumulator_value: of a, at first.
        d0: the first d.
        growth_rate: the most by which d grows in a step.
        **options: shared options, see `FusedOptimizer`. No projection, offload, gradient release or differentiable=True, and all
            parameters on one device.

    d is `d` in the state of every parameter: the same 0-dim float64 tensor. Four states: s, q and p_0, the parameter when its
    states are made, at its first step, are kept in fp32 under every state_format. q is kept for each element, and its
    difference with s^2 / sqrt(a), which nearly cancels, is taken there. A step reads everything twice.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2301.07733, algorithm 3, with the published code's a, growth cap and momentum.
    """

    def __init__(self, params, lr=1.0, momentum=0.0, eps=0.0, weight_decay=0.0, initial_accumulator_value=1e-6, d0=1e-6,
                 growth_rate=math.inf, **options):  # fmt: skip
        check_fraction(momentum, "momentum value")
        check_nonnegative(eps, "epsilon value")
        if not (initial_accumulator_value > 0 or initial_accumulator_value == 0 and eps > 0):
            raise ValueError(
                f"Invalid initial_accumulator_value: {initial_accumulator_value}; it is positive, or 0 with a positive eps"
            )
        check_d(d0, growth_rate)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "d0": d0,
            "growth_rate": growth_rate,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return DADAPT_ADAGRAD
