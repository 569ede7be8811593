"""Induced-metric SGD and RMSprop: "The Optimiser Hidden in Plain Sight: Training with the Loss Landscape's Induced Metric"
(arXiv 2509.03594)."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.losses import TakesLoss, sign_of
from fusedopt.options import check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer

NAMES = ("momentum", "weight", "debias", "xi", "beta", "slope_debias")


def scalars(h, step):
    momentum, beta = h["momentum"], h["beta"]
    return momentum, 1 - momentum, 1 / (1 - momentum**step), h["xi"], beta, 1 / (1 - beta**step)


def log_scalars(h, step):
    return (*scalars(h, step), sign_of(h))


def rms_scalars(h, step):
    alpha = h["alpha"]
    return (*scalars(h, step), alpha, 1 - alpha, 1 / (1 - alpha**step) ** 0.5, h["eps"])


def smoothed(memory, slope_sq, c):
    return c["beta"] * memory["slope_sq"] + (1 - c["beta"]) * c["xi"] * slope_sq


def shrunk(memory, slope_sq, c):
    """The step's factor from the squared length of the gradient."""
    slope = smoothed(memory, slope_sq, c)
    return {"slope_sq": slope}, {"lr_factor": 1 / (1 + slope * c["slope_debias"])}


def log_norms(memory, param_sq, grad_sq, c):
    slope = smoothed(memory, grad_sq, c)
    loss = c["sign"] * c["loss"]
    return {"slope_sq": slope}, {"lr_factor": loss / (loss * loss + slope * c["slope_debias"])}


def norms(memory, param_sq, grad_sq, c):
    return shrunk(memory, grad_sq, c)


def sums(memory, slope_sq, nothing, c):
    return shrunk(memory, slope_sq, c)


def reference(g, p, m, *, momentum, weight, debias, **_):
    m = m * momentum + g * weight
    return m * debias, m


def rms_terms(g, p, m, v, *, alpha, rms_weight, rms_debias_sqrt, eps, **_):
    slope = g.square() / ((v * alpha + g.square() * rms_weight).sqrt() * rms_debias_sqrt + eps)
    return slope, torch.zeros_like(slope)


def rms_reference(g, p, m, v, *, momentum, weight, debias, alpha, rms_weight, rms_debias_sqrt, eps, **_):
    m, v = m * momentum + g * weight, v * alpha + g.square() * rms_weight
    return m * debias / (v.sqrt() * rms_debias_sqrt + eps), m, v


@jit
def direction(g, p, exp_avg, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    return exp_avg * tl.load(c + 2), exp_avg


@jit
def rms_terms_triton(g, p, exp_avg, exp_avg_sq, c):
    exp_avg_sq = tl.load(c + 6) * exp_avg_sq + tl.load(c + 7) * g * g
    return g * g / (tl.sqrt(exp_avg_sq) * tl.load(c + 8) + tl.load(c + 9)), g * 0.0


@jit
def rms_direction(g, p, exp_avg, exp_avg_sq, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    exp_avg_sq = tl.load(c + 6) * exp_avg_sq + tl.load(c + 7) * g * g
    u = exp_avg * tl.load(c + 2) / (tl.sqrt(exp_avg_sq) * tl.load(c + 8) + tl.load(c + 9))
    return u, exp_avg, exp_avg_sq


INDUCED = register(
    Rule(
        "induced_metric",
        (State("exp_avg"),),
        NAMES,
        scalars,
        reference,
        direction,
        measures=Measures(("lr_factor",), {"slope_sq": 0.0}, scope="group", norms=norms),
    )
)
INDUCED_LOG = register(
    Rule(
        "induced_metric_log",
        (State("exp_avg"),),
        (*NAMES, "sign"),
        log_scalars,
        reference,
        direction,
        measures=Measures(("lr_factor",), {"slope_sq": 0.0}, scope="group", norms=log_norms, given=("loss",)),
    )
)
INDUCED_RMS = register(
    Rule(
        "induced_metric_rms",
        (State("exp_avg"), State("exp_avg_sq", signed=False)),
        (*NAMES, "alpha", "rms_weight", "rms_debias_sqrt", "eps"),
        rms_scalars,
        rms_reference,
        rms_direction,
        measures=Measures(
            ("lr_factor",), {"slope_sq": 0.0}, scope="group", sums=sums, terms=rms_terms, terms_triton=rms_terms_triton
        ),
    )
)


@register_optimizer("induced_metric")
class InducedMetric(TakesLoss):
    """SGD in the metric that the loss landscape induces when it is drawn as a surface: steps shrink where it is steep.
    m = momentum m + (1 - momentum) g; E = beta E + (1 - beta) xi sum g^2, over all parameters of a group;
    p -= lr / (1 + E / (1 - beta^t)) m / (1 - momentum^t). With rms=True g^2 in E and m are divided by
    sqrt(v / (1 - alpha^t)) + eps, v = alpha v + (1 - alpha) g^2, RMSprop's. With log=True, the surface of log L, the factor is
    L / (L^2 + E / (1 - beta^t)) in place of 1 / (1 + E / (1 - beta^t)).

    A smooth form of clipping the global norm: at small gradients it is SGD (rms: Adam), at large ones the step is bounded.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        momentum: decay rate of m.
        xi: scale of the embedding; 0 leaves SGD.
        beta: decay rate of E.
        rms: divide by the root mean square of gradients.
        log: the loss is drawn on a logarithmic scale; it must be positive, and step wants it: step(closure) or step(loss=loss).
        alpha, eps: decay rate of v, and what is added to its root; with rms only.
        weight_decay: decoupled decay, times lr alone.
        **options: shared options, see `FusedOptimizer`. No projection, offload, gradient release or differentiable=True, and all
            parameters on one device.

    E is `slope_sq` in the state of every parameter of a group: one 0-dim float64 tensor.

    Raises:
        ValueError: a hyperparameter is out of range; rms and log at once. At the step, with log: no loss is given.
    Source: arXiv 2509.03594.
    """

    decay_mode = "decoupled"

    def __init__(
        self,
        params,
        lr=0.1,
        momentum=0.9,
        xi=0.1,
        beta=0.8,
        rms=False,
        log=False,
        alpha=0.99,
        eps=1e-8,
        weight_decay=0.0,
        **options,
    ):
        for name, value in (("momentum", momentum), ("beta", beta), ("alpha", alpha)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"Invalid {name} value: {value}")
        check_nonnegative(xi, "xi value")
        check_nonnegative(eps, "epsilon value")
        if rms and log:
            raise ValueError("InducedMetric: rms and log are two variants; choose one")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "xi": xi,
            "beta": beta,
            "rms": rms,
            "log": log,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return INDUCED_RMS if group["rms"] else INDUCED_LOG if group.get("log") else INDUCED
