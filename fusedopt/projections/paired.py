"""Sites of two parameters that are stepped together, as the factors of a LoRA adapter are: they wait for each other's gradients,
and the last of a device has the pairs of all layers stepped, so that small solves are batched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from fusedopt.lora import LoraPair
from fusedopt.memory import flat
from fusedopt.projections import ops
from fusedopt.projections.base import Projection
from fusedopt.projections.pieces import FullSite


@dataclass(eq=False)
class Both:
    """A pair in a step: slots, weights and gradients of A [r, n] and B [m, r], in fp32 (fp64 where a tensor is).

    Gradients are unscaled and clipped, but not negated where a group maximises.
    """

    pair: LoraPair
    slots: tuple
    weights: tuple[torch.Tensor, torch.Tensor]
    grads: tuple[torch.Tensor, torch.Tensor]

    @property
    def sites(self) -> tuple[PairSite, PairSite]:
        return self.slots[0].site, self.slots[1].site


class Crew:
    """The slots of all pairs of a device, which one method steps."""

    def __init__(self):
        self.slots: dict[tuple[LoraPair, str], Any] = {}
        self.grads: dict[tuple[LoraPair, str], torch.Tensor] = {}

    def take(self, grad: torch.Tensor, slot, steps) -> None:
        self.grads[slot.site.member] = grad
        if len(self.grads) < len(self.slots):
            return
        try:
            pairs = {pair: None for pair, _ in self.slots}
            slot.site.step_pairs([self._both(pair, steps) for pair in pairs], steps)
        finally:
            self.grads.clear()

    def _both(self, pair: LoraPair, steps) -> Both:
        slots = tuple(self.slots[pair, role] for role in "AB")
        weights = tuple(slot.site.weights(slot) for slot in slots)
        grads = tuple(s.site.wide(self.grads[pair, r]) * unscaled(s, steps) for s, r in zip(slots, "AB", strict=True))
        return Both(pair, slots, weights, grads)


def unscaled(slot, steps):
    """What a gradient is multiplied by, without the sign of maximize: a number or a 0-dim tensor."""
    return steps.multiplier(slot) * steps.scalars.numbers[slot.row].grad_sign


class PairSite(FullSite):
    """One factor of a pair. Subclasses define `step_pairs`."""

    def __init__(self, projection, p, entry, grad_dtype, tensor_id, group, place):
        super().__init__(projection, p, entry, grad_dtype, tensor_id, group, place)
        self.member = projection.pair, projection.role
        self.counting = projection.role  # scalar rows: factors may decay at different steps
        self.transposed = not p.is_contiguous()  # in memory; a dense matrix is nothing else

    def bind(self, slot, steps) -> None:
        self.crew = steps.shared.setdefault(("pairs", type(self)), Crew())
        self.crew.slots[self.member] = slot

    def after(self, grad, slot, steps) -> None:
        self.crew.take(grad, slot, steps)

    def wide(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix as it lies in memory, as the factor's own shape says, in the dtype of the arithmetic."""
        return (matrix.t() if self.transposed else matrix).to(self.dtype)

    def weights(self, slot) -> torch.Tensor:
        """A copy of what the parameter and its companion stand for: factors see each other as they were before the step."""
        if not slot.precision.companion:
            return self.wide(self.matrix(slot.work_param).clone())
        loaded = slot.precision.load(flat(slot.work_param), flat(slot.companion), torch.float32)
        return self.wide(loaded.view(self.shape))

    def step_pairs(self, pairs: list[Both], steps) -> None:
        raise TypeError(f"{type(self).__name__} does not say how it steps pairs")

    def update_param(self, slot, u: torch.Tensor, steps) -> None:
        """p <- p - (lr u + decay p), in the parameter's precision."""
        u = (u.t() if self.transposed else u).contiguous()
        ops.apply(slot.key.backend, replace(steps.work(slot, u), grad_scale=None, clip=None))


@dataclass(frozen=True)
class PairProjection(Projection):
    """A factor of a pair, as the classes that step pairs set it by themselves. role: "A" or "B"."""

    name: ClassVar[str] = "lora_pair"
    site: ClassVar[type] = PairSite

    pair: LoraPair
    role: str

    def describe(self):
        return {"name": self.name, "pair": self.pair.name, "role": self.role}

    def refuses(self, p):
        return None

    def state_like(self, p, name):
        return p
