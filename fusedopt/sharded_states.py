"""States of DTensor parameters: `LocalEntry`, a parameter's state dict as the step sees it; the forms that any number of
processes can load, and their loading."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import replace
from math import gcd, prod

import torch

from fusedopt import states as st
from fusedopt.distributed import as_dtensor, is_dtensor, local, shard_of, sharded_dims
from fusedopt.formats import Format

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
    DTensor in the dict behind it (`stored`), split like the parameter, or like the DTensor under its name in `likes`.

    Scales of blocks that are no whole part of a row of the tensor lie in `stored` as they are, a plain tensor of this
    process; `portable` makes them DTensors.
    """

    def __init__(self, p, stored: dict, likes: dict | None = None):
        self.p, self.stored, self.likes = p, stored, likes or {}

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
        like = self.likes.get(name, self.p)
        shard, form = local(like), scale_format(name)
        if form is not None:
            if granule(like, form) < form.block:
                return value
            whole = scales_shape(like, form)
            return as_dtensor(value.view(*shard.shape[: len(whole) - 1], whole[-1]), like, whole)
        if value.shape == shard.shape and not (value.dtype == torch.uint8 and value.numel() == 1):
            return as_dtensor(value, like, like.shape, like.stride())  # one code fills a byte in every format
        if value.dim() == like.dim() and packs_in_shape(like):
            return as_dtensor(value, like, (*like.shape[:-1], like.shape[-1] // 2))
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


def portable(p, stored: dict, likes: dict) -> dict:
    """A DTensor's state dict with every tensor a DTensor that any number of processes can load. likes: see LocalEntry.

    Most already are, and stay the live ones. Scales become one per granule, packed codes that cannot be split one a byte. A
    small tensor that every process has whole (the noise of a layer) stays one.
    """
    if all(is_dtensor(v) or not isinstance(v, torch.Tensor) or not v.dim() for v in stored.values()):
        return stored
    out = {}
    for name, value in stored.items():
        like, form = likes.get(name, p), scale_format(name)
        shard = local(like)
        if is_dtensor(value) or not isinstance(value, torch.Tensor) or not value.dim():
            out[name] = value
        elif form is not None:
            whole, size = scales_shape(like, form), granule(like, form)
            first = torch.arange(shard.numel() // size, device=value.device) * size
            scales = value[torch.div(first, form.block, rounding_mode="floor")]
            out[name] = as_dtensor(scales.view(*shard.shape[: len(whole) - 1], whole[-1]), like, whole)
        elif value.dtype == torch.uint8 and st.stored_format(stored, name).bits == 4:
            out[name] = as_dtensor(unpacked(value, shard.numel()).view(shard.shape), like, like.shape)
        elif value.shape == shard.shape:
            out[name] = as_dtensor(value, like, like.shape)
        else:
            out[name] = value
    return out


class Loader:
    """Turns a loaded entry of a DTensor parameter into its shard's: codes, scales one per block of the shard.

    Loaded tensors are DTensors on the parameter's mesh, or plain ones of the whole parameter, the same on every process.
    likes: see LocalEntry. kept: names of tensors that every process has whole, unless they are in `likes`.
    Raises ValueError where a shape or a mesh does not fit.
    """

    def __init__(self, what: str, p, entry: dict, likes: dict, kept=()):
        self.what, self.p, self.entry, self.likes = what, p, entry, likes
        self.whole = {name for name in kept if name not in likes}

    def load(self, rule) -> dict:
        signs = {state.name: state.signed for state in rule.states}
        out = {}
        for name, value in self.entry.items():
            one = isinstance(value, torch.Tensor) and not value.dim() and self.p.dim()  # a count
            kept = name == "step" or name in rule.memory or name in self.whole or one
            if not isinstance(value, torch.Tensor) or kept or scale_format(name) is not None:
                if scale_format(name) is None:
                    out[name] = value
                continue
            form = st.stored_format(self.entry, name) if value.dtype == torch.uint8 and name in signs else None
            if form is None or not form.block:
                like = self.likes.get(name, self.p)
                out[name] = self._part(name, value, like, like.shape)
            else:
                scale = st.scale_name(name, form)
                out[name], out[scale] = self._coded(name, form, signs[name])
        return out

    def _part(self, name: str, value: torch.Tensor, like, *shapes) -> torch.Tensor:
        if tuple(value.shape) not in map(tuple, shapes):
            raise ValueError(
                f"{self.what}: the loaded {name!r} has shape {tuple(value.shape)}, but it is {tuple(shapes[0])} for a "
                "parameter split like this one. Load a state dict of the same model, saved with the same dimensions split."
            )
        if not is_dtensor(value):
            return shard_of(like, value)
        if value.device_mesh != like.device_mesh:
            raise ValueError(
                f"{self.what}: the loaded {name!r} lies on another device mesh ({value.device_mesh}). Load it with "
                "torch.distributed.checkpoint, which reshards, or load the full state dict."
            )
        if value.placements != like.placements:
            value = value.redistribute(placements=like.placements)
        return local(value)

    def _coded(self, name: str, form: Format, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of the shard: bit for bit where its blocks are blocks of what was saved, else encoded anew."""
        codes, scales, like = self.entry[name], self.entry[st.scale_name(name, form)], self.likes.get(name, self.p)
        size, whole, n = granule(like, form), scales_shape(like, form), like.numel()
        if scales.dim() == 1 and not is_dtensor(scales):  # of a whole tensor: its own blocks
            if scales.numel() != form.scale_count(n) or codes.numel() != form.stored_count(n):
                raise ValueError(
                    f"{self.what}: the loaded {form.name} state {name!r} has {codes.numel()} codes and {scales.numel()} scales, "
                    f"not {form.stored_count(n)} and {form.scale_count(n)}. Load a complete state dict."
                )
            first = torch.arange(prod(whole), device=scales.device) * size
            scales = scales[torch.div(first, form.block, rounding_mode="floor")].view(whole)
            codes = (unpacked(codes, n) if form.bits == 4 else codes).view(like.shape)
        packs = form.bits == 4 and packs_in_shape(like)
        half = (*like.shape[:-1], like.shape[-1] // 2) if packs else like.shape
        mine = self._part(name, codes, like, half, like.shape)
        scales = self._part(st.scale_name(name, form), scales, like, whole).reshape(-1)
        return in_blocks(local(like), mine, scales, size, form, signed)


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


def gathered(likes: list[torch.Tensor], entry: dict, rule) -> dict:
    """An entry of a whole tensor, from one that may be a sharded tensor's, gathered (full_state_dict): one scale per block.
    likes: for each state of the rule a tensor of its shape and layout."""
    out = dict(entry)
    for state, like in zip(rule.states, likes, strict=True):
        form = st.stored_format(entry, state.name) if isinstance(entry.get(state.name), torch.Tensor) else None
        scales = st.stored_scale(entry, state.name, form) if form is not None and form.block else None
        if scales is None or scales.dim() < 2 or not scales.numel() or not like.is_contiguous():
            continue
        n, size = like.numel(), like.numel() // scales.numel()
        whole = n == size * scales.numel() and entry[state.name].numel() in (n, form.stored_count(n))
        if whole and form.block % size == 0:
            codes, scales = in_blocks(like, entry[state.name], scales.reshape(-1), size, form, state.signed)
            out[state.name], out[st.scale_name(state.name, form)] = codes, scales
    return out
