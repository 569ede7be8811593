"""MicroAdam's site: its window of sparse gradients (window.py) hands out updates that launches over pieces apply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fusedopt.abi import Phase
from fusedopt.projections import base
from fusedopt.projections.pieces import FullSite, PieceLaunch
from fusedopt.projections.window import Options, update
from fusedopt.rules.sgd import SGD_PLAIN


class WindowSite(FullSite):
    """One tensor of any shape, as a column of its elements in memory order."""

    plain_rule = "sgd"

    def shape_of(self, p):
        return p.numel(), 1

    def bind(self, slot, steps) -> None:
        self.group = steps.groups[slot.group]
        self.pieces = self.pieces_of(slot, steps, self.shape)
        self.launch: PieceLaunch | None = None

    def operations(self, slot) -> list[base.Operation]:
        """Of the window one row is written."""
        (whole,) = super().operations(slot)
        window = base.nbytes(self.entry["window_indices"], self.entry["window_values"])
        return [base.Operation(whole.name, whole.bytes - window + window / self.projection.window)]

    def after(self, grad, slot, steps) -> None:
        scratch, numbers = self.pieces.scratch(steps), steps.scalars.numbers[slot.row]
        if self.launch is None:
            self.launch = PieceLaunch(self.pieces, slot, steps.scalars, slot.plain_row, SGD_PLAIN, Phase.FUSED,
                                      grad_dtype=self.dtype)  # fmt: skip
        self.launch.use(scratch, None, None, steps.found)
        waiting = iter(enumerate(self.pieces.pieces))
        index, piece = next(waiting)

        def apply(first: int, last: int, u: torch.Tensor) -> None:
            nonlocal index, piece
            while first < last:
                stop = min(last, piece.last)
                part = self.pieces.part_of(piece, scratch)[first - piece.first : stop - piece.first]
                part.copy_(u[: stop - first])
                u, first = u[stop - first :], stop
                if first == piece.last:
                    self.launch.run(index)
                    index, piece = next(waiting, (index, piece))

        h = self.group
        betas = tuple(b.item() if isinstance(b, torch.Tensor) and b.device.type == "cpu" else b for b in h["betas"])
        options = self.projection.options(betas, h["eps"])
        flat_grad = grad.reshape(-1)
        update(self.entry, flat_grad, numbers.step, options, apply, steps.multiplier(slot), steps.found)


@dataclass(frozen=True)
class SparseWindow(base.Projection):
    """The largest gradients of the last steps in place of both moments. Used by `MicroAdam`."""

    name: ClassVar[str] = "sparse_window"
    site: ClassVar[type] = WindowSite

    window: int = 10
    density: float = 0.01
    block: int = 32768
    error_block: int = 32768

    def __post_init__(self):
        self.options()

    def options(self, betas=(0.9, 0.999), eps: float = 1e-8) -> Options:
        return Options(betas, eps, self.window, self.density, self.block, self.error_block)

    def refuses(self, p):
        return None if p.numel() else "it has no elements"

    def state_like(self, p, name):
        return p

    def tensors(self, p):
        n, options = p.numel(), self.options()
        row, bounds = (self.window, options.kept_of(n)), (-(-n // self.error_block),)
        return {
            "window_indices": (row, torch.int16),
            "window_values": (row, torch.bfloat16),
            "error_codes": (((n + 1) // 2,), torch.uint8),
            "error_min": (bounds, torch.bfloat16),
            "error_max": (bounds, torch.bfloat16),
        }
