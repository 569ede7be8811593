"""Cautious masking: Liang et al., "Cautious Optimizers: Improving Training with One Line of Code" (arXiv 2411.16085), algorithm 1.

An update moves only where its sign is the gradient's, scaled up for the elements that stay. A rule takes part with a variant
of itself made by `cautious`: a probe counts the elements that stay, and the learning rate of the tensor is scaled by them.
"""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.rule import Measures, Rule

NAMES = ("kept_add", "kept_floor")
# The update of n elements is scaled by n / max(kept + kept_add, kept_floor n).
NORMALISERS = {"mean": (0.0, 1e-3), "count": (1.0, 0.0)}


def check_cautious(value) -> None:
    if value not in (False, True, *NORMALISERS):
        raise ValueError(f"Invalid cautious value: {value!r}; it is False, True, 'mean' or 'count'")


@jit
def agree(u, g):
    return (((u > 0.0) & (g > 0.0)) | ((u < 0.0) & (g < 0.0))).to(tl.float32)


@jit
def keep(u, g):
    return u * agree(u, g)


def _factor(memory, elements, kept, c):
    least = c["kept_floor"] * c["numel"] + 0 * kept
    return {}, {"lr_factor": c["numel"] / torch.maximum(kept + c["kept_add"], least)}


def cautious(rule: Rule, default: str, direction, terms_triton, heavy: tuple[str, ...] = ()) -> Rule:
    """The cautious variant of a rule. default: what cautious=True means. direction, terms_triton: its Triton bodies, made of
    `keep` and `agree`; its scalars are the rule's, then NAMES. heavy: see Rule."""

    def scalars(h, step):
        return *rule.scalars(h, step), *NORMALISERS[default if h["cautious"] is True else h["cautious"]]

    def reference(g, p, *states, kept_add, kept_floor, **named):
        u, *states = rule.reference(g, p, *states, **named)
        return u * (u * g > 0), *states

    def terms(g, p, *states, kept_add, kept_floor, **named):
        u = rule.reference(g, p, *states, **named)[0]
        return torch.ones_like(u), (u * g > 0).to(u.dtype)

    return Rule(
        f"{rule.name}_cautious",
        rule.states,
        (*rule.scalar_names, *NAMES),
        scalars,
        reference,
        direction,
        step_size=rule.step_size,
        decay=rule.decay,
        measures=Measures(("lr_factor",), sums=_factor, terms=terms, terms_triton=terms_triton),
        heavy=heavy,
    )
