"""Bandwidth probes of the present machine: what a step's bytes are held against. Run inside every round of a benchmark.

copy: one buffer into another (bytes read + written). stream: the traffic of an fp32 AdamW step in place, 4 reads and
3 writes, as three additions over blocks small enough for g to stay in cache. CPU copies pay for loading the lines they
overwrite, in-place streams do not, so a good in-place step exceeds the copy bandwidth there.
"""

from __future__ import annotations

import time

import torch

STREAM_BLOCK = 1 << 19  # elements: four fp32 blocks are 8 MB


def bench_device(device: torch.device, work) -> float:
    """Seconds of work() by CUDA events, or by the clock on a CPU."""
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
    """Buffers of `size` bytes for the probes. copy() and stream() give bytes per second of one pass."""

    def __init__(self, device: torch.device, size: int):
        self.device, self.size = device, size
        self.source = torch.ones(self.size // 4, device=device)
        self.target = torch.zeros_like(self.source)
        self.tensors: list[tuple[torch.Tensor, ...]] = []
        if device.type == "cpu":
            streams = [torch.ones(self.size // 16) for _ in range(4)]
            self.tensors = list(zip(*(s.split(STREAM_BLOCK) for s in streams), strict=True))
        for _ in range(2):
            self.copy()
            self.stream()

    @property
    def bytes(self) -> int:
        return self.size * (3 if self.tensors else 2)

    def copy(self) -> float:
        seconds = bench_device(self.device, lambda: self.target.copy_(self.source))
        return 2 * self.source.numel() * 4 / seconds

    def _stream(self) -> None:
        for p, m, v, g in self.tensors:
            p.add_(g, alpha=1e-9)
            m.add_(g, alpha=1e-9)
            v.add_(g, alpha=1e-9)

    def stream(self) -> float | None:
        """None on a GPU, where the copy is the ceiling."""
        if not self.tensors:
            return None
        seconds = bench_device(self.device, self._stream)
        return 7 * 4 * (self.size // 16) / seconds
