"""DTensor parameters (FSDP2, tensor parallelism): their shards, the states kept beside them, and sums over a mesh.

A step works on local shards. The optimizer's state holds DTensors with the parameter's mesh and placements, so that
torch.distributed.checkpoint saves and reshards them. `LocalEntry` is a parameter's state dict as the step sees it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import replace
from math import gcd, prod

import torch

from fusedopt import states as st
from fusedopt.formats import Format


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


def sharded_dims(p) -> list[tuple[int, int]]:
    """(mesh dimension, tensor dimension) of every placement that splits a DTensor."""
    return [(i, placement.dim) for i, placement in enumerate(p.placements) if hasattr(placement, "dim")]


def is_partial(t) -> bool:
    return any(placement.is_partial() for placement in t.placements)


# Blocks and shards


def tail(p) -> int:
    """Elements that follow each other in every shard, however many processes there are: those of the dimensions after the
    last one that is split (the first one, where none is, so that replicated and sharded groups of a mesh agree)."""
    last = max((dim for _, dim in sharded_dims(p)), default=0)
    return prod(p.shape[last + 1 :])


def granule(p, form: Format) -> int:
    """Elements of a run that lies in one block whatever the shards: blocks begin at multiples of it in every shard."""
    return gcd(tail(p), form.block)


def scales_shape(p, form: Format) -> tuple[int, ...]:
    """The shape of the scales as the state dict holds them, one per granule, split like the parameter."""
    last = max((dim for _, dim in sharded_dims(p)), default=0)
    return (*p.shape[: last + 1], tail(p) // granule(p, form))


def packs_in_shape(p) -> bool:
    """Whether packed codes can be split like the parameter: pairs lie within its last dimension, which is whole."""
    last = max((dim for _, dim in sharded_dims(p)), default=0)
    return p.dim() > last + 1 and p.shape[-1] % 2 == 0


def scale_format(name: str) -> Format | None:
    """The format a scale of this name belongs to, None where the name is not that of a scale."""
    return next((form for form in st.blockwise() if name.endswith(st.scale_name("", form))), None)


class LocalEntry(MutableMapping):
    """A DTensor's state dict seen from one process: reads give shards, scales one per block; what is put in becomes a
    DTensor in the dict behind it (`stored`), split like the parameter.

    Scales of blocks that are no whole part of a row of the parameter lie in `stored` as they are, a plain tensor of this
    process; `portable` makes them DTensors.
    """

    def __init__(self, p, stored: dict):
        self.p, self.shard, self.stored = p, local(p), stored

    def __getitem__(self, name: str):
        value = self.stored[name]
        if not is_dtensor(value):
            return value
        return local(value).view(-1) if scale_format(name) is not None else local(value)

    def __setitem__(self, name: str, value) -> None:
        self.stored[name] = self._whole(name, value)

    def _whole(self, name: str, value):
        if not isinstance(value, torch.Tensor) or name == "step":
            return value
        form = scale_format(name)
        if form is not None:
            if granule(self.p, form) < form.block:
                return value
            whole = scales_shape(self.p, form)
            return as_dtensor(value.view(*self.shard.shape[: len(whole) - 1], whole[-1]), self.p, whole)
        if value.shape == self.shard.shape and not (value.dtype == torch.uint8 and value.numel() == 1):
            return as_dtensor(value, self.p, self.p.shape, self.p.stride())  # one code fills a byte in every format
        if value.dim() == self.p.dim() and packs_in_shape(self.p):
            return as_dtensor(value, self.p, (*self.p.shape[:-1], self.p.shape[-1] // 2))
        return value

    def __delitem__(self, name: str) -> None:
        del self.stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def entry_of(p: torch.Tensor, entry: dict):
    """A parameter's state dict as a step uses it."""
    return LocalEntry(p, entry) if is_dtensor(p) else entry


def unpacked(codes: torch.Tensor, numel: int) -> torch.Tensor:
    """One 4-bit code a byte, flat."""
    codes = codes.reshape(-1)
    return torch.stack([codes >> 4, codes & 15], 1).view(-1)[:numel]


