"""Polyak step sizes: SPS_max, Loizou et al., "Stochastic Polyak Step-size for SGD" (arXiv 2002.10542), and SANIA, Abdukhakimov et
al. (arXiv 2312.17369)."""

from __future__ import annotations

import math

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.losses import TakesLoss, sign_of
from fusedopt.options import check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer


def excess(c):
    """How far the loss lies above its lower bound."""
    return (c["sign"] * c["loss"] - c["bound"]).clamp(min=0.0)


def scalars(h, step):
    return sign_of(h), h["lower_bound"], h["scale"], h["max_rate"]


def norms(memory, param_sq, grad_sq, c):
    moving = grad_sq > 0
    rate = excess(c) / (c["scale"] * torch.where(moving, grad_sq, 1.0))
    rate = torch.where(grad_sq != grad_sq, grad_sq, torch.where(moving, rate, 0.0))
    rate = rate.clamp(max=c["most"])
    return {}, {"lr_factor": rate, "decay_factor": rate}


def reference(g, p, **_):
    return (g.clone(),)


@jit
def direction(g, p, c):
    return g


POLYAK = register(
    Rule(
        "polyak",
        (),
        ("sign", "bound", "scale", "most"),
        scalars,
        reference,
        direction,
        measures=Measures(("lr_factor", "decay_factor"), scope="optimizer", norms=norms, given=("loss",)),
    )
)


