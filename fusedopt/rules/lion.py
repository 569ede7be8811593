"""Lion: Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675), algorithm 2."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas
from fusedopt.rule import Rule, State, register, register_optimizer
from fusedopt.rules.cautious import agree, cautious, check_cautious, keep


def scalars(h, step):
    beta1, beta2 = h["betas"]
    return beta1, 1 - beta1, beta2, 1 - beta2


def reference(g, p, m, *, beta1, weight1, beta2, weight2):
    u = torch.sign(m * beta1 + g * weight1)
    return u, m * beta2 + g * weight2


@jit
def direction(g, p, exp_avg, c):
    blend = tl.load(c) * exp_avg + tl.load(c + 1) * g
    u = (blend > 0).to(tl.float32) - (blend < 0).to(tl.float32)
    return u, tl.load(c + 2) * exp_avg + tl.load(c + 3) * g


LION = register(
    Rule("lion", (State("exp_avg"),), ("beta1", "weight1", "beta2", "weight2"), scalars, reference, direction)
)


@jit
def direction_cautious(g, p, exp_avg, c):
    u, exp_avg = direction(g, p, exp_avg, c)
    return keep(u, g), exp_avg


@jit
def terms(g, p, exp_avg, c):
    u, _ = direction(g, p, exp_avg, c)
    return p * 0.0 + 1.0, agree(u, g)


LION_CAUTIOUS = register(cautious(LION, "count", direction_cautious, terms))


@register_optimizer("lion")
class Lion(FusedOptimizer):
    """Lion: p -= lr * (sign(beta1 m + (1 - beta1) g) + weight_decay p), then m = beta2 m + (1 - beta2) g. sign(0) = 0.

    For large batches and long runs: half the state of AdamW, one pass without a division. Every weight moves by lr at each
    step, so that the learning rate must fall to the end.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate; the paper takes 3 to 10 times less than for AdamW.
        betas: interpolation of the update and of the momentum.
        weight_decay: decoupled; the paper takes 3 to 10 times more than for AdamW.
        cautious: move only where the update has the gradient's sign, scaled by n / (kept + 1) of a tensor's n elements ("count",
            also True) or 1 / max(kept / n, 1e-3) ("mean"). Takes a second pass over the states and no projection.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2302.06675, algorithm 2; cautious: arXiv 2411.16085, algorithm 1, normalised as in its code for Lion.
    """

    decay_mode = "decoupled"

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, cautious=False, **options):
        check_betas(betas, options)
        check_cautious(cautious)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "cautious": cautious}
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return LION_CAUTIOUS if group["cautious"] else LION
