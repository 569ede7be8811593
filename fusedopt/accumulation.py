"""Gradients of micro-batches added to optimizer states, where a rule's states are sums: AdamA (arXiv 2305.19982), momentum.

A state s <- decay s + weight f(g) becomes decay s + weight (f(g_1) + ... + f(g_n)) if all gradients but the last are added as
s += weight / decay f(g_i), and the ordinary step takes the last: no kernel of its own.
"""

from __future__ import annotations

import torch

from fusedopt import states as st
from fusedopt.checks import describe
from fusedopt.numbers import _host


class _FromSecond:
    """Counts steps from 2: the first step of SGD would drop a buffer that holds gradients already."""

    @staticmethod
    def rule_step(step):
        return step.clamp(min=2) if isinstance(step, torch.Tensor) else max(step, 2)


def count_from_second(plan) -> None:
    for device in plan.devices:
        for row in device.scalars.rows:
            if row.rule.name == "sgd_momentum":
                row.site = _FromSecond


def _why_not(opt, p: torch.Tensor, group: dict) -> str | None:
    """Why gradients cannot be added to the states of a parameter, or None."""
    rule = opt.kept_rule(p, group)
    if opt.projection_for(p, group) is not None:
        return "its states are those of projected gradients"
    if rule.name == "sgd_momentum":
        if group["dampening"] or group["nesterov"]:
            return "dampening weighs the first step otherwise, and Nesterov's update needs the whole gradient beside the buffer"
    elif rule.name in ("adam", "adam_amsgrad"):
        if opt.decay_mode == "coupled" and group["weight_decay"]:
            return "L2 decay would enter the square of one micro-batch's gradient; use AdamW or weight_decay=0"
        if not all(_host(beta) > 0 for beta in group["betas"]):
            return "a beta of 0 keeps nothing"
    elif rule.name == "lion":
        return "Lion's update needs the sum of the gradients and the old momentum apart"
    else:
        return f"rule {rule.name!r} has no states that are sums of gradients alone"
    formats = st.configured_formats(p, group, rule)
    if any(form.name != "fp32" for form in formats):
        return f"its states are {', '.join(form.name for form in formats)}, which would be rounded at every micro-batch"
    return None


def check(opt) -> None:
    """Raises ValueError for the first parameter whose states take no gradients."""
    owners = ((p, group) for group in opt.param_groups for p in group["params"])
    for index, (p, group) in enumerate(owners):
        why = _why_not(opt, p, group) if p.requires_grad else None
        if why is not None:
            raise ValueError(
                f"{describe(type(opt).__name__, index, p)} cannot accumulate gradients in its states: {why}. Use "
                "accumulate_in='gradients', which adds them up in .grad."
            )


def _sums(opt, group: dict, rule) -> list[tuple[str, float, bool]]:
    """(state, weight / decay, whether gradients are squared) of each state that gradients are added to."""
    sign = -1.0 if group["maximize"] else 1.0
    if rule.name == "sgd_momentum":
        return [("momentum_buffer", sign / group["momentum"], False)]
    beta1, beta2 = (float(_host(beta)) for beta in group["betas"])
    return [("exp_avg", sign * (1 - beta1) / beta1, False), ("exp_avg_sq", (1 - beta2) / beta2, True)]


def add_to_states(opt, owners: list[tuple[int, int, torch.Tensor]], grads: list[torch.Tensor]) -> None:
    """Adds gradients to the states of parameters, given as (group, index, parameter)."""
    found: dict[tuple, tuple[list, list]] = {}
    for (number, _, p), g in zip(owners, grads, strict=True):
        group = opt.param_groups[number]
        rule = opt.kept_rule(p, group)
        entry = opt.init_state(p, group, rule)
        for name, weight, squared in _sums(opt, group, rule):
            states, mine = found.setdefault((weight, squared), ([], []))
            states.append(entry[name])
            mine.append(g)
    for (weight, squared), (states, mine) in found.items():
        if squared:
            torch._foreach_addcmul_(states, mine, mine, value=weight)
        else:
            torch._foreach_add_(states, mine, alpha=weight)
