"""Conversion of saved state dicts and checkpoints, tensor by tensor from one mapped file into another.

The result is laid out on disk first (torch.save without data), then mapped and written in place: what is in memory at a
time is a chunk, not a state dict.
"""

from __future__ import annotations

import copy
import errno
import importlib
import mmap
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from fusedopt.conversion import Conversion, Summary

PIECE = 2**24  # bytes copied at a time


def load(path: str | Path) -> dict:
    """A file of torch.save, mapped (read whole where it is in the old format without a zip archive). ValueError says why not."""
    mapped = True
    while True:
        try:
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        except RuntimeError as error:
            if not mapped or "mmap" not in str(error):
                raise ValueError(f"{path} is not a file of torch.save: {_first_line(error)}") from None
            mapped = False
        except (pickle.UnpicklingError, EOFError) as error:
            if "torchao" in str(error) and "torchao.optim" not in sys.modules and _has_torchao():
                continue
            raise ValueError(
                f"{path} is not a file of torch.save, or holds more than tensors, numbers and containers: "
                f"{_first_line(error)} Load it yourself, and pass its state dict to fusedopt.checkpoint.convert."
            ) from None


def _first_line(error: Exception) -> str:
    """The cause: torch's advice around it is for other cases."""
    text = str(error)
    cause = text.split("WeightsUnpickler error:")[-1].strip()
    return cause.split(". ")[0].splitlines()[0] + "." if cause else type(error).__name__


def _has_torchao() -> bool:
    """Makes torchao's state classes known to torch.load."""
    try:
        importlib.import_module("torchao.optim")
    except ImportError:
        return False
    return True


def _is_state_dict(value) -> bool:
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()


def find_key(checkpoint, key: str | None) -> list[str]:
    """Where in a checkpoint the optimizer's state dict is: the parts of `key` ("a.b"), or found at its top. ValueError else."""
    if key is None:
        if _is_state_dict(checkpoint):
            return []
        entries = checkpoint.items() if isinstance(checkpoint, Mapping) else ()
        found = [name for name, value in entries if _is_state_dict(value)]
        if len(found) == 1:
            return found
        there = f"several: {', '.join(map(str, found))}" if found else f"none among {_keys(checkpoint)}"
        raise ValueError(
            f"which entry is the optimizer's state dict? There is {there}. Name it with key= (--key, nested as a.b)."
        )
    path, value = [], checkpoint
    rest = key
    while rest:
        # A name may have dots itself: the longest that is there wins.
        parts = rest.split(".")
        ways = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
        name = next((w for w in ways if isinstance(value, Mapping) and w in value), None)
        if name is None:
            raise ValueError(f"there is no {key!r} in the file: no {rest!r} among {_keys(value)}")
        path.append(name)
        value, rest = value[name], rest[len(name) + 1 :]
    if not _is_state_dict(value):
        raise ValueError(f"{key!r} is not an optimizer's state dict; it holds {_keys(value)}")
    return path


def _keys(value) -> str:
    return ", ".join(map(str, list(value)[:12])) if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _replaced(checkpoint, path: list[str], value):
    """The checkpoint with another value under a path; all else is shared."""
    if not path:
        return value
    out = copy.copy(checkpoint)
    out[path[0]] = _replaced(checkpoint[path[0]], path[1:], value)
    return out


def _pairs(a, b) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The tensors at the same places of two structures that torch.save and torch.load leave equal."""
    if isinstance(a, torch.Tensor):
        yield a, b
    elif isinstance(a, Mapping):
        for key in a:
            yield from _pairs(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            yield from _pairs(x, y)


def _bytes(t: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def _store(layout, path: str, fill: Callable[[Callable], None], kept: Callable[[torch.Tensor], bool]) -> None:
    """Writes a structure of CPU tensors. fill(place): writes the tensors place(t) for all t that are not kept as they are."""
    with torch.serialization.skip_data():
        torch.save(layout, path)
    with open(path, "r+b") as file:
        # Space that is missing is an error here, and not a fault in the middle of writing.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    with zipfile.ZipFile(path) as archive:
        records = [r for r in archive.infolist() if "/data/" in r.filename and r.file_size]
    _write(layout, path, fill, kept, len(records))
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _write(layout, path: str, fill: Callable[[Callable], None], kept: Callable, records: int) -> None:
    """Maps a file that was laid out and writes what it lacks. records: its storages that are not empty."""
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        mapped = torch.load(path, mmap=True, weights_only=True)
    places, storages = {}, set()
    for source, target in _pairs(layout, mapped):
        places[id(source)] = target
        storage = target.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            if kept(source):
                _copy(_bytes(source), _bytes(target))
    if len(storages) != records:
        raise ValueError(
            "the checkpoint holds tensors inside objects that cannot be copied. Convert its state dict alone."
        )
    fill(lambda t: places[id(t)])


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    for begin in range(0, source.numel(), PIECE):
        target[begin : begin + PIECE].copy_(source[begin : begin + PIECE])


def convert_file(
    source: str | Path,
    target: str | Path,
    state_format: str | dict[str, str],
    *,
    key: str | None = None,
    min_quantized_numel: int = 4096,
    optimizer: str | None = None,
    to: str = "native",
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Converts a saved state dict, or a checkpoint that holds one under `key`; all else in it is copied.

    Memory beside the mapped files stays at some tens of megabytes. The target appears under its name when it is whole.

    Args: see `convert`; to: "native", "torch" or "bitsandbytes".
    Raises:
        ValueError: the file cannot be read or converted. OSError: it cannot be written, or there is no space for it.
    """
    source, target = Path(source), Path(target)
    if target.resolve() == source.resolve() or target.exists() and os.path.samefile(source, target):
        raise ValueError(f"{target} is the file to convert. Name another one for the result.")
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(target.parent))
    checkpoint = load(source)
    path = find_key(checkpoint, key)
    state_dict = checkpoint
    for name in path:
        state_dict = state_dict[name]
    conversion = Conversion(state_dict, state_format, min_quantized_numel, optimizer, to)
    pending = conversion.pending()
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        _store(
            _replaced(checkpoint, path, conversion.layout),
            str(part),
            lambda place: conversion.fill(place, progress),
            lambda t: id(t) not in pending,
        )
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return conversion.summary
