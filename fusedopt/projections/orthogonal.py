"""Steps of matrices along the orthogonal factor of their momentum (Muon): the rule's direction, Newton-Schulz, the update.

Not a subspace: states have the parameter's shape. On a GPU matrices of one shape go through the iteration together. Of a
sharded matrix (DTensor) each process makes the direction of its shard; these are gathered, every process takes the whole through
the iteration, with the same bits, and steps its shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fusedopt.abi import Phase
from fusedopt.distributed import Sharding, is_dtensor, local
from fusedopt.newton_schulz import Coefficients, orthogonalize
from fusedopt.noise_rates import NoiseRates, layer_rates
from fusedopt.projections import base, ops
from fusedopt.projections.pieces import FullSite, PieceLaunch, skipping
from fusedopt.rule import get_rule

# Elements of the matrices that go through the iteration together, at least one matrix: what fills a GPU
TOGETHER, CPU_TOGETHER = 1 << 26, 0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ADJUST = ("original", "match_rms_adamw", "rms_to_rms", "none")


class Batch:
    """Slots whose matrices have one shape. Each pass over them fills a stack; its last slot has all of them handled."""

    def __init__(self, site: OrthogonalSite):
        self.shape, self.dtype, self.projection = site.whole, site.direction_dtype, site.projection
        self.slots: list = []
        self.grads: list[torch.Tensor] = []
        self.stack: torch.Tensor | None = None

    def room(self) -> int:
        return len(self.slots) * self.shape[0] * self.shape[1]

    def take(self, grad: torch.Tensor, steps, handle: Callable) -> None:
        """Notes the gradient of the next slot; handle(batch, steps) is called with all of them."""
        self.grads.append(grad)
        if len(self.grads) == len(self.slots):
            try:
                if self.stack is None:
                    buffer = steps.scratch(0, self.room(), self.dtype, full=True)
                    self.stack = buffer.view(len(self.slots), *self.shape)
                handle(self, steps)
            finally:
                self.grads.clear()

    def each(self):
        """(slot, its matrix of the stack, its gradient)"""
        return zip(self.slots, self.stack, self.grads, strict=True)

    def factors(self) -> torch.Tensor:
        return orthogonalize(self.stack, self.projection.coefficients, self.projection.eps, self.slots[0].key.backend)


class NoiseGroup:
    """Sites of a group whose learning rates are compared, and the rate of each for this step."""

    def __init__(self, alpha: float):
        self.alpha = alpha
        self.sites: list[OrthogonalSite] = []
        self.rates: dict[OrthogonalSite, torch.Tensor] = {}

    def rate(self, site: OrthogonalSite) -> torch.Tensor:
        """0-dim. The first site that asks after a change has all computed."""
        if not self.rates:
            noise = torch.stack([s.entry["noise"][0] for s in self.sites])
            self.rates = dict(zip(self.sites, layer_rates(noise, self.alpha).unbind(), strict=True))
        return self.rates[site]


class OrthogonalSite(FullSite):
    """One matrix of Muon. `scale` is what its orthogonal factor is multiplied by, beside the learning rate; `whole` the shape of
    the matrix, of which a shard has `shape`."""

    momentum_rule = "muon"  # the direction whose orthogonal factor is taken

    def __init__(self, projection, p, entry, grad_dtype, tensor_id, group, place):
        super().__init__(projection, p, entry, grad_dtype, tensor_id, group, place)
        self.whole = self.shape
        self.direction_dtype = torch.float64 if self.dtype == torch.float64 else DTYPES[projection.dtype]
        self.launches: dict[str, PieceLaunch] = {}

    def shape_of(self, p):
        return base.matrix_shape(local(p)) or (0, 0)  # a shard may be empty

    def bind(self, slot, steps) -> None:
        if is_dtensor(slot.owner):
            self.sharding = Sharding(slot.owner)
            self.shape, self.whole = self.sharding.local_matrix, self.sharding.matrix
            self.room = max(self.room, slot.param.numel())
        rows = slot.owner.shape[0]  # of a transposed matrix not the first of `whole`
        self.scale = self.projection.scale_for((rows, self.whole[0] * self.whole[1] // rows))
        self.pieces = self.pieces_of(slot, steps, self.shape)
        key = ("orthogonal", self.whole, self.direction_dtype, self.projection)
        batch = steps.shared.get(key)
        most = CPU_TOGETHER if slot.param.device.type == "cpu" else TOGETHER
        if batch is None or batch.room() + self.whole[0] * self.whole[1] > most:
            batch = steps.shared[key] = Batch(self)
        batch.slots.append(slot)
        self.batch, self.full_room = batch, batch.room()
        if self.projection.noise is not None:
            ball = ("noise", slot.group, self.projection)
            self.noise_group = steps.shared.setdefault(ball, NoiseGroup(self.projection.noise.alpha))
            self.noise_group.sites.append(self)

    def launch(self, name: str, slot, steps, grad: torch.Tensor, target: torch.Tensor, row: int, *, own: bool,
               clip: torch.Tensor | None = None) -> None:  # fmt: skip
        """One pass of the rule `name` over a gradient into a buffer for the whole matrix, which lives as long as the plan. own: the
        gradient is the parameter's, still to be unscaled and clipped; else a whole matrix, which `clip`, fp32 [1], multiplies."""
        whole = target
        if self.sharding is not None:
            target = steps.scratch(2, slot.param.numel(), whole.dtype)  # 0 is the stack, 1 a site's own
            grad = grad if own else self.sharding.part(grad)
        if name not in self.launches:
            rule = get_rule(name)
            states = [self.stored(slot, state) for state in rule.state_names]
            self.launches[name] = PieceLaunch(self.pieces, slot, steps.scalars, row, rule, Phase.DIRECTION, target=target,
                                              states=states, grad_dtype=grad.dtype)  # fmt: skip
        launch = self.launches[name]
        launch.use(grad, steps.scale if own else None, steps.clip if own else clip, steps.found)
        for i in range(len(self.pieces.pieces)):
            launch.run(i)
        if self.sharding is not None:
            self.sharding.gather(target, whole)

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """Of a whole matrix what belongs to this process's parameter."""
        return whole if self.sharding is None else self.sharding.part(whole)

    def direct(self, slot, steps, grad: torch.Tensor, target: torch.Tensor) -> None:
        """Fills `target` with what becomes orthogonal, and updates the momentum."""
        self.launch(self.momentum_rule, slot, steps, grad, target, slot.row, own=True)

    def finish(self, batch: Batch, steps, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The updates of a batch from its orthogonal factors, and numbers [slots] that multiply them, or None."""
        return factors, None

    def before(self, grad, step, slot, steps) -> None:
        if self.projection.noise is not None:
            self.batch.take(grad, steps, measure_noise)

    def after(self, grad, slot, steps) -> None:
        self.batch.take(grad, steps, step_together)

    def operations(self, slot) -> list[base.Operation]:
        states = [t for name in slot.rule.state_names for t in self.stored(slot, name)[:2]]
        size = slot.param.numel()
        momentum = size * (slot.grad_dtype.itemsize + self.direction_dtype.itemsize) + 2 * base.nbytes(*states)
        whole = self.whole[0] * self.whole[1]
        products = 3 * len(self.projection.coefficients) * (1 if self.projection.noise is None else 2)
        update = size * self.direction_dtype.itemsize + sum(base.weight_bytes(slot))
        return [
            base.Operation("momentum", momentum),
            base.Operation("Newton-Schulz", products * 2 * whole * self.direction_dtype.itemsize),
            base.Operation("update", update),
        ]


def step_together(batch: Batch, steps) -> None:
    """The step of all slots of a batch."""
    for slot, target, grad in batch.each():
        slot.site.direct(slot, steps, grad, target)
    factors, numbers = batch.slots[0].site.finish(batch, steps, batch.factors())
    if batch.projection.noise is not None:
        rates = torch.stack([slot.site.noise_group.rate(slot.site) for slot in batch.slots])
        numbers = rates if numbers is None else numbers * rates
    if numbers is not None:  # one for each row of a matrix
        wide = torch.float64 if batch.dtype == torch.float64 else torch.float32
        numbers = numbers.to(wide).view(-1, 1).expand(-1, batch.shape[0]).contiguous()
    for i, (slot, factor) in enumerate(zip(batch.slots, factors, strict=True)):
        if not slot.param.numel():
            continue
        site = slot.site
        row_factor = None if numbers is None else numbers[i, : site.shape[0]]
        work = replace(
            steps.work(slot, site.part(factor)), grad_scale=None, clip=None, scale=site.scale, row_factor=row_factor
        )
        ops.apply(slot.key.backend, work)


def measure_noise(batch: Batch, steps) -> None:
    """Averages the squared dual norm of the change of each gradient: its nuclear norm <D, UV^T>, times the ball's scale."""
    for slot, target, grad in batch.each():
        slot.site.noise_group.rates = {}
        slot.site.launch("difference", slot, steps, grad, target, slot.row, own=True)
    factors, kept = batch.factors(), batch.projection.noise.beta2
    for slot, change, factor in zip(batch.slots, batch.stack, factors, strict=True):
        memory = slot.site.entry["noise"]  # the average, and 1 once there is a gradient to compare with
        size = slot.site.scale * (change * factor).sum(dtype=memory.dtype)
        average, seen = memory.unbind()
        new = kept * average + (1 - kept) * size.square()
        skipping(steps.found, torch.stack([torch.where(seen > 0, new, average), torch.ones_like(seen)]), memory)


@dataclass(frozen=True)
class Orthogonal(base.Projection):
    """p -= lr * (s U V^T + weight_decay p) with U V^T the orthogonal factor of the rule's direction. `Muon` sets it by itself.

    Args:
        coefficients: of each Newton-Schulz step. eps: the least norm. dtype: of the products, "bf16" or "fp32" (fp64 parameters
            take fp64).
        adjust: what s is for a matrix [rows, cols]: "original", sqrt(max(1, rows / cols)); "match_rms_adamw", 0.2 sqrt(max(rows,
            cols)); "rms_to_rms", sqrt(rows / cols); "none", 1. Convolution weights are [out, in h w].
        noise: None, or how learning rates depend on the noise of layers' gradients (fusedopt.noise_rates). Keeps the last
            gradient, and takes a second iteration.
    """

    name: ClassVar[str] = "orthogonal"
    site: ClassVar[type] = OrthogonalSite

    coefficients: Coefficients
    eps: float = 1e-7
    adjust: str = "original"
    dtype: str = "bf16"
    noise: NoiseRates | None = None

    @property
    def compares(self) -> bool:
        return self.noise is not None

    def sharded_site(self):
        return self.site

    def refuses(self, p):
        return None if base.matrix_shape(p) is not None else f"{p.dim()}-D tensors are no matrices"

    def scale_for(self, shape: tuple[int, int]) -> float:
        rows, cols = shape
        if self.adjust == "original":
            return max(1.0, rows / cols) ** 0.5
        if self.adjust == "match_rms_adamw":
            return 0.2 * max(rows, cols) ** 0.5
        return (rows / cols) ** 0.5 if self.adjust == "rms_to_rms" else 1.0

    def state_like(self, p, name):
        return p

    def tensors(self, p):
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        return {} if self.noise is None else {"noise": ((2,), wide)}