@register_optimizer("sps")
class SPS(TakesLoss):
    """SPS_max, SGD with stochastic Polyak step sizes: p -= lr min((L - lower_bound) / (scale |g|^2), max_rate) g, with the loss L
    of the step and the norm of all gradients.

    For models that can fit every batch (L reaches its bound), whose rate then needs no tuning or schedule. No states; the step
    wants the loss: step(closure), or step(loss=loss) after backward().

    Args:
        params: parameters, named parameters, or groups of them.
        lr: multiplies the step size, a float or a 1-element tensor; leave it at 1.
        scale: c of the paper: 1/2 for convex losses; larger is more careful, 0.2 the paper's choice for deep networks.
        max_rate: the largest step size; math.inf for none.
        lower_bound: what the loss of a batch cannot fall below.
        weight_decay: decoupled, times lr and the step size.
        **options: shared options, see `FusedOptimizer`. No projection, offload, gradient release or differentiable=True, and all
            parameters on one device. With maximize=True L stands for minus the loss.

    With clip_grad_norm the norm is that of the clipped gradient. Where all gradients are 0, and where the loss is below its
    bound, nothing moves.

    Raises:
        ValueError: a hyperparameter is out of range. At the step: no loss is given.
    Source: arXiv 2002.10542, algorithm SPS_max.
    """

    decay_mode = "decoupled"

    def __init__(
        self, params, lr=1.0, scale=0.5, max_rate=1.0, lower_bound=0.0, weight_decay=0.0, **options
    ):  # fmt: skip
        for name, value in (("scale", scale), ("max_rate", max_rate)):
            if not value > 0:
                raise ValueError(f"Invalid {name} value: {value}")
        defaults = {
            "lr": lr,
            "scale": scale,
            "max_rate": max_rate,
            "lower_bound": lower_bound,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return POLYAK


def sania_scalars(h, step):
    if h["preconditioner"] == "adagrad":
        kept, weight, debias = 1.0, 1.0, 1.0
    else:
        kept, weight, debias = h["beta2"], 1 - h["beta2"], 1 / (1 - h["beta2"] ** step)
    return sign_of(h), h["lower_bound"], kept, weight, debias, h["eps"], float(h["sqrt"])


def solved(memory, product, nothing, c):
    """The step size at which the quadratic model of the loss reaches its bound; 1, Newton's, where it does not."""
    loss = 2 * excess(c)
    reached = (loss <= product) & (product > 0)
    root = (1 - loss / torch.where(reached, product, 1.0)).clamp(min=0.0).sqrt()
    rate = torch.where(reached, 1 - root, 1.0)
    rate = torch.where(product != product, product, rate)
    return {}, {"lr_factor": rate, "decay_factor": rate}


def preconditioned(g, v, debias, eps, root):
    metric = (v * debias).clamp(min=eps)
    return g / (metric.sqrt() if root else metric)


def sania_terms(g, p, v, *, kept, weight, debias, eps, root, **_):
    product = g * preconditioned(g, v * kept + g.square() * weight, debias, eps, root)
    return product, torch.zeros_like(g)


def sania_reference(g, p, v, *, kept, weight, debias, eps, root, **_):
    v = v * kept + g.square() * weight
    return preconditioned(g, v, debias, eps, root), v


@jit
def scaled(g, exp_avg_sq, c):
    metric = exp_avg_sq * tl.load(c + 4)
    metric = tl.where(metric < tl.load(c + 5), tl.load(c + 5), metric)
    return g / tl.where(tl.load(c + 6) != 0.0, tl.sqrt(metric), metric)


@jit
def sania_terms_triton(g, p, exp_avg_sq, c):
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g
    return g * scaled(g, exp_avg_sq, c), g * 0.0


@jit
def sania_direction(g, p, exp_avg_sq, c):
    exp_avg_sq = tl.load(c + 2) * exp_avg_sq + tl.load(c + 3) * g * g
    return scaled(g, exp_avg_sq, c), exp_avg_sq


def _measures(terms, terms_triton) -> Measures:
    return Measures(
        ("lr_factor", "decay_factor"), scope="optimizer", sums=solved, terms=terms, terms_triton=terms_triton, given=("loss",)
    )  # fmt: skip


SANIA_RULE = register(
    Rule(
        "sania",
        (State("exp_avg_sq", signed=False),),
        ("sign", "bound", "kept", "weight", "debias", "eps", "root"),
        sania_scalars,
        sania_reference,
        sania_direction,
        measures=_measures(sania_terms, sania_terms_triton),
    )
)


@register_optimizer("sania")
class SANIA(TakesLoss):
    """SANIA: Newton-like steps of Polyak's size, with a diagonal from squared gradients: v = beta2 v + (1 - beta2) g^2,
    d = g / max(v / (1 - beta2^t), eps); with Q = sum <d, g> over all tensors and the loss L, a = 1 - sqrt(1 - 2 L / Q) where
    2 L <= Q, else 1; p -= lr a d. With sqrt=True the divisor is a root, as in Adam.

    Without sqrt the steps do not depend on the scale of features: for badly scaled, convex problems (logistic regression) and
    models that fit every batch. One state; the step wants the loss: step(closure), or step(loss=loss) after backward().

    Args:
        params: parameters, named parameters, or groups of them.
        lr: multiplies the step size, a float or a 1-element tensor; leave it at 1.
        preconditioner: "adam", as above, or "adagrad": v = v + g^2, without correction.
        beta2: decay rate of v, of "adam" only.
        eps: the least divisor (its square with sqrt).
        sqrt: divide by the root.
        lower_bound: what the loss of a batch cannot fall below; L counts from there.
        weight_decay: decoupled, times lr a.
        **options: shared options, see `FusedOptimizer`. No projection, offload, gradient release or differentiable=True, and all
            parameters on one device. With maximize=True L stands for minus the loss.

    A step reads everything twice. Where the loss is below its bound, a is 0.

    Raises:
        ValueError: a hyperparameter is out of range. At the step: no loss is given.
    Source: arXiv 2312.17369, Adam-SQR, AdaGrad-SQR and those with roots.
    """

    decay_mode = "decoupled"

    def __init__(
        self,
        params,
        lr=1.0,
        preconditioner="adam",
        beta2=0.999,
        eps=0.1,
        sqrt=False,
        lower_bound=0.0,
        weight_decay=0.0,
        **options,
    ):
        if preconditioner not in ("adam", "adagrad"):
            raise ValueError(f"Invalid preconditioner value: {preconditioner!r}; it is 'adam' or 'adagrad'")
        if not 0.0 <= beta2 < 1.0:
            raise ValueError(f"Invalid beta2 value: {beta2}")
        check_nonnegative(eps, "epsilon value")
        if eps == 0 or math.isinf(eps):
            raise ValueError(f"Invalid epsilon value: {eps}; it is the least divisor, so it must be positive")
        defaults = {
            "lr": lr,
            "preconditioner": preconditioner,
            "beta2": beta2,
            "eps": eps,
            "sqrt": sqrt,
            "lower_bound": lower_bound,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return SANIA_RULE
