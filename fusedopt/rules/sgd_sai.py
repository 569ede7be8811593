"""SGD-SaI: Xu et al., "No More Adam: Learning Rate Scaling at Initialization is All You Need" (arXiv 2412.11768), algorithm 1."""

from __future__ import annotations

from fusedopt.kernels.language import jit, tl
from fusedopt.measures import after, choose
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_fraction, check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer


def scalars(h, step):
    kept = h["momentum"] * after(step, 1)  # the first step takes the gradient as it is
    return kept, 1 - kept, h["eps"], 1 - after(step, 1), 1.0


def sums(memory, total, square, c):
    n = c["numel"]
    deviation = ((square - total.square() / n) / (n - 1).clamp(min=1)).clamp(min=0).sqrt()
    gain = choose(n > 1, square.sqrt() / (deviation + c["eps"]), 1.0)
    gain = choose(c["first"], gain, memory["gain"])
    return {"gain": gain}, {"snr": gain}


def terms(g, p, b, **_):
    return g, g.square()


def reference(g, p, b, *, kept, weight, snr, **_):
    b = b * kept + g * weight
    return b * snr, b


@jit
def terms_triton(g, p, momentum_buffer, c):
    return g, g * g


@jit
def direction(g, p, momentum_buffer, c):
    momentum_buffer = tl.load(c) * momentum_buffer + tl.load(c + 1) * g
    return momentum_buffer * tl.load(c + 4), momentum_buffer


SGD_SAI = register(
    Rule(
        "sgd_sai",
        (State("momentum_buffer"),),
        ("kept", "weight", "eps", "first", "snr"),
        scalars,
        reference,
        direction,
        measures=Measures(("snr",), {"gain": 0.0}, sums=sums, terms=terms, terms_triton=terms_triton, last_step=1),
    )
)


@register_optimizer("sgd_sai")
class SGDSaI(FusedOptimizer):
    """SGD-SaI: SGD with momentum whose learning rate is scaled once for each tensor, by the signal-to-noise ratio of its first
    gradient, G = |g_1| / (std(g_1) + eps), std the unbiased deviation of its elements. b = g at the first step, then
    b = momentum b + (1 - momentum) g; p -= lr G b, after p -= lr weight_decay p.

    Half of AdamW's states for transformers, where plain SGD fails. G is of the order of sqrt(elements): learning rates are
    small. The first gradient decides: make it one of a full batch, after any loss scale has settled.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        momentum: decay rate of b.
        eps: added to the deviation.
        weight_decay: decoupled decay.
        **options: shared options, see `FusedOptimizer`. No projection and no differentiable=True.

    Each tensor's G is `gain` in its state: 0-dim, float64. A tensor of one element has no deviation; its G is 1. The first
    step reads gradients twice (with capturable=True every step does, since the count is on the device).

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2412.11768, algorithm 1, with the published code's first step.
    """

    decay_mode = "decoupled"

    def __init__(self, params, lr=1e-2, momentum=0.9, eps=1e-8, weight_decay=1e-2, **options):
        check_fraction(momentum, "momentum value")
        check_nonnegative(eps, "epsilon value")
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return SGD_SAI
