"""SGDP: Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights" (arXiv 2006.08217)."""

from __future__ import annotations

from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_fraction, check_nesterov, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer
from fusedopt.rules.sgd import MOMENTUM_NAMES, SGD_PLAIN, momentum_direction, momentum_reference
from fusedopt.transforms.base import listed
from fusedopt.transforms.tangent import TangentProjection


def scalars(h, step):
    """Those of SGD; the buffer starts at zero, so that dampening counts at the first step too."""
    look = (1.0, h["momentum"]) if h["nesterov"] else (0.0, 1.0)
    return (h["momentum"], 1 - h["dampening"], *look)


SGDP_RULE = register(
    Rule(
        "sgdp",
        (State("momentum_buffer"),),
        MOMENTUM_NAMES,
        scalars,
        momentum_reference,
        momentum_direction,
        decay=lambda h, step: h["lr"] * h["weight_decay"] / (1 - h["momentum"]),
    )
)


@register_optimizer("sgdp")
class SGDP(FusedOptimizer):
    """SGDP: SGD whose step u, with b = momentum b + (1 - dampening) g and u = g + momentum b if nesterov else b, loses its part
    along the weights where their scale does not matter: p = (1 - lr weight_decay k / (1 - momentum)) p - lr Pi(u), k = wd_ratio
    where Pi projects, else 1. The test, of the cosine of gradient and weights of tensors of two dimensions or more, and Pi are
    those of `TangentProjection`.

    For convolutional networks with batch normalisation. weight_decay is what L2 decay would be: its effect is that of a decay
    which the buffer carries on.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        momentum: below 1; 0 keeps no state.
        dampening: of the gradient that enters the buffer; needs momentum > 0.
        weight_decay: coefficient of the decoupled decay.
        nesterov: needs momentum > 0 and dampening 0.
        eps: added to norms of the weights.
        delta: threshold of the cosine, times the square root of the number of elements. Of all groups, as wd_ratio and eps.
        wd_ratio: share of the decay that projected tensors take.
        gradient_transforms: come after the projection's test, which is of the raw gradients.
        **options: shared options, see `FusedOptimizer`. No int8 weights, gradient release, offload or differentiable=True.

    b itself is not projected; the authors' code projects it in place without nesterov, its paper does not.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2006.08217, algorithm 1, with the test by channel and by layer of the authors' code.
    """

    decay_mode = "decoupled"

    def __init__(self, params, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, eps=1e-8, delta=0.1,
                 wd_ratio=0.1, *, gradient_transforms=(), **options):  # fmt: skip
        check_nonnegative(eps, "epsilon value")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        options["gradient_transforms"] = (TangentProjection(delta, wd_ratio, eps), *listed(gradient_transforms))
        super().__init__(params, defaults, **options)

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group of parameters. Raises ValueError for a momentum that does not fit."""
        group = {**self.defaults, **param_group} if isinstance(param_group, dict) else self.defaults
        momentum, dampening = group["momentum"], group["dampening"]
        check_fraction(momentum, "momentum value")
        check_nesterov(group["nesterov"], momentum, dampening)
        if dampening and not momentum:
            raise ValueError(f"Invalid dampening value: {dampening}; without momentum there is no buffer to dampen")
        super().add_param_group(param_group)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return SGDP_RULE if group["momentum"] else SGD_PLAIN
