"""Ranger21: Wright and Demeure, "Ranger21: a synergistic deep learning optimizer" (arXiv 2106.13731), around positive-negative
momentum (Xie et al., arXiv 2103.17182)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer
from fusedopt.transforms.base import applied, listed
from fusedopt.transforms.clipping import AdaptiveClip
from fusedopt.transforms.normalising import Centralize, Normalize
from fusedopt.transforms.wrappers import Lookahead, NormLoss, StableDecay

NAMES = (
    "keep_odd", "enter_odd", "weigh_odd", "keep_even", "enter_even", "weigh_even", "beta2", "weight2", "debias2_sqrt", "eps",
    "keep_max", "softplus", "over_softplus",
)  # fmt: skip


def scalars(h, step):
    """Two averages take turns with the gradient; the one that has just had it counts 1 + pnm, the other -pnm."""
    (beta1, beta2), pnm = h["betas"], h["pnm"]
    odd, debias = step % 2, 1 / (1 - beta1**step)
    if pnm is None:
        averages = beta1, 1 - beta1, debias, 1.0, 0.0, 0.0
    else:
        keep, size = beta1**2, debias * ((1 + pnm) ** 2 + pnm**2) ** -0.5
        turns = ((1 - own * (1 - keep), own * (1 - keep), size * (own * (1 + 2 * pnm) - pnm)) for own in (odd, 1 - odd))
        averages = tuple(x for turn in turns for x in turn)
    softplus = h["softplus"] or 0.0
    return (
        *averages, beta2, 1 - beta2, (1 - beta2**step) ** -0.5, h["eps"], float(h["amsgrad"]), softplus,
        1 / softplus if softplus else 0.0,
    )  # fmt: skip


def reference(
    g, p, a, b, v, v_max, *, keep_odd, enter_odd, weigh_odd, keep_even, enter_even, weigh_even, beta2, weight2, debias2_sqrt,
    eps, keep_max, softplus, over_softplus,
):  # fmt: skip
    a, b = a * keep_odd + g * enter_odd, b * keep_even + g * enter_even
    v = v * beta2 + g.square() * weight2
    v_max = torch.maximum(v_max * keep_max, v)
    x = v_max.sqrt() * debias2_sqrt + eps
    return (
        (a * weigh_odd + b * weigh_even) / (x + torch.log1p(torch.exp(-softplus * x)) * over_softplus),
        a,
        b,
        v,
        v_max,
    )


@jit
def direction(g, p, exp_avg, exp_avg_even, exp_avg_sq, max_exp_avg_sq, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * g
    exp_avg_even = tl.load(c + 3) * exp_avg_even + tl.load(c + 4) * g
    exp_avg_sq = tl.load(c + 6) * exp_avg_sq + tl.load(c + 7) * g * g
    max_exp_avg_sq = tl.maximum(tl.load(c + 10) * max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    x = tl.sqrt(max_exp_avg_sq) * tl.load(c + 8) + tl.load(c + 9)
    # softplus(x) >= log(2) / beta, beside which what log(1 + y) loses of a small y is nothing
    x = x + tl.load(c + 12) * tl.log(1.0 + tl.exp(-tl.load(c + 11) * x))
    u = (tl.load(c + 2) * exp_avg + tl.load(c + 5) * exp_avg_even) / x
    return u, exp_avg, exp_avg_even, exp_avg_sq, max_exp_avg_sq


PNM_ADAM = register(
    Rule(
        "pnm_adam",
        (
            State("exp_avg"),
            State("exp_avg_even"),
            State("exp_avg_sq", signed=False),
            State("max_exp_avg_sq", signed=False),
        ),
        NAMES,
        scalars,
        reference,
        direction,
    )
)


def ranger21_schedule(
    lr: float,
    total_steps: int,
    beta2: float = 0.999,
    *,
    warmup_steps: int | None = None,
    flat_until: float | None = 0.72,
    min_lr: float = 3e-5,
) -> Callable[[int], float]:
    """Ranger21's learning rate as factors of lr, for `torch.optim.lr_scheduler.LambdaLR(opt, ranger21_schedule(lr, steps))`:
    a linear warm-up, then lr, then a linear way down to min_lr.

    Args:
        lr: the learning rate of the flat part.
        total_steps: of the run; the factor stays where it ends.
        beta2: that of the optimizer; the warm-up takes ceil(2 / (1 - beta2)) steps, or 22 % of a run of which that would be
            more than 45 %.
        warmup_steps: instead of that; 0 for none.
        flat_until: the share of the run after which the rate goes down; None for never.
        min_lr: the last learning rate, an absolute number.
    Raises ValueError: an argument is out of range.
    Source: arXiv 2106.13731, section on the learning rate schedule; arXiv 1910.04209 (warm-up).
    """
    if not lr > 0:
        raise ValueError(f"ranger21_schedule: invalid lr: {lr}; it must be positive")
    if total_steps < 1:
        raise ValueError(f"ranger21_schedule: invalid total_steps: {total_steps}; it is 1 or more")
    if not 0 <= min_lr <= lr:
        raise ValueError(f"ranger21_schedule: invalid min_lr: {min_lr}; it is between 0 and lr ({lr})")
    if flat_until is not None and not 0 <= flat_until <= 1:
        raise ValueError(f"ranger21_schedule: invalid flat_until: {flat_until}; it is a share of the run, or None")
    if warmup_steps is None:
        warmup_steps = math.ceil(2 / (1 - beta2))
        if warmup_steps > 0.45 * total_steps:
            warmup_steps = int(0.22 * total_steps)
    if warmup_steps < 0:
        raise ValueError(f"ranger21_schedule: invalid warmup_steps: {warmup_steps}; it is 0 or more")
    start = math.inf if flat_until is None else int(flat_until * total_steps)

    def factor(done: int) -> float:
        """done: steps before this one, as LambdaLR counts them."""
        step = done + 1
        if step >= start:
            share = min((step + 1 - start) / (total_steps - start + 1), 1.0)
            return 1 - (1 - min_lr / lr) * share
        return min(1.0, step / warmup_steps) if warmup_steps else 1.0

    return factor


@register_optimizer("ranger21")
class Ranger21(FusedOptimizer):
    """Ranger21: AdamW with positive-negative momentum, a maximum of v and a softplus in the denominator, between gradient
    transforms: adaptive clipping, centralised and normalised gradients, stable weight decay, norm loss and Lookahead.
    With a and b taking turns, a = beta1^2 a + (1 - beta1^2) g at odd steps, b at even ones, x = sqrt(max v / (1 - beta2^t)) + eps:
    p -= lr / (1 - beta1^t) ((1 + pnm) a - pnm b) / (sqrt((1 + pnm)^2 + pnm^2) log(1 + exp(softplus x)) / softplus), a and b
    changing places at even steps.

    For training from scratch, above all of image models, with `ranger21_schedule`, which is a part of it. Each component can
    be left out.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates; that of the averages is beta1^2 in their own steps.
        eps: added to the root in the denominator.
        weight_decay: coefficient of stable decay, p *= 1 - lr weight_decay / sigma; 0 for none.
        pnm: how much the other average counts, 0.9; None for one average, with beta1.
        amsgrad: use the running maximum of v.
        softplus: of the denominator; None for x itself.
        clip: largest ratio of a unit's gradient norm to its weight norm; None for no clipping.
        centralize, normalize: take the mean of rows from gradients; divide them by their standard deviation.
        stable_decay: False for AdamW's decay, p *= 1 - lr weight_decay.
        norm_loss: factor of norm loss; None for none.
        lookahead: steps between two averagings with the slow weights; None for no slow weights. lookahead_alpha: their share.
        gradient_transforms: come before all these.
        **options: shared options, see `FusedOptimizer`. No gradient release, offload or differentiable=True, with stable
            decay no projection, and no int8 weights while a component reads them. Groups with transform_gradients=False take
            AdamW's decay.

    Four states and the slow weights. Without amsgrad max_exp_avg_sq is v, and without pnm exp_avg_even stays zero.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2106.13731. Its published code applies decay and norm loss to the last tensor only and
        takes other constants in the momentum, and normalises gradients twice; that is not reproduced.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-4,
        *,
        pnm=0.9,
        amsgrad=True,
        softplus=50.0,
        clip=1e-2,
        centralize=True,
        normalize=True,
        stable_decay=True,
        norm_loss=1e-4,
        lookahead=5,
        lookahead_alpha=0.5,
        gradient_transforms=(),
        **options,
    ):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        if pnm is not None:
            check_nonnegative(pnm, "pnm value")
        if softplus is not None and not softplus > 0:
            raise ValueError(f"Invalid softplus value: {softplus}; it must be positive, or None for none")
        parts = (
            lookahead is not None and Lookahead(lookahead, lookahead_alpha),  # begins as the weights before their decay
            clip is not None and AdaptiveClip(clip),
            centralize and Centralize(),
            normalize and Normalize(),
            stable_decay and StableDecay(None),
            norm_loss is not None and NormLoss(norm_loss),
        )
        options["gradient_transforms"] = (*listed(gradient_transforms), *(part for part in parts if part))
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "pnm": pnm,
            "amsgrad": amsgrad,
            "softplus": softplus,
        }
        super().__init__(params, defaults, **options)

    def _check_projection(self, group: dict) -> None:
        if group["projection"] is not None and any(isinstance(t, StableDecay) for t in applied(self, group)):
            raise ValueError(
                "Ranger21: stable decay needs the second moments of the full gradient, so it takes no projection. Use "
                "stable_decay=False."
            )
        super()._check_projection(group)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return PNM_ADAM

    def decay_mode_for(self, group: dict) -> str:
        """ "rule" where StableDecay has decayed the weights before the step."""
        return "rule" if any(isinstance(t, StableDecay) for t in applied(self, group)) else "decoupled"
