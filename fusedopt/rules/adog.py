"""A-DoG: Kreisler et al., "Accelerated Parameter-Free Stochastic Optimization" (arXiv 2404.00666), of one gradient a step."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer

NAMES = ("reps_rel", "eps", "rate", "growth", "fresh", "size", "weighted_size", "mix")


def scalars(h, step):
    return h["reps_rel"], h["eps"], h["lr"], h["coefficient"], 1.0, 0.0, 0.0, 0.0


def start(memory, c):
    return {"fresh": (memory["max_distance"] == 0).double()}


def sums(memory, dot, grad_sq, c):
    """|w - x_0|^2 after the step follows from what it was before and <g, w - x_0>: no second pass after the size is known."""
    fresh = memory["max_distance"] == 0  # then the first sum is |p|^2
    first = c["reps_rel"] * (1 + dot.clamp(min=0).sqrt())
    farthest = torch.where(fresh, first, memory["max_distance"])
    weight = torch.where(fresh, 1.0, memory["step_weight"])
    grads = memory["grad_sq_sum"] + fresh * c["eps"] + weight.square() * grad_sq
    size = torch.where(grads > 0, c["rate"] * farthest / torch.where(grads > 0, grads, 1.0).sqrt(), 0.0)
    step = weight * size
    away = memory["distance_sq"] - 2 * step * torch.where(fresh, 0.0, dot) + step.square() * grad_sq
    away = away.clamp(min=0)
    beyond = torch.maximum(farthest, away.sqrt())
    distances = torch.where(fresh, first, memory["distance_sum"]) + beyond
    heavier = (c["growth"] * distances / beyond).clamp(min=1.0)
    weights = torch.where(fresh, first, memory["weight_sum"]) + heavier * beyond
    return {
        "max_distance": beyond,
        "distance_sum": distances,
        "distance_sq": away,
        "step_weight": heavier,
        "weight_sum": weights,
        "grad_sq_sum": grads,
    }, {"size": size, "weighted_size": step, "mix": heavier * beyond / weights}


def terms(g, p, initial, away, *, fresh, **_):
    return g * away + p.square() * fresh, g.square()


def reference(g, p, initial, away, *, size, weighted_size, mix, **_):
    away = away - g * weighted_size
    return g * (size * (1 - mix)) + (p - initial - away) * mix, initial.clone(), away


@jit
def terms_triton(g, p, initial_param, displacement, c):
    return g * displacement + tl.load(c + 4) * p * p, g * g


@jit
def direction(g, p, initial_param, displacement, c):
    mix = tl.load(c + 7)
    displacement = displacement - tl.load(c + 6) * g
    u = (1.0 - mix) * tl.load(c + 5) * g + mix * ((p - initial_param) - displacement)
    return u, initial_param, displacement


ADOG = register(
    Rule(
        "adog",
        (State("initial_param", position=lambda h: 1.0), State("displacement", wide=True)),
        NAMES,
        scalars,
        reference,
        direction,
        step_size=lambda h, step: 1.0,
        measures=Measures(
            ("fresh", "size", "weighted_size", "mix"),
            dict.fromkeys(
                ("max_distance", "distance_sum", "distance_sq", "step_weight", "weight_sum", "grad_sq_sum"), 0.0
            ),
            scope="group",
            start=start,
            sums=sums,
            terms=terms,
            terms_triton=terms_triton,
        ),
    )
)


@register_optimizer("adog")
class ADoG(FusedOptimizer):
    """A-DoG: DoG with acceleration from one gradient a step. With e = lr r / sqrt(G), G the sum of all a^2 |g|^2 plus eps:
    y = p - e g; w = w - a e g; r = max(r, |w - p_0|); a = max(1, coefficient R / r); p = (1 - t) y + t w, t = a r / A, where R
    and A are the sums of all r and of all a r. At first w = p_0, a = 1 and r = reps_rel (1 + |p_0|). Norms are over all
    parameters of a group.

    For smooth problems with little noise (large batches), where `DoG` is too slow; no theory covers it. Leave lr at 1. p is
    an average already.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: multiplies e, a float or a 1-element tensor.
        reps_rel: the first distance, relative to 1 + |p_0|.
        eps: added to G once.
        coefficient: how fast the weights a of the steps grow.
        weight_decay: L2 coefficient; the decayed gradient counts in G.
        **options: shared options, see `FusedOptimizer`. No projection, offload, gradient release or differentiable=True, and all
            parameters on one device.

    r, R, |w - p_0|^2, a, A and G are `max_distance`, `distance_sum`, `distance_sq`, `step_weight`, `weight_sum` and `grad_sq_sum`
    in the state of every parameter of a group: the same 0-dim float64 tensors. p_0 and w - p_0, which is small at first, are kept
    in fp32 under every state_format. A step reads everything twice.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2404.00666, the accelerated DoG of its experiments.
    """

    def __init__(self, params, lr=1.0, reps_rel=1e-6, eps=1e-8, coefficient=1.0, weight_decay=0.0, **options):
        check_nonnegative(eps, "epsilon value")
        for name, value in (("reps_rel", reps_rel), ("coefficient", coefficient)):
            if not value > 0:
                raise ValueError(f"Invalid {name} value: {value}")
        defaults = {
            "lr": lr,
            "reps_rel": reps_rel,
            "eps": eps,
            "coefficient": coefficient,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return ADOG
