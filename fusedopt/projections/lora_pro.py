"""The pairs of LoRA-Pro with Adam (arXiv 2407.18242, algorithm 2): moments of the full weight's gradient, a few rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fusedopt.abi import Phase
from fusedopt.factors import Factors, together
from fusedopt.projections.paired import Both, PairProjection, PairSite
from fusedopt.projections.pieces import PieceLaunch
from fusedopt.rules.adam import ADAM
from fusedopt.rules.sgd import SGD_PLAIN


class LoraProSite(PairSite):
    """One factor; that of B keeps the moments [m, n]."""

    def bind(self, slot, steps) -> None:
        super().bind(slot, steps)
        if self.projection.role == "B":
            self.pieces = self.pieces_of(slot, steps, self.projection.pair.shape)
            self.launch: PieceLaunch | None = None

    def step_pairs(self, pairs: list[Both], steps) -> None:
        dampings = [steps.groups[both.slots[1].group]["damping"] for both in pairs]
        for which in together((both.pair.rank, d) for both, d in zip(pairs, dampings, strict=True)):
            mine = [pairs[i] for i in which]
            a, b = ([both.weights[k] for both in mine] for k in (0, 1))
            ga, gb = ([both.grads[k] for both in mine] for k in (0, 1))
            factors = Factors(a, b, [both.pair.scale for both in mine], dampings[which[0]])
            towards = factors.nearest(ga, gb, closest=False)
            normal = [both.slots[1].site.normalised(both, *t, steps) for both, t in zip(mine, towards, strict=True)]
            for both, updates in zip(mine, factors.nearest(*map(list, zip(*normal, strict=True))), strict=True):
                for site, slot, u in zip(both.sites, both.slots, updates, strict=True):
                    site.update_param(slot, u, steps)

    def normalised(self, both: Both, towards_a: torch.Tensor, towards_b: torch.Tensor, steps):
        """Steps the moments by s (B t_A + t_B A), and returns the gradients s B^T N, s N A^T of the factors, N the step of Adam."""
        slot, s, (a, b) = both.slots[1], both.pair.scale, both.weights
        gradient, direction = (self.pieces.scratch(steps, i) for i in (0, 1))
        if self.launch is None:
            states = [self.stored(slot, name) for name in slot.rule.state_names]
            self.launch = PieceLaunch(self.pieces, slot, steps.scalars, slot.row, ADAM, Phase.DIRECTION, target=direction,
                                      states=states, grad_dtype=self.dtype)  # fmt: skip
        self.launch.use(gradient, None, None, steps.found)
        for_a, for_b = torch.zeros_like(a), torch.zeros_like(b)
        for i, piece in enumerate(self.pieces.pieces):
            rows = slice(piece.row, piece.stop)
            full = self.pieces.rows_of(piece, gradient)
            torch.mm(b[rows], towards_a, out=full)
            full.addmm_(towards_b[rows], a).mul_(s)
            self.launch.run(i)
            n = self.pieces.rows_of(piece, direction)
            skipped = piece.first - piece.row * n.shape[1]  # of a row that began in the last piece
            n.view(-1)[:skipped].zero_()
            n.view(-1)[skipped + piece.last - piece.first :].zero_()
            for_a.addmm_(b[rows].t(), n, alpha=s)
            for_b[rows].addmm_(n, a.t(), alpha=s)
        return for_a, for_b


@dataclass(frozen=True)
class LoraProPair(PairProjection):
    """A factor of a pair of `LoRAProAdamW`."""

    name: ClassVar[str] = "lora_pro"
    site: ClassVar[type] = LoraProSite

    def rule_for(self, rule):
        return rule if self.role == "B" else SGD_PLAIN

    def state_like(self, p, name):
        return torch.empty(self.pair.shape, dtype=p.dtype, device=p.device)
