"""SparseGrad: Chekalina et al., "SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers" (arXiv 2410.07383): in a
basis where gradients of layers are nearly sparse, the largest share of them steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fusedopt.abi import Phase
from fusedopt.projections import base, ops
from fusedopt.projections.pieces import FullSite, PieceLaunch
from fusedopt.projections.subset_norm import adam_only
from fusedopt.rule import Rule
from fusedopt.rules.adam_parts import ADAM_LAZY

MARK = "sparse_grad_mark"


@dataclass(frozen=True, eq=False)
class GradientBasis:
    """Two orthogonal matrices, basis vectors in columns: a gradient G [rows, cols] becomes left^T G right."""

    left: torch.Tensor
    right: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[0]


def sparse_grad_bases(params: Iterable[torch.Tensor], closure: Callable, steps: int = 30) -> list[GradientBasis]:
    """The bases of `SparseGrad`, one for all matrices of one shape: factor matrices of the HOSVD of their gradients, stacked over
    matrices and steps.

    Args:
        params: matrices that will be stepped sparsely, those of the MLP layers.
        closure: as torch.optim's: clears gradients, computes the loss of another batch and its gradients. Weights stay as they are.
        steps: calls of it.
    Memory: the sums of G G^T and G^T G in fp64 for each shape, 8 (rows^2 + cols^2) bytes. Save the result with the model
    (basis.left, basis.right): a resumed run needs the same.
    Raises:
        ValueError: steps is not positive, a parameter is no matrix, or gradients are missing, all zero or not finite.
    Source: arXiv 2410.07383, section 3.1. The eigenvectors of both sums are the factor matrices, without the stack itself.
    """
    base.check_positive_int(steps, "steps")
    params = list(params)
    sums: dict[tuple, torch.Tensor] = {}
    for p in params:
        if p.dim() != 2:
            raise ValueError(f"sparse_grad_bases: a parameter of shape {tuple(p.shape)} is no matrix")
    for _ in range(steps):
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p in params:
                if p.grad is None:
                    raise ValueError(
                        f"sparse_grad_bases: a matrix of shape {tuple(p.shape)} has no gradient after the closure"
                    )
                g = p.grad.double()
                for i, gram in enumerate((g @ g.t(), g.t() @ g)):
                    key = tuple(p.shape), p.device, i
                    sums[key] = sums[key].add_(gram) if key in sums else gram
    found: dict[tuple, dict[int, torch.Tensor]] = {}
    for (shape, device, side), gram in sums.items():
        if not bool(gram.isfinite().all() & gram.any()):
            raise ValueError(f"sparse_grad_bases: gradients of shape {shape} are all zero or not finite")
        found.setdefault((shape, device), {})[side] = torch.linalg.eigh(gram)[1].flip(1)
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    return [GradientBasis(both[0].to(dtype).contiguous(), both[1].to(dtype).contiguous()) for both in found.values()]


class SparseGradSite(FullSite):
    """One matrix: rotated, cut to its largest elements, stepped by a lazy Adam, rotated back."""

    def __init__(self, projection, p, entry, grad_dtype, tensor_id, group, place):
        super().__init__(projection, p, entry, grad_dtype, tensor_id, group, place)
        basis = projection.basis_for(p)
        self.left, self.right = basis.left.to(p.device, self.dtype), basis.right.to(p.device, self.dtype)
        self.count = max(1, math.ceil(round(projection.density * p.numel(), 9)))
        mark = torch.stack([x.double().diagonal().sum() for x in (self.left, self.right)])
        kept = entry[MARK]
        if bool(kept.any()) and not torch.allclose(kept, mark, rtol=1e-6, atol=1e-6):
            raise RuntimeError(
                f"parameter {tensor_id} (shape {tuple(p.shape)}): its states are those of another basis. Give SparseGrad the bases "
                "that this run began with."
            )
        kept.copy_(mark)

    def bind(self, slot, steps) -> None:
        self.pieces = self.pieces_of(slot, steps, self.shape)
        self.full_room = self.shape[0] * self.shape[1]
        self.launch: PieceLaunch | None = None

    def after(self, grad, slot, steps) -> None:
        sparse, u = (steps.scratch(i, self.full_room, self.dtype, full=True).view(self.shape) for i in (0, 1))
        if self.launch is None:
            states = [self.stored(slot, name) for name in slot.rule.state_names]
            self.launch = PieceLaunch(self.pieces, slot, steps.scalars, slot.row, ADAM_LAZY, Phase.DIRECTION, target=u,
                                      states=states, grad_dtype=self.dtype)  # fmt: skip
        rotated = (self.left.t() @ grad.to(self.dtype) @ self.right).view(-1)
        chosen = rotated.abs().topk(self.count, sorted=False).indices
        sparse.zero_().view(-1).scatter_(0, chosen, rotated.gather(0, chosen))
        self.launch.use(sparse, steps.scale, steps.clip, steps.found)
        for i in range(len(self.pieces.pieces)):
            self.launch.run(i)
        torch.mm(self.left @ u, self.right.t(), out=sparse)
        ops.apply(slot.key.backend, replace(steps.work(slot, sparse), grad_scale=None, clip=None))


@dataclass(frozen=True, eq=False)
class SparseGrad(base.Projection):
    """Steps the largest share of R = left^T G right by Adam, whose moments change only where it steps, and rotates back:
        m, v of the chosen elements as Adam's; N = m_hat / (sqrt(v_hat) + eps) there, else 0;
        W -= lr (left N right^T + weight_decay W).

    When to use it: fine-tuning MLP layers with a small share of numbers that change, where adapters are not wanted; vectors and
    matrices without a basis are stepped as usual, so give it to a group of these matrices.

    Args:
        bases: of `sparse_grad_bases`; a matrix takes that of its shape.
        density: the share that is stepped, in (0, 1].
    For AdamW and Adam. States are of full size, in any format. A step multiplies twice by each basis; the basis is kept once, and
    not in state dicts, which note which one it was.
    Raises ValueError: density is out of range, or bases have one shape twice. RuntimeError at the step: states are of other bases.
    Source: arXiv 2410.07383, sections 3 and 5.1; bias corrections count the steps of the matrix, as torch.optim.SparseAdam's do.
    """

    name: ClassVar[str] = "sparse_grad"
    site: ClassVar[type] = SparseGradSite

    bases: tuple[GradientBasis, ...]
    density: float = 0.01

    def __post_init__(self):
        object.__setattr__(self, "bases", tuple(self.bases))
        if not 0 < self.density <= 1:
            raise ValueError(f"Invalid density: {self.density}; it must be in (0, 1]")
        shapes = [basis.shape for basis in self.bases]
        if len(set(shapes)) < len(shapes):
            raise ValueError(
                "SparseGrad: two bases are of one shape. Make one projection for each, and a group for its matrices."
            )

    def describe(self):
        return {"name": self.name, "density": self.density}

    def basis_for(self, p: torch.Tensor) -> GradientBasis | None:
        return next((b for b in self.bases if b.shape == tuple(p.shape)), None)

    def refuses(self, p):
        if p.dim() != 2:
            return f"{p.dim()}-D tensors are not projected"
        if self.basis_for(p) is None:
            return f"there is no basis of shape {tuple(p.shape)}"
        return None if p.is_contiguous() else "it is transposed in memory"

    def rule_for(self, rule: Rule) -> Rule:
        adam_only("SparseGrad", rule)
        return ADAM_LAZY

    def state_like(self, p, name):
        return p

    def tensors(self, p):
        return {MARK: ((2,), torch.float64)}
