"""Rules that divide by an estimated diagonal of the Hessian: AdaHessian, Yao et al. (arXiv 2006.00719), OASIS, Jahani et al. (arXiv
2109.05198), and SANIA with Hutchinson's estimate, Abdukhakimov et al. (arXiv 2312.17369)."""

from __future__ import annotations

import torch

from fusedopt.curvature import EstimatesHessian
from fusedopt.kernels.language import jit, tl
from fusedopt.losses import TakesLoss, sign_of
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer
from fusedopt.rules.polyak import solved

HESSIAN = State("hessian", estimate=True)


def scalars(h, step):
    beta1, beta2 = h["betas"]
    return beta1, 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta1**step), 1 / (1 - beta2**step) ** 0.5, h["eps"]


def reference(g, p, m, v, hessian, *, beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps):
    m, v = m * beta1 + g * weight1, v * beta2 + hessian.square() * weight2
    return m * debias1 / (v.sqrt() * debias2_sqrt + eps), m, v, hessian.clone()


@jit
def direction(g, p, exp_avg, exp_hessian_diag_sq, hessian, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    exp_hessian_diag_sq = tl.load(c + 2) * exp_hessian_diag_sq + tl.load(c + 3) * hessian * hessian
    u = exp_avg * tl.load(c + 4) / (tl.sqrt(exp_hessian_diag_sq) * tl.load(c + 5) + tl.load(c + 6))
    return u, exp_avg, exp_hessian_diag_sq, hessian


def oasis_scalars(h, step):
    beta1 = h["betas"][0]
    return beta1, 1 - beta1, h["truncation"]


def oasis_reference(g, p, m, hessian, *, beta1, weight1, least):
    m = m * beta1 + g * weight1
    return m / hessian.abs().clamp(min=least), m, hessian.clone()


@jit
def divisor(hessian, least):
    size = tl.abs(hessian)
    return tl.where(size < least, least, size)


@jit
def oasis_direction(g, p, exp_avg, hessian, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    return exp_avg / divisor(hessian, tl.load(c + 2)), exp_avg, hessian


def sania_scalars(h, step):
    return sign_of(h), h["lower_bound"], h["eps"]


def sania_terms(g, p, hessian, *, eps, **_):
    product = g.square() / hessian.abs().clamp(min=eps)
    return product, torch.zeros_like(g)


def sania_reference(g, p, hessian, *, eps, **_):
    return g / hessian.abs().clamp(min=eps), hessian.clone()


@jit
def sania_terms_triton(g, p, hessian, c):
    return g * g / divisor(hessian, tl.load(c + 2)), g * 0.0


@jit
def sania_direction(g, p, hessian, c):
    return g / divisor(hessian, tl.load(c + 2)), hessian


ADAHESSIAN = register(
    Rule(
        "adahessian",
        (State("exp_avg"), State("exp_hessian_diag_sq", signed=False), HESSIAN),
        ("beta1", "weight1", "beta2", "weight2", "debias1", "debias2_sqrt", "eps"),
        scalars,
        reference,
        direction,
    )
)
OASIS_RULE = register(
    Rule(
        "oasis",
        (State("exp_avg"), HESSIAN),
        ("beta1", "weight1", "least"),
        oasis_scalars,
        oasis_reference,
        oasis_direction,
    )
)
SANIA_HESSIAN = register(
    Rule(
        "sania_hessian",
        (HESSIAN,),
        ("sign", "bound", "eps"),
        sania_scalars,
        sania_reference,
        sania_direction,
        measures=Measures(
            ("lr_factor", "decay_factor"),
            scope="optimizer",
            sums=solved,
            terms=sania_terms,
            terms_triton=sania_terms_triton,
            given=("loss",),
        ),
    )
)


@register_optimizer("adahessian")
class AdaHessian(EstimatesHessian):
    """AdaHessian: Adam whose second moment is that of the Hessian's diagonal D in place of the gradient:
    v = beta2 v + (1 - beta2) D^2; p -= lr m_hat / (sqrt(v_hat) + eps). D comes from `estimate_hessian(loss)`, which takes the place
    of loss.backward(), at every step or at every few.

    Where curvature differs much between weights and a gradient's size does not tell it; about as robust against lr as SGD is not.
    An estimate costs about a backward pass and twice its memory. Three states, one of them in fp32.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the moments.
        eps: added to the denominator.
        spatial_averaging: |D| of 4-D weights is averaged over its last two dimensions.
        weight_decay: decoupled.
        **options: shared options, see `FusedOptimizer`; seed draws the estimates. No projection. `estimate_hessian` wants whole
            parameters (no DTensor), and states that are neither offloaded nor stepped in backward.

    Raises:
        ValueError: a hyperparameter is out of range. RuntimeError at the step: a parameter never had an estimate.
    Source: arXiv 2006.00719, algorithm 1, with Hessian power 1.
    """

    decay_mode = "decoupled"

    def __init__(
        self,
        params,
        lr=0.15,
        betas=(0.9, 0.999),
        eps=1e-4,
        spatial_averaging=True,
        weight_decay=0.0,
        **options,
    ):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "spatial_averaging": spatial_averaging,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return ADAHESSIAN

    def joined(self, old, new, group):
        new = new.abs()
        averaged = group["spatial_averaging"] and new.dim() == 4
        return new.mean((2, 3), keepdim=True).expand_as(new) if averaged else new


def smoothed(old, new, beta2: float):
    return new if old is None else old * beta2 + new * (1 - beta2)


@register_optimizer("oasis")
class OASIS(EstimatesHessian):
    """OASIS: momentum over a smoothed and truncated diagonal of the Hessian: D = beta2 D + (1 - beta2) D_new at each
    `estimate_hessian(loss)`, which takes the place of loss.backward(); m = beta1 m + (1 - beta1) g;
    p -= lr m / max(|D|, truncation).

    For small or convex models whose curvature is worth its price, an estimate a step or one in several; a large truncation makes
    it SGD. The first estimate wants several samples. Two states, one of them in fp32.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of m (0 for none) and, per estimate, of D.
        truncation: the least divisor.
        weight_decay: decoupled.
        **options: shared options, see `FusedOptimizer`; seed draws the estimates. No projection. `estimate_hessian` wants whole
            parameters (no DTensor), and states that are neither offloaded nor stepped in backward.

    Raises:
        ValueError: a hyperparameter is out of range. RuntimeError at the step: a parameter never had an estimate.
    Source: arXiv 2109.05198, with a fixed learning rate, and momentum.
    """

    decay_mode = "decoupled"

    def __init__(
        self, params, lr=0.01, betas=(0.9, 0.999), truncation=0.01, weight_decay=0.0, **options
    ):  # fmt: skip
        check_betas(betas, options)
        if not truncation > 0:
            raise ValueError(f"Invalid truncation value: {truncation}; it is the least divisor, so it must be positive")
        super().__init__(
            params, {"lr": lr, "betas": betas, "truncation": truncation, "weight_decay": weight_decay}, **options
        )

    @classmethod
    def rule_for(cls, group) -> Rule:
        return OASIS_RULE

    def joined(self, old, new, group):
        return smoothed(old, new, float(group["betas"][1]))


@register_optimizer("sania_hessian")
class SANIAHessian(EstimatesHessian, TakesLoss):
    """SANIA with Hutchinson's diagonal: D = beta2 D + (1 - beta2) D_new at each `estimate_hessian(loss)`, which takes the place of
    loss.backward(); d = g / max(|D|, eps); with Q = sum <d, g> over all tensors and the loss L, a = 1 - sqrt(1 - 2 L / Q) where
    2 L <= Q, else 1; p -= lr a d.

    As `SANIA`, where squared gradients say too little of the curvature. One state, in fp32; a step is
    opt.estimate_hessian(loss), then opt.step(loss=loss).

    Args:
        params: parameters, named parameters, or groups of them.
        lr: multiplies the step size, a float or a 1-element tensor; leave it at 1.
        beta2: decay rate of D, per estimate.
        eps: the least divisor.
        lower_bound: what the loss of a batch cannot fall below; L counts from there.
        weight_decay: decoupled, times lr a.
        **options: shared options, see `FusedOptimizer`; seed draws the estimates. No projection, offload, gradient release or
            differentiable=True, whole parameters (no DTensor) and all on one device. With maximize=True L stands for minus
            the loss.

    Raises:
        ValueError: a hyperparameter is out of range; at the step: no loss is given. RuntimeError at the step: a parameter never
            had an estimate.
    Source: arXiv 2312.17369, with Hutchinson's preconditioner.
    """

    decay_mode = "decoupled"

    def __init__(
        self, params, lr=1.0, beta2=0.999, eps=0.1, lower_bound=0.0, weight_decay=0.0, **options
    ):  # fmt: skip
        if not 0.0 <= beta2 < 1.0:
            raise ValueError(f"Invalid beta2 value: {beta2}")
        check_nonnegative(eps, "epsilon value")
        if eps == 0:
            raise ValueError("Invalid epsilon value: 0; it is the least divisor, so it must be positive")
        defaults = {"lr": lr, "beta2": beta2, "eps": eps, "lower_bound": lower_bound, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return SANIA_HESSIAN

    def joined(self, old, new, group):
        return smoothed(old, new, group["beta2"])
