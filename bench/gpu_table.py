"""The GPUs that `bench predict` knows: numbers of their data sheets, and the few that had to be assumed.

Sources: NVIDIA's data sheets of the H200 SXM, H100 SXM, A100 80GB SXM and GeForce RTX 4090 (SMs, boost clock, bandwidth); the CUDA
C++ programming guide's tables of technical specifications (registers, threads, shared memory) and of arithmetic throughput by
compute capability (lanes: results of a unit per SM and cycle).
Assumed, and replaced by nothing until a GPU has measured them: `share` of the bandwidth that a copy reaches (what published
copies of large arrays reach, 0.88 to 0.93), `latency` of a load while the memory is busy (an H200 is known to need about 25 KB
in flight per SM, which at 4.3 TB/s is 770 ns; the others in proportion to their idle latencies), `launch`, the time of a launch
with nothing to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Gpu:
    """bandwidth: bytes/s of the data sheet. clock: Hz. share: of the bandwidth, achievable. latency, launch: seconds. lanes:
    results per SM and cycle by unit (sass.UNITS; "issue": of all instructions together). shared: bytes per SM. model: what the
    driver's name of it contains."""

    name: str
    model: str
    arch: str
    sms: int
    clock: float
    bandwidth: float
    share: float
    latency: float
    launch: float = 3e-6
    threads: int = 2048
    registers: int = 65536
    shared: int = 228 << 10
    lanes: dict[str, int] = field(default_factory=dict)

    @property
    def achievable(self) -> float:
        """Bytes per second that a copy is expected to reach."""
        return self.share * self.bandwidth


COMMON = {"issue": 128, "integer": 64, "special": 16, "load/store": 32}
HOPPER = COMMON | {"float": 128, "convert": 64}
AMPERE = COMMON | {"float": 64, "convert": 16}

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", "H200", "sm_90", 132, 1.98e9, 4.8e12, 0.90, 770e-9, lanes=HOPPER),
        Gpu("h100", "H100", "sm_90", 132, 1.98e9, 3.35e12, 0.90, 770e-9, lanes=HOPPER),
        Gpu("a100", "A100", "sm_80", 108, 1.41e9, 2.039e12, 0.90, 700e-9, shared=164 << 10, lanes=AMPERE),
        Gpu(
            "4090",
            "RTX 4090",
            "sm_89",
            128,
            2.52e9,
            1.008e12,
            0.92,
            600e-9,
            threads=1536,
            shared=100 << 10,
            lanes=HOPPER,
        ),
    )
}
