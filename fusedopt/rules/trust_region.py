"""Non-Euclidean trust regions: Kovalev, "Understanding Gradient Orthogonalization for Deep Learning via Non-Euclidean Trust-Region
Optimization" (arXiv 2503.12645), algorithm 1; with noise-adaptive rates of layers, LANTON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.matrices import HIDDEN, OUTER, VECTOR, MatrixOptimizer, orthogonal_options
from fusedopt.measures import after
from fusedopt.newton_schulz import QUINTIC
from fusedopt.noise_rates import layer_rates, noise_rates
from fusedopt.options import check_fraction
from fusedopt.projections.orthogonal import Orthogonal
from fusedopt.rule import Measures, Rule, State, compose, register, register_optimizer
from fusedopt.rules.muon import DIFFERENCE, MUON

BALLS = ("spectral", "linf", "l2", "rms")
PLACES = {HIDDEN: "spectral", OUTER: "linf", VECTOR: "rms"}
MOMENTUM, PREVIOUS = State("momentum_buffer"), State("previous_grad")
UNIT_NAMES = ("momentum", "weight", "rms", "eps", "inverse")
NOISE_NAMES = ("alpha", "beta2", "weight2")


def sign_scalars(h, step):
    return h["momentum"], 1 - h["momentum"]


def unit_scalars(h, step):
    return h["momentum"], 1 - h["momentum"], float(h["ball"] == "rms"), h["eps"], 0.0


def noise_scalars(h, step):
    alpha, beta2 = h["noise_rates"]
    return alpha, 1 - (1 - beta2) * after(step, 1), (1 - beta2) * after(step, 1)  # no change is known at the first step


def decay(h, step):
    """The share of the parameter that a step takes off."""
    return h["weight_decay"] * (1.0 if h["fixed_decay"] else h["lr"])


def sign_reference(g, p, m, *, momentum, weight):
    m = m * momentum + g * weight
    return torch.sign(m), m


def unit_reference(g, p, m, *, momentum, weight, inverse, **_):
    m = m * momentum + g * weight
    return m * inverse, m


def unit_terms(g, p, m, *, momentum, weight, **_):
    square = (m * momentum + g * weight).square()
    return square, torch.zeros_like(square)


def unit_sums(memory, square, nothing, c):
    return {}, {"inverse": inverse_of(square, c)}


def inverse_of(square, c):
    """What makes of m a vector of norm 1, or of root mean square 1."""
    return c["numel"] ** (0.5 * c["rms"]) / square.sqrt().clamp(min=c["eps"])


def noisy_sign_reference(g, p, m, previous, *, momentum, weight, **_):
    m = m * momentum + g * weight
    return torch.sign(m), m, g.clone()


def noisy_sign_terms(g, p, m, previous, **_):
    change = (g - previous).abs()
    return change, torch.zeros_like(change)


def noisy_sign_sums(memory, change, nothing, c):
    return noise_of(memory, change.square(), c)


def noise_of(memory, dual_square, c):
    """H and the rates of layers (fusedopt.noise_rates) from the squared dual norms of the gradients' changes."""
    noise = c["beta2"] * memory["noise"] + c["weight2"] * dual_square
    return {"noise": noise}, {"lr_factor": layer_rates(noise, c["alpha"])}


def noisy_unit_reference(g, p, m, previous, *, momentum, weight, inverse, **_):
    m = m * momentum + g * weight
    return m * inverse, m, g.clone()


def noisy_unit_terms(g, p, m, previous, *, momentum, weight, **_):
    return (m * momentum + g * weight).square(), (g - previous).square()


def noisy_unit_sums(memory, square, change, c):
    memory, numbers = noise_of(memory, change * c["numel"] ** c["rms"], c)
    return memory, {**numbers, "inverse": inverse_of(square, c)}


@jit
def averaged(g, momentum_buffer, c):
    return tl.load(c) * momentum_buffer + tl.load(c + 1) * g


@jit
def side(x):
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


@jit
def sign_direction(g, p, momentum_buffer, c):
    momentum_buffer = averaged(g, momentum_buffer, c)
    return side(momentum_buffer), momentum_buffer


@jit
def unit_direction(g, p, momentum_buffer, c):
    momentum_buffer = averaged(g, momentum_buffer, c)
    return momentum_buffer * tl.load(c + 4), momentum_buffer


@jit
def unit_terms_triton(g, p, momentum_buffer, c):
    m = averaged(g, momentum_buffer, c)
    return m * m, g * 0.0


@jit
def noisy_sign_direction(g, p, momentum_buffer, previous_grad, c):
    momentum_buffer = averaged(g, momentum_buffer, c)
    return side(momentum_buffer), momentum_buffer, g


