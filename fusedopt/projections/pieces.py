"""A full-size step of one tensor in pieces: launches over ranges of it that exchange values through small scratch buffers.

Where an update is computed by torch operations and not by a rule alone (a factored or sparse second moment, a momentum
that is partly low-rank), they fill a scratch buffer for one range of elements and the ordinary launch of a rule goes over
that range, so that formats, precisions and random bits are those of any other step and no full-size buffer exists.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from fusedopt.abi import GRAIN_SIZE, Column, Phase, chunk_size
from fusedopt.backends import select
from fusedopt.backends.base import BucketKey, Item, Work
from fusedopt.formats import Format
from fusedopt.memory import flat
from fusedopt.precision import NEAREST, ParamPrecision
from fusedopt.rule import Rule

CPU_ELEMENTS, GPU_ELEMENTS = 1 << 18, 1 << 22  # of a piece at most: it stays in the caches


class Piece(NamedTuple):
    """Elements first to last, and the rows they lie in. Scratch buffers hold whole rows."""

    first: int
    last: int
    row: int
    stop: int


class Pieces:
    """The pieces of a matrix [rows, cols] and its scratch buffers (flat, as long as the longest piece)."""

    def __init__(self, shape: tuple[int, int], device: torch.device, backend: str, dtype: torch.dtype = torch.float32):
        self.dtype = dtype
        self.shape, self.device, self.backend = shape, device, select.get_backend(backend)
        rows, cols = shape
        n = rows * cols
        self.whole = backend == "reference"  # it steps whole tensors, and is not meant to save memory
        size = n if self.whole else self._size(n, cols)
        starts = range(0, n, size) if n else ()
        self.pieces = [Piece(a, min(a + size, n), a // cols, -(-min(a + size, n) // cols)) for a in starts]
        self.room = max(((p.stop - p.row) * cols for p in self.pieces), default=0)

    def _size(self, n: int, cols: int) -> int:
        """Elements of a piece: whole chunks, whole rows where that is possible, at most 2 % of a large tensor."""
        most = min(CPU_ELEMENTS if self.device.type == "cpu" else GPU_ELEMENTS, max(8 * GRAIN_SIZE, n // 50))
        both = math.lcm(GRAIN_SIZE, cols)
        unit = both if both <= most else GRAIN_SIZE
        return max(unit, most // unit * unit)

    def scratch(self) -> torch.Tensor:
        return torch.empty(self.room, dtype=self.dtype, device=self.device)

    def rows_of(self, piece: Piece, scratch: torch.Tensor) -> torch.Tensor:
        """The part of a scratch buffer that holds a piece's rows, [stop - row, cols]."""
        count = piece.stop - piece.row
        return scratch[: count * self.shape[1]].view(count, self.shape[1])

    def part_of(self, piece: Piece, scratch: torch.Tensor) -> torch.Tensor:
        """The part that holds a piece's elements, flat."""
        skipped = piece.first - piece.row * self.shape[1]
        return scratch[skipped : skipped + piece.last - piece.first]


