"""Steps along the sphere for weights whose scale does not matter: the projection of AdamP and SGDP (arXiv 2006.08217)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedopt.transforms.base import Batch, Tensors, Transform
from fusedopt.transforms.clipping import check_positive
from fusedopt.transforms.wrappers import decays


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[rows]: the sum of x over all dimensions but the first."""
    return x.sum(tuple(range(1, x.dim())))


@dataclass
class _Held:
    """What a step leaves for its end: of the tensors of two dimensions or more."""

    batch: Batch
    old: Tensors
    square: list[torch.Tensor]  # |p_r|^2 of rows, before the step
    rows: torch.Tensor  # bool [n]: each row is projected
    whole: torch.Tensor  # bool [n]: the tensor is projected as one


@dataclass(frozen=True)
class TangentProjection(Transform):
    """Takes the part along the weights out of a step, where the gradient says that their scale does not matter: for tensors of two
    dimensions or more, with c the cosine of gradient and weights,
    if max |c_r| over rows r (filters of convolutions) < delta / sqrt(row length): u_r <- u_r - <n_r, u_r> n_r with
    n_r = p_r / (|p_r| + eps); else if |c| of the whole tensor < delta / sqrt(n): the same with all of it as one row; else u
    stays. Decoupled decay of a projected tensor is multiplied by wd_ratio. u is the step of the rule, apart from its
    decoupled decay.

    When to use it: networks with normalisation layers, trained with momentum, which else grows their weights and so shrinks
    their effective learning rate. `AdamP` and `SGDP` are AdamW and SGD with it. First of several transforms, as the test is of
    the raw gradient; what later ones do to weights before the step (NormLoss, StableDecay) counts as part of u.

    Args:
        delta: threshold of the test. wd_ratio: of the decay of projected tensors, 0 to 1. eps: added to norms of weights, and the
            least norm in a cosine.
    L2 decay is a part of u. 16-bit weights without anything kept beside them lose what is below their rounding.
    State: none; the weights before the step are kept during it (4 bytes per element). Sums over rows and over each tensor.
    Raises ValueError: delta is not positive, wd_ratio is not in [0, 1], or eps is negative.
    Source: arXiv 2006.08217, algorithms 1 and 2; test and order as in its authors' code.
    """

    delta: float = 0.1
    wd_ratio: float = 0.1
    eps: float = 1e-8
    name = "tangent"
    scope = "row"
    reads_weights = after_step = True

    def __post_init__(self):
        check_positive("TangentProjection", "delta", self.delta)
        if not 0.0 <= self.wd_ratio <= 1.0:
            raise ValueError(f"TangentProjection: invalid wd_ratio: {self.wd_ratio}; it is in [0, 1]")
        if not self.eps >= 0.0:
            raise ValueError(f"TangentProjection: invalid eps: {self.eps}; it is 0 or more")

    def each(self, batch: Batch) -> None:
        mine = batch.only([i for i, s in enumerate(batch.slots) if s.owner.dim() > 1 and s.owner.numel()])
        if not len(mine):
            return
        old = torch._foreach_mul(mine.weights(), 1.0)
        across, square, total, loud = [], [], [], []
        for slot, w, g in zip(mine.slots, old, mine.grads, strict=True):
            dot, w_sq, g_sq = _rows(w * g).double(), _rows(w.square()).double(), _rows(g.square()).double()
            limit = self.delta / (slot.owner.numel() / slot.owner.shape[0]) ** 0.5
            loud.append((~(self._cosine(dot, w_sq, g_sq) < limit)).double().sum())
            across.append(dot.sum())
            total.append(g_sq.sum())
            square.append(w_sq)
        rows = mine.add_up(torch.stack(loud)) == 0
        sums = (mine.add_up(torch.stack(x)) for x in (across, [s.sum() for s in square], total))
        limits = self.delta / mine.tensor_sizes().sqrt()
        whole = ~rows & (self._cosine(*sums) < limits)
        batch.kept[self.name] = _Held(mine, old, square, rows, whole)

    def _cosine(self, dot: torch.Tensor, p_sq: torch.Tensor, g_sq: torch.Tensor) -> torch.Tensor:
        return dot.abs() / (p_sq.sqrt().clamp(min=self.eps) * g_sq.sqrt().clamp(min=self.eps))

    def after(self, batches: list[Batch]) -> None:
        for batch in batches:
            held = batch.kept.pop(self.name, None)
            if held is not None:
                self._project(held)

    def _project(self, held: _Held) -> None:
        """p <- p + <n, u> n + (1 - wd_ratio) decay p_old: a tensor that is not projected keeps every bit."""
        mine, new, decay = held.batch, held.batch.weights(), decays(held.batch)
        along = []
        for w, p, d in zip(held.old, new, decay.to(mine.dtype).unbind(), strict=True):
            along.append(_rows(w * ((w - p) - d * w)).double())
        whole = mine.add_up(torch.stack([x.sum() for x in along]))
        size = mine.add_up(torch.stack([s.sum() for s in held.square]))
        shares = torch.where(held.whole, self._share(whole, size), 0.0)
        spared = torch.where(held.rows | held.whole, decay * (1 - self.wd_ratio), 0.0)
        out = []
        for i, (w, p) in enumerate(zip(held.old, new, strict=True)):
            factor = torch.where(held.rows[i], self._share(along[i], held.square[i]), shares[i]) + spared[i]
            out.append(torch.addcmul(p, w, factor.to(w.dtype).view(-1, *(1,) * (w.dim() - 1))))
        mine.set_weights(out)

    def _share(self, dot: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return torch.where(square > 0, dot / (square.sqrt() + self.eps).square().clamp(min=1e-300), 0.0)
