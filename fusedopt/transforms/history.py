"""A window of gradients of one tensor in any state format, for M-FAC (arXiv 2107.03356): replaced row by row, and passed over as
it is stored. Kernels decode in registers, or in the first-level cache; torch a piece at a time; all in double precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fusedopt.formats import Format
from fusedopt.quantize import dequantize_blockwise, quantize_blockwise

PIECE = 256  # elements: a row ends with whole blocks of every format
TILE = 2048  # of the kernels
DEPTH = 64  # rows of a program that multiplies: its own row is decoded once for all of them
PROGRAMS = 2048  # enough to fill a GPU, between which the rows of a small tensor are divided
# elements in double precision at a time: few launches on a GPU; on the CPU what fits in a cache (one core at 2^16 and 2^20
# took twice as long as at 2^18)
CHUNK, CPU_CHUNK = 1 << 24, 1 << 18


@dataclass
class Rows:
    """[window, numel] values; of blockwise formats rows are padded to whole blocks, with scales [window, blocks]."""

    stored: torch.Tensor
    scale: torch.Tensor | None
    form: Format
    numel: int

    def put(self, place: torch.Tensor, g: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        """Replaces a row by a gradient, None for zeros, unless the step is skipped. place: int64 [1]."""
        place = place.to(self.stored.device)
        if self.scale is None:
            new = torch.zeros_like(self.stored[0]) if g is None else g.reshape(-1).to(self.stored.dtype)
            self._set(self.stored, place, new, skip)
        elif g is None:
            self._set(self.scale, place, torch.zeros_like(self.scale[0]), skip)
        else:
            padded = torch.nn.functional.pad(g.reshape(-1), (0, -self.numel % PIECE))
            for target, new in zip((self.stored, self.scale), quantize_blockwise(padded, self.form), strict=True):
                self._set(target, place, new, skip)

    @staticmethod
    def _set(target: torch.Tensor, place: torch.Tensor, new: torch.Tensor, skip: torch.Tensor | None) -> None:
        if skip is not None:
            new = torch.where(skip.to(target.device), target.index_select(0, place)[0], new)
        target.index_copy_(0, place, new[None])

    def chunks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The values of some columns at a time: the first column, and fp64 [window, columns]."""
        most = CPU_CHUNK if self.stored.device.type == "cpu" else CHUNK
        width = max(most // len(self.stored) // PIECE, 1) * PIECE
        for first in range(0, self.numel, width):
            last = min(first + width, self.numel)
            if self.scale is None:
                yield first, self.stored[:, first:last].double()
                continue
            a, b = first, last + -last % PIECE
            codes = self.stored[:, self.form.stored_count(a) : self.form.stored_count(b)].contiguous()
            scale = self.scale[:, self.form.scale_count(a) : self.form.scale_count(b)].reshape(-1)
            values = dequantize_blockwise(codes, scale, self.form, shape=(len(codes), b - a))
            yield first, values[:, : last - a].double()

    def products(self, place: torch.Tensor) -> torch.Tensor:
        """The inner products of a row with all rows, fp64 [window]. place: int64 [1]."""
        place = place.to(self.stored.device)
        if self.launches():
            return self.launched_products(place)
        if (cpu := self.native()) is not None:
            return cpu.history_products(self.stored, self.scale, self.form, self._width, int(place))
        out = torch.zeros(len(self.stored), dtype=torch.float64, device=self.stored.device)
        for _, values in self.chunks():
            out += torch.mv(values, values.index_select(0, place)[0])
        return out

    def combine(self, y: torch.Tensor, out: torch.Tensor) -> None:
        """The sum of y_j times row j, into a tensor of the gradient's shape. y: fp64 [window]."""
        y = y.to(self.stored.device)
        if self.launches():
            out.copy_(self.launched_combination(y).view(out.shape))
            return
        if (cpu := self.native()) is not None:
            out.copy_(
                cpu.history_combine(self.stored, self.scale, self.form, self._width, y)[: self.numel].view(out.shape)
            )
            return
        total = out.view(-1) if out.is_contiguous() else out.new_empty(out.numel())
        for first, values in self.chunks():
            total[first : first + values.shape[1]].copy_(torch.mv(values.t(), y))
        if not out.is_contiguous():
            out.copy_(total.view(out.shape))

    # Kernels

    def launches(self) -> bool:
        """Whether the Triton kernels can run."""
        from fusedopt.backends.select import get_backend

        return (
            self.stored.device.type == "cuda"
            and self.stored.dtype != torch.float64
            and self.numel > 0
            and get_backend("triton").reason() is None
        )

    def native(self):
        """The CPU's kernels, or None."""
        from fusedopt.quantize import _backend

        if self.stored.device.type != "cpu" or self.stored.dtype == torch.float64 or not self.numel:
            return None
        chosen = _backend(self.stored.new_empty(0, dtype=torch.float32))
        return chosen if chosen.name == "cpu" and chosen.has_history() else None

    def launched_products(self, place: torch.Tensor) -> torch.Tensor:
        from fusedopt.kernels.history import products_kernel

        tiles = -(-self._width // TILE)
        part = torch.empty(tiles, len(self.stored), dtype=torch.float64, device=self.stored.device)
        self._launch(products_kernel, place, part, tiles, DEPTH)
        return part.sum(0)

    def launched_combination(self, y: torch.Tensor) -> torch.Tensor:
        """fp64 [numel]."""
        from fusedopt.kernels.history import combine_kernel

        window, tiles = len(self.stored), -(-self._width // TILE)
        groups = max(min(PROGRAMS // tiles, window // 16), 1)
        depth = -(-window // groups)
        depth = 1 << (depth - 1).bit_length()  # few of them to compile
        part = torch.empty(-(-window // depth), self._width, dtype=torch.float64, device=self.stored.device)
        self._launch(combine_kernel, y.contiguous(), part, tiles, depth)
        return part.sum(0)[: self.numel]

    @property
    def _width(self) -> int:
        return self.numel if self.scale is None else self.numel + -self.numel % PIECE

    def _launch(self, kernel, vector: torch.Tensor, part: torch.Tensor, tiles: int, depth: int) -> None:
        from fusedopt.backends.triton import _on

        window, row_size = self.stored.shape
        aligned = self.stored.data_ptr() % 16 == 0 and row_size * self.stored.element_size() % 16 == 0
        scale = self.stored if self.scale is None else self.scale  # not read without blocks
        nvidia = self.stored.is_cuda and torch.version.hip is None
        with _on(self.stored.device):
            kernel[(tiles, -(-window // depth))](
                self.stored, scale, vector, part, window, self._width, row_size, scale.shape[1],
                FORMAT=self.form.code(True), ALIGNED=aligned, DEPTH=depth, num_warps=8 if nvidia else 4,
            )  # fmt: skip
