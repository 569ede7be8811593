"""M-FAC's preconditioner: Frantar, Kurtic and Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order
Information" (arXiv 2107.03356), the dynamic algorithm: the inverse empirical Fisher matrix of a window of gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedopt.formats import Format, get_format
from fusedopt.states import scale_name, scale_names, stored_format
from fusedopt.transforms.base import Batch, Transform, shared
from fusedopt.transforms.clipping import check_positive
from fusedopt.transforms.history import PIECE, Rows
from fusedopt.transforms.wrappers import check_count

ROWS = "fisher_rows"
SMALLEST = 4096  # elements: smaller tensors keep fp32 rows, as they keep fp32 states


@dataclass(frozen=True)
class InverseFisher(Transform):
    """g <- (damping I + (1 / window) G^T G)^-1 g, where the rows of G are the last `window` gradients, this one among them, of all
    tensors together (rows of zeros while there are fewer). Never a matrix of the model's size: with K = G G^T, [window, window],
    and g row i of G, that is window G^T y with (window damping I + K) y = e_i. A step replaces the oldest row, takes G g
    for the new row of K in one pass over G, and G^T y in another, both in double precision: by kernels on
    the CPU and on GPUs (not run on one yet), which decode what they read, or else by torch, a piece of G at a time.

    When to use it: by `MFAC`, which is SGD with it; with another rule, where g should be a natural gradient.

    Args:
        window: gradients kept. damping: positive; what it is to be compared with is the mean square norm of the gradients.
        history_format: of G: "fp32", "bf16", or a blockwise format (tensors of less than 4096 elements stay in fp32).
    What is preconditioned is the stored gradient. What rounding takes away from it lies outside of all rows, where the inverse
    is 1 / damping: it would drown the rest.
    States: `fisher_rows`, window times 4, 2, 1.02 or 0.53 bytes per element (fp32, bf16, 8 bits, int4): by far the largest thing
    in memory; and once for the model `fisher_products`, K in fp64, and the count of steps. Steps whose gradients are not all
    finite are left out. Tensors without a gradient have a row of zeros and do not move. No DTensors. Sums over all tensors.
    Raises ValueError: an option is out of range. Source: arXiv 2107.03356, whose dynamic algorithm has the same result.
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
        least = 32 * m * torch.finfo(torch.float64).eps * diagonal.max()
        system = products + torch.diag((least.clamp(min=m * self.damping)).expand(m))
        factor, _ = torch.linalg.cholesky_ex(system)
        unit = torch.zeros_like(diagonal).index_fill_(0, place, float(m))
        return torch.cholesky_solve(unit[:, None], factor)[:, 0]
