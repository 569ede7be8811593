"""DTensor parameters (FSDP2, tensor parallelism): their shards, the states kept beside them, and sums over a mesh.

A step works on local shards. The optimizer's state holds DTensors with the parameter's mesh and placements, so that
torch.distributed.checkpoint saves and reshards them (fusedopt.sharded_states).
"""

from __future__ import annotations

import sys
from math import prod

import torch


def is_dtensor(t) -> bool:
    if type(t) is torch.nn.Parameter or type(t) is torch.Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # whoever has a DTensor has imported it
    return module is not None and isinstance(t, module.DTensor)


def local(t: torch.Tensor) -> torch.Tensor:
    """The shard of a DTensor on this process, the same object every time; any other tensor as it is."""
    if not is_dtensor(t):
        return t
    shard = t._local_tensor  # to_local() of a Parameter is a new view at every call
    return shard.wait() if hasattr(shard, "wait") else shard  # a collective may be under way (AsyncCollectiveTensor)


def as_dtensor(shard: torch.Tensor, like, shape: tuple[int, ...], stride: tuple[int, ...] | None = None):
    """A DTensor around a shard, on the mesh and with the placements of `like`. shape, stride: of the whole."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    shape = torch.Size(shape)
    if stride is None:
        stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    # from_local would move the shard of a parameter that is offloaded to the CPU onto the mesh's device
    spec = DTensorSpec(like.device_mesh, like.placements, tensor_meta=TensorMeta(shape, stride, shard.dtype))
    return DTensor(shard.detach(), spec, requires_grad=False)


def spread(p, shape: tuple[int, ...], dims: dict[int, int], dtype: torch.dtype):
    """A DTensor of another shape, uninitialised. dims: of each dimension of p that it has too, its number; it is split as p is
    along these, and whole on every process along the others."""
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    size, p_local = list(shape), local(p)
    for _, dim in sharded_dims(p):
        if dim in dims:
            size[dims[dim]] = p_local.shape[dim]
    placements = tuple(_along(x, dims[x.dim]) if getattr(x, "dim", None) in dims else Replicate() for x in p.placements)
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    meta = TensorMeta(torch.Size(shape), stride, dtype)
    shard = torch.empty(size, dtype=dtype, device=p_local.device)
    return DTensor(shard, DTensorSpec(p.device_mesh, placements, tensor_meta=meta), requires_grad=False)


def _along(placement, dim: int):
    """A Shard, strided or not, along another dimension."""
    from torch.distributed.tensor import Shard

    if placement.dim == dim:
        return placement
    return Shard(dim) if type(placement) is Shard else type(placement)(dim, split_factor=placement.split_factor)


def sharded_dims(p) -> list[tuple[int, int]]:
    """(mesh dimension, tensor dimension) of every placement that splits a DTensor."""
    return [(i, placement.dim) for i, placement in enumerate(p.placements) if hasattr(placement, "dim")]


def is_partial(t) -> bool:
    return any(placement.is_partial() for placement in t.placements)


def shard_of(p, whole: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that every process has whole, split like a DTensor. No communication."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = p.device_mesh
    everywhere = DTensor.from_local(whole.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local(everywhere.redistribute(placements=p.placements)).to(local(p).device).contiguous()


def first_octet(p: torch.Tensor) -> int:
    """Where the random bits of a shard begin, in octets of elements: where the shard does, if the first dimension alone is
    split and that is a multiple of 8; so a sharded run rounds as one process does. Otherwise somewhere of its own."""
    if not is_dtensor(p) or not local(p).numel():
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, split = p.device_mesh, sharded_dims(p)
    if all(dim == 0 for _, dim in split):
        _, offset = compute_local_shape_and_global_offset(p.shape, mesh, p.placements)
        return -(-offset[0] * prod(p.shape[1:]) // 8) if offset else 0
    return shard_number(p) * -(-p.numel() // 8)


def shard_number(p) -> int:
    """Which shard of a DTensor this process has, counted from 0; replicas have the same."""
    number = 0
    for i, _ in sharded_dims(p):
        number = number * p.device_mesh.size(i) + p.device_mesh.get_local_rank(i)
    return number


class Sharding:
    """How the shards of a matrix (a tensor of two or more dimensions, [first, all others]) make the whole, and which part of a
    whole is this process's. Every process of the mesh has to gather the same matrices in the same order."""

    def __init__(self, p):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        self.p, self.shape, self.number = p, p.shape, shard_number(p)
        self.matrix = (p.shape[0], prod(p.shape[1:]))
        self.mine, self.offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)

    def gather(self, shard: torch.Tensor, whole: torch.Tensor) -> None:
        """Fills whole [rows, cols] from the shards; shard has this process's elements in order."""
        whole.copy_(self.full(shard))

    def full(self, shard: torch.Tensor) -> torch.Tensor:
        """The whole [rows, cols], from every process's shard."""
        return as_dtensor(shard.view(self.mine), self.p, self.shape).full_tensor().view(self.matrix)

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's elements of whole [rows, cols], as the matrix that its shard is; contiguous."""
        t = whole.view(self.shape)
        for dim, (start, length) in enumerate(zip(self.offset, self.mine, strict=True)):
            t = t.narrow(dim, min(start, self.shape[dim]), length)
        return t.reshape(self.local_matrix).contiguous()

    @property
    def local_matrix(self) -> tuple[int, int]:
        return self.mine[0], prod(self.mine[1:])


