"""global_norm and clip_grad_norm_: the gradient norm as one multi-tensor launch, and clipping with its coefficient."""

from __future__ import annotations

import torch

from fusedopt.abi import DTYPE_CODES, GRAIN_SIZE, Column, Phase, chunk_size, chunk_table
from fusedopt.backends import select
from fusedopt.backends.base import BucketKey, Item, Work
from fusedopt.distributed import add_up, is_dtensor, is_partial, local, split_groups
from fusedopt.memory import flat, is_dense
from fusedopt.precision import get_precision
from fusedopt.rule import get_rule
from fusedopt.states import undisturbed


@undisturbed
def _sum_of_squares(tensors: list[torch.Tensor], each: bool = False) -> torch.Tensor:
    """fp32 [1]: the sum of squares over dense tensors of one device and dtype; each: fp32 [tensors], one for each of them."""
    first = tensors[0]
    device, dtype = first.device, first.dtype
    aligned = all(t.data_ptr() % 16 == 0 for t in tensors)
    key = BucketKey(device, "", "sgd", dtype, dtype, (), "nearest", aligned)
    name, _ = select.choose(key, select.requested(None))
    backend = select.get_backend(name)
    numels = [t.numel() for t in tensors]
    grains = [-(-n // GRAIN_SIZE) for n in numels]
    table = torch.zeros(Column.COUNT, len(tensors), dtype=torch.int64)
    table[Column.GRAD] = table[Column.PARAM] = torch.tensor([t.data_ptr() for t in tensors])
    table[Column.NUMEL] = torch.tensor(numels)
    table[Column.META] = torch.arange(len(tensors)) << 32
    table[Column.GRAIN] = torch.tensor([0, *grains[:-1]]).cumsum(0)
    size = chunk_size(sum(numels), backend.units(device))
    out = [torch.zeros(n, dtype=torch.float32, device=device) for n in (1, 1)]
    work = Work(
        key._replace(backend=name), get_rule("sgd"), (), get_precision("nearest"),
        [Item(t, t, (), (), i, 0) for i, t in enumerate(tensors)],
        _upload(table, device), _upload(chunk_table(numels, size), device), torch.zeros(1, 32, device=device), [], size,
        sum(grains),
        phase=Phase.NORM, totals=out[0], norm=out[1],
        partials=torch.zeros(sum(grains), 2, device=device),
        counters=torch.zeros(len(tensors) + 1, dtype=torch.int32, device=device),
        sums=torch.zeros(len(tensors), 2, device=device) if each else None,
    )  # fmt: skip
    backend.launch(work)
    return work.sums[:, 1] if each else out[0]


def _upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A table on a device, without waiting for the device."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


@torch.no_grad()
def square_sums(tensors: list[torch.Tensor]) -> dict[torch.device, tuple[list[int], torch.Tensor]]:
    """By device: which of the tensors are there, and the sum of squares of each, fp32 [of them]. One launch per device and
    dtype; empty tensors are left out. The tensors must be dense or strided, and floating point."""
    groups: dict = {}
    for i, t in enumerate(tensors):
        if t.numel():
            groups.setdefault((t.device, t.dtype), []).append(i)
    found: dict[torch.device, tuple[list[int], torch.Tensor]] = {}
    for (device, dtype), mine in groups.items():
        chosen = [flat(t if is_dense(t) else t.contiguous()) for t in (tensors[i].detach() for i in mine)]
        if dtype in DTYPE_CODES:
            sums = _sum_of_squares(chosen, each=True)
        else:
            sums = torch.stack([t.double().square().sum() for t in chosen]).float()
        before = found.get(device)
        found[device] = (mine, sums) if before is None else (before[0] + mine, torch.cat([before[1], sums]))
    return found


@torch.no_grad()
def global_norm(tensors) -> torch.Tensor:
    """L2 norm over all elements of all tensors (an iterable, None entries skipped): fp32, 0-dim, on the first one's device.

    One launch per device and dtype. Of a DTensor all shards count, replicas once; every process of its mesh must call this.
    Raises RuntimeError for sparse or complex tensors, and for Partial DTensors.
    """
    found = [t for t in tensors if t is not None]
    spread: dict[tuple, list] = {}
    for i, t in enumerate(found):
        if t.layout != torch.strided or not t.dtype.is_floating_point:
            raise RuntimeError(f"global_norm: tensor {i} ({t.dtype}, {t.layout}) must be dense and floating point")
        if is_dtensor(t) and is_partial(t):
            raise RuntimeError(f"global_norm: tensor {i} is Partial. Redistribute it to Shard or Replicate.")
        spread.setdefault(split_groups(t), []).append(local(t))
    if not spread:
        return torch.zeros(())
    home = local(found[0]).device
    parts = [add_up(_square_sum(mine, home), groups) for groups, mine in spread.items()]
    return torch.stack(parts).sum().sqrt().float()


def _square_sum(tensors: list[torch.Tensor], home: torch.device) -> torch.Tensor:
    """fp64 [1] on a device: the sum of squares of the tensors of this process."""
    groups: dict = {}
    for t in tensors:
        if t.numel():
            groups.setdefault((t.device, t.dtype), []).append(t if is_dense(t) else t.contiguous())
    total = torch.zeros(1, dtype=torch.float64, device=home)
    for (_, dtype), mine in groups.items():
        if dtype in DTYPE_CODES:
            part = _sum_of_squares([flat(t) for t in mine]).double()
        else:
            part = torch.stack([t.double().square().sum() for t in mine]).sum().view(1)
        total += part.to(home)
    return total


@torch.no_grad()
def clip_grad_norm_(parameters, max_norm: float) -> torch.Tensor:
    """torch.nn.utils.clip_grad_norm_ for the L2 norm: scales every .grad in place and returns the norm before clipping.

    `clip_grad_norm=` of an optimizer does the same inside the step without the scaling pass.
    """
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = global_norm(grads)
    clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for g in map(local, grads):
        g.mul_(clip.to(g.device))
    return norm
