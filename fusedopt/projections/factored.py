"""Factored second moments: Shazeer and Stern, "Adafactor" (arXiv 1804.04235), algorithms 4 to 6, one tensor at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from fusedopt.abi import Phase
from fusedopt.backends.base import MatrixWork, RowNumbers
from fusedopt.distributed import Sharding, add_up, is_dtensor, local, split_groups, spread
from fusedopt.memory import flat, is_dense
from fusedopt.projections import base, ops
from fusedopt.projections.pieces import FullSite, PieceLaunch, skipping


class OwnRow:
    """One scalar row whose learning rate and decay are computed on the device from the tensor itself."""

    def __init__(self, like: torch.Tensor):
        self.table = torch.zeros(1, like.shape[1], dtype=like.dtype, device=like.device)
        self.numbers: list[RowNumbers] = []

    def write(self, steps, slot, lr, decay) -> None:
        """The slot's row (seed, step, the rule's scalars) with other rates, for an update that has its sign already."""
        self.table.copy_(steps.scalars.table[slot.row : slot.row + 1])
        for word, value in enumerate((lr, decay, 0.0, 1.0)):
            if isinstance(value, torch.Tensor):
                self.table[0, word].copy_(value)
            else:
                self.table[0, word].fill_(value)
        base = steps.scalars.numbers[slot.row]
        self.numbers = [base._replace(lr=lr, decay=decay, l2=0.0, grad_sign=1.0)]


def _smaller(a, b):
    """The smaller of two numbers, either of which may be a 0-dim tensor."""
    if isinstance(a, torch.Tensor):
        return torch.minimum(a, torch.as_tensor(b, dtype=a.dtype, device=a.device))
    return b.clamp(max=a) if isinstance(b, torch.Tensor) else min(a, b)


def factor_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of exp_avg_sq_row and exp_avg_sq_col: one factor for each of the last two dimensions, as in transformers."""
    return tuple(shape[:-1]), (*shape[:-2], shape[-1])


