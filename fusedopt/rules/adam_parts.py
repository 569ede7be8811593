"""Two halves of Adam as building blocks for projections: the moving average alone, and Adam over a given numerator.

Both read Adam's scalar row with eps beside sqrt(v), as the papers of the projections have it (their "sqrt(v) + eps" with the
bias correction outside), so that one row serves the launches of both. No optimizer class steps them alone.
"""

from __future__ import annotations

from fusedopt.kernels.language import jit, tl
from fusedopt.rule import Rule, State, register
from fusedopt.rules.adam import NAMES


def scalars(h, step):
    beta1, beta2 = h["betas"]
    root = (1 - beta2**step) ** -0.5
    return beta1, 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta1**step), root, h["eps"] * root


def reference_ema(g, p, m, *, beta1, weight1, **rest):
    m = m * beta1 + g * weight1
    return m, m.clone()


def reference_denominator(g, p, m, v, *, beta2, weight2, debias1, debias2_sqrt, eps, **rest):
    v = v * beta2 + g.square() * weight2
    return m * debias1 / (v.sqrt() * debias2_sqrt + eps), m.clone(), v


@jit
def direction_ema(g, p, exp_avg, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    return exp_avg, exp_avg


@jit
def direction_denominator(g, p, exp_avg, exp_avg_sq, c):
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g
    u = exp_avg * tl.load(c + 4) / (tl.sqrt(exp_avg_sq) * tl.load(c + 5) + tl.load(c + 6))
    return u, exp_avg, exp_avg_sq


# u is the moving average of the gradients, without bias correction.
EMA = register(Rule("ema", (State("exp_avg"),), NAMES, scalars, reference_ema, direction_ema, internal=True))

# exp_avg is the numerator: it is read, and stays.
ADAM_DENOMINATOR = register(
    Rule(
        "adam_denominator",
        (State("exp_avg"), State("exp_avg_sq", signed=False)),
        NAMES,
        scalars,
        reference_denominator,
        direction_denominator,
        internal=True,
    )
)
