"""A full-size step of one tensor in pieces: launches over ranges of it that exchange values through small scratch buffers.

Where an update is computed by torch operations and not by a rule alone (a factored or sparse second moment, a momentum
that is partly low-rank), they fill a scratch buffer for one range of elements and the ordinary launch of a rule goes over
that range, so that formats, precisions and random bits are those of any other step and no full-size buffer exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from fusedopt.abi import GRAIN_SIZE, Column, Phase, chunk_size
from fusedopt.backends import select
from fusedopt.backends.base import BucketKey, Item, Work
from fusedopt.formats import FP32, Format
from fusedopt.memory import flat
from fusedopt.precision import NEAREST, ParamPrecision
from fusedopt.projections import base
from fusedopt.rule import Rule

CPU_ELEMENTS, GPU_ELEMENTS = 1 << 18, 1 << 22  # of a piece at most: it stays in the caches
GPU_LEAST = 1 << 20  # of a piece where there are as many: each costs several launches
SHARE = 150  # a piece is at most this part of the largest tensor: three buffers of it stay below 4 % of a bf16 tensor
PAD = 8  # elements that a scratch buffer is longer than a piece, so that its rows can lie as the tensor's do


class Piece(NamedTuple):
    """Elements first to last, and the rows they lie in. Scratch buffers hold whole rows."""

    first: int
    last: int
    row: int
    stop: int


class Scratch(NamedTuple):
    """A buffer that holds the rows of one piece at a time."""

    buffer: torch.Tensor


class Pieces:
    """The pieces of a matrix [rows, cols]; `room` is the length of a scratch buffer for them, dtype its elements'.

    largest: elements of the largest tensor that shares the scratch buffers. whole_rows: pieces hold whole rows even where
    these are long (odd numbers of columns: a piece starts at a whole chunk).
    """

    def __init__(self, shape: tuple[int, int], device: torch.device, backend: str, *, dtype: torch.dtype = torch.float32,
                 largest: int = 0, whole_rows: bool = False):  # fmt: skip
        self.shape, self.device, self.backend, self.dtype = shape, device, select.get_backend(backend), dtype
        rows, cols = shape
        n = rows * cols
        self.whole = backend == "reference"  # it steps whole tensors, and is not meant to save memory
        size = n if self.whole or not n else self._size(n, cols, max(n, largest), whole_rows)
        starts = range(0, n, size) if n else ()
        self.pieces = [Piece(a, min(a + size, n), a // cols, -(-min(a + size, n) // cols)) for a in starts]
        self.room = max(((p.stop - p.row) * cols for p in self.pieces), default=0) + PAD

    def _size(self, n: int, cols: int, largest: int, whole_rows: bool) -> int:
        """Elements of a piece: whole chunks, whole rows where that is possible."""
        if self.device.type == "cpu":
            most = min(CPU_ELEMENTS, max(8 * GRAIN_SIZE, largest // SHARE))
        else:
            most = min(GPU_ELEMENTS, max(GPU_LEAST, largest // SHARE))
        both = math.lcm(GRAIN_SIZE, cols)
        unit = both if both <= most or whole_rows else GRAIN_SIZE
        return max(unit, most // unit * unit)

    def _start(self, piece: Piece) -> int:
        """Where a piece's rows begin in a scratch buffer: aligned to 16 bytes exactly where the tensor's are."""
        return piece.row * self.shape[1] % PAD

    def scratch(self, steps, index: int = 0) -> Scratch:
        """Scratch buffer `index` of the device."""
        return Scratch(steps.scratch(index, self.room, self.dtype))

    def rows_of(self, piece: Piece, scratch: Scratch) -> torch.Tensor:
        """The part of a scratch buffer that holds a piece's rows, [stop - row, cols]."""
        count, start = piece.stop - piece.row, self._start(piece)
        return scratch.buffer[start : start + count * self.shape[1]].view(count, self.shape[1])

    def part_of(self, piece: Piece, scratch: Scratch) -> torch.Tensor:
        """The part that holds a piece's elements, flat."""
        start = self._start(piece) + piece.first - piece.row * self.shape[1]
        return scratch.buffer[start : start + piece.last - piece.first]

    def address(self, t: torch.Tensor | Scratch, piece: Piece) -> int:
        """Where element 0 of the tensor lies; of a scratch buffer: would lie, if it held the rows before the piece's too."""
        if isinstance(t, Scratch):
            skipped = self._start(piece) - piece.row * self.shape[1]
            return t.buffer.data_ptr() + skipped * t.buffer.element_size()
        return t.data_ptr()

    def whole_tensor(self, t: torch.Tensor | Scratch) -> torch.Tensor:
        """What the reference backend takes, which steps all elements at once."""
        return t.buffer[: self.shape[0] * self.shape[1]] if isinstance(t, Scratch) else flat(t)


