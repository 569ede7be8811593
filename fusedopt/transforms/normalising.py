"""Gradient centralisation, gradient normalisation, unit-norm gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedopt.transforms.base import Batch, Transform
from fusedopt.transforms.clipping import unit_norms


@dataclass(frozen=True)
class Centralize(Transform):
    """g <- g - mean of g over all dimensions but the first, for tensors of two dimensions or more.

    When to use it: convolutional networks and fully connected layers with normalised inputs; a component of Ranger21.

    Args:
        conv_only: only tensors of four dimensions or more.
    State: none. Sums over rows. Source: arXiv 2004.01461, equation 1.
    """

    conv_only: bool = False
    name = "centralize"
    scope = "row"

    def each(self, batch: Batch) -> None:
        for g in batch.grads:
            if g.dim() > (3 if self.conv_only else 1) and g.numel():
                g.sub_(g.mean(tuple(range(1, g.dim())), keepdim=True))


@dataclass(frozen=True)
class Normalize(Transform):
    """g <- g / (std(g) + eps), for tensors of more than two elements: the unbiased standard deviation of the whole tensor.

    When to use it: with SGD, for layers whose gradients differ by orders of magnitude; a component of Ranger21.

    State: none. Sums over each tensor. Raises ValueError: eps is negative.
    Source: Ranger21, arXiv 2106.13731, section on gradient normalisation.
    """

    eps: float = 1e-8
    name = "normalize"
    scope = "tensor"

    def __post_init__(self):
        if not self.eps >= 0.0:
            raise ValueError(f"Normalize: invalid eps: {self.eps}; it is 0 or more")

    def each(self, batch: Batch) -> None:
        for part in batch.chunks():
            sizes = part.tensor_sizes()
            means = part.sums(part.grads) / sizes
            centred = torch._foreach_sub(part.grads, list(means.to(part.dtype).unbind()))
            std = (part.square_norms(centred) / (sizes - 1).clamp(min=1)).sqrt()
            part.scale(torch.where(sizes > 2, 1.0 / (std + self.eps), 1.0))


@dataclass(frozen=True)
class UnitNorm(Transform):
    """g <- g / (N(g) + eps) with the norm N of each unit, or of each tensor.

    When to use it: normalised SGD: step lengths that do not depend on the size of gradients.

    Args:
        per: "unit" (rows of matrices, filters of convolutions, whole vectors) or "tensor".
    State: none. Raises ValueError: an option is out of range.
    Source: normalised gradient descent per layer (arXiv 1707.04822); units as in arXiv 2102.06171.
    """

    per: str = "tensor"
    eps: float = 1e-8
    name = "unit_norm"

    def __post_init__(self):
        if self.per not in ("unit", "tensor"):
            raise ValueError(f"UnitNorm: unknown per {self.per!r}; it is 'unit' or 'tensor'")
        if not self.eps >= 0.0:
            raise ValueError(f"UnitNorm: invalid eps: {self.eps}; it is 0 or more")

    @property
    def scope(self) -> str:
        return "row" if self.per == "unit" else "tensor"

    def each(self, batch: Batch) -> None:
        if self.per == "tensor":
            batch.scale(1.0 / (batch.square_norms(batch.grads).sqrt() + self.eps))
            return
        for g, norm in zip(batch.grads, unit_norms(batch, batch.grads), strict=True):
            g.div_(norm + self.eps)