# What a step refuses, and the gradients it takes


def check_sharded(what: str, p, projection, formats) -> None:
    """Raises RuntimeError for a DTensor parameter that cannot be stepped in shards."""
    if is_partial(p):
        raise RuntimeError(f"{what} has Partial placements {p.placements}. Redistribute it to Shard or Replicate.")
    if projection is not None and (reason := projection.refuses_shards(p)):
        raise RuntimeError(
            f"{what} is a DTensor, and {type(projection).__name__} {reason}. Sharded parameters take GaLore, APOLLO, Muon, "
            "Adafactor and rules without projection (AdamW, Lion, SGD, LAMB, LARS); DDP keeps them whole."
        )
    if projection is not None and not local(p).is_contiguous():
        raise RuntimeError(
            f"{what} has a shard of strides {local(p).stride()}: {type(projection).__name__} gathers contiguous ones. Make the "
            "parameter contiguous before it is distributed."
        )
    if not local(p).is_contiguous() and any(form.block for form in formats):
        raise RuntimeError(
            f"{what} has a shard of strides {local(p).stride()}: blockwise states need contiguous ones. Make the parameter "
            "contiguous before it is distributed, or use state_format='fp32' or 'bf16'."
        )


def partition_of(p: torch.Tensor) -> str | None:
    """Whose flat partition a 1-D tensor is, None for a tensor of its own shape. ZeRO puts plain tensors in the place of an
    optimizer's Parameters, and bears no mark but that it makes the step itself; FSDP1 marks its flat parameters and the views
    of them."""
    if p.dim() != 1:
        return None
    if getattr(p, "_fsdp_flattened", False):
        return "FullyShardedDataParallel (FSDP1)"
    if type(p) is not torch.Tensor or "deepspeed" not in sys.modules:
        return None
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("deepspeed.runtime."):
            return "DeepSpeed ZeRO"
        frame = frame.f_back
    return None


def check_partition(opt, what: str, owner: str, group: dict) -> None:
    """Raises RuntimeError for what a flat partition of many tensors cannot have."""
    name = type(opt).__name__
    if opt.needs_shapes or opt.rule_for(group).reduces:
        raise RuntimeError(
            f"{what} is a flat partition of {owner}, which does not know where its tensors begin; {name} needs their shapes. "
            "Use an elementwise rule (AdamW, Adam, Lion, SGD), or fully_shard (FSDP2), which keeps tensors apart."
        )
    if group["projection"] is not None:
        raise RuntimeError(
            f"{what} is a flat partition of {owner}: there are no matrices for {group['projection'].name} to project. Use "
            "projection=None, or DDP, which keeps tensors whole."
        )
    if opt.clip_grad_norm is not None:
        raise RuntimeError(
            f"{what} is a flat partition of {owner}, and clip_grad_norm would see this process's part of the gradients only. "
            f"Leave clipping to {owner} (gradient_clipping in DeepSpeed's configuration, FSDP's clip_grad_norm_)."
        )


def local_gradients(name: str, params: list, grads: list) -> list:
    """The shards of gradients that go with the parameters'. One that is split otherwise, or still a sum to be made
    (Partial), is redistributed first, as torch.optim's operations do."""
    if set(map(type, grads)) <= {torch.Tensor, type(None)}:
        return grads
    return [
        _local_gradient(name, i, p, g) if is_dtensor(g) else g
        for i, (p, g) in enumerate(zip(params, grads, strict=True))
    ]


