"""MicroAdam: Modoranu et al., "Accurate Adaptive Optimization with Low Space Overhead and Provable Convergence"
(arXiv 2405.15593), algorithm 1."""

from __future__ import annotations

import torch

from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.projections.sparse import SparseWindow
from fusedopt.rule import Rule, register_optimizer
from fusedopt.rules.sgd import SGD_PLAIN


@register_optimizer("microadam")
class MicroAdam(FusedOptimizer):
    """AdamW whose moments are summed anew at each step from the largest 1 % of the last 10 gradients: 0.9 bytes of state a
    parameter.

    a = g + error; of each block of a the largest in magnitude go into the window, the rest becomes the error, in 4 bits.
    p -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), with m and v the window's exponential sums; zero where the
    window has no entry.

    For fine-tuning in little memory where matrices cannot be projected; pretraining loses accuracy with it.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled.
        window: how many sparse gradients are kept.
        density: share of a block that is kept of each.
        block: elements a choice is made from, at most 32768.
        error_block: elements that share the bounds of their 4-bit error; even, divides block.
        **options: shared options, see `FusedOptimizer`; state_format has nothing to act on, projection is not one of them.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2405.15593, algorithms 1 to 3; bias corrections with the full step count, as there. error_block is 32768,
    not the paper's 100 000, so that it divides block.
    """

    decay_mode = "decoupled"

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, window=10, density=0.01,
                 block=32768, error_block=32768, **options):  # fmt: skip
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        SparseWindow(window, density, block, error_block)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "window": window,
                    "density": density, "block": block, "error_block": error_block}  # fmt: skip
        super().__init__(params, defaults, **options)
        if self.defaults["differentiable"]:
            raise ValueError("MicroAdam: differentiable=True is not supported. Use AdamW with fused=False.")

    def _check_projection(self, group) -> None:
        if group["projection"] is not None:
            raise ValueError(
                "MicroAdam: its gradients are sparse already, so it takes no projection. Use AdamW for one."
            )

    def projection_for(self, p: torch.Tensor, group: dict) -> SparseWindow | None:
        chosen = SparseWindow(group["window"], group["density"], group["block"], group["error_block"])
        return None if chosen.refuses(p) else chosen

    @classmethod
    def rule_for(cls, group) -> Rule:
        return SGD_PLAIN
