"""OrthoGrad: the gradient without its component along the weights (arXiv 2501.04697, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedopt.transforms.base import Batch, Transform


def remove_component(batch: Batch, along: list[torch.Tensor]) -> None:
    """g <- g - (<x, g> / |x|^2) x for each tensor. Done twice: the first difference leaves a share of x of the size of its
    own rounding, which matters where g and x are nearly parallel."""
    square = batch.square_norms(along) + 1e-30
    for _ in range(2):
        share = -(batch.dots(along, batch.grads) / square)
        torch._foreach_add_(batch.grads, torch._foreach_mul(along, list(share.to(batch.dtype).unbind())))


@dataclass(frozen=True)
class OrthoGrad(Transform):
    """g' = g - (<p, g> / |p|^2) p, g <- g' |g| / |g'|, for each tensor.

    When to use it: training past the point where everything is fitted, where softmax collapse stops generalisation, and for
    weights whose scale does not matter.

    A gradient that is parallel to its weights up to rounding (|g'| <= 4 eps |g|) becomes zero: what is left of it is noise,
    which the rescaling would blow up to its full size. |g'| is summed anew, never |g|^2 - <p, g>^2 / |p|^2, which cancels;
    where |g'| is small, the direction is exact to eps |g| / |g'|.

    Args:
        rescale: bring the norm back to |g|.
    State: none. Sums over each tensor. Source: arXiv 2501.04697, definition of the orthogonal gradient.
    """

    rescale: bool = True
    name = "orthograd"
    scope = "tensor"
    reads_weights = True

    def each(self, batch: Batch) -> None:
        for part in batch.chunks():
            norms = part.square_norms(part.grads).sqrt()
            remove_component(part, part.weights())
            left = part.square_norms(part.grads).sqrt()
            noise = left <= 4 * torch.finfo(part.dtype).eps * norms
            factor = norms / (left + 1e-30) if self.rescale else torch.ones_like(norms)
            part.scale(torch.where(noise, 0.0, factor))