class FactoredSite(FullSite):
    """One tensor of Adafactor: a vector, a matrix, or a stack of matrices (more than two dimensions)."""

    gradient_reads = 3  # for its second moment, for the size of the update and for the update

    def __init__(self, projection, p, entry, grad_dtype, tensor_id, group, place):
        self.owner, self.sizes = p, p.shape
        self.sharding = Sharding(p) if is_dtensor(p) else None
        p = local(p)
        self.layout = projection.layout(p)
        self.logical = p
        super().__init__(projection, p, entry, grad_dtype, tensor_id, group, place)

    def add_up(self, x: torch.Tensor, *dims: int) -> torch.Tensor:
        """What this process has summed over dimensions of the tensor (-1 the last), summed over those who have the rest."""
        if self.sharding is None:
            return x
        return add_up(x, tuple(g for d in dims for g in split_groups(self.owner, d % len(self.sizes))))

    def shape_of(self, p):
        """As [rows, cols] in memory order; vectors and tensors with permuted dimensions as one column."""
        if self.layout == "matrix":
            return tuple(p.shape)
        if self.layout == "transposed":
            return p.shape[1], p.shape[0]
        return (p.numel() // p.shape[-1], p.shape[-1]) if self.layout == "stack" else (p.numel(), 1)

    def bind(self, slot, steps) -> None:
        self.row = OwnRow(steps.scalars.table)
        self.group = steps.groups[slot.group]
        self.backend = slot.key.backend
        self.torch_form = self.group["variant"] == "torch"
        self.one_product = self.layout in ("matrix", "transposed") and not self.torch_form and not slot.rule.states
        self.pieces = None if self.one_product else self.pieces_of(slot, steps, self.shape)
        self.launch: PieceLaunch | None = None

    def operations(self, slot) -> list[base.Operation]:
        """The size of the weights takes another read of them."""
        (whole,) = super().operations(slot)
        weights = base.weight_bytes(slot)[0] if self.group["scale_parameter"] else 0
        name = "factored update" if self.one_product else whole.name
        return [base.Operation(name, whole.bytes + weights)]

    def after(self, grad, slot, steps) -> None:
        if not math.prod(self.sizes):
            return
        numbers, mul = steps.scalars.numbers[slot.row], steps.multiplier(slot)
        mul = mul.to(self.dtype) if isinstance(mul, torch.Tensor) else mul
        self._average(grad, mul, numbers.step, steps.found)
        scratch = None if self.one_product else self.pieces.scratch(steps)
        clip = (self._rms_update(grad, mul, scratch) / self.group["clip_threshold"]).clamp(min=1.0)
        size, decay = self._sizes(slot, numbers)
        rate = size / clip
        if self.one_product:
            self.row.write(steps, slot, rate, decay)
            rows, cols = self._roots()
            work = MatrixWork(
                self.matrix(slot.work_param), None if slot.companion is None else self.matrix(slot.companion),
                slot.precision, None, None, self.row.table[0], self.row.numbers[0], slot.stream, grad=grad,
                row_factor=rows * mul, col_factor=cols, found_inf=steps.found,
            )  # fmt: skip
            if grad.numel():
                ops.apply(self.backend, work)
            return
        self.row.write(steps, slot, 1.0, decay)
        if self.launch is None:
            states = [self.stored(slot, name) for name in slot.rule.state_names]
            self.launch = PieceLaunch(self.pieces, slot, self.row, 0, slot.rule, Phase.FUSED, states=states,
                                      grad_dtype=self.dtype)  # fmt: skip
        self.launch.use(scratch, None, None, steps.found)
        for i, piece in enumerate(self.pieces.pieces):
            self._fill(grad, mul * rate, piece, scratch)
            self.launch.run(i)

    def _sizes(self, slot, numbers: RowNumbers):
        """The step size that multiplies the clipped update, and the share of the parameter that decays."""
        h, size = self.group, numbers.lr
        if h["relative_step"]:
            most = 1e-6 * numbers.step if h["warmup_init"] else numbers.lr
            size = _smaller(most, numbers.step**-0.5)
        if isinstance(size, torch.Tensor):  # what a number of the host becomes where it meets a tensor
            size = size.to(self.dtype)
        if h["scale_parameter"]:
            size = self._rms_weights(slot).clamp(min=h["eps"][1]) * size
        return size, (numbers.lr if self.torch_form else size) * h["weight_decay"]

    def _rms_weights(self, slot) -> torch.Tensor:
        mine, n = slot.work_param, slot.work_param.numel()
        own = ops.rms(mine, slot.companion, slot.precision, self.dtype) if n else mine.new_zeros((), dtype=self.dtype)
        if self.sharding is None:
            return own
        return (self.add_up(own.square() * n, *range(len(self.sizes))) / math.prod(self.sizes)).sqrt()

    # The second moment

    def _floor(self) -> float:
        """torch's first epsilon: under the mean of the rows, and its square under every second moment."""
        first = self.group["eps"][0]
        return torch.finfo(self.logical.dtype).eps if first is None else first

    def _average(self, grad, mul, step, found) -> None:
        """Moves the stored means of squared gradients towards this step's."""
        weight = step ** self.group["decay_rate"]  # 1 - beta2
        added = 0.0 if self.torch_form else self.group["eps"][0]
        if isinstance(weight, torch.Tensor):
            weight = weight.to(self.dtype)
        if self.layout == "vector":
            mean = self.entry["exp_avg_sq"].view(-1)
            for piece in self.pieces.pieces:
                part = mean[piece.first : piece.last]
                now = (grad.view(-1)[piece.first : piece.last].to(self.dtype) * mul).square_().add_(added)
                skipping(found, torch.lerp(part, now, weight), part)
            return
        for name, now in zip(("exp_avg_sq_row", "exp_avg_sq_col"), self._means(grad), strict=True):
            mean = self.entry[name]
            skipping(found, torch.lerp(mean, now * (mul * mul) + added, weight), mean)
        self.row_mean = self._means_of_rows()  # once a step: it may take all processes

    def _means(self, grad) -> tuple[torch.Tensor, torch.Tensor]:
        """The means of the squared gradient over the last dimension and over the one before."""
        row, col = (torch.empty_like(self.entry[n]) for n in ("exp_avg_sq_row", "exp_avg_sq_col"))
        if not grad.numel():
            row.zero_(), col.zero_()
        elif self.layout in ("matrix", "transposed"):
            first, second = (col, row) if self.layout == "transposed" else (row, col)
            ops.row_col_sums(self.backend, grad, first, second)
        elif self.layout == "stack":
            ops.row_col_sums(self.backend, grad, row.view(-1), None)
            each = self.logical.shape[-2] * self.logical.shape[-1]
            stack, out = grad.view(-1, *self.logical.shape[-2:]), col.view(-1, col.shape[-1])
            count = max(1, (1 << 18) // each)
            for first in range(0, stack.shape[0], count):
                part = slice(first, first + count)
                torch.sum(stack[part].to(self.dtype, copy=True).square_(), 1, out=out[part])
        else:
            squares = self._strided(grad).to(self.dtype).square()
            torch.sum(squares, -1, out=row), torch.sum(squares, -2, out=col)
        return self.add_up(row, -1).div_(self.sizes[-1]), self.add_up(col, -2).div_(self.sizes[-2])

    def _strided(self, memory: torch.Tensor) -> torch.Tensor:
        """A tensor in memory order as one of the parameter's shape."""
        return memory.as_strided(self.logical.shape, self.logical.stride(), memory.storage_offset())

    def _means_of_rows(self) -> torch.Tensor:
        row = self.entry["exp_avg_sq_row"]
        mean = (
            self.add_up(row.sum(-1, keepdim=True), -2) / self.sizes[-2]
            if self.sharding is not None
            else row.mean(-1, keepdim=True)
        )
        return mean.clamp(min=self._floor()) if self.torch_form else mean

    def _roots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the rows and the columns of the gradient are multiplied by, in memory order."""
        row = (self.entry["exp_avg_sq_row"] / self.row_mean).rsqrt()
        col = self.entry["exp_avg_sq_col"].rsqrt()
        return (col, row) if self.layout == "transposed" else (row, col)

    # The update

    def _rms_update(self, grad, mul, scratch) -> torch.Tensor:
        if self.one_product:
            rows, cols = self._roots()
            total = (
                grad.new_zeros((), dtype=self.dtype)
                if not grad.numel()
                else ops.weighted_square_sum(self.backend, grad, rows.square(), cols.square()) * (mul * mul)
            )
        else:
            total = torch.zeros((), dtype=self.dtype, device=grad.device)
            for piece in self.pieces.pieces:
                self._fill(grad, mul, piece, scratch)
                part = self.pieces.part_of(piece, scratch)
                total = total + torch.dot(part, part)
        return (self.add_up(total, *range(len(self.sizes))) / math.prod(self.sizes)).sqrt()

    def _fill(self, grad, mul, piece, scratch) -> None:
        """mul * grad divided by the root of its second moment, for the rows of a piece."""
        out, rows = self.pieces.rows_of(piece, scratch), slice(piece.row, piece.stop)
        out.copy_(grad[rows])
        out.mul_(mul)
        if self.layout == "vector":
            root = self.entry["exp_avg_sq"].view(-1)[rows]
        elif self.layout == "strided":
            row = self.entry["exp_avg_sq_row"] / self.row_mean
            whole = torch.empty_strided(self.logical.shape, self.logical.stride(), dtype=self.dtype, device=out.device)
            torch.mul(row[..., :, None], self.entry["exp_avg_sq_col"][..., None, :], out=whole)
            root = flat(whole)[rows]
        elif self.layout == "transposed":
            row = self.entry["exp_avg_sq_row"] / self.row_mean
            root = self.entry["exp_avg_sq_col"][rows, None] * row
        else:
            row = (self.entry["exp_avg_sq_row"] / self.row_mean).view(-1)[rows]
            col = self.entry["exp_avg_sq_col"].view(-1, self.shape[1])
            if col.shape[0] > 1:
                height = self.logical.shape[-2]
                col = col[torch.arange(piece.row, piece.stop, device=out.device) // height]
            root = row[:, None] * col
        if self.torch_form:
            root = root.clamp(min=self._floor() ** 2)
        out.mul_(root.rsqrt().view(out.shape))


@dataclass(frozen=True)
class Factored(base.Projection):
    """The second moment of every tensor with two or more dimensions as a row and a column factor. Used by `Adafactor`."""

    name: ClassVar[str] = "factored"
    site: ClassVar[type] = FactoredSite

    @staticmethod
    def layout(p: torch.Tensor) -> str:
        """How a tensor lies in memory: vector, matrix, transposed, stack (of matrices), or strided (in another order).

        A strided one (channels_last) takes temporary memory of its own size.
        """
        if p.dim() < 2:
            return "vector"
        if not is_dense(p) or p.is_contiguous():
            return "matrix" if p.dim() == 2 else "stack"
        return "transposed" if p.dim() == 2 else "strided"

    def refuses(self, p):
        return None

    def sharded_site(self):
        return FactoredSite

    def state_like(self, p, name):
        return p

    def tensors(self, p):
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        if p.dim() < 2:
            return {"exp_avg_sq": (tuple(p.shape), dtype)}
        row, col = factor_shapes(p.shape)
        return {"exp_avg_sq_row": (row, dtype), "exp_avg_sq_col": (col, dtype)}

    def tensor_like(self, p, name):
        if name == "exp_avg_sq":
            return p
        shape, dtype = self.tensors(p)[name]
        last = p.dim() - 1
        dims = (
            {d: d for d in range(last)}
            if name == "exp_avg_sq_row"
            else {**{d: d for d in range(last - 1)}, last: last - 1}
        )
        return spread(p, shape, dims, dtype)


FACTORED = Factored()


def factored_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of the factors of a tensor: 4 per row and per column of its last two dimensions; of a vector, 4 per element."""
    return 4 * (math.prod(shape) if len(shape) < 2 else sum(map(math.prod, factor_shapes(shape))))
