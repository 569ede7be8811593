"""Clipping of coordinates, of components and of units: thresholds, fractions, tensor norms, adaptive gradient clipping."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedopt.transforms.base import Batch, Tensors, Transform


def check_positive(cls: str, name: str, value) -> None:
    if not value > 0.0:
        raise ValueError(f"{cls}: invalid {name}: {value}; it must be positive")


@dataclass(frozen=True)
class ClipValue(Transform):
    """g <- min(max(g, -threshold), threshold), element by element.

    When to use it: gradients with heavy tails in single coordinates, as SGD on transformers has them.

    Args:
        threshold: the largest size of an element.
    State: none. Raises ValueError: threshold is not positive. Source: arXiv 2306.00204 (coordinate-wise clipping).
    """

    threshold: float = 1.0
    name = "clip_value"

    def __post_init__(self):
        check_positive("ClipValue", "threshold", self.threshold)

    def each(self, batch: Batch) -> None:
        torch._foreach_clamp_min_(batch.grads, -self.threshold)
        torch._foreach_clamp_max_(batch.grads, self.threshold)


@dataclass(frozen=True)
class ClipFraction(Transform):
    """Cuts the largest elements of each tensor, floor(fraction n) of its n, to the size of the largest of the others.

    When to use it: as ClipValue, where no one threshold fits all tensors or all phases of a run.

    Args:
        fraction: share of the elements that are cut, in (0, 1).
    State: none; |g| of one tensor is selected from at a time (4 bytes per element of it). Needs whole tensors.
    Raises ValueError: fraction is out of range. Source: arXiv 2306.00204, section on coordinate-wise clipping.
    """

    fraction: float = 0.1
    name = "clip_fraction"
    scope = "tensor"
    whole = True

    def __post_init__(self):
        if not 0.0 < self.fraction < 1.0:
            raise ValueError(f"ClipFraction: invalid fraction: {self.fraction}; it is in (0, 1)")

    def each(self, batch: Batch) -> None:
        for g in batch.grads:
            kept = g.numel() - int(self.fraction * g.numel())
            if kept < g.numel():
                limit = g.abs().reshape(-1).kthvalue(kept).values
                g.copy_(torch.minimum(torch.maximum(g, -limit), limit))


@dataclass(frozen=True)
class ClipComponents(Transform):
    """g <- g min(1, max_norm / (|g| + 1e-6)) with the norm of each component: a tensor, or a group of tensors.

    When to use it: fine-tuning of pretrained models, where a few components would take all of a global norm.

    Args:
        max_norm: the largest norm of a component.
        components: parts of parameter names. Parameters whose names contain the same one form a component together, e.g.
            ("q_proj", "k_proj"); each other parameter is one by itself. Needs an optimizer with named parameters.
    State: none. Sums over each tensor; with components over all tensors.
    Raises ValueError: max_norm is not positive; at the step: components without names.
    Source: arXiv 2210.10325, equation 2 and its component-wise form.
    """

    max_norm: float = 0.15
    components: tuple[str, ...] = ()
    name = "clip_components"

    def __post_init__(self):
        check_positive("ClipComponents", "max_norm", self.max_norm)
        parts = (self.components,) if isinstance(self.components, str) else tuple(self.components)
        object.__setattr__(self, "components", parts)

    @property
    def scope(self) -> str:
        return "model" if self.components else "tensor"

    def ready(self, batches: list[Batch]) -> None:
        if self.components and any(name is None for batch in batches for name in batch.names):
            raise ValueError(
                "ClipComponents: components are chosen by name, and the optimizer has none. Create it with "
                "model.named_parameters()."
            )

    def before(self, batches: list[Batch]) -> None:
        squares = [batch.square_norms(batch.grads) for batch in batches]
        if self.components:
            squares = self._together(batches, squares)
        for batch, square in zip(batches, squares, strict=True):
            batch.scale((self.max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0))

    def _together(self, batches: list[Batch], squares: list[torch.Tensor]) -> list[torch.Tensor]:
        home, parts = batches[0].device, self.components
        numbers, alone = [], len(parts)
        for batch in batches:
            for name in batch.names:
                found = next((i for i, part in enumerate(parts) if part in name), None)
                numbers.append(alone if found is None else found)
                alone += found is None
        index = batches[0].constant(numbers, torch.int64)
        every = torch.cat([s.to(home) for s in squares])
        total = torch.zeros(alone, dtype=every.dtype, device=home).index_add_(0, index, every)[index]
        return [t.to(b.device) for t, b in zip(total.split([len(b) for b in batches]), batches, strict=True)]


def unit_dims(x: torch.Tensor) -> tuple[int, ...]:
    """The dimensions a unit norm sums over: those of a fan-in; all of a vector's."""
    if x.dim() <= 1:
        return tuple(range(x.dim()))
    return (1,) if x.dim() <= 3 else tuple(range(1, x.dim()))


def unit_norms(batch: Batch, tensors: Tensors) -> list[torch.Tensor]:
    """|x| of each unit: of the rows of matrices, the filters of convolutions (dimension 1 alone of 3-D tensors), and of whole
    vectors; dimensions are kept."""
    out: list = [None] * len(tensors)
    vectors = [i for i, x in enumerate(tensors) if x.dim() <= 1]
    if vectors:
        whole = batch.only(vectors).square_norms([tensors[i] for i in vectors]).sqrt()
        for i, norm in zip(vectors, whole.to(batch.dtype).unbind(), strict=True):
            out[i] = norm.view((1,) * tensors[i].dim())
    for i, x in enumerate(tensors):
        if x.dim() > 1:
            out[i] = torch.linalg.vector_norm(x, dim=unit_dims(x), keepdim=True)
    return out


@dataclass(frozen=True)
class AdaptiveClip(Transform):
    """AGC: g <- g min(1, clip max(N(p), eps) / max(N(g), 1e-6)) with the unit norms N.

    When to use it: large batches and networks without normalisation layers; a component of Ranger21.

    Args:
        clip: largest ratio of a unit's gradient norm to its weight norm. eps: least weight norm of a unit.
    A unit is a row of a matrix, a filter of a convolution, or a whole vector.
    State: none. Sums over rows. Raises ValueError: an option is not positive. Source: arXiv 2102.06171, equation 3.
    """

    clip: float = 0.01
    eps: float = 1e-3
    name = "agc"
    scope = "row"
    reads_weights = True

    def __post_init__(self):
        check_positive("AdaptiveClip", "clip", self.clip)
        check_positive("AdaptiveClip", "eps", self.eps)

    def each(self, batch: Batch) -> None:
        for part in batch.chunks():
            limits, norms = unit_norms(part, part.weights()), unit_norms(part, part.grads)
            for g, limit, norm in zip(part.grads, limits, norms, strict=True):
                g.mul_((limit.clamp(min=self.eps) * self.clip / norm.clamp(min=1e-6)).clamp(max=1.0))