class PieceLaunch:
    """The launch of one rule over single pieces: `use` once a step, then `run` for each piece.

    target: a scratch buffer or a full-size tensor; None is the parameter in its precision. states: for each state of the
    rule what holds it, its scales and its format; a scratch buffer is (scratch, None, FP32).
    scalars, row: a table and a row of it, with `.numbers` in double precision (ScalarTable).
    """

    def __init__(self, pieces: Pieces, slot, scalars, row: int, rule: Rule, phase: Phase, *,
                 target: torch.Tensor | Scratch | None = None,
                 states: Sequence[tuple[torch.Tensor | Scratch, torch.Tensor | None, Format]] = (),
                 grad_dtype: torch.dtype = torch.float32):  # fmt: skip
        self.pieces, self.slot, self.scalars, self.row = pieces, slot, scalars, row
        self.target = slot.work_param if target is None else target
        self.companion = slot.companion if target is None else None
        precision: ParamPrecision = slot.precision if target is None else NEAREST
        formats = tuple(form for *_, form in states)
        self.states = tuple(t for t, *_ in states)
        self.scales = tuple(s for _, s, _ in states)
        self.native = pieces.backend.name != "reference"
        addresses = [pieces.address(t, p) for p in pieces.pieces for t in (self.target, *self.states)]
        addresses += [t.data_ptr() for t in (self.companion,) if t is not None]
        self.aligned = all(a % 16 == 0 for a in addresses)
        target_dtype = (self.target.buffer if isinstance(self.target, Scratch) else self.target).dtype
        key = BucketKey(pieces.device, pieces.backend.name, rule.name, target_dtype, grad_dtype,
                        tuple(f.name for f in formats), precision.name, self.aligned)  # fmt: skip
        count, n = len(pieces.pieces), pieces.shape[0] * pieces.shape[1]
        companion = None if self.companion is None else flat(self.companion)
        whole = [pieces.whole_tensor(t) for t in (self.target, *self.states)]
        item = Item(whole[0], None, tuple(whole[1:]), self.scales, slot.stream, row, companion)
        longest = max((p.last - p.first for p in pieces.pieces), default=0)
        chunk = chunk_size(longest, pieces.backend.units(pieces.device))
        while any(p.first % chunk for p in pieces.pieces):
            chunk -= GRAIN_SIZE
        self.table = self._table(n, count) if self.native else torch.empty(0, dtype=torch.int64)
        chunks = [torch.arange(p.first // chunk, -(-p.last // chunk)) + (i << 32) for i, p in enumerate(pieces.pieces)]
        whole_work = Work(key, rule, formats, precision, [item] * count, self.table, self.table, scalars.table, [], chunk, 0,
                    phase=phase)  # fmt: skip
        self.works = [replace(whole_work, chunks=c.to(pieces.device), cache={}) for c in chunks]
        self.grad: list[int] | None = None

    def _table(self, n: int, count: int) -> torch.Tensor:
        table, address = torch.zeros(Column.COUNT, count, dtype=torch.int64), self.pieces.address
        for i, piece in enumerate(self.pieces.pieces):
            table[Column.PARAM, i] = address(self.target, piece)
            for k, (state, scale) in enumerate(zip(self.states, self.scales, strict=True)):
                table[Column.STATE + k, i] = address(state, piece)
                table[Column.SCALE + k, i] = 0 if scale is None else scale.data_ptr()
        table[Column.NUMEL] = n
        table[Column.META] = self.slot.stream << 32 | self.row
        table[Column.COMPANION] = 0 if self.companion is None else self.companion.data_ptr()
        return table.to(self.pieces.device)

    def use(self, grad: torch.Tensor | Scratch, grad_scale, clip, found_inf) -> None:
        """Called once a step: where the gradients lie, what they are multiplied by, and whether anything is written."""
        for work in self.works:
            work.numbers, work.grad_scale, work.clip, work.found_inf = self.scalars.numbers, grad_scale, clip, found_inf
            if not self.native:
                work.items = [work.items[0]._replace(grad=self.pieces.whole_tensor(grad))]
        addresses = [self.pieces.address(grad, piece) for piece in self.pieces.pieces]
        if not self.native or addresses == self.grad:
            return
        self.grad = addresses
        if len(set(addresses)) == 1:
            self.table[Column.GRAD].fill_(addresses[0])
        else:
            self.table[Column.GRAD].copy_(torch.tensor(addresses, dtype=torch.int64))
        aligned = self.aligned and all(a % 16 == 0 for a in addresses)
        for work in self.works:
            work.key, work.cache = work.key._replace(aligned=aligned), {}

    def run(self, index: int) -> None:
        self.pieces.backend.launch(self.works[index])


def pieces_of(site, slot, steps, shape: tuple[int, int], dtype: torch.dtype, whole_rows: bool = False) -> Pieces:
    """Pieces for a site, which notes their room: to be called in `bind`, before the first scratch buffer is made."""
    pieces = Pieces(
        shape, slot.param.device, slot.key.backend, dtype=dtype, largest=steps.largest(), whole_rows=whole_rows
    )
    site.room = max(site.room, pieces.room)
    return pieces


class FullSite(base.Site):
    """A site that steps its parameter at full size by itself: no low-rank gradient, no launch with other parameters."""

    launched = False
    gradient_reads = 1  # times that a step reads the gradient

    def __init__(self, projection, p, entry, grad_dtype, tensor_id, group, place):
        self.projection, self.entry, self.tensor_id, self.place = projection, entry, tensor_id, place
        self.seed = group["seed"]
        self.shape = self.shape_of(p)
        self.dtype = torch.float64 if torch.float64 in (p.dtype, grad_dtype) else torch.float32  # of the arithmetic
        self.projected = torch.empty(0, dtype=grad_dtype, device=p.device)  # says which gradients a backend must take
        self.update = torch.empty(0, dtype=p.dtype, device=p.device)

    def shape_of(self, p: torch.Tensor) -> tuple[int, int]:
        return base.matrix_shape(p)

    def pieces_of(self, slot, steps, shape: tuple[int, int], whole_rows: bool = False) -> Pieces:
        return pieces_of(self, slot, steps, shape, self.dtype, whole_rows)

    def stored(self, slot, name: str) -> tuple[torch.Tensor, torch.Tensor | None, Format]:
        """A state as a PieceLaunch takes it."""
        index = slot.rule.state_names.index(name)
        return slot.state_tensors[index], slot.scale_tensors[index], slot.formats[index]

    def operations(self, slot) -> list[base.Operation]:
        """All of it, in pieces whose scratch buffers stay in the caches: what is kept is read and written, a projector read."""
        apart = ("step", "projector", slot.precision.companion)
        kept = [t for name, t in self.entry.items() if name not in apart]
        moved = slot.param.numel() * slot.grad_dtype.itemsize * self.gradient_reads + 2 * base.nbytes(*kept)
        moved += base.nbytes(self.entry.get("projector")) + sum(base.weight_bytes(slot))
        return [base.Operation("step in pieces", moved)]

    def before(self, grad, step, slot, steps) -> None:
        """Everything happens after the launches of directions."""


def in_scratch(scratch: Scratch) -> tuple[Scratch, None, Format]:
    """A state of a rule that is a scratch buffer."""
    return scratch, None, FP32


def skipping(found: torch.Tensor | None, new: torch.Tensor, old: torch.Tensor) -> None:
    """old <- new, unless found_inf says that nothing may be written."""
    old.copy_(new if found is None else torch.where(found.view(()) != 0, old, new))
