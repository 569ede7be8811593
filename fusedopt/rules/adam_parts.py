"""Parts of Adam as building blocks for projections: the moving average alone, Adam over a given numerator, and a lazy Adam.

The first two read Adam's scalar row with eps beside sqrt(v), as the papers of the projections have it (their "sqrt(v) + eps"
with the bias correction outside), so that one row serves the launches of both. The lazy one is torch.optim.SparseAdam's masking
with AdamW's own eps. No optimizer class steps them alone.
"""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.rule import Rule, State, register
from fusedopt.rules.adam import MOMENTS, NAMES
from fusedopt.rules.adam import direction as adam_direction
from fusedopt.rules.adam import reference as adam_reference
from fusedopt.rules.adam import scalars as adam_scalars


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


def reference_lazy(g, p, m, v, **numbers):
    seen, new = g != 0, adam_reference(g, p, m, v, **numbers)
    return tuple(torch.where(seen, x, old) for x, old in zip(new, (torch.zeros_like(g), m, v), strict=True))


@jit
def direction_lazy(g, p, exp_avg, exp_avg_sq, c):
    u, m, v = adam_direction(g, p, exp_avg, exp_avg_sq, c)
    seen = g != 0.0
    return tl.where(seen, u, 0.0), tl.where(seen, m, exp_avg), tl.where(seen, v, exp_avg_sq)


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

# Elements without a gradient keep their moments, and do not move.
ADAM_LAZY = register(Rule("adam_lazy", MOMENTS, NAMES, adam_scalars, reference_lazy, direction_lazy, internal=True))
