"""M-FAC's preconditioner: Frantar, Kurtic and Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order
Information" (arXiv 2107.03356), the dynamic algorithm: the inverse empirical Fisher matrix of a window of gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fusedopt.formats import Format, get_format
from fusedopt.quantize import dequantize_blockwise, quantize_blockwise
from fusedopt.states import scale_name, scale_names, stored_format
from fusedopt.transforms.base import Batch, Transform, shared
from fusedopt.transforms.clipping import check_positive
from fusedopt.transforms.wrappers import check_count

ROWS = "fisher_rows"
PIECE = 256  # elements: a row ends with whole blocks of every format
SMALLEST = 4096  # elements: smaller tensors keep fp32 rows, as they keep fp32 states
# elements of a history that are in double precision at a time: few launches on a GPU, what fits in a cache on the CPU
CHUNK, CPU_CHUNK = 1 << 24, 1 << 18


@dataclass(frozen=True)
class InverseFisher(Transform):
    """g <- (damping I + (1 / window) G^T G)^-1 g, where the rows of G are the last `window` gradients, this one among them, of all
    tensors together (rows of zeros while there are fewer). Never a matrix of the model's size: with K = G G^T, [window, window],
    and g row i of G, that is window G^T y with (window damping I + K) y = e_i. A step replaces the oldest row, takes G g
    for the new row of K in one pass over G, and G^T y in another, both in double precision.

    When to use it: by `MFAC`, which is SGD with it; with another rule, where g should be a natural gradient.

    Args:
        window: gradients kept. damping: positive; what it is to be compared with is the mean square norm of the gradients.
        history_format: of G: "fp32", "bf16", or a blockwise format (tensors of less than 4096 elements stay in fp32).
    What is preconditioned is the stored gradient. What rounding takes away from it lies outside of all rows, where the inverse
    is 1 / damping: it would drown the rest.
    States: `fisher_rows`, window times 4, 2, 1.02 or 0.53 bytes per element (fp32, bf16, 8 bits, int4): by far the largest thing
    in memory; and once for the model `fisher_products`, K in fp64, and the count of steps. Steps whose gradients are not all
    finite are left out. Tensors without a gradient have a row of zeros and do not move. No DTensors. Sums over all tensors.
    Raises ValueError: an option is out of range. Source: arXiv 2107.03356, section 3.2 (dynamic algorithm), of the same result.
    """

    window: int = 1024
    damping: float = 1e-5
    history_format: str = "fp32"
    name = "fisher"
    scope = "model"
    keeps = (ROWS, *scale_names(ROWS))
    shares = ("fisher_products", "fisher_steps")
    whole = needs_finite = True

    def __post_init__(self):
        check_count("InverseFisher", "window", self.window, 1)
        check_positive("InverseFisher", "damping", self.damping)
        if get_format(self.history_format).stochastic:
            raise ValueError(
                f"InverseFisher: invalid history_format: {self.history_format!r}; a row is rounded once, and to nearest loses "
                "least. Use 'bf16'."
            )

    def format(self, p: torch.Tensor) -> Format:
        form = get_format(self.history_format)
        return get_format("fp32") if form.block and p.numel() < SMALLEST or p.dtype == torch.float64 else form

    def shapes(self, p):
        form, n = self.format(p), p.numel()
        if not form.block:
            return {ROWS: (self.window, n)}
        n += -n % PIECE
        return {
            ROWS: (self.window, form.stored_count(n)),
            scale_name(ROWS, form): (self.window, form.scale_count(n)),
        }

    def shared_shapes(self):
        return {"fisher_products": (self.window, self.window), "fisher_steps": ()}

    def dtype(self, name, p):
        if name == "fisher_products":
            return torch.float64
        form = self.format(p)
        return form.storage if name == ROWS and form.name != "fp32" else super().dtype(name, p)

    def check_loaded(self, what, p, entry):
        if isinstance(entry.get(ROWS), torch.Tensor):
            found, form = stored_format(entry, ROWS), self.format(p)
            if found is not form:
                raise ValueError(
                    f"{what}: the loaded history of gradients is in {found.name}, not in {form.name}, and its products are of what "
                    f"is stored. Load it with history_format={found.name!r}."
                )

    def rows(self, p: torch.Tensor, entry: dict) -> Rows:
        form = self.format(p)
        return Rows(entry[ROWS], entry.get(scale_name(ROWS, form)), form, p.numel())

    def before(self, batches: list[Batch]) -> None:
        opt = batches[0].opt
        products, steps = (shared(opt, name) for name in self.shares)
        home = products.device
        skip = None if batches[0].skip is None else batches[0].skip.to(home)
        place = (steps % self.window).long().view(1)
        found = [(batch, i) for batch in batches for i in range(len(batch))]
        stepped = {batch.slots[i].owner for batch, i in found}
        for batch, i in found:
            self.rows(batch.slots[i].param, batch.slots[i].entry).put(place, batch.grads[i], batch.skip)
        for p, entry in opt.state.items():
            if ROWS in entry and p not in stepped:
                self.rows(p, entry).put(place, None, skip)
        new = torch.zeros(self.window, dtype=torch.float64, device=home)
        for batch, i in found:
            new += self.rows(batch.slots[i].param, batch.slots[i].entry).products(place).to(home)
        at = place.to(home)
        kept = new if skip is None else torch.where(skip, products.index_select(0, at)[0], new)
        products.index_copy_(0, at, kept[None])
        products.index_copy_(1, at, kept[:, None])
        y = self.solve(products, at)
        for batch, i in found:
            self.rows(batch.slots[i].param, batch.slots[i].entry).combine(y, batch.grads[i])
        steps += 1 if skip is None else (~skip).to(steps.device, steps.dtype)

    def solve(self, products: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """window y, fp64 [window]."""
        m, diagonal = self.window, products.diagonal()
        # less than what rounding does to K is as good as nothing, and K alone is singular
        least = 4 * m * torch.finfo(torch.float64).eps * diagonal.max()
        system = products + torch.diag((least.clamp(min=m * self.damping)).expand(m))
        factor, _ = torch.linalg.cholesky_ex(system)
        unit = torch.zeros_like(diagonal).index_fill_(0, place, float(m))
        return torch.cholesky_solve(unit[:, None], factor)[:, 0]


@dataclass
class Rows:
    """The gradients of one tensor, [window, numel] in its format; of blockwise ones rows are padded to whole blocks."""

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
        """The inner products of a row with all rows, fp64 [window]."""
        place = place.to(self.stored.device)
        out = torch.zeros(len(self.stored), dtype=torch.float64, device=self.stored.device)
        for _, values in self.chunks():
            out += torch.mv(values, values.index_select(0, place)[0])
        return out

    def combine(self, y: torch.Tensor, out: torch.Tensor) -> None:
        """The sum of y_j times row j, into a tensor of the gradient's shape."""
        y, total = y.to(self.stored.device), out.view(-1) if out.is_contiguous() else out.new_empty(out.numel())
        for first, values in self.chunks():
            total[first : first + values.shape[1]].copy_(torch.mv(values.t(), y))
        if not out.is_contiguous():
            out.copy_(total.view(out.shape))
