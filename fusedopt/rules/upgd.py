"""UPGD: Elsayed and Mahmood, "Addressing Loss of Plasticity and Catastrophic Forgetting in Continual Learning" (arXiv
2404.00781), first-order global utility."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer

NAMES = ("kept", "weight", "debias", "sigma")


def scalars(h, step):
    beta = h["beta_utility"]
    debias = 1 / (1 - beta**step)
    return beta, 1 - beta, debias, h["sigma"], float(h["protecting"]), debias


def adaptive_scalars(h, step):
    beta, (beta1, beta2) = h["beta_utility"], h["betas"]
    debias = 1 / (1 - beta**step)
    return (
        beta, 1 - beta, debias, h["sigma"], beta1, 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta1**step),
        1 / (1 - beta2**step) ** 0.5, h["eps"], debias,
    )  # fmt: skip


def sums(memory, largest, nothing, c):
    useful = largest != 0
    return {}, {"gain": torch.where(useful, c["debias"] / torch.where(useful, largest, 1.0), 0.0)}


def terms(g, p, *states, kept, weight, **_):
    return kept * states[-1] - weight * g * p, torch.zeros_like(g)


def reference(g, p, z, utility, *, kept, weight, sigma, protects, gain, **_):
    utility = kept * utility - weight * g * p
    free = torch.sigmoid(-utility * gain)
    return g * (free if protects else 1.0) + sigma * z * free, utility


def adaptive_reference(
    g,
    p,
    z,
    m,
    v,
    utility,
    *,
    kept,
    weight,
    sigma,
    beta1,
    weight1,
    beta2,
    weight2,
    debias1,
    debias2_sqrt,
    eps,
    gain,
    **_,
):
    utility = kept * utility - weight * g * p
    m, v = m * beta1 + g * weight1, v * beta2 + g.square() * weight2
    u = m * debias1 / (v.sqrt() * debias2_sqrt + eps) + sigma * z
    return u * torch.sigmoid(-utility * gain), m, v, utility


@jit
def plasticity(x):
    """1 - sigmoid(x)"""
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0.0, e, 1.0) / (1.0 + e)


@jit
def terms_triton(g, p, utility, c):
    return tl.load(c) * utility - tl.load(c + 1) * g * p, g * 0.0


@jit
def direction(g, p, z, utility, c):
    utility = tl.load(c) * utility - tl.load(c + 1) * g * p
    free = plasticity(utility * tl.load(c + 5))
    return g * tl.where(tl.load(c + 4) != 0.0, free, 1.0) + tl.load(c + 3) * z * free, utility


@jit
def adaptive_terms_triton(g, p, exp_avg, exp_avg_sq, utility, c):
    return tl.load(c) * utility - tl.load(c + 1) * g * p, g * 0.0


@jit
def adaptive_direction(g, p, z, exp_avg, exp_avg_sq, utility, c):
    utility = tl.load(c) * utility - tl.load(c + 1) * g * p
    exp_avg = tl.load(c + 4) * exp_avg + tl.load(c + 5) * g
    exp_avg_sq = tl.load(c + 6) * exp_avg_sq + tl.load(c + 7) * g * g
    u = exp_avg * tl.load(c + 8) / (tl.sqrt(exp_avg_sq) * tl.load(c + 9) + tl.load(c + 10)) + tl.load(c + 3) * z
    return u * plasticity(utility * tl.load(c + 11)), exp_avg, exp_avg_sq, utility


def _measures(terms_of_triton) -> Measures:
    return Measures(
        ("gain",), scope="optimizer", sums=sums, terms=terms, terms_triton=terms_of_triton, largest=True
    )  # fmt: skip


UPGD_RULE = register(
    Rule(
        "upgd",
        (State("utility"),),
        (*NAMES, "protects", "gain"),
        scalars,
        reference,
        direction,
        measures=_measures(terms_triton),
        noise=True,
        heavy=("plain",),
    )
)
ADAPTIVE = register(
    Rule(
        "upgd_adaptive",
        (State("exp_avg"), State("exp_avg_sq", signed=False), State("utility")),
        (*NAMES, "beta1", "weight1", "beta2", "weight2", "debias1", "debias2_sqrt", "eps", "gain"),
        adaptive_scalars,
        adaptive_reference,
        adaptive_direction,
        step_size=lambda h, step: 2 * h["lr"],
        measures=_measures(adaptive_terms_triton),
        noise=True,
    )
)


def check(beta_utility: float, sigma: float) -> None:
    if not 0.0 <= beta_utility < 1.0:
        raise ValueError(f"Invalid beta_utility value: {beta_utility}")
    check_nonnegative(sigma, "sigma value")


@register_optimizer("upgd")
class UPGD(FusedOptimizer):
    """UPGD, utility-based perturbed gradient descent: SGD that perturbs weights of little use and spares useful ones. The utility
    of a weight is what the loss would rise by without it, to first order; with M the largest one of all tensors and z ~ N(0, 1):
    U = b U - (1 - b) g p; k = sigmoid(U / (1 - b^t) / M); p -= lr (g + sigma z) (1 - k).

    For continual learning: noise renews weights that do nothing, so the network stays able to learn, and what is in use is
    not overwritten. One state.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor. As large as SGD's; the published code has 1e-5.
        beta_utility: decay rate b of the utility. The published code's default is 0.
        sigma: standard deviation of the noise. The published code's default is 1.
        protecting: False gives gradients their full weight: p -= lr (g + sigma z (1 - k)).
        weight_decay: decoupled.
        **options: shared options, see `FusedOptimizer`; seed draws the noise. No projection, offload, gradient release or
            differentiable=True, and all parameters on one device.

    M is that of U as it is stored, before its correction by 1 - b^t, as in the published code. Where M is 0, k is 1/2. The
    noise of an element depends on seed, step, tensor and element alone, and has steps of 2^-16 in its two uniform numbers.
    A step reads everything twice.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2404.00781, first-order global variants.
    """

    decay_mode = "decoupled"

    def __init__(
        self, params, lr=0.1, beta_utility=0.999, sigma=1e-3, protecting=True, weight_decay=0.0, **options
    ):  # fmt: skip
        check(beta_utility, sigma)
        defaults = {
            "lr": lr,
            "beta_utility": beta_utility,
            "sigma": sigma,
            "protecting": protecting,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return UPGD_RULE


@register_optimizer("adaptive_upgd")
class AdaptiveUPGD(FusedOptimizer):
    """UPGD with Adam's step, for reinforcement learning: with k and z as in `UPGD`,
    p -= 2 lr (m_hat / (sqrt(v_hat) + eps) + sigma z) (1 - k).

    Where Adam loses its ability to learn over many tasks or a policy's changing data. The factor 2 makes up for 1 - k = 1/2 of
    a weight without utility. Three states.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the moments.
        eps: added to the denominator.
        beta_utility: decay rate of the utility.
        sigma: standard deviation of the noise.
        weight_decay: decoupled, times lr.
        **options: shared options, see `FusedOptimizer`; seed draws the noise. No projection, offload, gradient release or
            differentiable=True, and all parameters on one device.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2404.00781, and its published code for reinforcement learning.
    """

    decay_mode = "decoupled"

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-5,
        beta_utility=0.999,
        sigma=1e-3,
        weight_decay=1e-3,
        **options,
    ):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        check(beta_utility, sigma)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "beta_utility": beta_utility,
            "sigma": sigma,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return ADAPTIVE
