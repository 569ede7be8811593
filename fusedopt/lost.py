"""Notices when most updates of 16-bit parameters round to nothing, and says so once.

With param_precision="nearest" an update below half a unit in the last place (0.2 to 0.4 % of a bf16 weight) leaves the
weight as it was, whatever its sum over many steps. A few steps of a run are looked at, on a sample of the weights.
"""

from __future__ import annotations

import warnings

import torch

from fusedopt.distributed import local
from fusedopt.memory import flat, is_dense

STEPS = (10, 100, 1000)  # the first ones may still be warming up
TENSORS, ELEMENTS = 8, 4096  # sample per look


class LostUpdates:
    """Looks at chosen steps of one optimizer. On a GPU the counts are read a step or more later, without waiting for them."""

    def __init__(self, name: str):
        self.name, self.calls, self.told = name, 0, False
        self._open = False  # whether a step that comes in parts is under way
        self._counts: torch.Tensor | None = None  # of its parts so far
        self._sample: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._pending: tuple[torch.Tensor, torch.cuda.Event | None, int] | None = None

    def before(self, slots, groups: list[dict]) -> None:
        """Called before each step, or part of one, with the slots of the plan."""
        self.calls += not self._open
        if self._pending is not None:
            self._read()
        if self.told or self.calls not in STEPS:
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        rounded = [s for s in slots if self._takes(s, groups)]
        for slot in rounded[:: max(1, len(rounded) // TENSORS)][:TENSORS]:
            part = flat(slot.param.detach())[:ELEMENTS]
            self._sample.append((part, part.clone(), flat(local(slot.owner.grad))[:ELEMENTS]))

    @staticmethod
    def _takes(slot, groups: list[dict]) -> bool:
        p, lr = slot.param, groups[slot.group]["lr"]
        grad = slot.owner.grad
        if slot.quantized:
            return False
        if grad is None or local(grad).shape != p.shape or slot.copy_grad:
            return False
        plain = p.dtype in (torch.bfloat16, torch.float16) and slot.precision.name == "nearest"
        stopped = not isinstance(lr, torch.Tensor) and lr == 0
        return plain and not stopped and p.numel() > 0 and is_dense(p)

    def after(self, found_inf: torch.Tensor | None, part: bool = False) -> None:
        """Called after each step: counts what stayed although it had a gradient and was not skipped by found_inf. After a part
        of a step only counts; `finish` closes the step."""
        self._open = part
        if not self._sample:
            return
        device = self._sample[0][0].device if self._counts is None else self._counts.device
        counts = torch.zeros(2, dtype=torch.int64, device=device) if self._counts is None else self._counts
        for now, then, grad in self._sample:
            moved = grad != 0
            stayed = (now == then) & moved
            counts = counts + torch.stack([stayed.sum(), moved.sum()]).to(device)
        if found_inf is not None:
            counts *= found_inf.to(device).view(()) == 0
        self._sample, self._counts = [], counts
        if not part:
            self.finish()

    def finish(self) -> None:
        """Ends a step: its counts are read now, or as soon as the device has them."""
        self._open, counts, self._counts = False, self._counts, None
        if counts is None:
            return
        device, event = counts.device, None
        if device.type == "cuda":
            counts = torch.empty(2, dtype=torch.int64, pin_memory=True).copy_(counts, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
        self._pending = counts, event, self.calls
        self._read()

    def _read(self) -> None:
        counts, event, step = self._pending
        if event is not None and not event.query():
            return
        self._pending = None
        stayed, moved = counts.tolist()
        if self.told or 2 * stayed <= moved:
            return
        self.told = True
        warnings.warn(
            f"{self.name}: {100 * stayed / moved:.0f} % of the sampled 16-bit weights with a gradient did not change at step "
            f"{step}: their updates round to nothing. Use param_precision='stochastic' (no memory), 'kahan', 'split24' or "
            "'master', or fp32 parameters.",
            stacklevel=5,
        )
