"""Sites whose projector is a basis of the gradient's dominant subspace: GaLore's, and those that build on it."""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedopt.backends.base import MatrixWork
from fusedopt.projections import base, ops
from fusedopt.projections.subspace import compute_dtype, random_basis, refresh_basis, svd_basis


class BasisSite(base.Site):
    """A site whose projector is a basis of the gradient's dominant subspace, kept dense in the state."""

    takes_int8 = True
    kept_exactly = True  # whether basis() is what set_basis was given

    def basis(self) -> torch.Tensor:
        """The projector: [rows, rank] with orthonormal columns (left) or [rank, cols] with orthonormal rows (right)."""
        return self.entry["projector"]

    def old_basis(self) -> torch.Tensor:
        """What a refresh starts from, and leaves where the gradient is no use."""
        return self.basis()

    def set_basis(self, basis: torch.Tensor) -> None:
        self.entry["projector"].copy_(basis)

    def fresh_basis(self, grad: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The new basis and, where it is a by-product, the projected gradient, which is then in `projected`; the basis may be
        in the state already. A gradient that is all zero or not finite leaves the old one."""
        method, old = self.projection.method, None if self.cold else self.old_basis()
        keys = {"seed": self.seed, "tensor_id": self.tensor_id, "step": step}
        if method == "random":
            return random_basis(self.whole, self.rank, self.side, device=grad.device, **keys), None
        if method == "svd":
            return svd_basis(grad, self.rank, self.side, old), None
        # Results go where they are kept, so that they need no memory of their own.
        wanted = self.kept_exactly and compute_dtype(grad.dtype) == self.basis_dtype == self.projected.dtype
        into = {
            "basis_out": self.entry["projector"] if self.kept_exactly else None,
            "projected_out": self.projected if wanted else None,
            "with_projected": wanted,
        }
        return refresh_basis(grad, self.rank, self.side, old, **into, **keys)

    def before(self, grad: torch.Tensor, step: int, slot, steps) -> None:
        if self.refreshes(step, steps):
            basis, projected = self.fresh_basis(grad, step)
            if basis is not self.entry.get("projector"):
                self.set_basis(basis)
            self.refreshed(slot, step)
            if projected is not None:
                return
        self.project(grad, slot)

    def project(self, grad: torch.Tensor, slot) -> None:
        """Fills `projected`."""
        ops.project(slot.key.backend, grad, self.basis(), self.side, self.projected)

    def refreshed(self, slot, step: int) -> None:
        """What becomes of the states when the basis has changed: they stay, as in the paper."""

    def pair(self, low_rank: torch.Tensor) -> tuple:
        """The two factors whose product projects a low-rank matrix back."""
        basis = self.basis()
        if isinstance(basis, torch.Tensor) and basis.dtype != low_rank.dtype:
            low_rank = low_rank.to(basis.dtype)
        return (basis, low_rank) if self.side == "left" else (low_rank, basis)

    def work(self, base: MatrixWork) -> MatrixWork:
        left, right = self.pair(self.update)
        return replace(base, left=left, right=right, scale=self.projection.scale)