@jit
def noisy_sign_terms_triton(g, p, momentum_buffer, previous_grad, c):
    return tl.abs(g - previous_grad), g * 0.0


@jit
def noisy_unit_direction(g, p, momentum_buffer, previous_grad, c):
    momentum_buffer = averaged(g, momentum_buffer, c)
    return momentum_buffer * tl.load(c + 4), momentum_buffer, g


@jit
def noisy_unit_terms_triton(g, p, momentum_buffer, previous_grad, c):
    m, change = averaged(g, momentum_buffer, c), g - previous_grad
    return m * m, change * change


def unit_measures(scope: str) -> Measures:
    return Measures(("inverse",), scope=scope, sums=unit_sums, terms=unit_terms, terms_triton=unit_terms_triton)


SIGN = register(
    Rule("trust_sign", (MOMENTUM,), ("momentum", "weight"), sign_scalars, sign_reference, sign_direction, decay=decay)
)
UNIT = register(
    Rule("trust_unit", (MOMENTUM,), UNIT_NAMES, unit_scalars, unit_reference, unit_direction, decay=decay,
         measures=unit_measures("tensor"))
)  # fmt: skip
UNIT_GLOBAL = register(
    Rule("trust_unit_global", (MOMENTUM,), UNIT_NAMES, unit_scalars, unit_reference, unit_direction, decay=decay,
         measures=unit_measures("optimizer"))
)  # fmt: skip
NOISY_SIGN = register(
    Rule(
        "trust_noisy_sign",
        (MOMENTUM, PREVIOUS),
        ("momentum", "weight", *NOISE_NAMES),
        lambda h, step: (*sign_scalars(h, step), *noise_scalars(h, step)),
        noisy_sign_reference,
        noisy_sign_direction,
        decay=decay,
        measures=Measures(
            ("lr_factor",), {"noise": 0.0}, sums=noisy_sign_sums, terms=noisy_sign_terms,
            terms_triton=noisy_sign_terms_triton, compares=True,
        ),
    )
)  # fmt: skip
NOISY_UNIT = register(
    Rule(
        "trust_noisy_unit",
        (MOMENTUM, PREVIOUS),
        (*UNIT_NAMES, *NOISE_NAMES),
        lambda h, step: (*unit_scalars(h, step), *noise_scalars(h, step)),
        noisy_unit_reference,
        noisy_unit_direction,
        decay=decay,
        measures=Measures(
            ("inverse", "lr_factor"), {"noise": 0.0}, sums=noisy_unit_sums, terms=noisy_unit_terms,
            terms_triton=noisy_unit_terms_triton, compares=True,
        ),
    )
)  # fmt: skip
SPECTRAL = compose("trust_spectral", MUON, decay=decay)
NOISY_SPECTRAL = compose("trust_noisy_spectral", MUON, DIFFERENCE, decay=decay)


