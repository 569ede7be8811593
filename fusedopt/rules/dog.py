"""DoG and L-DoG: Ivgi et al., "DoG is SGD's Best Friend: A Parameter-Free Dynamic Step Size Schedule" (arXiv 2302.12022)."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer


def scalars(h, step):
    return h["reps_rel"], h["eps"], 1.0


def start(memory, c):
    return {"moved": (memory["max_distance"] > 0).double()}


def sums(memory, distance_sq, grad_sq, c):
    distance, fresh = distance_sq.sqrt(), memory["max_distance"] == 0  # then the "distance" is the parameters' own norm
    farthest = torch.where(fresh, c["reps_rel"] * (1 + distance), torch.maximum(memory["max_distance"], distance))
    total = memory["grad_sq_sum"] + grad_sq + fresh * c["eps"]
    return {"max_distance": farthest, "grad_sq_sum": total}, {"lr_factor": farthest / total.sqrt()}


def terms(g, p, initial, *, moved, **_):
    return (p - initial * moved).square(), g.square()


def reference(g, p, initial, **_):
    return g, initial.clone()


@jit
def terms_triton(g, p, initial_param, c):
    away = p - tl.load(c + 2) * initial_param
    return away * away, g * g


@jit
def direction(g, p, initial_param, c):
    return g, initial_param


def _rule(name: str, scope: str) -> Rule:
    return register(
        Rule(
            name,
            (State("initial_param", position=lambda h: 1.0),),
            ("reps_rel", "eps", "moved"),
            scalars,
            reference,
            direction,
            measures=Measures(
                ("moved", "lr_factor"),
                {"max_distance": 0.0, "grad_sq_sum": 0.0},
                scope=scope,
                start=start,
                sums=sums,
                terms=terms,
                terms_triton=terms_triton,
            ),
        )
    )


DOG, LDOG = _rule("dog", "group"), _rule("ldog", "tensor")


class _Dog(FusedOptimizer):
    def __init__(self, params, lr=1.0, reps_rel=1e-6, eps=1e-8, weight_decay=0.0, **options):
        check_nonnegative(eps, "epsilon value")
        if not reps_rel > 0:
            raise ValueError(f"Invalid reps_rel value: {reps_rel}")
        defaults = {"lr": lr, "reps_rel": reps_rel, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)


@register_optimizer("dog")
class DoG(_Dog):
    """DoG (distance over gradients): p -= lr r / sqrt(G) g, with r = max |p - p_0| so far, at first reps_rel (1 + |p_0|), and G
    the sum of all |g|^2 so far plus eps; norms are over all parameters of a group.

    SGD without a learning rate to find: leave lr at 1. Evaluate an average of the iterates (torch.optim.swa_utils), on which
    the method relies. For a step size for each layer: `LDoG`.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: multiplies the step, a float or a 1-element tensor.
        reps_rel: the first distance, relative to 1 + |p_0|.
        eps: added to G once.
        weight_decay: L2 coefficient; the decayed gradient counts in G.
        **options: shared options, see `FusedOptimizer`. No projection, offload, gradient release or differentiable=True, and all
            parameters on one device.

    r and G are `max_distance` and `grad_sq_sum` in the state of every parameter of a group: the same 0-dim float64 tensors. p_0
    is kept in fp32, the parameter when its states are made: at its first step. A step reads everything twice.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2302.12022, section 2, with the published code's first distance.
    """

    @classmethod
    def rule_for(cls, group) -> Rule:
        return DOG


@register_optimizer("ldog")
class LDoG(_Dog):
    """L-DoG: `DoG` with r, the largest distance from the start, and G of each tensor on its own: p -= lr * r / sqrt(G) * g.

    For fine-tuning transformers, where tensors differ in scale; the paper finds it better there than DoG, less so elsewhere.

    Args:
        params: parameters, named parameters, or groups of them.
        lr, reps_rel, eps, weight_decay: as in `DoG`.
        **options: shared options, see `FusedOptimizer`. No projection, offload or differentiable=True.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2302.12022, section 4.
    """

    @classmethod
    def rule_for(cls, group) -> Rule:
        return LDOG
