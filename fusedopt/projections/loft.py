"""The pairs of LoFT (arXiv 2505.21289): momenta of both factors that follow each other's changes, second moments as products of
columns, so that Adam's step of the full weight is known without its moments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fusedopt.factors import grams, inverse, products, together
from fusedopt.projections.paired import Both, PairProjection, PairSite
from fusedopt.projections.pieces import skipping
from fusedopt.rule import Rule
from fusedopt.rules.adam import ADAM
from fusedopt.rules.sgd import SGD_PLAIN

STATES = ("loft_exp_avg", "loft_products", "loft_other")
CHUNK, CPU_CHUNK = 1 << 24, 1 << 18  # elements of the full weight that are worked on at a time


def turn_of(role: str, h, step):
    """1 at the steps that move a factor, 0 at others: B first where they alternate. step: a number or a tensor."""
    if not h["alternate"]:
        return 1
    return step % 2 if role == "B" else 1 - step % 2


# weight_decay is the share of the weights itself, at the steps that move them
LOFT_OTHERS = replace(ADAM, decay=lambda h, step: h["weight_decay"])


def decay_of(role: str):
    return lambda h, step: h["weight_decay"] * turn_of(role, h, step)


LOFT = {role: replace(SGD_PLAIN, decay=decay_of(role)) for role in "AB"}


class LoftSite(PairSite):
    """One factor. Both are treated as A is: as columns x [r, columns] beside the other factor o [rows, r], B as its transpose."""

    @property
    def is_a(self) -> bool:
        return self.projection.role == "A"

    def step_pairs(self, pairs: list[Both], steps) -> None:
        for k, name in enumerate(("damping_a", "damping_b")):
            dampings = [steps.groups[both.slots[k].group][name] for both in pairs]
            for which in together((both.pair.rank, d) for both, d in zip(pairs, dampings, strict=True)):
                self._step_factors([pairs[i] for i in which], k, dampings[which[0]], steps)

    def _step_factors(self, pairs: list[Both], k: int, damping: float, steps) -> None:
        """Steps factor A (k = 0) or B (1) of pairs of one rank, from the weights before this step."""
        slots, sites = [both.slots[k] for both in pairs], [both.sites[k] for both in pairs]
        others = [both.weights[1 - k] if k == 0 else both.weights[1 - k].t() for both in pairs]
        entries = [slot.entry for slot in slots]
        c = inverse(grams([o.t() for o in others]), damping)
        olds = [e["loft_other"] if k == 0 else e["loft_other"].t() for e in entries]
        calibrations = c @ products([o.t() for o in others], [old.t() for old in olds])
        for both, slot, site, o, inv, r in zip(pairs, slots, sites, others, c, calibrations, strict=True):
            h, numbers = steps.groups[slot.group], steps.scalars.numbers[slot.row]
            s = both.pair.scale if h["use_scale"] else 1.0
            g = both.grads[k] if k == 0 else both.grads[k].t()
            g = (inv @ g.double() / s).to(site.dtype) * numbers.grad_sign
            m, p = site._moments(slot.entry, g, r.to(site.dtype), h, steps.found)
            skipping(steps.found, both.weights[1 - k], slot.entry["loft_other"])
            turn = turn_of(site.projection.role, h, numbers.step)
            if not isinstance(turn, torch.Tensor) and not turn:
                continue
            u = site._update(m, p, o, inv.to(site.dtype) / s, h, numbers.step)
            if isinstance(turn, torch.Tensor):
                u = torch.where(turn.to(u.device) != 0, u, 0.0)
            site.update_param(slot, u if k == 0 else u.t(), steps)

    def _moments(self, entry: dict, g: torch.Tensor, r: torch.Tensor, h: dict, found):
        """m <- b1 R m + (1 - b1) g, [r, columns], and of each column P <- b2 R P R^T + (1 - b2) g g^T, [columns, r, r]."""
        beta1, beta2 = (b.to(g.device, g.dtype) if isinstance(b, torch.Tensor) else b for b in h["betas"])
        m, p = entry["loft_exp_avg"], entry["loft_products"]
        m = r @ (m if self.is_a else m.t()) * beta1 + (1 - beta1) * g
        around = r.t() if h["transposed_calibration"] else r
        columns = g.t()
        p = (around @ p @ around.t()) * beta2 + (1 - beta2) * (columns[:, :, None] * columns[:, None, :])
        skipping(found, m if self.is_a else m.t(), entry["loft_exp_avg"])
        skipping(found, p, entry["loft_products"])
        return m, p

    def _update(self, m, p, o, c, h: dict, step) -> torch.Tensor:
        """C O^T U with U = M / (sqrt(V / c2) + eps) / c1, M = O m, V_ij = o_i^T P_j o_j, some columns at a time."""
        if isinstance(step, torch.Tensor):
            step = step.to(m.device)
        beta1, beta2 = (b.to(m.device, torch.float64) if isinstance(b, torch.Tensor) else b for b in h["betas"])
        c1, c2 = (1 - b**step for b in (beta1, beta2))
        out = torch.empty_like(m)
        squares = (o[:, :, None] * o[:, None, :]).flatten(1)
        width = max(1, (CHUNK if m.is_cuda else CPU_CHUNK) // o.shape[0])
        back = c @ o.t()
        for first in range(0, m.shape[1], width):
            part = slice(first, first + width)
            v = (squares @ p[part].flatten(1).t()).clamp_(min=0.0)
            u = (o @ m[:, part]) / ((v / c2).sqrt_() + h["eps"])
            out[:, part] = back @ u
        return out / c1


@dataclass(frozen=True)
class LoftPair(PairProjection):
    """A factor of a pair of `LoFTAdamW`."""

    name: ClassVar[str] = "loft"
    site: ClassVar[type] = LoftSite

    def rule_for(self, rule: Rule) -> Rule:
        return LOFT[self.role]

    def tensors(self, p):
        (r, n), m = self.pair.A.shape, self.pair.B.shape[0]
        wide = torch.float64 if torch.float64 in (self.pair.A.dtype, self.pair.B.dtype) else torch.float32
        own, columns, other = ((r, n), n, (m, r)) if self.role == "A" else ((m, r), m, (r, n))
        return {name: (shape, wide) for name, shape in zip(STATES, (own, (columns, r, r), other), strict=True)}
