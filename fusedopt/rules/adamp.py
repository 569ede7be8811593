"""AdamP: Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights" (arXiv 2006.08217)."""

from __future__ import annotations

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, register, register_optimizer
from fusedopt.rules.adam import ADAM, MOMENTS, NAMES, moments, ratio, scalars
from fusedopt.transforms.base import listed
from fusedopt.transforms.tangent import TangentProjection


def reference_nesterov(g, p, m, v, *, beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps):
    m, v = m * beta1 + g * weight1, v * beta2 + g.square() * weight2
    ahead = m * beta1 + g * weight1
    return ahead * debias1 / (v.sqrt() * debias2_sqrt + eps), m, v


@jit
def direction_nesterov(g, p, exp_avg, exp_avg_sq, c):
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, c)
    return ratio(tl.load(c) * exp_avg + tl.load(c + 1) * g, exp_avg_sq, c), exp_avg, exp_avg_sq


NESTEROV = register(Rule("adamp_nesterov", MOMENTS, NAMES, scalars, reference_nesterov, direction_nesterov))


@register_optimizer("adamp")
class AdamP(FusedOptimizer):
    """AdamP: AdamW whose step u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) loses its part along the weights where
    their scale does not matter: p = (1 - lr weight_decay k) p - lr Pi(u), k = wd_ratio where Pi projects, else 1. The test, of the
    cosine of gradient and weights of tensors of two dimensions or more, and Pi are those of `TangentProjection`.

    For networks with batch or layer normalisation, trained long with momentum. Tensors that are not to be tested
    (embeddings): a group with transform_gradients=False, where this is AdamW.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the first and second moment.
        eps: added to the denominator, and to norms of the weights.
        weight_decay: coefficient of the decoupled decay.
        delta: threshold of the cosine, times the square root of the number of elements. Of all groups, as wd_ratio.
        wd_ratio: share of the decay that projected tensors take.
        nesterov: u = (beta1 m + (1 - beta1) g) / (1 - beta1^t) / (...).
        gradient_transforms: come after the projection's test, which is of the raw gradients.
        **options: shared options, see `FusedOptimizer`. No int8 weights, gradient release, offload or differentiable=True.

    States are those of AdamW; the weights before the step are kept during it.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2006.08217, algorithm 2, with the test by channel and by layer of the authors' code.
    """

    decay_mode = "decoupled"

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, delta=0.1, wd_ratio=0.1,
                 nesterov=False, *, gradient_transforms=(), **options):  # fmt: skip
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "nesterov": nesterov}
        options["gradient_transforms"] = (TangentProjection(delta, wd_ratio, eps), *listed(gradient_transforms))
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return NESTEROV if group["nesterov"] else ADAM
