"""Subset-Norm: Nguyen and Nguyen, "Subset-Norm and Subspace-Momentum" (arXiv 2411.07120): one second moment a subset."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from fusedopt.abi import Phase
from fusedopt.projections import base, ops
from fusedopt.projections.pieces import FullSite, PieceLaunch, Pieces, skipping
from fusedopt.rule import Rule
from fusedopt.rules.adam import ADAM
from fusedopt.rules.adam_parts import EMA
from fusedopt.rules.sgd import SGD_PLAIN


def adam_only(name: str, rule: Rule) -> None:
    """Raises ValueError for a class whose direction is not Adam's: the projection computes the direction itself."""
    if rule is not ADAM:
        raise ValueError(f"{name} is a form of Adam, and cannot step with rule {rule.name!r}. Use AdamW or Adam.")


def check_subset_size(size) -> None:
    if size != "heuristic" and (not isinstance(size, int) or isinstance(size, bool) or size == 0):
        raise ValueError(
            f"Invalid subset_size: {size!r}; it is a positive number of elements, -j for sqrt(numel) / j of them, or 'heuristic'"
        )


def subset_size(numel: int, target: int) -> int:
    """The largest divisor of numel that is at most the target; -j stands for floor(sqrt(numel) / j)."""
    most = target if target > 0 else math.isqrt(numel // (target * target))
    most = max(1, min(most, numel))
    small = (k for k in range(1, math.isqrt(numel) + 1) if numel % k == 0)
    return max(d for k in small for d in (k, numel // k) if d <= most)


class SubsetMoment:
    """The second moments of the subsets of one matrix, fp32 [subsets] in its state, and the factors they make.

    Subsets are runs of `width` elements in memory order: rows of [subsets, width]; of "heuristic" subsets, the rows of the
    matrix where it is not wider than high, else its columns.
    """

    def __init__(self, target, shape: tuple[int, int]):
        rows, cols = shape
        self.columns = target == "heuristic" and rows < cols
        if target == "heuristic":
            self.shape = shape
        else:
            width = subset_size(rows * cols, target)
            self.shape = rows * cols // width, width
        self.count = cols if self.columns else self.shape[0]

    def factors(
        self, backend: str, grad: torch.Tensor, mul, moment: torch.Tensor, scalars: tuple, found
    ) -> torch.Tensor:
        """Updates the moment; what numerators of each subset are multiplied by, debias1 / (sqrt(v) debias2 + eps)."""
        _, _, beta2, weight2, debias1, debias2_sqrt, eps = (
            x.to(moment.dtype) if isinstance(x, torch.Tensor) else x for x in scalars
        )
        sums = torch.empty_like(moment)
        ops.row_col_sums(backend, grad.view(self.shape), None if self.columns else sums, sums if self.columns else None)
        skipping(found, moment * beta2 + sums * (mul * mul) * weight2, moment)
        return debias1 / (moment.sqrt() * debias2_sqrt + eps)

    def scale(self, pieces: Pieces, piece, scratch, factors: torch.Tensor) -> None:
        """Multiplies a piece by its factors. pieces: of any shape of the same elements."""
        if self.columns:
            pieces.rows_of(piece, scratch).mul_(factors)
        elif pieces.shape == self.shape:
            pieces.rows_of(piece, scratch).mul_(factors[piece.row : piece.stop, None])
        else:
            width = self.shape[1]
            first = piece.first // width
            spread = factors[first : -(-piece.last // width), None].expand(-1, width).reshape(-1)
            pieces.part_of(piece, scratch).mul_(spread[piece.first - first * width :][: piece.last - piece.first])


class SubsetSite(FullSite):
    """One matrix of Subset-Norm AdamW."""

    plain_rule = "sgd"
    gradient_reads = 2  # for the sums and for the momentum

    def bind(self, slot, steps) -> None:
        self.moment = SubsetMoment(self.projection.subset_size, self.shape)
        self.pieces = self.pieces_of(slot, steps, self.moment.shape)
        self.launches: list[PieceLaunch] | None = None

    def after(self, grad, slot, steps) -> None:
        mul = steps.multiplier(slot)
        scratch, numbers = self.pieces.scratch(steps), steps.scalars.numbers[slot.row]
        subsets = self.entry["exp_avg_sq_subset"]
        factors = self.moment.factors(slot.key.backend, grad, mul, subsets, numbers.scalars, steps.found)
        if self.launches is None:
            average = PieceLaunch(self.pieces, slot, steps.scalars, slot.row, slot.rule, Phase.DIRECTION, target=scratch,
                                  states=[self.stored(slot, "exp_avg")], grad_dtype=grad.dtype)  # fmt: skip
            update = PieceLaunch(self.pieces, slot, steps.scalars, slot.plain_row, SGD_PLAIN, Phase.FUSED,
                                 grad_dtype=self.dtype)  # fmt: skip
            self.launches = [average, update]
        average, update = self.launches
        average.use(grad, steps.scale, steps.clip, steps.found)
        update.use(scratch, None, None, steps.found)
        for i, piece in enumerate(self.pieces.pieces):
            average.run(i)
            self.moment.scale(self.pieces, piece, scratch, factors)
            update.run(i)


@dataclass(frozen=True)
class SubsetNorm(base.Projection):
    """AdamW whose second moment is one number for a run of elements of a matrix: about 2 sqrt(numel) numbers by default.

    v <- beta2 v + (1 - beta2) sum of g^2 over the subset; p -= lr * debias * m / (sqrt(v) + eps). Sums, not means: a good
    learning rate is larger than AdamW's by about the root of the subset's size. The moment `exp_avg` is full-size, in any
    state_format. Vectors are stepped as the class steps them.

    Args:
        subset_size: elements of a subset, rounded down to a divisor of numel; -j stands for sqrt(numel) / j;
            "heuristic": the rows of a matrix, or its columns where there are more of them than rows.

    Subsets are counted in memory order, and memory order differs for transposed parameters. eps lies beside sqrt(v)
    without bias correction, as in the paper. Raises ValueError for another subset_size, or a class other than Adam and AdamW.
    Source: arXiv 2411.07120, algorithm 1.
    """

    name: ClassVar[str] = "subset_norm"
    site: ClassVar[type] = SubsetSite

    subset_size: int | str = -2

    def __post_init__(self):
        check_subset_size(self.subset_size)

    def refuses(self, p):
        return None if base.matrix_shape(p) is not None else f"{p.dim()}-D tensors have no subsets"

    def rule_for(self, rule):
        adam_only("SubsetNorm", rule)
        return EMA

    def state_like(self, p, name):
        return p

    def tensors(self, p):
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        return {"exp_avg_sq_subset": ((SubsetMoment(self.subset_size, base.matrix_shape(p)).count,), dtype)}
