"""Algebra of LoRA factors, batched over pairs of one rank: Gram matrices, their inverses, and the factor gradients whose product
step is nearest to the full one (LoRA-Pro, arXiv 2407.18242). In fp64, as Gram matrices square condition numbers; without eigenvalue
solvers, whose error checks wait for a GPU."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence

import torch

EPS = torch.finfo(torch.float64).eps
FLOOR = 4 * EPS  # of the eigenvalues of a Gram matrix, by its trace: what rounding leaves of them
DOUBLINGS = 32  # of the Smith iteration, whose powers must reach 37 / 4 sqrt(r cond): 2^31 at FLOOR and r = 64


def _plus(gram: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """gram + d I of each, where a d of zero counts as 1: only of a zero matrix."""
    d = torch.where(d > 0, d, 1.0)[..., None, None]
    return gram + d * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _trace(x: torch.Tensor) -> torch.Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


def inverse(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """(gram + d I)^-1 of Gram matrices [k, r, r], with d = damping, or what rounding needs where that is more."""
    least = _trace(gram) * FLOOR
    return torch.linalg.inv_ex(_plus(gram, least.clamp(min=damping))).inverse


def sylvester(left: torch.Tensor, right: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """X of left X + X right = rhs, for Gram matrices [k, r, r] of which one is not singular.

    Smith's method with doubling: X = Y + U Y V + U^2 Y V^2 + ... with U = (left - q)(left + q)^-1 and V alike; q suits the better
    conditioned side.
    """
    least = (_trace(left) + _trace(right)) * FLOOR
    left, right = _plus(left, least), _plus(right, least)
    high, low = (
        [_trace(x) for x in (left, right)],
        [1 / _trace(torch.linalg.inv_ex(x).inverse) for x in (left, right)],
    )
    middles = [(h * x).sqrt() for h, x in zip(high, low, strict=True)]
    q = torch.where(high[0] / low[0] <= high[1] / low[1], middles[0], middles[1])
    inverses = [torch.linalg.inv_ex(_plus(x, q)).inverse for x in (left, right)]
    q = q[..., None, None]
    x = 2 * q * (inverses[0] @ rhs @ inverses[1])
    unit = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device)
    u, v = (unit - 2 * q * y for y in inverses)
    for _ in range(DOUBLINGS):
        x = x + u @ x @ v
        u, v = u @ u, v @ v
    return x


def together(keys: Iterable[Hashable]) -> list[list[int]]:
    """Indices of the pairs that are batched: those with one key."""
    found: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return list(found.values())


def grams(xs: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp64 [k, r, r]: x x^T of each x [r, any]."""
    return products(xs, xs)


def products(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp64 [k, r, r]: x y^T of each pair [r, any]."""
    return torch.stack([x.double() @ y.double().t() for x, y in zip(xs, ys, strict=True)])


class Factors:
    """Pairs of one rank with the inverses of their Gram matrices: C_B = (B^T B + damping)^-1, C_A = (A A^T + damping)^-1."""

    def __init__(self, a: list[torch.Tensor], b: list[torch.Tensor], scales: list[float], damping: float):
        self.a, self.b, self.scales = a, b, scales
        self.gram_a, self.gram_b = grams(a), grams([x.t() for x in b])
        self.inverse_a, self.inverse_b = inverse(self.gram_a, damping), inverse(self.gram_b, damping)

    def scaled(self, grad_a: list[torch.Tensor], grad_b: list[torch.Tensor]) -> Iterator[tuple]:
        """C_B g_A and g_B C_A of each pair, in the dtype of its gradients."""
        for ga, gb, ca, cb in zip(grad_a, grad_b, self.inverse_a, self.inverse_b, strict=True):
            yield (cb @ ga.double()).to(ga.dtype), (gb.double() @ ca).to(gb.dtype)

    def nearest(self, grad_a: list[torch.Tensor], grad_b: list[torch.Tensor], closest: bool = True) -> Iterator[tuple]:
        """Factor gradients of each pair, in the dtype of its gradients:
            t_A = C_B g_A / s^2 + X A,  t_B = (I - B C_B B^T) g_B C_A / s^2 - B X,
        whose product gradient s (B t_A + t_B A) does not depend on X. closest: X minimises |t_A - g_A|^2 + |t_B - g_B|^2; else 0.
        """
        cross = products([b.t() for b in self.b], [g.t() for g in grad_b])  # B^T g_B
        inverse_s2 = torch.stack(
            [torch.full((), s**-2.0, dtype=torch.float64, device=cross.device) for s in self.scales]
        )
        left = self.inverse_b * inverse_s2[:, None, None]
        core = left @ cross @ self.inverse_a
        x = None
        if closest:
            with_a = products(grad_a, self.a)  # g_A A^T, which is B^T g_B but for rounding
            rest = cross @ self.inverse_a * inverse_s2[:, None, None] - self.gram_b @ core  # B^T t_B without X
            x = sylvester(self.gram_b, self.gram_a, with_a - cross - left @ with_a + rest)
            core = core + x
        for i, (ga, gb) in enumerate(zip(grad_a, grad_b, strict=True)):
            ta = left[i] @ ga.double()
            if x is not None:
                ta += x[i] @ self.a[i].double()
            tb = gb.double() @ (self.inverse_a[i] * inverse_s2[i]) - self.b[i].double() @ core[i]
            yield ta.to(ga.dtype), tb.to(gb.dtype)
