"""Weight prediction: Guan et al., "XGrad: Boosting Gradient-Based Optimizers With Weight Prediction" (arXiv 2305.18240),
algorithm 1: gradients are taken where momentum will have brought the weights, and step the weights themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fusedopt import states as st
from fusedopt.checks import describe
from fusedopt.distributed import local
from fusedopt.sharded_states import entry_of
from fusedopt.weights import Int8Weight


def _momentum(c, momentum_buffer):
    return momentum_buffer


def _adam(c, exp_avg, exp_avg_sq, max_exp_avg_sq=None):
    second = exp_avg_sq if max_exp_avg_sq is None else max_exp_avg_sq
    return exp_avg * c["debias1"] / (second.sqrt() * c["debias2_sqrt"] + c["eps"])


# What a rule's next update is expected to be, from its states, before the learning rate.
EXPECTED: dict[str, Callable] = {"sgd_momentum": _momentum, "adam": _adam, "adam_amsgrad": _adam}


@contextmanager
def predicted_weights(opt: torch.optim.Optimizer, steps: float = 1) -> Iterator[None]:
    """Within it the parameters are where `steps` more updates like the last ones would bring them: p - steps * lr * d, d the
    momentum buffer of SGD, m_hat / (sqrt(v_hat) + eps) of Adam and AdamW. Afterwards they are what they were, bit for bit.

        with fusedopt.predicted_weights(opt):
            loss = model(batch).mean()
            loss.backward()
        opt.step()

    For asynchronous pipelines, whose gradients come late, and as a kind of Nesterov momentum for Adam.

    Args:
        opt: an SGD with momentum, Adam or AdamW of this package. Forward and backward pass belong inside, the step outside.
        steps: how far ahead; the number of steps by which gradients are late. Parameters without states do not move.
    Raises:
        ValueError: `opt` has another rule, a projection, or steps during the backward pass; steps is negative.
        RuntimeError (at the end): parameters were changed inside, say by a step; they are left as they were before.

    A copy of the parameters is kept meanwhile. Computed in plain torch, one parameter at a time.
    Source: arXiv 2305.18240, algorithm 1; decay takes no part in the prediction.
    """
    _check(opt, steps)
    moved: list[tuple[torch.Tensor, torch.Tensor, tuple]] = []
    try:
        with torch.no_grad():
            for group in opt.param_groups:
                for p in group["params"]:
                    if opt.state.get(p) and int(opt.state[p].get("step", 0)) > 0:
                        kept = local(p).detach().clone()
                        moved.append((p, kept, ()))
                        _move(opt, p, group, steps)
                        moved[-1] = (p, kept, _mark(opt, p))
        yield
    finally:
        touched = [p for p, _, mark in moved if _mark(opt, p) != mark]
        with torch.no_grad():
            for p, kept, _ in moved:
                local(p).copy_(kept)
    if touched:
        raise RuntimeError(
            f"predicted_weights: {len(touched)} parameters were changed inside, the first of shape {tuple(touched[0].shape)}. "
            "Step after the context; what was changed inside is undone."
        )


def _mark(opt, p: torch.Tensor) -> tuple:
    """Changes when a parameter is written to: a native step counts steps, all else versions."""
    return p._version, int(opt.state[p]["step"])


def _check(opt, steps: float) -> None:
    name = type(opt).__name__
    if not steps >= 0:
        raise ValueError(f"Invalid steps value: {steps}")
    if opt._release is not None:
        raise ValueError(f"predicted_weights: {name} steps during the backward pass. Remove release_gradients first.")
    for index, (p, group) in enumerate((p, g) for g in opt.param_groups for p in g["params"]):
        rule = opt.rule_for(group)
        if rule.name not in EXPECTED:
            raise ValueError(
                f"predicted_weights: rule {rule.name!r} of {name} says nothing of the next update. Use SGD with momentum, Adam or "
                "AdamW."
            )
        if opt.projection_for(p, group) is not None or isinstance(p, Int8Weight):
            raise ValueError(
                f"predicted_weights: {describe(name, index, p)} is projected or an int8 weight, whose states are not of its shape."
            )


def _move(opt, p: torch.Tensor, group: dict, steps: float) -> None:
    mine, entry, rule = local(p), entry_of(p, opt.state[p]), opt.rule_for(group)
    here = {k: v.to(mine.device) for k, v in entry.items() if isinstance(v, torch.Tensor)}
    values = {state.name: st.decode(mine, here, state) for state in rule.states}
    numbers = {**group, "lr": float(group["lr"])}
    if "betas" in group:
        numbers["betas"] = tuple(float(beta) for beta in group["betas"])
    c = rule.named_scalars(numbers, int(here["step"]))
    update = EXPECTED[rule.name](c, **values)
    mine.copy_(mine.to(update.dtype) - steps * numbers["lr"] * update)