def _local_gradient(name: str, index: int, p: torch.Tensor, g) -> torch.Tensor:
    if not is_dtensor(p) or g.device_mesh != p.device_mesh:
        mine = f"on {p.device_mesh}" if is_dtensor(p) else "a plain tensor"
        raise RuntimeError(
            f"{name}: parameter {index} (shape {tuple(p.shape)}) is {mine}, its gradient a DTensor on {g.device_mesh}. "
            "Assign a gradient that is distributed like the parameter."
        )
    return local(g if g.placements == p.placements else g.redistribute(placements=p.placements))


# Sums over a mesh


def split_groups(t, along: int | None = None) -> tuple:
    """The process groups whose members hold different parts of a tensor, or of one dimension (`along`) of it; none for a plain
    tensor. Replicas count once."""
    if not is_dtensor(t):
        return ()
    return tuple(t.device_mesh.get_group(i) for i, dim in sharded_dims(t) if along in (None, dim))


def add_up(x: torch.Tensor, groups: tuple) -> torch.Tensor:
    """x summed over process groups, in place; 16-bit numbers are added in fp32 and rounded once."""
    wide = x.float() if groups and x.dtype.itemsize == 2 else x
    for group in groups:
        torch.distributed.all_reduce(wide, group=group)
    return x if wide is x else x.copy_(wide)


def largest(x: torch.Tensor, groups: tuple) -> torch.Tensor:
    """The largest over process groups of each element of x; NaN where one is NaN, which collectives may pass over."""
    pair = torch.stack([x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), x.isnan().to(x.dtype)])
    for group in groups:
        torch.distributed.all_reduce(pair, op=torch.distributed.ReduceOp.MAX, group=group)
    return torch.where(pair[1] > 0, torch.nan, pair[0])


def _ids(slots: list, device: torch.device) -> torch.Tensor:
    return torch.tensor([slot.tensor_id for slot in slots], dtype=torch.int64, device=device)


class MeshSums:
    """Sums of the sharded slots of a device, over the processes that hold their shards: one collective per mesh dimension
    and kind of sum, on the device, in the order of the parameters, which is the same on every process.

    normed: the buckets whose sums of squares are in `totals`, in this order; each holds slots of the same split_groups.
    """

    def __init__(self, slots, normed, device: torch.device):
        self.trusted: dict[str, list[tuple[torch.Tensor, torch.Tensor, tuple, bool]]] = {}
        for kind in ("gradient", "update"):
            ids: dict[tuple, list] = {}
            for slot in slots:
                if (slot.rule.takes_norms if kind == "gradient" else slot.rule.probes) and slot.groups:
                    most = kind == "update" and slot.rule.takes_largest
                    ids.setdefault((slot.groups, most), []).append(slot)
            self.trusted[kind] = [
                (_ids(mine, device), _ids([s for s in mine if not s.param.numel()], device), *key)
                for key, mine in ids.items()
            ]
        self.squares = []
        for groups in dict.fromkeys(slot.groups for slot in slots):
            launches = [i for i, bucket in enumerate(normed) if bucket.slots[0].groups == groups]
            self.squares.append((torch.tensor(launches, dtype=torch.int64, device=device), groups))

    def trust(self, kind: str, sums: torch.Tensor | None) -> None:
        """Completes the sums of each tensor that a norm launch ("gradient") or a probe ("update") gave."""
        for index, empty, groups, most in self.trusted[kind]:
            if empty.numel():  # no launch writes these
                sums.index_fill_(0, empty, -torch.inf if most else 0)
            mine = sums.index_select(0, index).double()
            whole = largest(mine, groups) if most else add_up(mine, groups)
            sums.index_copy_(0, index, whole.to(sums.dtype))

    def square_sum(self, totals: torch.Tensor) -> torch.Tensor:
        """The sum of squares over all tensors, fp64 [1], from those of each launch of this process."""
        parts = [add_up(totals.index_select(0, index).double().sum(0, True), groups) for index, groups in self.squares]
        return torch.stack(parts).sum(0)


def anywhere(flag: torch.Tensor, params) -> bool:
    """Whether a flag (0-dim, non-negative) is set on any process that shares a DTensor of params. Waits for the device."""
    flag = flag.float().view(1)
    for groups in dict.fromkeys(split_groups(p) for p in params):
        add_up(flag, groups)
    return bool(flag)
