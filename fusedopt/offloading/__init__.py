"""offload: optimizer states in host memory or in a file, stepped by the CPU or paged through the parameter's device."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from fusedopt.checks import describe
from fusedopt.memory import is_dense
from fusedopt.metrics import watched_offload
from fusedopt.offloading.storage import ScratchFile, lay_out, release_freed_memory
from fusedopt.states import option_overrides
from fusedopt.transforms.base import check_none
from fusedopt.weights import Int8Weight

STEP_ON = ("cpu", "device")


@dataclass(frozen=True)
class Offloading:
    """How an optimizer is offloaded: `opt.offloading`. See `offload`."""

    step_on: str
    folder: str | None
    memory_limit: int

    def keeper(self) -> Keeper:
        return Keeper(self)


class Keeper:
    """Takes states that are being loaded out of the way, one parameter at a time: nothing is gathered on a device, and
    nothing in memory where states lie in a file."""

    def __init__(self, settings: Offloading):
        self._file = None if settings.folder is None else ScratchFile(settings.folder)

    def home(self, p: torch.Tensor) -> torch.Tensor:
        """What states of p are allocated like."""
        return p if p.device.type == "cpu" else host_copy(p)

    def keep(self, entry: dict) -> dict:
        if self._file is None:
            return entry
        places, nbytes = lay_out(entry, 0)
        segment = self._file.segment(nbytes)
        for place in places:
            segment.put(place, entry[place.name])
        release_freed_memory()
        return entry | {place.name: segment.tensor(place) for place in places}


def host_copy(p: torch.Tensor, values: bool = True) -> torch.Tensor:
    """A tensor on the CPU in p's layout (contiguous for views with gaps), with p's values and options."""
    if is_dense(p):
        out = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype)
    else:
        out = torch.empty(p.shape, dtype=p.dtype)
    if values:
        out.copy_(p.detach())
    if options := option_overrides(p):
        out._fusedopt_options = options
    return out


def offload(
    opt: torch.optim.Optimizer,
    *,
    step_on: str = "cpu",
    folder: str | os.PathLike | None = None,
    memory_limit: int = 3 << 28,
) -> torch.optim.Optimizer:
    """Keeps the states of an optimizer in host memory, or in a file for states larger than that. Returns the same optimizer.

    Schedulers, clipping, hooks, GradScaler, added groups, frozen parameters and state dicts work as before, and every step
    gives the bits of the backend that does it: elementwise rules, and trust ratios per tensor (LAMB, LARS). Parameters and
    gradients stay where they are. Call it before the first step or at any later time.

    Args:
        step_on: "cpu": gradients stream to the CPU, its kernels step them, parameters stream back. "device": states are
            paged through the parameter's device and stepped there.
        folder: of a scratch file that holds the states, on a fast local disk; None for host memory (pinned where a GPU
            copies from it). The file has no name and is no checkpoint: it is gone when the process ends, however it ends.
        memory_limit: bytes of staging buffers, in host memory and in device memory each. Work moves in chunks of whole
            tensors of a third of it: one is brought, one stepped, one taken back at a time.

    Raises:
        TypeError: not an optimizer of this package. ValueError: an option is out of range, or the optimizer has
        capturable, differentiable, a projection or a factored rule, or it is watched or releases gradients.
        ValueError (at a step): a tensor does not fit in a third of memory_limit; nothing has been changed then.
        RuntimeError (at every step after one that an error of the disk broke off): load a checkpoint.

    `opt.state` holds tensors in host memory, with a folder ones that map the file. After ZeRO-Offload (arXiv 2101.06840) and
    ZeRO-Infinity (arXiv 2104.07857).
    """
    from fusedopt.optimizer import FusedOptimizer

    if not isinstance(opt, FusedOptimizer):
        raise TypeError(
            f"offload: {type(opt).__name__} is not an optimizer of fusedopt. Make e.g. fusedopt.AdamW, and load its state dict."
        )
    if opt._release is not None:
        raise ValueError(
            f"offload: release_gradients steps this {type(opt).__name__} during the backward pass. Call its handle's "
            "remove() first."
        )
    if opt._watchers:
        raise watched_offload(opt, "offload")
    if step_on not in STEP_ON:
        raise ValueError(f"offload: unknown step_on {step_on!r}; it is 'cpu' or 'device'")
    if not isinstance(memory_limit, int) or isinstance(memory_limit, bool) or memory_limit < 1:
        raise ValueError(f"offload: invalid memory_limit: {memory_limit!r}; it is a number of bytes")
    if folder is not None:
        folder = os.path.abspath(folder)
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise ValueError(f"offload: folder {folder!r} does not exist or cannot be written to. Make it first.")
    index = 0
    for group in opt.param_groups:
        for p in group["params"]:
            check_offloadable(opt, index, p, group)
            index += 1
    opt.offloading = Offloading(step_on, folder, memory_limit)
    opt._drop_plans()
    return opt


def check_offloadable(opt, index: int, p: torch.Tensor, group: dict) -> None:
    """Raises ValueError for a parameter whose states cannot be moved about."""
    name = type(opt).__name__
    check_none(opt, "offload", "it streams gradients as they are to where states are stepped")
    if opt._low_rank is not None:
        raise ValueError(
            f"{name}: projected_linear keeps low-rank gradients, which cannot be offloaded. Use one of both."
        )
    for flag in ("capturable", "differentiable"):
        if group[flag]:
            raise ValueError(f"{name}: {flag}=True needs its states on the device. Offload an optimizer without it.")
    rule = opt.rule_for(group)
    if rule.measures is not None and (rule.memory or rule.measures.given or rule.measures.scope != "tensor"):
        raise ValueError(
            f"{name} keeps numbers of whole tensors beside its states, on the device. Do not offload, or use LAMB or LARS."
        )
    if isinstance(p, Int8Weight):
        raise ValueError(f"{describe(name, index, p)} is an int8 weight, whose optimizer cannot be offloaded.")
    if type(p).__name__ == "DTensor":
        raise ValueError(
            f"{describe(name, index, p)} is a DTensor, whose states cannot be offloaded. Use FSDP's CPUOffloadPolicy."
        )
    projection = opt.projection_for(p, group)
    if projection is not None:
        raise ValueError(
            f"{describe(name, index, p)}: its states are low-rank or factored ({projection.name}): they are small, and are "
            "bound to buffers on the device. Switch the projection off, or do not offload."
        )


def staging_bytes(opt: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of the staging buffers of an offloaded optimizer, now and at most: host, device, host_peak, device_peak.

    Raises ValueError for an optimizer that is not offloaded.
    """
    if getattr(opt, "offloading", None) is None:
        raise ValueError(f"staging_bytes: this {type(opt).__name__} is not offloaded. Call fusedopt.offload(opt).")
    engine = opt._offload
    return {"host": 0, "device": 0, "host_peak": 0, "device_peak": 0} if engine is None else dict(engine.staging)
