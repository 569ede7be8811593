"""The step as a torch.library operator, so that torch.compile keeps a train step in one graph.

The compiled code calls `fusedopt::step(params, grads, positions, handle)`. The operator finds the optimizer by its handle
and runs its plan: learning rates, step counts, formats and states are read when it runs and are not part of the graph, so
schedulers cause no recompilation. Parameters are declared as mutated; states belong to the optimizer alone.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

# Written out: what torch can infer from annotations differs between its versions.
SCHEMA = "(Tensor(a0!)[] params, Tensor[] grads, SymInt[] positions, SymInt handle) -> ()"

_handles = itertools.count(1)
_optimizers: weakref.WeakValueDictionary[int, torch.optim.Optimizer] = weakref.WeakValueDictionary()


class Traced:
    """What the compiler reads of an optimizer. Reading opt.param_groups itself would make it guard every number in them, and
    set capturable on groups that nobody asked it for.

    handle: a number by which the operator finds the optimizer; it dies with it and is never given twice.
    """

    def __init__(self, opt: torch.optim.Optimizer):
        self.handle = next(_handles)
        self.groups = opt.param_groups
        _optimizers[self.handle] = opt


@torch.library.custom_op("fusedopt::step", mutates_args=("params",), schema=SCHEMA)
def step_op(params: list[Tensor], grads: list[Tensor], positions: list[int], handle: int) -> None:
    """One step of the optimizer `handle` over the parameters that have a gradient.

    Args:
        params: parameters with a gradient; the optimizer's own, or copies that a compiler has made of them.
        grads: their gradients. positions: which of the optimizer's parameters they are, in the order of its groups.
    Raises:
        RuntimeError: the optimizer is gone, or has other parameters than when it was traced.
    """
    opt = _optimizers.get(handle)
    if opt is None:
        raise RuntimeError(
            "fusedopt::step: the optimizer of this compiled step no longer exists. Compile the step again."
        )
    own = [p for group in opt.param_groups for p in group["params"]]
    stale = opt._traced.groups is not opt.param_groups or positions[-1] >= len(own)
    if stale or any(own[i].shape != p.shape for i, p in zip(positions, params, strict=True)):
        opt._traced.groups = opt.param_groups
        raise RuntimeError(
            f"fusedopt::step: {type(opt).__name__} has other parameters than when this step was compiled. Compile it again."
        )
    every: list[Tensor | None] = [None] * len(own)
    for i, g in zip(positions, grads, strict=True):
        every[i] = g
    copies = copied_parameters([own[i] for i in positions], params)
    with torch.no_grad():
        for p, mine in copies:
            mine.copy_(p)
        opt._step_tensors(own, every)
        for p, mine in copies:
            p.copy_(mine)


def copied_parameters(own: list[Tensor], given: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs (given, own) that are not the same memory: a compiler may pass a copy, and reads the result from it."""
    return [(p, mine) for mine, p in zip(own, given, strict=True) if p.data_ptr() != mine.data_ptr()]


@step_op.register_fake
def _(params, grads, positions, handle) -> None:
    return None


def traced_step(traced: Traced) -> None:
    """What torch.compile sees of a step: one operator."""
    params, grads, positions, position = [], [], [], 0
    for group in traced.groups:
        for p in group["params"]:
            if p.grad is not None:
                params.append(p)
                grads.append(p.grad)
                positions.append(position)
            position += 1
    if params:
        with torch.no_grad():
            torch.ops.fusedopt.step(params, grads, positions, traced.handle)


def traced_zero_grad(traced: Traced, set_to_none: bool) -> None:
    """Optimizer.zero_grad, which torch keeps out of its compiler."""
    for group in traced.groups:
        for p in group["params"]:
            if p.grad is not None:
                if set_to_none:
                    p.grad = None
                else:
                    p.grad.zero_()
