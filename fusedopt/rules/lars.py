"""LARS: You et al., "Large Batch Training of Convolutional Networks" (arXiv 1708.03888), algorithm 1."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_nesterov, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer
from fusedopt.rules.sgd import MOMENTUM_NAMES, momentum_reference, momentum_scalars

NAMES = ("coefficient", "weight_decay", "eps", "adapt", "clip_lr")


def scalars(h, step):
    adapt = float(h["weight_decay"] != 0 or h["always_adapt"])
    return h["trust_coefficient"], h["weight_decay"], h["eps"], adapt, h["lr"] if h["trust_clip"] else 0.0


def scalars_with_momentum(h, step):
    return (*scalars(h, step), *momentum_scalars(h, step))


def reference(g, p, **_):
    return (g,)


def reference_with_momentum(g, p, b, *, momentum, weight, look_grad, look_buffer, **_):
    return momentum_reference(g, p, b, momentum=momentum, weight=weight, look_grad=look_grad, look_buffer=look_buffer)


def trust(param_sq, grad_sq, *, coefficient, weight_decay, eps, adapt, clip_lr, **_):
    one = torch.ones_like(param_sq)
    if not adapt:
        return one
    param_norm, grad_norm = param_sq.sqrt(), grad_sq.sqrt()
    q = coefficient * param_norm / (grad_norm + weight_decay * param_norm + eps)
    q = torch.where((param_norm > 0) & (grad_norm > 0), q, one)
    return torch.minimum(q / clip_lr, one) if clip_lr else q


@jit
def trust_triton(param_sq, grad_sq, c):
    param_norm = tl.sqrt(param_sq)
    grad_norm = tl.sqrt(grad_sq)
    q = tl.load(c) * param_norm / (grad_norm + tl.load(c + 1) * param_norm + tl.load(c + 2))
    q = tl.where((param_norm > 0) & (grad_norm > 0), q, 1.0)
    clip_lr = tl.load(c + 4)
    q = tl.where(clip_lr > 0, tl.minimum(q / tl.where(clip_lr > 0, clip_lr, 1.0), 1.0), q)
    return tl.where(tl.load(c + 3) > 0, q, 1.0)


@jit
def direction(g, p, c):
    return g


@jit
def direction_with_momentum(g, p, momentum_buffer, c):
    momentum_buffer = tl.load(c + 5) * momentum_buffer + tl.load(c + 6) * g
    return tl.load(c + 7) * g + tl.load(c + 8) * momentum_buffer, momentum_buffer


TRUST = {"trust": trust, "trust_triton": trust_triton, "trust_on": "gradient"}
LARS_PLAIN = register(Rule("lars", (), NAMES, scalars, reference, direction, **TRUST))
LARS_MOMENTUM = register(
    Rule(
        "lars_momentum",
        (State("momentum_buffer"),),
        NAMES + MOMENTUM_NAMES,
        scalars_with_momentum,
        reference_with_momentum,
        direction_with_momentum,
        **TRUST,
    )
)


@register_optimizer("lars")
class LARS(FusedOptimizer):
    """LARS: SGD with momentum on q (g + weight_decay p), q = trust_coefficient |p| / (|g| + weight_decay |p| + eps) per tensor.

    For convolutional networks at batches of thousands, where one learning rate no longer suits all layers. Warm it up.

    Args:
        params: parameters, named parameters, or groups of them. Biases and norms usually go to a group with weight_decay=0.
        lr: learning rate.
        momentum, dampening, nesterov: as in `SGD`.
        weight_decay: coupled; with 0 a group is plain SGD unless always_adapt.
        trust_coefficient: scale of q.
        eps: added to the denominator of q.
        trust_clip: limit lr * q to lr.
        always_adapt: adapt groups without weight decay too.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 1708.03888, algorithm 1, with the learning rate outside the momentum buffer.
    """

    decay_mode = "coupled"

    def __init__(
        self,
        params,
        lr=1.0,
        momentum=0.9,
        dampening=0.0,
        weight_decay=0.0,
        nesterov=False,
        trust_coefficient=0.001,
        eps=1e-8,
        trust_clip=False,
        always_adapt=False,
        **options,
    ):
        check_nonnegative(momentum, "momentum value")
        check_nonnegative(trust_coefficient, "trust_coefficient value")
        check_nonnegative(eps, "epsilon value")
        check_nesterov(nesterov, momentum, dampening)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return LARS_MOMENTUM if group["momentum"] else LARS_PLAIN
