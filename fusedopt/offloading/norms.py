"""The global gradient norm of an optimizer that is stepped in chunks: the launches, and so the bits, of a step in one piece."""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedopt.abi import Phase
from fusedopt.backends import select
from fusedopt.backends.base import Work
from fusedopt.bucket import Bucket, Slot
from fusedopt.memory import strides_match
from fusedopt.precision import NEAREST
from fusedopt.rule import get_rule


def _upload(destination: torch.Tensor, source: torch.Tensor) -> None:
    pinned = torch.empty_like(source, pin_memory=destination.is_cuda).copy_(source)
    destination.copy_(pinned, non_blocking=True)


class _DeviceNorm:
    """The norm launches of one device: a bucket for each bucket of the step in one piece, in its order."""

    def __init__(self, device: torch.device, buckets: list[Bucket]):
        self.buckets = buckets
        dtype = torch.float32 if any(b.native for b in buckets) else torch.float64

        def zeros(*shape, dtype=dtype):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.totals, self.norm, self.clip = zeros(max(1, len(buckets))), zeros(1), zeros(1)
        partials = zeros(max((b.grains for b in buckets), default=0), 2)
        counters = zeros(max((len(b.slots) for b in buckets), default=0) + 1, dtype=torch.int32)
        scalars = torch.zeros(1, 32, device=device)
        for i, b in enumerate(buckets):
            items = b.items(None) if b.native else []
            b.works = {Phase.NORM: Work(
                b.key, b.slots[0].rule, (), NEAREST, items, b.table, b.chunks, scalars, [], b.chunk, b.grains,
                phase=Phase.NORM, clip=self.clip, partials=partials, totals=self.totals, norm=self.norm, counters=counters,
                total_index=i, total_count=len(buckets),
            )}  # fmt: skip

    def run(self, grads: list[torch.Tensor], max_norm: float, grad_scale: torch.Tensor | None) -> None:
        pointers = [g.data_ptr() for g in grads]
        for bucket in self.buckets:
            bucket.set_gradients(grads, pointers, _upload)
            work = bucket.works[Phase.NORM]
            work.max_norm, work.grad_scale = max_norm, grad_scale
            bucket.backend.launch(work)
            bucket.clear_gradients()


class GlobalNorm:
    """Norm and clip coefficient of the gradients of a step.

    Args:
        slots: of all chunks, in parameter order. params: the parameters themselves, which slots may stand in for.
        asked: the backend that was asked for, or None.
    """

    def __init__(self, slots: list[Slot], params: list[torch.Tensor], asked: str | None):
        self.layouts = [slot.work_param for slot in slots]
        plain = get_rule("sgd")
        by_device: dict[torch.device, dict] = {}
        for position, (slot, p) in enumerate(zip(slots, params, strict=True)):
            if not p.numel():
                continue
            mine = replace(
                slot, position=position, param=p, work_param=p.detach(), rule=plain, formats=(), entry={}, row=0
            )
            mine.precision, mine.copy_grad = NEAREST, False
            key = slot.key._replace(device=p.device, backend="", rule="sgd", formats=(), precision="nearest")
            name, _ = select.choose(key, asked if p.device == slot.param.device else None)
            mine.key = key._replace(backend=name)
            # Slots are put together as the step in one piece would: sums depend on who is in a bucket.
            by_device.setdefault(p.device, {}).setdefault(slot.key._replace(device=p.device), []).append(mine)
        self.devices = {
            device: _DeviceNorm(device, [Bucket(m, select.get_backend(m[0].key.backend)) for m in by_key.values()])
            for device, by_key in by_device.items()
        }
        self.norm: torch.Tensor | None = None

    def run(self, grads: list[torch.Tensor], max_norm: float, grad_scale: torch.Tensor | None) -> dict:
        """The clip coefficient, fp32 or fp64 [1], by device. grads: one for each slot. grad_scale: the loss scale or None."""
        grads = [
            g if strides_match(g, like) else torch.empty_strided(like.shape, like.stride(), dtype=g.dtype, device=g.device).copy_(g)
            for g, like in zip(grads, self.layouts, strict=True)
        ]  # fmt: skip
        for device, one in self.devices.items():
            one.run(grads, max_norm, None if grad_scale is None else grad_scale.to(device, torch.float32))
        every = list(self.devices.values())
        if len(every) > 1:
            home = every[0].norm.device
            norm = sum(d.totals.double().sum().to(home, non_blocking=True) for d in every).sqrt()
            norm = norm if grad_scale is None else norm / grad_scale.to(home).double().view(())
            clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for d in every:
                d.norm.copy_(norm, non_blocking=True)
                d.clip.copy_(clip, non_blocking=True)
        self.norm = every[0].norm if every else None
        return {device: d.clip for device, d in self.devices.items()}
