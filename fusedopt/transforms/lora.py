"""Gradients of LoRA factors made better ones, before any rule: LoRA-Pro's (arXiv 2407.18242) and LoRA-One's (arXiv 2502.01235)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedopt.factors import Factors, together
from fusedopt.lora import LoraPair, as_pairs
from fusedopt.options import check_nonnegative
from fusedopt.transforms.base import Batch, Transform


@dataclass(frozen=True)
class OfPairs(Transform):
    """Base: changes the gradients of both factors of each pair together. Other parameters keep theirs."""

    pairs: tuple[LoraPair, ...]
    damping: float = 1e-8
    scope = "model"
    whole = reads_weights = True

    def __post_init__(self):
        object.__setattr__(self, "pairs", as_pairs(self.pairs))
        check_nonnegative(self.damping, "damping")

    def refuses(self, p):
        mine = any(p is x for pair in self.pairs for x in (pair.A, pair.B))
        return super().refuses(p) if mine else None

    def ready(self, batches):
        name, found = type(self).__name__, _places(batches)
        for pair in self.pairs:
            a, b = (id(x) in found for x in (pair.A, pair.B))
            if a != b:
                raise ValueError(
                    f"{name}: of pair {pair.name!r} only {'A' if a else 'B'} has a gradient that this step transforms, and the "
                    "two factors go together. Train both, or leave the pair out: lora_pairs(model, filter=...)."
                )
            if a and found[id(pair.A)][0].device != found[id(pair.B)][0].device:
                raise ValueError(f"{name}: the factors of pair {pair.name!r} are on two devices. Put them on one.")
        owned = {id(p) for group in batches[0].opt.param_groups for p in group["params"]}
        if not any(id(pair.A) in owned for pair in self.pairs):
            raise ValueError(
                f"{name}: none of its pairs is stepped by this optimizer. Make pairs of the model whose parameters it has."
            )

    def before(self, batches: list[Batch]) -> None:
        found = _places(batches)
        live = [(pair, found[id(pair.A)], found[id(pair.B)]) for pair in self.pairs if id(pair.A) in found]
        for which in together((pair.rank, pair.A.device) for pair, *_ in live):
            mine = [live[i] for i in which]
            a, b = ([batch.only([i]).weights()[0] for batch, i in (entry[k] for entry in mine)] for k in (1, 2))
            grads = [[batch.grads[i] for batch, i in (entry[k] for entry in mine)] for k in (1, 2)]
            factors = Factors(a, b, [pair.scale for pair, *_ in mine], self.damping)
            for ga, gb, new in zip(*grads, self.changed(factors, *grads), strict=True):
                ga.copy_(new[0])
                gb.copy_(new[1])

    def changed(self, factors: Factors, grad_a: list[torch.Tensor], grad_b: list[torch.Tensor]):
        """New gradients of each pair."""
        raise TypeError(f"{type(self).__name__} does not say what it changes")


def _places(batches: list[Batch]) -> dict[int, tuple[Batch, int]]:
    return {id(slot.owner): (batch, i) for batch in batches for i, slot in enumerate(batch.slots)}


@dataclass(frozen=True)
class LoRAPro(OfPairs):
    """LoRA-Pro: factor gradients whose step of W = s B A is as near as can be to that of full fine-tuning:
        g_A <- C_B g_A / s^2 + X A, g_B <- (I - B C_B B^T) g_B C_A / s^2 - B X,
    with C_B = (B^T B + damping)^-1, C_A = (A A^T + damping)^-1 and X, which W's step does not depend on, such that both stay
    nearest to the gradients of LoRA: (B^T B) X + X (A A^T) = -C_B g_A A^T / s^2.

    When to use it: with SGD; with adaptive rules `LoRAProAdamW` is the paper's method, as their moments of factors are not
    those of W. W's steps are then as large as full fine-tuning's, so take its learning rate.

    Args:
        pairs: of `lora_pairs`, or the model itself.
        damping: of the inverses, at least what rounding in fp64 needs. Where B is zero, as at the first step, g_A stays zero; while
            B is small, a larger one (1e-4) keeps the first steps of A in bounds, and what 16-bit gradients lose out of them.
    State: none. r x r matrices of all pairs of one rank are inverted together, in fp64; about ten products of r x r matrices
    with each factor, and fp64 copies of one factor at a time. What the damping leaves of B^T t_B goes into X, so that X is the
    exact minimiser for every damping.
    Raises ValueError: damping is negative; at the step: one factor of a pair has a gradient and the other has none.
    Source: arXiv 2407.18242, theorems 2.1 to 2.3.
    """

    name = "lora_pro"

    def changed(self, factors, grad_a, grad_b):
        return factors.nearest(grad_a, grad_b)


@dataclass(frozen=True)
class LoRAOne(OfPairs):
    """Scaled gradient descent of LoRA factors: g_A <- (B^T B + damping)^-1 g_A, g_B <- g_B (A A^T + damping)^-1.

    When to use it: adapters that do not begin at B = 0, above all those of `lora_one_init_`; steps no longer depend on how the
    product is split into its factors. Where B is small, a larger damping keeps the first steps in bounds.

    Args:
        pairs: of `lora_pairs`, or the model itself. damping: of the inverses.
    State: none. Sources: arXiv 2502.01235, algorithm 1 (its preconditioners); arXiv 2402.02347. The scale s is left to the
    learning rate, as there. Errors are those of `LoRAPro`.
    """

    damping: float = 1e-6
    name = "lora_one"

    def changed(self, factors, grad_a, grad_b):
        return factors.scaled(grad_a, grad_b)
