"""Error feedback: what a projection leaves out of a gradient is added to the next one (DCT-AdamW, arXiv 2505.17967).

The error has the gradient's shape and is kept in fp32, or in 8 or 4 bits between the least and largest value of each row:
x = code * unit + min with unit = (max - min) / (2^bits - 1), and code 0 where unit is 0.
"""

from __future__ import annotations

import torch

BITS = {"fp32": 32, "int8": 8, "int4": 4}
_BLOCK = 1 << 16  # elements of a block of rows: its temporaries stay in the second-level cache


def error_tensors(shape: tuple[int, int], form: str, wide: torch.dtype) -> dict:
    """Shape and dtype of the tensors kept per matrix."""
    rows, cols = shape
    if form == "fp32":
        return {"error": (shape, wide)}
    stored = cols if form == "int8" else (cols + 1) // 2
    return {"error": ((rows, stored), torch.uint8), "error_min": ((rows,), wide), "error_unit": ((rows,), wide)}


class ErrorFeedback:
    """The sum of a gradient and the error, read in parts like a matrix; it never exists as a whole."""

    def __init__(self, shape: tuple[int, int], entry: dict, form: str, wide: torch.dtype):
        self.shape, self.entry, self.bits, self.dtype = shape, entry, BITS[form], wide
        self.grad = self.scale = self.found = None

    @property
    def device(self) -> torch.device:
        return self.entry["error"].device

    def element_size(self) -> int:
        return self.dtype.itemsize

    def begin(self, grad: torch.Tensor, steps) -> None:
        """grad: [rows, cols]. The error is kept without the loss scale."""
        self.grad, self.scale, self.found = grad, steps.scale, steps.found

    def end(self) -> None:
        self.grad = self.scale = self.found = None

    def __getitem__(self, at) -> torch.Tensor:
        """A part of the sum, by a slice of rows or (slice, slice)."""
        rows, cols = at if isinstance(at, tuple) else (at, slice(None))
        part = self._error(rows, cols)
        if self.scale is not None:
            part = part * self.scale.view(())
        return part + self.grad[rows, cols].to(self.dtype)

    def _error(self, rows: slice, cols: slice) -> torch.Tensor:
        if self.bits == 32:
            return self.entry["error"][rows, cols]
        codes = self.entry["error"][rows]
        if self.bits == 4:
            codes = torch.stack([codes >> 4, codes & 15], 2).view(codes.shape[0], -1)[:, : self.shape[1]]
        low, unit = (self.entry[name][rows, None] for name in ("error_min", "error_unit"))
        return torch.addcmul(low, codes[:, cols].to(self.dtype), unit)

    def _blocks(self):
        rows, cols = self.shape
        step = max(1, _BLOCK // cols)
        return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]

    def project(self, basis: torch.Tensor, side: str, out: torch.Tensor) -> None:
        """out = basis^T A (left) or A basis^T (right), A the sum."""
        basis = basis.to(self.dtype)
        total = torch.zeros(out.shape, dtype=self.dtype, device=out.device)
        for rows in self._blocks():
            if side == "left":
                total.addmm_(basis[rows].t(), self[rows])
            else:
                torch.mm(self[rows], basis.t(), out=total[rows])
        out.copy_(total)

    def keep(self, basis: torch.Tensor, side: str, projected: torch.Tensor) -> None:
        """The new error: A less what `projected` stands for. Where found_inf is set the old one stays."""
        basis, projected = basis.to(self.dtype), projected.to(self.dtype)
        for rows in self._blocks():
            back = basis[rows] @ projected if side == "left" else projected[rows] @ basis
            rest = self[rows] - back
            if self.scale is not None:
                rest = rest / self.scale.view(())
            self._store(rows, rest)

    def _store(self, rows: slice, x: torch.Tensor) -> None:
        if self.bits == 32:
            self._put("error", rows, x)
            return
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        unit = (high - low) / (2**self.bits - 1)
        codes = torch.where(unit > 0, ((x - low) / unit + 0.5).floor_(), torch.zeros_like(x)).to(torch.uint8)
        if self.bits == 4:
            codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
            codes = codes[:, 0::2] << 4 | codes[:, 1::2]
        for name, values in (("error", codes), ("error_min", low[:, 0]), ("error_unit", unit[:, 0])):
            self._put(name, rows, values)

    def _put(self, name: str, rows: slice, values: torch.Tensor) -> None:
        """What is stored stays bit for bit: encoding its decoded values again would move them."""
        old = self.entry[name][rows]
        old.copy_(values if self.found is None else torch.where(self.found.view(()) != 0, old, values))
