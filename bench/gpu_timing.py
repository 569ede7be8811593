"""Times of single kernels and of whole steps on a GPU, and the records they make; on a CPU the same code by the clock.

A kernel of 20 microseconds is shorter than its launch from Python, so kernels are timed in a CUDA graph that goes round over
several sets of tensors, together larger than the L2 cache. Rounds are interleaved; ratios are formed within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bench import bandwidth
from bench.run import quartiles

BEYOND_CACHE = 256 << 20  # bytes of all sets together: five times the L2 of an H200


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sets_for(nbytes: int, device: torch.device) -> int:
    """How many copies of something lie beyond the cache."""
    return max(2, -(-BEYOND_CACHE // max(1, nbytes))) if device.type == "cuda" else 1


class Repeated:
    """Calls captured one after the other in a CUDA graph; calling it gives seconds a call. Raises what a call raises."""

    def __init__(self, device: torch.device, calls: list[Callable[[], object]], rounds: int = 2):
        self.device, self.count = device, len(calls) * rounds
        self.calls, self.graph = calls * rounds, None
        if device.type != "cuda":
            calls[0]()
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream(device).wait_stream(stream)
        synchronize(device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in self.calls:
                call()

    def _all(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        for call in self.calls:
            call()

    def __call__(self) -> float:
        return bandwidth.seconds(self.device, self._all) / self.count


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, in rotating order, after one round that is not counted."""
    out: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for index in range(rounds + 1):
        first = index % max(1, len(names))
        for name in names[first:] + names[:first]:
            taken = runs[name]()
            if index:
                out[name].append(taken)
    return out


def ratios(mine: list[float], base: list[float]) -> dict[str, float]:
    return quartiles([a / b for a, b in zip(mine, base, strict=True)])


def milliseconds(times: list[float]) -> dict[str, float]:
    return quartiles([1e3 * t for t in times])


class Clock:
    """Whether there is time for another case."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def over(self) -> bool:
        return time.monotonic() > self.end


def why(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