class PieceLaunch:
    """The launch of one rule over single pieces.

    target and states may be scratch buffers of the pieces; target None is the parameter in its precision. Gradients are
    given to `run`: the tensor's own, or a scratch buffer.
    """

    def __init__(self, pieces: Pieces, slot, scalars, row: int, rule: Rule, phase: Phase, *,
                 target: torch.Tensor | None = None, states: list[tuple[torch.Tensor, torch.Tensor | None, Format]] = (),
                 grad_dtype: torch.dtype = torch.float32):  # fmt: skip
        self.pieces, self.slot, self.scalars = pieces, slot, scalars
        self.target = slot.work_param if target is None else target
        self.companion = slot.companion if target is None else None
        precision: ParamPrecision = slot.precision if target is None else NEAREST
        formats = tuple(form for *_, form in states)
        self.states = tuple(t for t, *_ in states)
        self.scales = tuple(s for _, s, _ in states)
        addresses = [self.address(t, p) for p in pieces.pieces for t in (self.target, *self.states)]
        addresses += [t.data_ptr() for t in (self.companion,) if t is not None]
        self.row, self.native = row, pieces.backend.name != "reference"
        self.aligned = all(a % 16 == 0 for a in addresses)
        key = BucketKey(pieces.device, pieces.backend.name, rule.name, self.target.dtype, grad_dtype,
                        tuple(f.name for f in formats), precision.name, self.aligned)  # fmt: skip
        count, n = len(pieces.pieces), pieces.shape[0] * pieces.shape[1]
        item = Item(self.target, None, self.states, self.scales, slot.tensor_id, row, self.companion)
        longest = max((p.last - p.first for p in pieces.pieces), default=0)
        chunk = chunk_size(longest, pieces.backend.units(pieces.device))
        while any(p.first % chunk for p in pieces.pieces):
            chunk -= GRAIN_SIZE
        self.table = self._table(n, count) if self.native else torch.empty(0, dtype=torch.int64)
        chunks = []
        for i, p in enumerate(pieces.pieces):
            chunks.append(torch.arange(p.first // chunk, -(-p.last // chunk)) + (i << 32))
        self.chunks = [c.to(pieces.device) for c in chunks]
        base = Work(key, rule, formats, precision, [item] * count, self.table, self.chunks[0] if chunks else self.table,
                    scalars.table, [], chunk, 0, phase=phase)  # fmt: skip
        self.works = [replace(base, chunks=c, cache={}) for c in self.chunks]
        self.grad: int | None = None

    def address(self, t: torch.Tensor, piece: Piece) -> int:
        """Where element 0 of the tensor would lie: a scratch buffer holds a piece's rows only."""
        if t.numel() == self.pieces.room and len(self.pieces.pieces) > 1:
            return t.data_ptr() - piece.row * self.pieces.shape[1] * t.element_size()
        return t.data_ptr()

    def _table(self, n: int, count: int) -> torch.Tensor:
        table = torch.zeros(Column.COUNT, count, dtype=torch.int64)
        for i, piece in enumerate(self.pieces.pieces):
            table[Column.PARAM, i] = self.address(self.target, piece)
            for k, (state, scale) in enumerate(zip(self.states, self.scales, strict=True)):
                table[Column.STATE + k, i] = self.address(state, piece)
                table[Column.SCALE + k, i] = 0 if scale is None else scale.data_ptr()
        table[Column.NUMEL] = n
        table[Column.META] = self.slot.tensor_id << 32 | self.row
        table[Column.COMPANION] = 0 if self.companion is None else self.companion.data_ptr()
        return table.to(self.pieces.device)

    def use(self, grad: torch.Tensor, grad_scale, clip, found_inf) -> None:
        """Called once a step: where the gradients lie, and what they are multiplied by."""
        for work in self.works:
            work.numbers, work.grad_scale, work.clip, work.found_inf = self.scalars.numbers, grad_scale, clip, found_inf
        if not self.native:
            self._items(grad)
        elif grad.data_ptr() != self.grad:
            self.grad = grad.data_ptr()
            addresses = [self.address(grad, piece) for piece in self.pieces.pieces]
            if len(set(addresses)) == 1:
                self.table[Column.GRAD].fill_(addresses[0])
            else:
                self.table[Column.GRAD].copy_(torch.tensor(addresses, dtype=torch.int64))
            aligned = self.aligned and all(a % 16 == 0 for a in addresses)
            for work in self.works:
                work.key, work.cache = work.key._replace(aligned=aligned), {}

    def _items(self, grad: torch.Tensor) -> None:
        for work in self.works:
            work.items = [work.items[0]._replace(grad=flat(grad))]

    def run(self, index: int) -> None:
        self.pieces.backend.launch(self.works[index])
