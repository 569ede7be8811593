"""Adafactor: Shazeer and Stern, "Adaptive Learning Rates with Sublinear Memory Cost" (arXiv 1804.04235), algorithms 4 and 5."""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_nonnegative
from fusedopt.projections.factored import FACTORED
from fusedopt.rule import Rule, register_optimizer
from fusedopt.rules.adam_parts import EMA
from fusedopt.rules.sgd import SGD_PLAIN

VARIANTS = ("transformers", "torch")


def momentum_scalars(h, step):
    return h["beta1"], 1 - h["beta1"], 0.0, 0.0, 0.0, 0.0, 0.0


MOMENTUM = replace(EMA, scalars=momentum_scalars)  # of updates that are scaled already


@register_optimizer("adafactor")
class Adafactor(FusedOptimizer):
    """Adam without first moment whose second moment is kept as a row and a column factor: rows + cols numbers a matrix.

    u = g / sqrt(row col / mean(row)), divided by max(1, rms(u) / clip_threshold); p -= size * (u + weight_decay * p) with
    size = min(lr, 1 / sqrt(t)) * max(eps[1], rms(p)).

    For models whose optimizer state must vanish: T5 and other encoder-decoders were trained with it. Without a first moment
    it wants a warm-up; with beta1 it is close to AdamW.

    Args:
        params: parameters, named parameters, or groups of them. The last two dimensions of a tensor are factored, each
            matrix of a stack on its own (a convolution's weight saves little); vectors keep all of `exp_avg_sq`.
        lr: upper bound of the relative step size; the step size itself with relative_step=False. None is 1e-2.
        eps: (added to the squared gradient, smallest rms(p) that scales a step).
        clip_threshold: largest root mean square of an update.
        decay_rate: exponent c of 1 - beta2 = t^c.
        beta1: of a moving average `exp_avg` of the updates, in any state_format; None for none.
        weight_decay: decoupled, times the step size.
        scale_parameter: multiply the step size by max(eps[1], rms(p)).
        relative_step: bound the step size by 1 / sqrt(t).
        warmup_init: bound it by 1e-6 t instead of lr; needs relative_step.
        variant: "transformers" (and fairseq), or "torch", whose eps[0] is a floor (None: the machine epsilon of the
            parameter's dtype) under mean(row) and, squared, under the second moment, and whose decay is lr * weight_decay.
            torch.optim.Adafactor(lr, d, eps) is Adafactor(lr, eps=(None, 1e-3), clip_threshold=d, variant="torch").
        **options: shared options, see `FusedOptimizer`; projection is not one of them.

    Raises:
        ValueError: a hyperparameter is out of range, or relative_step=False without lr.
    Source: arXiv 1804.04235, algorithms 4 and 5; variants as in transformers.Adafactor and torch.optim.Adafactor.
    """

    decay_mode = "decoupled"
    needs_shapes = True

    def __init__(self, params, lr=None, eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8, beta1=None,
                 weight_decay=0.0, scale_parameter=True, relative_step=True, warmup_init=False, variant="transformers",
                 **options):  # fmt: skip
        if variant not in VARIANTS:
            raise ValueError(f"Invalid variant: {variant!r}; it is one of {', '.join(VARIANTS)}")
        if lr is None:
            if not relative_step:
                raise ValueError("Adafactor: relative_step=False needs a learning rate. Pass lr=.")
            lr = 1e-2
        if warmup_init and not relative_step:
            raise ValueError("Adafactor: warmup_init=True needs relative_step=True.")
        if not isinstance(eps, (tuple, list)) or len(eps) != 2:
            raise ValueError(f"Invalid epsilon value: {eps}; Adafactor takes two, such as (1e-30, 1e-3)")
        if eps[0] is None and variant != "torch":
            raise ValueError("Adafactor: eps[0]=None is for variant='torch'. Pass a number such as 1e-30.")
        for value in eps:
            check_nonnegative(0.0 if value is None else value, "epsilon value")
        if not clip_threshold > 0:
            raise ValueError(f"Invalid clip_threshold value: {clip_threshold}; it must be positive")
        if not decay_rate <= 0:
            raise ValueError(f"Invalid decay_rate value: {decay_rate}; it must not be positive")
        if beta1 is not None and not 0.0 <= beta1 < 1.0:
            raise ValueError(f"Invalid beta1 value: {beta1}")
        defaults = {
            "lr": lr, "eps": eps, "clip_threshold": clip_threshold, "decay_rate": decay_rate, "beta1": beta1,
            "weight_decay": weight_decay, "scale_parameter": scale_parameter, "relative_step": relative_step,
            "warmup_init": warmup_init, "variant": variant,
        }  # fmt: skip
        super().__init__(params, defaults, **options)
        if self.defaults["differentiable"]:
            raise ValueError("Adafactor: differentiable=True is not supported. Use torch.optim.Adafactor.")

    def _check_projection(self, group) -> None:
        if group["projection"] is not None:
            raise ValueError(
                "Adafactor: its second moment is factored already, so it takes no projection. Use AdamW for one."
            )

    def projection_for(self, p: torch.Tensor, group: dict):
        return FACTORED

    @classmethod
    def rule_for(cls, group) -> Rule:
        return SGD_PLAIN if group["beta1"] is None else MOMENTUM
