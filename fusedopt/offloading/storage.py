"""Where offloaded states lie: segments of host memory or of a scratch file, and the layout of a parameter's state in one.

A segment holds the states of a chunk of parameters in one piece, so that it moves in one copy, one read or one write. The
tensors of `opt.state` are views of it; each has a storage of its own, as torch.save asks of tensors of different dtypes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
import threading
from typing import NamedTuple

import torch

from fusedopt.memory import flat

ALIGNMENT = 64  # bytes: what torch's allocator gives on a CPU, and more than any kernel asks for


def padded(nbytes: int, to: int = ALIGNMENT) -> int:
    return -(-nbytes // to) * to


class Place(NamedTuple):
    """Where a tensor lies in a segment; offset in bytes."""

    name: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor in a flat uint8 buffer that holds a copy of the segment."""
        part = buffer[self.offset : self.offset + self.numel * self.dtype.itemsize].view(self.dtype)
        return part.as_strided(self.shape, self.stride, part.storage_offset())


def lay_out(entry: dict, start: int) -> tuple[list[Place], int]:
    """Places for the tensors of a parameter's state except its step count, from an offset on, and the offset after them."""
    places = []
    for name, t in entry.items():
        if name != "step" and isinstance(t, torch.Tensor):
            places.append(Place(name, start, tuple(t.shape), t.stride(), t.dtype))
            start += padded(t.numel() * t.element_size())
    return places, start


def _memory(t: torch.Tensor) -> memoryview:
    """The bytes of a dense tensor in host memory."""
    return memoryview((ctypes.c_char * (t.numel() * t.element_size())).from_address(t.data_ptr())).cast("B")


def _tensor(buffer, place: Place) -> torch.Tensor:
    if not place.numel:
        return torch.empty_strided(place.shape, place.stride, dtype=place.dtype)
    whole = torch.frombuffer(buffer, dtype=place.dtype, count=place.numel, offset=place.offset)
    return whole.as_strided(place.shape, place.stride)


def release_freed_memory() -> None:
    """Gives freed memory back to the system. glibc before 2.38 hardly reuses aligned blocks of a few MB: without this, making
    the states of a model one after the other left as much behind as if all of them were in memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class MemorySegment:
    """A segment in host memory, pinned where a GPU copies from it."""

    def __init__(self, nbytes: int, pin: bool):
        self.bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pin)
        self._buffer = (ctypes.c_char * nbytes).from_address(self.bytes.data_ptr())
        self._buffer.owner = self.bytes  # views keep the buffer alive, and the buffer the memory

    def tensor(self, place: Place) -> torch.Tensor:
        return _tensor(self._buffer, place)

    def put(self, place: Place, values: torch.Tensor) -> None:
        place.view(self.bytes).copy_(values)


class FileSegment:
    """A segment of a scratch file. Its tensors map the file; `load` and `save` copy all of it by plain reads and writes."""

    def __init__(self, file: ScratchFile, offset: int, nbytes: int):
        self._file, self._offset, self.nbytes = file, offset, nbytes
        self._buffer = mmap.mmap(file.descriptor, max(nbytes, 1), offset=offset)

    def tensor(self, place: Place) -> torch.Tensor:
        return _tensor(self._buffer, place)

    def put(self, place: Place, values: torch.Tensor) -> None:
        if place.numel:
            self._file.write(_memory(flat(values)), self._offset + place.offset)

    def load(self, into: torch.Tensor) -> None:
        self._file.read(_memory(into[: self.nbytes]), self._offset)

    def save(self, source: torch.Tensor) -> None:
        self._file.write(_memory(source[: self.nbytes]), self._offset)


class ScratchFile:
    """A file without a name in a folder: the system removes it when nothing uses it any more, however the process ends.

    Room is reserved on the disk before a segment is used, so that a full disk is found out before a step and not in it.
    """

    def __init__(self, folder: str):
        self._file = tempfile.TemporaryFile(dir=folder, prefix="fusedopt-", buffering=0)
        self._end = 0
        self._lock = threading.Lock()  # where reads and writes share a position

    @property
    def descriptor(self) -> int:
        return self._file.fileno()

    def segment(self, nbytes: int) -> FileSegment:
        """A new segment. Raises OSError where the disk is full."""
        offset, room = self._end, padded(max(nbytes, 1), mmap.ALLOCATIONGRANULARITY)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.descriptor, offset, room)
        else:
            self._file.truncate(offset + room)
        self._end = offset + room
        return FileSegment(self, offset, nbytes)

    def read(self, into: memoryview, offset: int) -> None:
        done = 0
        while done < len(into):
            if hasattr(os, "preadv"):
                n = os.preadv(self.descriptor, [into[done:]], offset + done)
            else:
                with self._lock:
                    self._file.seek(offset + done)
                    n = self._file.readinto(into[done:])
            if not n:
                raise OSError(f"the state file ends at byte {offset + done}: somebody has truncated it")
            done += n

    def write(self, source: memoryview, offset: int) -> None:
        done = 0
        while done < len(source):
            if hasattr(os, "pwrite"):
                done += os.pwrite(self.descriptor, source[done:], offset + done)
            else:
                with self._lock:
                    self._file.seek(offset + done)
                    done += self._file.write(source[done:])
