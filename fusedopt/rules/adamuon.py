"""AdaMuon: Si et al., "AdaMuon: Adaptive Muon Optimizer" (arXiv 2507.11005): orthogonal factors with a second moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.matrices import MatrixOrAdam, orthogonal_options
from fusedopt.newton_schulz import QUINTIC
from fusedopt.noise_rates import noise_rates
from fusedopt.options import check_betas, check_fraction
from fusedopt.projections.orthogonal import Orthogonal, OrthogonalSite
from fusedopt.rule import Rule, State, compose, register, register_optimizer
from fusedopt.rules.muon import DIFFERENCE
from fusedopt.rules.muon import scalars as momentum_scalars


def scalars(h, step):
    stabilised = h["sign_stabilised"]
    return *momentum_scalars(h, step), float(stabilised), float(not stabilised)


def second_scalars(h, step):
    beta2 = h["momentum"] if h["beta2"] is None else h["beta2"]
    return beta2, 1 - beta2, (1 - beta2**step) ** -0.5 if h["debias"] else 1.0, h["eps"]


def reference(g, p, b, *, momentum, weight, look_grad, look_buffer, sign_weight, value_weight):
    b = b * momentum + g * weight
    u = g * look_grad + b * look_buffer
    return torch.sign(u) * sign_weight + u * value_weight, b


def second_reference(g, p, v, *, beta2, weight2, debias_sqrt, eps):
    v = v * beta2 + g.square() * weight2
    return g / (v.sqrt() * debias_sqrt + eps), v


@jit
def direction(g, p, momentum_buffer, c):
    momentum_buffer = tl.load(c) * momentum_buffer + tl.load(c + 1) * g
    u = tl.load(c + 2) * g + tl.load(c + 3) * momentum_buffer
    side = (u > 0).to(tl.float32) - (u < 0).to(tl.float32)
    return tl.load(c + 4) * side + tl.load(c + 5) * u, momentum_buffer


@jit
def second_direction(g, p, exp_avg_sq, c):
    exp_avg_sq = tl.load(c) * exp_avg_sq + tl.load(c + 1) * g * g
    return g / (tl.sqrt(exp_avg_sq) * tl.load(c + 2) + tl.load(c + 3)), exp_avg_sq


MOMENTUM = register(
    Rule(
        "adamuon_momentum",
        (State("momentum_buffer"),),
        ("momentum", "weight", "look_grad", "look_buffer", "sign_weight", "value_weight"),
        scalars,
        reference,
        direction,
        internal=True,
    )
)
SECOND = register(
    Rule(
        "adamuon_second",
        (State("exp_avg_sq", signed=False),),
        ("beta2", "weight2", "debias_sqrt", "eps"),
        second_scalars,
        second_reference,
        second_direction,
        internal=True,
    )
)
ADAMUON = compose("adamuon", MOMENTUM, SECOND)
NOISY_ADAMUON = compose("adamuon_noise", MOMENTUM, SECOND, DIFFERENCE)


class AdaMuonSite(OrthogonalSite):
    """One matrix of AdaMuon: its orthogonal factor O becomes O / (sqrt(v) + eps), scaled to a root mean square of 0.2."""

    momentum_rule = "adamuon_momentum"
    plain_rule = "adamuon_second"

    def finish(self, batch, steps, factors):
        for slot, target, factor in zip(batch.slots, batch.stack, factors, strict=True):
            slot.site.launch(self.plain_rule, slot, steps, factor, target, slot.plain_row, own=False)
        norms = torch.linalg.vector_norm(batch.stack, dim=(1, 2), dtype=self.dtype)
        rows, cols = batch.shape
        return batch.stack, 0.2 * (rows * cols) ** 0.5 / (norms + self.projection.second_eps)


@dataclass(frozen=True)
class AdaptiveOrthogonal(Orthogonal):
    """Orthogonal with a second moment; `AdaMuon` sets it by itself. second_eps: beside the norm of the update."""

    name: ClassVar[str] = "adaptive_orthogonal"
    site: ClassVar[type] = AdaMuonSite

    second_eps: float = 1e-8


@register_optimizer("adamuon")
class AdaMuon(MatrixOrAdam):
    """AdaMuon: b = mu b + (1 - mu) g; u = (1 - mu) g + mu b (b without nesterov); O = U V^T of sign(u);
    v = beta2 v + (1 - beta2) O^2; w = O / (sqrt(v) + eps); p -= lr (0.2 sqrt(rows cols) w / (|w| + eps) + weight_decay p);
    and AdamW for everything that is no hidden matrix.

    As `Muon`, with element-wise rates on top, and updates of AdamW's size: its learning rate and decay serve. One state more.

    Args:
        params: a module, (named) parameters, or groups of them, with "orthogonalize" as in `Muon`.
        lr: learning rate, a float or a 1-element tensor.
        weight_decay: decoupled.
        momentum: mu.
        nesterov: look ahead, as above.
        eps: beside sqrt(v) and |w|; of AdamW's groups adam_eps.
        beta2: of v; None for mu, as in the published code.
        sign_stabilised: take the factor of sign(u), as above; False: of u.
        debias: v / (1 - beta2^t) in place of v. The paper's first version is sign_stabilised=False, beta2=0.999, debias=True.
        ns_coefficients, ns_steps, ns_dtype: of the Newton-Schulz iteration, as in `Muon`.
        ns_eps: the least norm of what becomes orthogonal.
        adam_lr, adam_betas, adam_eps: of AdamW's groups; adam_lr None for lr.
        noise_rates: as in `Muon`.
        **options: as in `Muon`; state_format is that of b, v and AdamW's moments.

    Without debias v starts small and w large, which its scaling undoes.

    Raises:
        ValueError: a hyperparameter is out of range, or a vector is to be made orthogonal.
    Source: arXiv 2507.11005, algorithm 1; beta2 and eps are those of its published code.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        weight_decay=0.01,
        momentum=0.95,
        nesterov=True,
        eps=1e-8,
        beta2=None,
        sign_stabilised=True,
        debias=False,
        ns_coefficients=QUINTIC,
        ns_steps=5,
        ns_dtype="bf16",
        ns_eps=1e-7,
        adam_lr=None,
        adam_betas=(0.9, 0.95),
        adam_eps=1e-8,
        noise_rates=None,
        **options,
    ):
        check_betas(adam_betas, options)
        check_fraction(momentum, "momentum value")
        if beta2 is not None:
            check_fraction(beta2, "beta2 value")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "eps": eps,
            "beta2": beta2,
            "sign_stabilised": sign_stabilised,
            "debias": debias,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "ns_eps": ns_eps,
            "noise_rates": noise_rates,
            "betas": adam_betas,
        }
        super().__init__(params, defaults, {"lr": adam_lr, "eps": adam_eps}, **options)

    def matrix_projection(self, h: Mapping[str, Any]) -> Orthogonal:
        options = orthogonal_options({**h, "eps": h["ns_eps"], "adjust_lr_fn": "none"})
        return AdaptiveOrthogonal(**options, noise=noise_rates(h["noise_rates"]), second_eps=h["eps"])

    @classmethod
    def matrix_rule(cls, group) -> Rule:
        return ADAMUON if group["noise_rates"] is None else NOISY_ADAMUON
