"""The Python half of csrc/fusedopt.h: codes, table columns, scalar rows and the packed Launch that native drivers take."""

from __future__ import annotations

import struct
from enum import IntEnum

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMAT_SIGNED = 0x100


class Phase(IntEnum):
    """FUSED: the whole step. PROBE: the step with stores disabled, summing |p|^2 and |u|^2 per tensor. APPLY: FUSED with
    the update scaled by the trust ratio of those sums. NORM: |p|^2, |g|^2 per tensor and the global gradient norm.
    DIRECTION: the update u is stored in place of the parameter, which is not read (it counts as 0): no lr, no decay."""

    FUSED = 0
    PROBE = 1
    APPLY = 2
    NORM = 3
    DIRECTION = 4


class Column(IntEnum):
    """Columns of the row table, int64, one row a tensor, stored column by column: table[column * rows + row]."""

    GRAD = 0
    PARAM = 1
    STATE = 2  # + index of the state
    SCALE = 6  # + index of the state
    NUMEL = 10
    META = 11  # tensor id << 32 | scalar row
    GRAIN = 12  # first entry of the tensor in the partial sums
    COMPANION = 13
    FIRST_OCTET = (
        14  # where a row's random bits begin, in octets of elements: of a shard, those before it in its tensor
    )
    COUNT = 15


MAX_STATES = 4
RAISED = 0x200  # in a format word of a Triton kernel: see kernels/states.py
GRAIN_SIZE = 2048
SCALAR_STRIDE = 32
SCALAR_HEAD = 8

# struct Launch, field by field
_POINTERS = "table chunks scalars grad_scale found_inf clip partials sums totals norm counters".split()
_COUNTS = "rows n_chunks chunk grains".split()
_INTS = (
    "rule phase param_dtype grad_dtype precision format0 format1 format2 format3 "
    "aligned total_index total_count threads isa bytes"
).split()
_LAUNCH = struct.Struct(f"={len(_POINTERS)}Q{len(_COUNTS)}qf{len(_INTS)}i")
LAUNCH_BYTES = _LAUNCH.size
LAUNCH_FIELDS = (*_POINTERS, *_COUNTS, "max_norm", *_INTS)


def pack_launch(fields: dict) -> bytes:
    """The bytes of one Launch; missing fields are 0 (null)."""
    unknown = fields.keys() - set(LAUNCH_FIELDS)
    if unknown:
        raise TypeError(f"no such Launch fields: {sorted(unknown)}")
    values = [fields.get(name, 0) for name in LAUNCH_FIELDS[:-1]]
    return _LAUNCH.pack(*values, LAUNCH_BYTES)


_HEAD = struct.Struct("=4f4I")


def pack_scalar_row(buffer, row: int, head: tuple, seed: int, step: int, scalars) -> None:
    """Writes one scalar row into a writable buffer: (lr, decay, l2, grad_sign), seed, step, then the rule's scalars."""
    offset = row * SCALAR_STRIDE * 4
    _HEAD.pack_into(buffer, offset, *head, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, step & 0xFFFFFFFF, 0)
    if scalars:
        struct.pack_into(f"={len(scalars)}f", buffer, offset + SCALAR_HEAD * 4, *scalars)


def chunk_size(total: int, units: int) -> int:
    """Elements per chunk: 2K to 16K, a multiple of GRAIN_SIZE, so that each of `units` (SMs or threads) gets at least 4."""
    size = total // (4 * units) // GRAIN_SIZE * GRAIN_SIZE
    return max(GRAIN_SIZE, min(8 * GRAIN_SIZE, size))


def chunk_table(numels, size: int) -> torch.Tensor:
    """int64 [chunks]: row << 32 | index of the chunk in its row. Empty rows have none."""
    parts = [torch.arange((n + size - 1) // size) + (row << 32) for row, n in enumerate(numels)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
