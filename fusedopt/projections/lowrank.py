"""Low-rank gradients that a backward pass accumulates in place of full ones, and sketches of the gradients behind them.

Of y = x W^T, G = dY^T X is [rows, cols]. Left: R = P^T G = (dY P)^T X; right: R = G P^T = dY^T (X P^T); G is never formed.
Where a refresh is due, a sketch S = G Omega (left, Omega random [cols, width]) or Omega^T G (right, [rows, width]) is
accumulated beside R; both are linear in G, so that they add up over backward passes. The leading singular vectors of S span
nearly the best subspace of G (projection-cost preserving sketches: Cohen, Elder, Musco, Musco, Persu 2015, section 6); the
two-sided one-pass sketch of Tropp et al. 2017 was tried with as many numbers and keeps less on slowly decaying spectra (0.79
against 0.88 of the SVD's energy for singular values i^-1/2, rank 32 of 512).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fusedopt.projections.base import due, places
from fusedopt.projections.seeds import generator
from fusedopt.projections.subspace import random_basis

REFRESHES = ("sketch", "full")
_FAST_BF16 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # elsewhere torch's bf16 products are scalar loops
_BLOCK = 1 << 20  # elements converted at a time


def parts(dy: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """dY [tokens, rows] and X [tokens, cols] in a dtype to multiply in: as they are, or some tokens at a time in fp32.

    fp16 is converted because sums of loss-scaled gradients overflow it.
    """
    if dy.dtype == dtype or dy.dtype == torch.bfloat16 and (dy.is_cuda or _FAST_BF16):
        yield dy, x
        return
    block = max(1, _BLOCK // (dy.shape[1] + x.shape[1]))
    for first in range(0, len(dy), block):
        yield dy[first : first + block].to(dtype), x[first : first + block].to(dtype)


def add_products(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """out += left^T right."""
    if left.dtype == out.dtype:
        out.addmm_(left.t(), right)
    else:
        out.add_(torch.mm(left.t(), right))


def accumulate(out: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, basis: torch.Tensor, side: str) -> None:
    """out += P^T dY^T X (left; P [rows, r]) or dY^T X P^T (right; P [r, cols])."""
    for dy_part, x_part in parts(dy, x, out.dtype):
        factor = basis.to(dy_part.dtype)
        if side == "left":
            add_products(out, torch.mm(dy_part, factor), x_part)
        else:
            add_products(out, dy_part, torch.mm(x_part, factor.t()))


def random_matrix(shape: tuple[int, int], width: int, side: str, device, **keys) -> torch.Tensor:
    """The Gaussian Omega of a sketch, fp32, transposed as a basis is: [width, cols] (left) or [rows, width] (right).

    keys: seed, tensor_id, step.
    """
    size = (width, shape[1]) if side == "left" else (shape[0], width)
    gen = generator(device, ~keys["seed"], keys["tensor_id"], keys["step"])  # not the numbers of a random basis
    return torch.randn(size, generator=gen, device=device)


def sketch_basis(sketch: torch.Tensor, rank: int, side: str, old: torch.Tensor) -> torch.Tensor:
    """The basis of a sketch S (left: [rows, width], right: [width, cols]): its leading singular vectors, each pointing the
    way of the old one with its number. A sketch that is all zero or not finite gives back `old`.

    By the Gram matrix of S in fp64, which loses nothing of an fp32 sketch, in half the time of its SVD (4096 x 512, 2 cores).
    """
    tall, before = (sketch.double(), old) if side == "left" else (sketch.double().t(), old.t())
    gram = tall.t() @ tall
    valid = torch.isfinite(gram).all() & (gram.diagonal().sum() > 0)
    gram = torch.where(valid, gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    leading = tall @ torch.linalg.eigh(gram)[1].flip(1)[:, :rank]
    new = torch.linalg.qr(leading)[0]  # also completes the basis where the sketch has a lower rank
    new = torch.where((new * before).sum(0) < 0, -new, new).to(old.dtype)
    return torch.where(valid, new if side == "left" else new.t(), old)


class LowRankGradient:
    """What takes the place of one parameter's .grad: `gradient` [rank, cols] or [rows, rank], None before a backward pass.

    Where a refresh is due there is also a sketch, or the full gradient, or the new basis if it does not depend on them.
    """

    def __init__(self, p: torch.nn.Parameter, owner: LowRankGradients):
        self.param, self.owner = p, owner
        self.gradient: torch.Tensor | None = None
        self.sketch: torch.Tensor | None = None
        self.full: torch.Tensor | None = None
        self.basis: torch.Tensor | None = None
        self.entry: dict | None = None
        self._counted: dict | None = None  # the state dict whose steps on the device `_step` counts
        self._step = 0

    def clear(self) -> None:
        self.gradient = self.sketch = self.full = self.basis = None

    def zero(self) -> None:
        for t in (self.gradient, self.sketch, self.full):
            if t is not None:
                t.zero_()

    def bytes(self) -> int:
        alive = [t for t in (self.gradient, self.sketch, self.full, self.basis) if t is not None]
        return sum(t.numel() * t.element_size() for t in alive)

    def nonfinite(self) -> torch.Tensor:
        return ~torch.isfinite((self.gradient if self.full is None else self.full).sum(dtype=torch.float64))

    def _next_step(self) -> int:
        count = self.entry["step"]
        if count.device.type == "cpu":
            return int(count) + 1
        if self._counted is not self.entry:  # once: it would wait for the device
            self._counted, self._step = self.entry, int(count)
        return self._step + 1

    @torch.no_grad()
    def add(self, dy: torch.Tensor, x: torch.Tensor) -> bool:
        """Accumulates dY [tokens, rows] and X [tokens, cols]. False: the parameter is not projected (any more)."""
        if self.gradient is None and not self._begin():
            return False
        if self.full is not None:
            add_products(self.full, dy.to(self.full.dtype), x.to(self.full.dtype))
            return True
        basis = self.entry["projector"] if self.basis is None else self.basis
        accumulate(self.gradient, dy, x, basis, self._side)
        if self.sketch is not None:
            omega = random_matrix(self._shape, self._width, self._side, dy.device, **self._keys)
            other = "right" if self._side == "left" else "left"  # a sketch of columns is a product from the right
            accumulate(self.sketch, dy, x, omega, other)
        return True

    def _begin(self) -> bool:
        """Before the first backward pass of a step: the basis it projects with, and empty buffers."""
        found = self.owner.place_of(self.param)
        if found is None:
            return False
        tensor_id, group, projection, place = found
        p, opt = self.param, self.owner.opt
        self.entry = opt.init_state(p, group, opt.rule_for(group))
        step = self._next_step()
        self._shape = (rows, cols) = tuple(p.shape)
        self._side, rank = projection.side_for(self._shape), projection.rank_for(self._shape)
        self._keys = {"seed": group["seed"], "tensor_id": tensor_id, "step": step}
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        self.gradient = torch.zeros(projection.state_shape(self._shape), dtype=dtype, device=p.device)
        if not due(projection, place, step):
            return True
        if projection.method == "random" or step == 1 and self.owner.refresh == "sketch":
            basis = random_basis(self._shape, rank, self._side, **self._keys, device=p.device)
            self.basis = basis.to(self.entry["projector"].dtype)
        if projection.method != "random":
            if self.owner.refresh == "full":
                self.full = torch.zeros_like(p, memory_format=torch.contiguous_format)
            else:
                self._width = min(self.owner.width * rank, *self._shape)
                size = (rows, self._width) if self._side == "left" else (self._width, cols)
                self.sketch = torch.zeros(size, dtype=dtype, device=p.device)
        return True

    def before(self, slot, step: int, steps) -> None:
        """Before the launch of directions: the basis becomes the one that `gradient` was projected with."""
        if self.full is not None:
            slot.site.before(self.full, step, slot, steps)
        elif self.basis is not None:
            slot.site.set_basis(self.basis)
            slot.site.refreshed(slot, step)

    def after(self, slot, step: int) -> None:
        """After the update: a sketch gives the basis of the steps to come."""
        self._step = step
        if self.sketch is not None:
            slot.site.set_basis(sketch_basis(self.sketch, slot.site.rank, slot.site.side, slot.site.basis()))
            slot.site.refreshed(slot, step)


class LowRankGradients:
    """The low-rank gradients of one optimizer."""

    def __init__(self, opt, params: list[torch.nn.Parameter], refresh: str, width: int):
        self.opt, self.refresh, self.width = opt, refresh, width
        self.sources = {p: LowRankGradient(p, self) for p in params}
        self._known: tuple = ()
        self._places: dict = {}

    def place_of(self, p: torch.Tensor):
        """(tensor id, group, projection, place among the projected parameters), or None."""
        groups = self.opt.param_groups
        now = tuple((id(g), id(g["projection"]), len(g["params"])) for g in groups)
        if now != self._known:
            owners = [(q, group) for group in groups for q in group["params"]]
            found = places(self.opt)
            self._places = {owners[i][0]: (i, owners[i][1], *found[i]) for i in found}
            self._known = now
        return self._places.get(p)

    def of(self, p: torch.Tensor) -> LowRankGradient | None:
        """What has taken the place of a parameter's .grad since the last step, or None."""
        source = self.sources.get(p)
        return source if source is not None and source.gradient is not None else None

    def gradients(self, params: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """The gradients of a step: .grad, or the low-rank one. Raises RuntimeError for a parameter that has both."""
        out = []
        for index, p in enumerate(params):
            source = self.of(p)
            if source is not None:
                self._check(index, p, source)
            out.append(p.grad if source is None else source.gradient)
        return out

    def _check(self, index: int, p: torch.Tensor, source: LowRankGradient) -> None:
        what = f"{type(self.opt).__name__}: parameter {index} (shape {tuple(p.shape)})"
        if self.opt.clip_grad_norm is not None:
            raise RuntimeError(f"{what} has a low-rank gradient from projected_linear: clip_grad_norm must stay None.")
        if p.grad is not None:
            raise RuntimeError(
                f"{what} has a low-rank gradient from projected_linear and a .grad from another use of the weight. "
                "Step it without projection: fusedopt.override(weight, projection=None) before projected_linear."
            )
        if self.opt.state.get(p) is not source.entry:
            raise RuntimeError(
                f"{what}: its state was replaced after the backward pass that projected its gradient. "
                "Call opt.zero_grad() after load_state_dict."
            )

    def signature(self) -> tuple:
        return tuple(source.gradient is not None for source in self.sources.values())

    def check_amp(self, grad_scale, found_inf):
        """found_inf with what GradScaler cannot see. Raises RuntimeError after scaler.unscale_, which skips these gradients."""
        if found_inf is None:
            return None
        live = [s for s in self.sources.values() if s.gradient is not None]
        if live and grad_scale is None:
            raise RuntimeError(
                f"{type(self.opt).__name__}: scaler.unscale_(optimizer) has unscaled .grad, but not the low-rank gradients of "
                "projected_linear. Leave it out: scaler.step(optimizer) unscales inside the step."
            )
        for source in live:
            found_inf = torch.maximum(found_inf, source.nonfinite().to(found_inf.device, found_inf.dtype))
        return found_inf

    def clear(self) -> None:
        for source in self.sources.values():
            source.clear()

    def zero(self, set_to_none: bool) -> None:
        for source in self.sources.values():
            source.clear() if set_to_none else source.zero()

    def bytes(self) -> int:
        return sum(source.bytes() for source in self.sources.values())
