"""Steps of matrices along the orthogonal factor of their momentum (Muon): the rule's direction, Newton-Schulz, the update.

Not a subspace: states have the parameter's shape. On a GPU matrices of one shape go through the iteration together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fusedopt.abi import Phase
from fusedopt.newton_schulz import Coefficients, orthogonalize
from fusedopt.projections import base, ops
from fusedopt.projections.pieces import FullSite, PieceLaunch

# Elements of the matrices that go through the iteration together, at least one matrix: what fills a GPU
TOGETHER, CPU_TOGETHER = 1 << 26, 0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Batch:
    """Slots whose matrices have one shape. Their directions fill a stack; the last slot of a step has all of them stepped."""

    def __init__(self, site: OrthogonalSite):
        self.shape, self.dtype, self.projection = site.shape, site.direction_dtype, site.projection
        self.slots: list = []
        self.grads: list[torch.Tensor] = []
        self.launches: list[PieceLaunch] | None = None
        self.stack: torch.Tensor | None = None

    def room(self) -> int:
        return len(self.slots) * self.shape[0] * self.shape[1]

    def take(self, grad: torch.Tensor, steps) -> None:
        self.grads.append(grad)
        if len(self.grads) == len(self.slots):
            try:
                self._step(steps)
            finally:
                self.grads.clear()

    def _make_launches(self, steps) -> None:
        buffer = steps.scratch(0, self.room(), self.dtype, full=True)
        self.stack = buffer.view(len(self.slots), *self.shape)
        self.launches = [
            PieceLaunch(slot.site.pieces, slot, steps.scalars, slot.row, slot.rule, Phase.DIRECTION, target=target,
                        states=[slot.site.stored(slot, name) for name in slot.rule.state_names], grad_dtype=grad.dtype)
            for slot, target, grad in zip(self.slots, self.stack, self.grads, strict=True)
        ]  # fmt: skip

    def _step(self, steps) -> None:
        if self.launches is None:
            self._make_launches(steps)
        for slot, launch, grad in zip(self.slots, self.launches, self.grads, strict=True):
            launch.use(grad, steps.scale, steps.clip, steps.found)
            for i in range(len(slot.site.pieces.pieces)):
                launch.run(i)
        backend = self.slots[0].key.backend
        factors = orthogonalize(self.stack, self.projection.coefficients, self.projection.eps, backend)
        for slot, factor in zip(self.slots, factors, strict=True):
            work = replace(steps.work(slot, factor), grad_scale=None, clip=None, scale=slot.site.scale)
            ops.apply(slot.key.backend, work)


class OrthogonalSite(FullSite):
    """One matrix of Muon. `scale` is what its orthogonal factor is multiplied by, beside the learning rate."""

    def __init__(self, projection, p, entry, grad_dtype, tensor_id, group, place):
        super().__init__(projection, p, entry, grad_dtype, tensor_id, group, place)
        self.scale = projection.scale_for(p.shape)
        self.direction_dtype = torch.float64 if self.dtype == torch.float64 else DTYPES[projection.dtype]

    def bind(self, slot, steps) -> None:
        self.pieces = self.pieces_of(slot, steps, self.shape)
        key = ("orthogonal", self.shape, self.direction_dtype, self.projection)
        batch = steps.shared.get(key)
        most = CPU_TOGETHER if slot.param.device.type == "cpu" else TOGETHER
        if batch is None or batch.room() + self.shape[0] * self.shape[1] > most:
            batch = steps.shared[key] = Batch(self)
        batch.slots.append(slot)
        self.batch, self.full_room = batch, batch.room()

    def after(self, grad, slot, steps) -> None:
        self.batch.take(grad, steps)

    def operations(self, slot) -> list[base.Operation]:
        states = [t for name in slot.rule.state_names for t in self.stored(slot, name)[:2]]
        size = slot.param.numel()
        momentum = size * (slot.grad_dtype.itemsize + self.direction_dtype.itemsize) + 2 * base.nbytes(*states)
        products = 3 * len(self.projection.coefficients)
        update = size * self.direction_dtype.itemsize + sum(base.weight_bytes(slot))
        return [
            base.Operation("momentum", momentum),
            base.Operation("Newton-Schulz", products * 2 * size * self.direction_dtype.itemsize),
            base.Operation("update", update),
        ]


@dataclass(frozen=True)
class Orthogonal(base.Projection):
    """p -= lr * (s U V^T + weight_decay p) with U V^T the orthogonal factor of the rule's direction. `Muon` sets it by itself.

    Args:
        coefficients: of each Newton-Schulz step. eps: the least norm. dtype: of the products, "bf16" or "fp32" (fp64 parameters
            take fp64).
        adjust: what s is for a matrix [rows, cols]: "original", sqrt(max(1, rows / cols)); "match_rms_adamw", 0.2 sqrt(max(rows,
            cols)); "none", 1. Convolution weights are [out, in h w].
    """

    name: ClassVar[str] = "orthogonal"
    site: ClassVar[type] = OrthogonalSite

    coefficients: Coefficients
    eps: float = 1e-7
    adjust: str = "original"
    dtype: str = "bf16"

    def refuses(self, p):
        return None if base.matrix_shape(p) is not None else f"{p.dim()}-D tensors are no matrices"

    def scale_for(self, shape: torch.Size) -> float:
        rows = shape[0]
        cols = shape.numel() // rows
        if self.adjust == "none":
            return 1.0
        return 0.2 * max(rows, cols) ** 0.5 if self.adjust == "match_rms_adamw" else max(1.0, rows / cols) ** 0.5

    def state_like(self, p, name):
        return p
