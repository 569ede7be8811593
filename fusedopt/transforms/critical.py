"""The buffer of critical momenta behind `AdamCM`: Malviya et al. (arXiv 2307.09638), algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedopt.transforms.base import Batch, Transform
from fusedopt.transforms.masking import momenta
from fusedopt.transforms.wrappers import check_count


@dataclass(frozen=True)
class CriticalMomenta(Transform):
    """Keeps the momenta of the `capacity` steps whose gradients weighed most, and puts their mean where the rule of `AdamCM` reads
    it. A step weighs as much as the sum of the norms of its gradients; all weights fall by `decay` from step to step. The
    first step enters its gradient.

    When to use it: by `AdamCM`, whose rule alone has a state `critical_mean`.

    Args:
        capacity: momenta kept. decay: in (0, 1].
    States: `critical_buffer`, `capacity` times 4 bytes per element, and one number for each. Sums over all tensors. Raises
    ValueError: an option is out of range; at the step: another rule. Source: arXiv 2307.09638, algorithm 1, as its
    published code weighs steps.
    """

    capacity: int = 5
    decay: float = 0.7
    name = "critical"
    scope = "model"
    keeps = ("critical_buffer", "critical_priority")
    whole = counts = after_step = True

    def __post_init__(self):
        check_count("CriticalMomenta", "capacity", self.capacity, 1)
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"CriticalMomenta: invalid decay: {self.decay}; it is in (0, 1]")

    def shapes(self, p):
        return {"critical_buffer": (self.capacity, *p.shape), "critical_priority": (self.capacity,)}

    def ready(self, batches: list[Batch]) -> None:
        for slot in (s for batch in batches for s in batch.slots):
            if "critical_mean" not in slot.rule.state_names:
                raise ValueError(f"CriticalMomenta: rule {slot.rule.name!r} has no state critical_mean. Use AdamCM.")

    def before(self, batches: list[Batch]) -> None:
        home = batches[0].device
        weight = sum(batch.square_norms(batch.grads).sqrt().sum().to(home) for batch in batches)
        for batch in batches:
            batch.kept[self.name] = weight.to(batch.device), batch.count(self.name)

    def after(self, batches: list[Batch]) -> None:
        for batch in batches:
            weight, before = batch.kept.pop(self.name)
            keep = torch.ones((), dtype=torch.bool, device=batch.device) if batch.skip is None else ~batch.skip
            each = zip(batch.slots, batch.groups, momenta(batch), batch.grads, before, strict=True)
            for slot, group, m, g, n in each:
                first = torch.as_tensor(n == 0, device=batch.device)
                value = torch.where(first, -g if group["maximize"] else g, m)
                self._enter(slot.entry, value, n, weight, keep)

    def _enter(self, entry: dict, value: torch.Tensor, n, weight: torch.Tensor, keep: torch.Tensor) -> None:
        """n: entries so far, an int or a 0-dim tensor. keep: whether the step is one."""
        buffer, priority = entry["critical_buffer"], entry["critical_priority"]
        full = torch.as_tensor(n >= self.capacity, device=buffer.device)
        least = priority.argmin()
        place = (
            torch.where(full, least, torch.as_tensor(n, device=buffer.device).clamp(max=self.capacity - 1))
            .long()
            .view(1)
        )
        enters = keep & (~full | (weight > priority[least]))
        old = buffer.index_select(0, place)[0], priority.index_select(0, place)[0]
        buffer.index_copy_(0, place, torch.where(enters, value.to(buffer.dtype), old[0])[None])
        priority.index_copy_(0, place, torch.where(enters, weight.to(priority.dtype), old[1])[None])
        priority.mul_(torch.where(keep, self.decay, 1.0).to(priority.dtype))
        filled = torch.as_tensor(n, device=buffer.device).clamp(max=self.capacity - 1) + 1
        mean = entry["critical_mean"]
        mean.copy_(torch.where(keep, buffer.sum(0) / filled, mean))
