"""Bandwidth probes of the present machine: what a step's bytes are held against. Run inside every round of a benchmark.

copy: one buffer into another (bytes read + written). stream: an addition in place (2 reads and 1 write), which is how
an optimizer step uses memory. CPU copies pay for loading the lines they overwrite, in-place streams do not, so a good
step exceeds the copy bandwidth there. Both are one torch operation, one parallel region: on a busy machine each further
one would wait for its slowest thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds(device: torch.device, work: Callable) -> float:
    """Duration of work() by CUDA events, or by the clock on a CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


class Probe:
    """Two buffers of `size` bytes; copy() and stream() give bytes per second of one pass over them."""

    def __init__(self, device: torch.device, size: int):
        self.device = device
        self.source = torch.full((size // 4,), 1e-9, device=device)
        self.target = torch.zeros_like(self.source)
        self.bytes = 4 * self.source.numel()
        for _ in range(2):
            self.copy()
            self.stream()

    def copy(self) -> float:
        return 2 * self.bytes / seconds(self.device, lambda: self.target.copy_(self.source))

    def stream(self) -> float:
        return 3 * self.bytes / seconds(self.device, lambda: self.target.add_(self.source))
