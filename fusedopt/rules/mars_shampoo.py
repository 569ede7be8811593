"""MARS-Shampoo: Yuan et al., "MARS: Unleashing the Power of Variance Reduction" (arXiv 2411.10438), algorithm 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.matrices import MatrixOrAdam, orthogonal_options
from fusedopt.newton_schulz import QUINTIC
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.projections.orthogonal import Orthogonal, OrthogonalSite
from fusedopt.rule import Rule, State, compose, register, register_optimizer
from fusedopt.rules.adam_parts import EMA


def scalars(h, step):
    beta1 = h["betas"][0]
    return (h["gamma"] * beta1 / (1 - beta1),)


def reference(g, p, previous, *, change):
    return g + (g - previous) * change, g.clone()


@jit
def direction(g, p, previous_grad, c):
    return g + tl.load(c) * (g - previous_grad), g


CORRECTED = register(
    Rule("mars_corrected", (State("previous_grad"),), ("change",), scalars, reference, direction, internal=True)
)
MARS_SHAMPOO = compose("mars_shampoo", CORRECTED, EMA)


class MarsShampooSite(OrthogonalSite):
    """One matrix of MARS-Shampoo: the corrected gradient fills an fp32 buffer, whose norm clips it on the way to its average."""

    plain_rule = "ema"

    def bind(self, slot, steps) -> None:
        super().bind(slot, steps)
        self.room = max(self.room, self.whole[0] * self.whole[1])

    def direct(self, slot, steps, grad, target) -> None:
        corrected = steps.scratch(1, self.whole[0] * self.whole[1], self.dtype).view(self.whole)
        self.launch("mars_corrected", slot, steps, grad, corrected, slot.row, own=True)
        norm = torch.linalg.vector_norm(corrected)
        shrink = (1 / norm.clamp(min=1.0)).view(1)
        self.launch("ema", slot, steps, corrected, target, slot.plain_row, own=False, clip=shrink)


@dataclass(frozen=True)
class VarianceReducedOrthogonal(Orthogonal):
    """Orthogonal factors of the average of corrected gradients; `MARSShampoo` sets it by itself."""

    name: ClassVar[str] = "variance_reduced_orthogonal"
    site: ClassVar[type] = MarsShampooSite


@register_optimizer("mars_shampoo")
class MARSShampoo(MatrixOrAdam):
    """MARS-Shampoo: c = g + gamma beta1 / (1 - beta1) (g - g'), g' the last step's gradient; c / max(1, |c|) in its place, |c| per
    matrix; m = beta1 m + (1 - beta1) c; p -= lr (sqrt(max(1, rows / cols)) U V^T + weight_decay p), U V^T the orthogonal factor of
    m; and AdamW for everything that is no hidden matrix.

    `Muon` with variance reduction: Shampoo without accumulation, its root by a Newton-Schulz iteration. One state more than Muon.

    Args:
        params: a module, (named) parameters, or groups of them, with "orthogonalize" as in `Muon`.
        lr: learning rate, a float or a 1-element tensor.
        betas: beta1, and a second one that nothing uses: that of the other forms of MARS.
        gamma: strength of the variance reduction.
        eps: the least norm of m / (1 - beta1).
        weight_decay: decoupled.
        ns_coefficients, ns_steps, ns_dtype, adjust_lr_fn: of the Newton-Schulz iteration and the scale, as in `Muon`.
        adam_lr, adam_betas, adam_eps, adam_weight_decay: of AdamW's groups; adam_lr None for lr.
        **options: as in `Muon`; state_format is that of m, g' and AdamW's moments. Between launches one matrix is held in fp32.

    g' is zero at the first step, so c is then g (1 + gamma beta1 / (1 - beta1)), as in the published code.

    Raises:
        ValueError: a hyperparameter is out of range, or a vector is to be made orthogonal.
    Source: arXiv 2411.10438, algorithm 4, with the last step's gradient for that of the last parameters ("MARS-approx").
    """

    def __init__(
        self,
        params,
        lr=3e-3,
        betas=(0.95, 0.99),
        gamma=0.025,
        eps=1e-8,
        weight_decay=0.0,
        ns_coefficients=QUINTIC,
        ns_steps=5,
        ns_dtype="bf16",
        adjust_lr_fn=None,
        adam_lr=None,
        adam_betas=(0.9, 0.95),
        adam_eps=1e-8,
        adam_weight_decay=0.1,
        **options,
    ):
        check_betas(betas, options)
        check_betas(adam_betas, options)
        check_nonnegative(gamma, "gamma value")
        check_nonnegative(adam_weight_decay, "adam_weight_decay value")
        defaults = {
            "lr": lr,
            "betas": betas,
            "gamma": gamma,
            "eps": eps,
            "weight_decay": weight_decay,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "adjust_lr_fn": adjust_lr_fn,
        }
        adam = {"lr": adam_lr, "betas": adam_betas, "eps": adam_eps, "weight_decay": adam_weight_decay}
        super().__init__(params, defaults, adam, **options)

    def matrix_projection(self, h: Mapping[str, Any]) -> Orthogonal:
        # the iteration starts from m, not from m / (1 - beta1)
        eps = h["eps"] * (1 - float(h["betas"][0]))
        return VarianceReducedOrthogonal(**{**orthogonal_options(h), "eps": eps})

    @classmethod
    def matrix_rule(cls, group) -> Rule:
        return MARS_SHAMPOO