@register_optimizer("trust_region")
class TrustRegion(MatrixOptimizer):
    """Steps to the edge of a ball of radius lr: m = mu m + (1 - mu) g; p = (1 - beta) p - lr D(m), D(m) the point of the unit ball
    that m points to: of the spectral norm U V^T of a matrix ("spectral", Muon's step), of the largest element sign(m) ("linf",
    signSGD with momentum), of the Euclidean norm m / |m| ("l2"), of the root mean square sqrt(n) m / |m| of n elements ("rms").

    One optimizer for the family: which norm suits a layer is a choice for each group. Without one hidden matrices take the
    spectral norm, embeddings and output heads the largest element, vectors the root mean square.

    Args:
        params: a module, (named) parameters, or groups of them. Of a group, "ball" says its norm; None decides tensor by tensor.
        lr: the radius, a float or a 1-element tensor. A spectral step moves elements by about lr / sqrt(longer side).
        momentum: mu.
        weight_decay: beta / lr, decoupled; with fixed_decay beta itself, which no schedule of lr changes, as in the paper.
        ball: of groups that have none.
        scope: of "l2": "tensor", or "optimizer" for one norm over all tensors with that ball.
        other_lr: learning rate of groups whose ball is not spectral, where `ball` is None: their elements move by that much. None
            for lr.
        adjust_lr_fn: what U V^T is multiplied by: "none", 1, the paper's; or another of `Muon`'s.
        ns_coefficients, ns_steps, ns_dtype: of the Newton-Schulz iteration, as in `Muon`. eps: the least norm of m.
        noise_rates: None, or (alpha, beta2): see `LANTON`. Not with scope "optimizer".
        **options: as in `Muon`; state_format is that of m.

    Raises:
        ValueError: a hyperparameter is out of range, or a vector is given the spectral norm.
    Source: arXiv 2503.12645, algorithm 1.
    """

    kind = "ball"
    elementwise: ClassVar[tuple[dict, ...]] = (
        {"ball": "linf"},
        {"ball": "l2"},
        {"ball": "l2", "scope": "optimizer"},
        {"ball": "linf", "noise_rates": (0.02, 0.9)},
        {"ball": "l2", "noise_rates": (0.02, 0.9)},
    )

    def __init__(
        self,
        params,
        lr=0.02,
        momentum=0.95,
        weight_decay=0.0,
        fixed_decay=False,
        ball=None,
        scope="tensor",
        other_lr=1e-3,
        adjust_lr_fn="none",
        ns_coefficients=QUINTIC,
        ns_steps=5,
        ns_dtype="bf16",
        eps=1e-7,
        noise_rates=None,
        **options,
    ):
        check_fraction(momentum, "momentum value")
        if options.get("projection") is not None:
            raise ValueError(f"{type(self).__name__}: it steps whole tensors, so it takes no projection. Use AdamW.")
        self._other = {} if other_lr is None or ball is not None else {"lr": other_lr}
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": False,
            "weight_decay": weight_decay,
            "fixed_decay": fixed_decay,
            "ball": ball,
            "scope": scope,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "eps": eps,
            "noise_rates": noise_rates,
        }
        self.orthogonal("spectral" if ball is None else ball, defaults)
        super().__init__(params, defaults, **options)

    def kind_of(self, place):
        return PLACES[place]

    def defaults_of(self, kind):
        return {} if kind == "spectral" else self._other

    def orthogonal(self, kind, h: Mapping[str, Any]) -> Orthogonal | None:
        if kind not in BALLS:
            raise ValueError(f"Invalid ball value: {kind!r}; it is one of {', '.join(map(repr, BALLS))}, or None")
        if h["scope"] not in ("tensor", "optimizer"):
            raise ValueError(f"Invalid scope value: {h['scope']!r}; it is 'tensor' or 'optimizer'")
        noise = noise_rates(h["noise_rates"])
        if kind == "l2" and h["scope"] == "optimizer" and noise is not None:
            raise ValueError("noise_rates are those of layers: they need scope='tensor'")
        options: dict[str, Any] = {**orthogonal_options(h), "noise": noise}
        return Orthogonal(**options) if kind == "spectral" else None

    @classmethod
    def rule_for(cls, group) -> Rule:
        ball, noisy = group["ball"], group["noise_rates"] is not None
        if ball == "spectral":
            return NOISY_SPECTRAL if noisy else SPECTRAL
        if ball == "linf":
            return NOISY_SIGN if noisy else SIGN
        if ball == "l2" and group["scope"] == "optimizer":
            return UNIT_GLOBAL
        return NOISY_UNIT if noisy else UNIT


@register_optimizer("lanton")
class LANTON(TrustRegion):
    """LANTON: `TrustRegion` with a rate of its own for each layer: H = beta2 H + (1 - beta2) |g - g'|^2, the norm dual to the
    layer's ball and g' the last step's gradient; a = alpha / sqrt(alpha^2 + H);
    p = (1 - lr weight_decay) p - lr sqrt(a / max a) D(m), the maximum over the layers of a group with the same ball.

    Where layers' gradients are of very different noise: the noisy ones take smaller steps than the calmest, which keeps lr. Keeps
    the last gradient beside the momentum; a matrix's nuclear norm takes a second Newton-Schulz iteration. All parameters of a
    group have to be stepped together.

    Args:
        params, lr, momentum, weight_decay, ball, other_lr, ns_coefficients, ns_steps, ns_dtype, eps, **options: of `TrustRegion`.
        alpha: below which noise does not matter, in units of the dual norm.
        beta2: of H.
        adjust_lr_fn: as in `Muon`; "rms_to_rms", sqrt(rows / cols), is the paper's for hidden matrices.

    H is 0 at the first step, when there is no g' to compare with, and all layers then take lr.

    Raises:
        ValueError: a hyperparameter is out of range, or a vector is given the spectral norm.
    Source: "Noise-Adaptive Layerwise Learning Rates", option I (the last step's gradient for that of a second batch); the
    defaults of alpha and beta2 are ours.
    """

    elementwise = ()  # those of TrustRegion with noise_rates

    def __init__(
        self,
        params,
        lr=0.02,
        momentum=0.95,
        weight_decay=0.0,
        alpha=0.02,
        beta2=0.9,
        adjust_lr_fn="rms_to_rms",
        **options,
    ):
        super().__init__(
            params, lr, momentum, weight_decay, adjust_lr_fn=adjust_lr_fn, noise_rates=(alpha, beta2), **options
        )
