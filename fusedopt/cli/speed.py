"""Step time against copy bandwidth: how near the automatic backend of a device comes to the limit the memory sets."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

import fusedopt

TIMED = ("adamw", "adamw8bit", "lion8bit")
TENSORS = 4


@dataclass(frozen=True)
class Timing:
    """Seconds of a step over `numel` parameters and of its limit: the bytes it must move at the copy bandwidth."""

    optimizer: str
    backend: str
    numel: int
    seconds: float
    limit: float


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _fastest(work, device: torch.device, budget: float, inner: int) -> float:
    """Seconds of a call, the best of repetitions of `inner` calls within a budget in seconds, after one to warm up.

    The best, not the median: other work on the machine only ever adds time, and a limit must not be too slow.
    """
    work()
    _wait(device)
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 3 or len(times) < 15 and time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(inner):
            work()
        _wait(device)
        times.append((time.perf_counter() - begin) / inner)
    return min(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of the faster of a copy and an in-place scale, on data larger than caches.

    On a CPU a copy may also read the lines it overwrites; a step, which works in place, does not.
    """
    cpu = device.type == "cpu"
    source = torch.ones(2**25 if cpu else 2**28, device=device)
    target = torch.zeros_like(source)
    works = (lambda: target.copy_(source), lambda: target.mul_(1.0))
    seconds = min(_fastest(work, device, 0.7, 1 if cpu else 10) for work in works)
    return 2 * source.numel() * source.element_size() / seconds


def time_step(name: str, device: torch.device, bandwidth: float) -> Timing:
    """One optimizer on fp32 parameters and gradients: 16 Mi of them on a CPU, 128 Mi on a GPU, 1 Mi in pure torch."""
    probe = [torch.nn.Parameter(torch.ones(8192, device=device))]
    probe[0].grad = torch.ones_like(probe[0])
    backend = fusedopt.create(name, probe).plan().buckets[0]["backend"]
    numel = 2**20 if backend == "reference" else 2**24 if device.type == "cpu" else 2**27
    params = [torch.nn.Parameter(torch.ones(numel // TENSORS, device=device)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    opt = fusedopt.create(name, params)
    opt.step()
    inner = 1 if device.type == "cpu" or backend == "reference" else 10
    seconds = _fastest(opt.step, device, 1.0, inner)
    return Timing(name, backend, numel, seconds, opt.plan().bytes / bandwidth)
