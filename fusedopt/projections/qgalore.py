"""Q-GaLore: Zhang et al., "Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients" (arXiv 2407.08296).

GaLore with a projector of packed 4-bit codes, refreshed ever less often where the subspace has settled. Its int8 weights are
`fusedopt.quantize_weights_`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fusedopt.backends.base import Int4Matrix
from fusedopt.options import check_nonnegative
from fusedopt.projections import base
from fusedopt.projections.basis import BasisSite
from fusedopt.projections.galore import GaLore
from fusedopt.projections.int4 import dequantize_affine, quantize_affine

GROUP = 256  # consecutive elements of the projector that share a scale and a zero point


class QGaLoreSite(BasisSite):
    """The packed projector, and a schedule that doubles its gap when successive bases resemble each other.

    A refresh leaves the similarity of the leading vectors on the device and marks it unread; the host reads it at the next
    step, when it has long arrived, so no step waits for its own refresh.
    """

    def basis(self) -> Int4Matrix:
        parts = (self.entry[f"projector_{name}"] for name in ("codes", "scale", "zero"))
        return Int4Matrix(*parts, base.basis_shape(self.shape, self.rank, self.side), GROUP)

    kept_exactly = False

    def basis_bytes(self) -> float:
        packed = self.basis()
        return base.nbytes(packed.codes, packed.scale, packed.zero)

    def due(self, step: int) -> bool:
        schedule = self.entry["schedule"]  # steps between refreshes, whether a similarity is unread
        if schedule[1]:
            self._read(schedule)
        return step == 1 or (step - 1) % int(schedule[0] or self.projection.update_every) == self.offset

    def _read(self, schedule: torch.Tensor) -> None:
        """Lengthens the gap where the last refreshes have hardly turned the leading vector."""
        options = self.projection
        gap = int(schedule[0]) or options.update_every
        recent = self.entry["similarities"].tolist()
        if all(x == x for x in recent) and sum(recent) / len(recent) >= options.cos_threshold:
            gap = int(gap * options.gap_factor)
        schedule[0], schedule[1] = gap, 0

    def old_basis(self) -> torch.Tensor:
        return dequantize_affine(self.basis(), self.basis_dtype)

    def set_basis(self, basis: torch.Tensor) -> None:
        same = not self.cold and (basis.to(self.basis_dtype) == self.old_basis()).all()  # the gradient was no use
        packed = quantize_affine(basis, group=GROUP)
        leading = (basis[:, 0] if self.side == "left" else basis[0]).to(self.basis_dtype)
        before, recent = self.entry["leading_vector"], self.entry["similarities"]
        if self.cold:
            recent.fill_(float("nan"))
        else:
            cosine = torch.nn.functional.cosine_similarity(before.float(), leading.float(), dim=0)
            recent.copy_(torch.where(same, recent, torch.cat([recent[1:], cosine.view(1)])))
            self.entry["schedule"][1] = 1
        new = {f"projector_{name}": getattr(packed, name) for name in ("codes", "scale", "zero")} | {
            "leading_vector": leading
        }
        for name, values in new.items():
            kept = self.entry[name]
            kept.copy_(values if self.cold else torch.where(same, kept, values))


@dataclass(frozen=True)
class QGaLore(GaLore):
    """GaLore with a 4-bit projector and lazy refreshes; use it with state_format="int8" and `quantize_weights_` for the paper's
    method.

    Args as in `GaLore`, and
        cos_threshold: when the cosines between the leading vectors of `queue` successive refreshes average at least this
            much, the gap grows.
        gap_factor: by which it grows.
        queue: how many refreshes are averaged.

    The projector is affine-quantised in groups of 256 elements. Source: arXiv 2407.08296, sections 3.2 to 3.4.
    """

    name: ClassVar[str] = "qgalore"
    site: ClassVar[type] = QGaLoreSite

    cos_threshold: float = 0.4
    gap_factor: float = 2.0
    queue: int = 5

    def __post_init__(self):
        super().__post_init__()
        base.check_positive_int(self.queue, "queue")
        check_nonnegative(self.gap_factor - 1, "gap_factor (less 1)")

    def on_host(self):
        return ("schedule",)

    def tensors(self, p):
        shape = base.matrix_shape(p)
        rank, side = self.rank_for(shape), self.side_for(shape)
        length = shape[0] if side == "left" else shape[1]
        size = length * rank
        groups = -(-size // GROUP)
        return {
            "projector_codes": ((-(-size // 2),), torch.uint8),
            "projector_scale": ((groups,), torch.float32),
            "projector_zero": ((groups,), torch.uint8),
            "leading_vector": ((length,), base.basis_dtype(p)),
            "similarities": ((self.queue,), torch.float32),
            "schedule": ((2,), torch.int64),
        }