def packed(codes: torch.Tensor, zero: int) -> torch.Tensor:
    """Two 4-bit codes a byte, flat; the reverse of `unpacked`. zero: the code that fills up the last byte."""
    codes = codes.reshape(-1)
    pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=zero).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def portable(p, stored: dict) -> dict:
    """A DTensor's state dict with every tensor a DTensor that any number of processes can load.

    Most already are, and stay the live ones. Scales become one per granule, packed codes that cannot be split one a byte.
    """
    if all(is_dtensor(v) or not isinstance(v, torch.Tensor) or not v.dim() for v in stored.values()):
        return stored
    shard, out = local(p), {}
    for name, value in stored.items():
        form = scale_format(name)
        if is_dtensor(value) or not isinstance(value, torch.Tensor) or not value.dim():
            out[name] = value
        elif form is not None:
            whole, size = scales_shape(p, form), granule(p, form)
            first = torch.arange(shard.numel() // size, device=value.device) * size
            scales = value[torch.div(first, form.block, rounding_mode="floor")]
            out[name] = as_dtensor(scales.view(*shard.shape[: len(whole) - 1], whole[-1]), p, whole)
        elif st.stored_format(stored, name).bits == 4:
            out[name] = as_dtensor(unpacked(value, shard.numel()).view(shard.shape), p, p.shape)
        else:
            out[name] = as_dtensor(value, p, p.shape)
    return out


def shard_of(p, whole: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that every process has whole, split like a DTensor. No communication."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = p.device_mesh
    everywhere = DTensor.from_local(whole.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local(everywhere.redistribute(placements=p.placements)).to(local(p).device).contiguous()


class Loader:
    """Turns a loaded entry of a DTensor parameter into its shard's: codes, scales one per block of the shard.

    Loaded tensors are DTensors on the parameter's mesh, or plain ones of the whole parameter, the same on every process.
    Raises ValueError where a shape or a mesh does not fit.
    """

    def __init__(self, what: str, p, entry: dict):
        self.what, self.p, self.entry, self.shard = what, p, entry, local(p)

    def load(self, rule) -> dict:
        signs = {state.name: state.signed for state in rule.states}
        out = {}
        for name, value in self.entry.items():
            one = isinstance(value, torch.Tensor) and not value.dim() and self.p.dim()  # a count
            kept = name == "step" or name in rule.memory or one or scale_format(name) is not None
            if not isinstance(value, torch.Tensor) or kept:
                if scale_format(name) is None:
                    out[name] = value
                continue
            form = st.stored_format(self.entry, name) if value.dtype == torch.uint8 and name in signs else None
            if form is None or not form.block:
                out[name] = self._part(name, value, self.p.shape)
            else:
                scale = st.scale_name(name, form)
                out[name], out[scale] = self._coded(name, form, signs[name])
        return out

    def _part(self, name: str, value: torch.Tensor, *shapes) -> torch.Tensor:
        if tuple(value.shape) not in map(tuple, shapes):
            raise ValueError(
                f"{self.what}: the loaded {name!r} has shape {tuple(value.shape)}, but it is {tuple(shapes[0])} for a "
                "parameter split like this one. Load a state dict of the same model, saved with the same dimensions split."
            )
        if not is_dtensor(value):
            return shard_of(self.p, value)
        if value.device_mesh != self.p.device_mesh:
            raise ValueError(
                f"{self.what}: the loaded {name!r} lies on another device mesh ({value.device_mesh}). Load it with "
                "torch.distributed.checkpoint, which reshards, or load the full state dict."
            )
        if value.placements != self.p.placements:
            value = value.redistribute(placements=self.p.placements)
        return local(value)

    def _coded(self, name: str, form: Format, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of the shard: bit for bit where its blocks are blocks of what was saved, else encoded anew."""
        codes, scales = self.entry[name], self.entry[st.scale_name(name, form)]
        size, whole, n = granule(self.p, form), scales_shape(self.p, form), self.p.numel()
        if scales.dim() == 1 and not is_dtensor(scales):  # of a whole tensor: its own blocks
            if scales.numel() != form.scale_count(n) or codes.numel() != form.stored_count(n):
                raise ValueError(
                    f"{self.what}: the loaded {form.name} state {name!r} has {codes.numel()} codes and {scales.numel()} scales, "
                    f"not {form.stored_count(n)} and {form.scale_count(n)}. Load a complete state dict."
                )
            first = torch.arange(prod(whole), device=scales.device) * size
            scales = scales[torch.div(first, form.block, rounding_mode="floor")].view(whole)
            codes = (unpacked(codes, n) if form.bits == 4 else codes).view(self.p.shape)
        half = (
            (*self.p.shape[:-1], self.p.shape[-1] // 2) if form.bits == 4 and packs_in_shape(self.p) else self.p.shape
        )
        mine = self._part(name, codes, half, self.p.shape)
        scales = self._part(st.scale_name(name, form), scales, whole).reshape(-1)
        return in_blocks(self.shard, mine, scales, size, form, signed)


def in_blocks(shard: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, size: int, form: Format, signed: bool):
    """Codes and scales as a step uses them, from scales one per `size` elements and codes that may lie one a byte.

    Bit for bit where all scales of each block agree, as those of the blocks that were saved do; else encoded anew.
    """
    n, flat_codes = shard.numel(), codes.reshape(-1)
    if form.bits == 4 and codes.shape == shard.shape:
        flat_codes = packed(flat_codes, form.zero_code(signed) & 15)
    if n:
        blocks, runs = form.scale_count(n), form.block // size
        padded = torch.cat([scales, scales[-1:].expand(blocks * runs - scales.numel())]).view(blocks, runs)
        if bool((padded == padded[:, :1]).all()):
            scales = padded[:, 0].contiguous()
        else:
            values = replace(form, block=size).decode(flat_codes, scales, signed, torch.float32, n)
            flat_codes, scales = form.encode(values, signed)
    return flat_codes.view(st.stored_shape(form, shard)), scales


def gathered(p: torch.Tensor, entry: dict, rule) -> dict:
    """An entry of a whole tensor, from one that may be a sharded tensor's, gathered (full_state_dict): one scale per block."""
    out = dict(entry)
    for state in rule.states:
        form = st.stored_format(entry, state.name) if isinstance(entry.get(state.name), torch.Tensor) else None
        scales = st.stored_scale(entry, state.name, form) if form is not None and form.block else None
        if (
            scales is None
            or scales.dim() < 2
            or not scales.numel()
            or p.numel() % scales.numel()
            or not p.is_contiguous()
        ):
            continue
        size = p.numel() // scales.numel()
        if form.block % size == 0 and entry[state.name].numel() in (p.numel(), form.stored_count(p.numel())):
            codes, scales = in_blocks(p, entry[state.name], scales.reshape(-1), size, form, state.signed)
            out[state.name], out[st.scale_name(state.name, form)] = codes, scales
    return out


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
        parts = as_dtensor(shard.view(self.mine), self.p, self.shape)
        whole.copy_(parts.full_tensor().view(self.matrix))

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
    if projection is not None and not projection.gathers:
        raise RuntimeError(
            f"{what} is a DTensor, and {type(projection).__name__} needs the whole tensor. Use a rule without projection or "
            "factors for sharded parameters (AdamW, Lion, SGD, LAMB, LARS, Muon), or DDP, which keeps them whole."
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


def split_groups(t) -> tuple:
    """The process groups whose members hold different parts of a tensor; none for a plain tensor. Replicas count once."""
    return tuple(t.device_mesh.get_group(i) for i, _ in sharded_dims(t)) if is_dtensor(t) else ()


def add_up(x: torch.Tensor, groups: tuple) -> torch.Tensor:
    """x summed over process groups, in place."""
    for group in groups:
        torch.distributed.all_reduce(x, group=group)
    return x


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
