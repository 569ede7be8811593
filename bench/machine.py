"""The stamp of the machine a result was measured on (no host names, no paths), and how much memory is free."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

PACKAGES = (
    "triton bitsandbytes torchao torch-optimi pytorch_optimizer lion-pytorch deepspeed apex flashoptim galore-torch "
    "numpy"
).split()
ROOT = Path(__file__).resolve().parent.parent


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git(*arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def load_average() -> float | None:
    """Runnable processes over the last minute, where the system tells."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache in front of memory, 0 where unknown."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    sizes = [0]
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1))
    return max(sizes)


def stamp(device: torch.device) -> dict:
    """Everything about hardware and software that a reader of the numbers needs."""
    changes = git("status", "--porcelain", "--untracked-files=no")
    out = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "isa_asked": os.environ.get("FUSEDOPT_CPU_ISA"),
        "last_level_cache_bytes": last_level_cache(device),
        "versions": versions(),
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(changes) if changes is not None else None,
    }
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        driver = None
        try:
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            pass
        out["gpu"] = {
            "name": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory, "cuda": torch.version.cuda, "hip": torch.version.hip, "driver": driver,
        }  # fmt: skip
    return out


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated now: free device memory, or MemAvailable within the control group's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = 1 << 62
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) * 1024
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except OSError:
        pass
    return free


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field}")


class PeakMemory:
    """Context that measures how far memory rises above its level at entry; `bytes` is None where it cannot tell."""

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
            self.before = _status("VmRSS:")
        except OSError:
            self.before = None
        return self

    def __exit__(self, *error) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        elif self.before is not None:
            self.bytes = max(0, _status("VmHWM:") - self.before)
