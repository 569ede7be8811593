"""What follows a step of any rule: Lookahead, LAWN, Layca, CAGE's pull; and what goes before it: norm loss, stable decay.

All act on fp32 weights: what is kept beside 16-bit ones (split, kahan, master) counts and is kept up to date; without it they
are rounded to nearest once more. For the time of the step they take up to four times the weights' size in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fusedopt.distributed import is_dtensor
from fusedopt.states import decode
from fusedopt.transforms.base import Batch, Tensors, Transform
from fusedopt.transforms.clipping import check_positive, unit_norms
from fusedopt.transforms.orthogonal import remove_component


def check_count(cls: str, name: str, value, least: int = 0) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{cls}: invalid {name}: {value!r}; it is an integer of at least {least}")


def each_group(batch: Batch, option: Callable[[dict], float | torch.Tensor]) -> torch.Tensor:
    """fp64 [n]: an option of the group of each tensor."""
    found = {id(g): g for g in batch.groups}
    values = {key: _on(batch.device, option(g)) for key, g in found.items()}
    return torch.stack([values[id(g)] for g in batch.groups])


def _on(device: torch.device, x: float | torch.Tensor) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x.detach().to(device, torch.float64).view(())
    return torch.full((), float(x), dtype=torch.float64, device=device)  # a launch, which a graph can capture


def rates(batch: Batch) -> torch.Tensor:
    """fp64 [n]: the learning rate of each tensor."""
    return each_group(batch, lambda g: g["lr"])


def decays(batch: Batch) -> torch.Tensor:
    """fp64 [n]: the share of each tensor's weights that decoupled decay has taken in this step. For `after`."""
    rows = [slot.row for slot in batch.slots]
    found = {row: _on(batch.device, batch.scalars.numbers[row].decay) for row in rows}
    return torch.stack([found[row] for row in rows])


def on_device(batch: Batch, counts) -> torch.Tensor:
    """Counts as fp64 [n] on the device."""
    return torch.as_tensor(counts, dtype=torch.float64).to(batch.device)


def scaled(xs: Tensors, factors: torch.Tensor) -> Tensors:
    return torch._foreach_mul(xs, list(factors.to(xs[0].dtype).unbind()))


@dataclass(frozen=True)
class Lookahead(Transform):
    """Every `every` steps: slow <- slow + alpha (p - slow), p <- slow. slow begins as the weights before the first step.

    When to use it: steadier training at a learning rate that is a little too high; a component of Ranger21.

    Args:
        every: steps between two averagings. alpha: share of the way that slow weights go, in (0, 1].
    State: `lookahead_slow`, fp32, 4 bytes per element. Raises ValueError: an option is out of range.
    Source: arXiv 1907.08610, algorithm 1.
    """

    every: int = 5
    alpha: float = 0.5
    name = "lookahead"
    keeps = ("lookahead_slow",)
    counts = reads_weights = after_step = True

    def __post_init__(self):
        check_count("Lookahead", "every", self.every, 1)
        if not 0.0 < self.alpha <= 1.0:
            raise ValueError(f"Lookahead: invalid alpha: {self.alpha}; it is in (0, 1]")

    def each(self, batch: Batch) -> None:
        before = batch.kept[self.name] = batch.count(self.name)
        slow = batch.states("lookahead_slow")
        if batch.on_device:
            first = (before == 0).unbind()
            batch.put(slow, [torch.where(f, w, s) for f, w, s in zip(first, batch.weights(), slow, strict=True)])
        elif new := [i for i, n in enumerate(before) if n == 0]:
            torch._foreach_copy_([slow[i] for i in new], batch.only(new).weights())

    def after(self, batches: list[Batch]) -> None:
        for batch in batches:
            counts = batch.kept[self.name]
            if batch.on_device:
                due = ((counts + 1) % self.every == 0).unbind()
                self._average(batch, due)
            elif which := [i for i, n in enumerate(counts) if (n + 1) % self.every == 0]:
                self._average(batch.only(which), None)

    def _average(self, batch: Batch, due) -> None:
        slow, fast = batch.states("lookahead_slow"), batch.weights()
        new = torch._foreach_lerp(slow, fast, self.alpha)
        if due is None:
            batch.set_weights(new)
        else:
            batch.set_weights([torch.where(d, n, w) for d, n, w in zip(due, new, fast, strict=True)])
            new = [torch.where(d, n, s) for d, n, s in zip(due, new, slow, strict=True)]
        batch.put(slow, new)


@dataclass(frozen=True)
class LAWN(Transform):
    """From step free_steps + 1 on: g <- g - (<p, g> / |p|^2) p before the step, and p <- c p / |p| after it, with c = |p| at
    the end of the free steps, for each tensor.

    When to use it: large batches; with weight_decay=0, and a learning rate that warms up again after the free steps. Leave
    tensors whose scale matters out by groups with transform_gradients=False.

    Args:
        free_steps: steps without a constraint.
    A tensor that is zero then is bound by its first norm that is not. State: `lawn_norm`, one number. Sums over each tensor.
    Raises ValueError: free_steps is negative.
    Source: Logit Attenuating Weight Normalization (arXiv 2108.05839); whether the update itself is projected again
    is not said there: here it is not, the rescaling makes that second order.
    """

    free_steps: int = 0
    name = "lawn"
    scope = "tensor"
    keeps = ("lawn_norm",)
    counts = reads_weights = after_step = True

    def __post_init__(self):
        check_count("LAWN", "free_steps", self.free_steps)

    def shapes(self, p):
        return {"lawn_norm": ()}

    def each(self, batch: Batch) -> None:
        bound = on_device(batch, batch.count(self.name)) >= self.free_steps
        batch.kept[self.name] = bound
        weights, free = batch.weights(), torch._foreach_mul(batch.grads, 1.0)
        norms = batch.square_norms(weights).sqrt()
        kept = torch.stack(batch.states("lawn_norm"))
        kept = torch.where(bound & (kept == 0), norms.to(kept.dtype), kept)
        batch.put(batch.states("lawn_norm"), list(kept.unbind()))
        remove_component(batch, weights)
        for b, g, f in zip(bound.unbind(), batch.grads, free, strict=True):
            g.copy_(torch.where(b, g, f))

    def after(self, batches: list[Batch]) -> None:
        for batch in batches:
            weights = batch.weights()
            norms = batch.square_norms(weights).sqrt()
            wanted = torch.stack(batch.states("lawn_norm")).double()
            move = batch.kept[self.name] & (norms > 0) & (wanted > 0)
            batch.set_weights(scaled(weights, torch.where(move, wanted / norms.clamp(min=1e-300), 1.0)))


@dataclass(frozen=True)
class Layca(Transform):
    """Replaces each step s of a tensor by one across its weights, as long as lr times them:
    s <- s - (<s, p> / |p|^2) p, s <- s |p| / |s|, p <- p + lr s, and p <- p |p_0| / |p|.

    When to use it: to control how far each layer turns; lr is then the rotation per step in radians.

    State: `layca_norm`, one number; the weights before the step are kept during it (4 bytes per element). Sums over each tensor.
    Source: Layer rotation (arXiv 1806.01603). A tensor that the rule does not move across itself stays.
    """

    name = "layca"
    scope = "tensor"
    keeps = ("layca_norm",)
    reads_weights = after_step = True

    def shapes(self, p):
        return {"layca_norm": ()}

    def each(self, batch: Batch) -> None:
        old = batch.kept[self.name] = torch._foreach_mul(batch.weights(), 1.0)
        kept = torch.stack(batch.states("layca_norm"))
        norms = batch.square_norms(old).sqrt().to(kept.dtype)
        batch.put(batch.states("layca_norm"), list(torch.where(kept == 0, norms, kept).unbind()))

    def after(self, batches: list[Batch]) -> None:
        for batch in batches:
            old = batch.kept.pop(self.name)
            step = replace(batch, grads=torch._foreach_sub(batch.weights(), old))
            length = step.square_norms(step.grads).sqrt()
            remove_component(step, old)
            across = step.square_norms(step.grads).sqrt()
            moved = across > 4 * torch.finfo(step.dtype).eps * length
            norms = batch.square_norms(old).sqrt()
            factor = torch.where(moved, rates(batch) * norms / across.clamp(min=1e-300), 0.0)
            new = torch._foreach_add(old, scaled(step.grads, factor))
            wanted = torch.stack(batch.states("layca_norm")).double()
            size = batch.square_norms(new).sqrt()
            batch.set_weights(scaled(new, torch.where(size > 0, wanted / size.clamp(min=1e-300), 1.0)))


def round_rows(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x rounded to 2^bits - 1 evenly spaced values of each row, symmetric about 0; the largest stays as it is."""
    top = 2 ** (bits - 1) - 1
    rows = x.reshape(x.shape[0], -1) if x.dim() > 1 else x.reshape(1, -1)
    step = rows.abs().amax(1, keepdim=True) / top
    return (torch.round(rows / step.clamp(min=1e-30)) * step).view(x.shape)


@dataclass(frozen=True)
class QuantizationPull(Transform):
    """After the step p <- p - lr kappa_t (p - Q(p)), with kappa_t = 0 for `silent` steps and then rising to kappa in `ramp`.

    When to use it: training that ends in weights of few bits (quantisation-aware training).

    Args:
        kappa: strength. silent, ramp: steps. bits: of Q, a symmetric rounding of rows by their largest element, 2 to 16.
        quantize: Q itself, a function of a tensor that returns one like it, in place of `bits`.
    State: the count of steps. Sums over rows; with `quantize`, whole tensors. Raises ValueError: an option is out of range.
    Source: CAGE (curvature-aware gradient estimation for QAT), its decoupled pull; the linear ramp is ours.
    """

    kappa: float = 1.0
    silent: int = 0
    ramp: int = 1
    bits: int = 4
    quantize: Callable[[torch.Tensor], torch.Tensor] | None = None
    name = "pull"
    scope = "row"
    counts = reads_weights = after_step = True

    def __post_init__(self):
        check_positive("QuantizationPull", "kappa", self.kappa)
        check_count("QuantizationPull", "silent", self.silent)
        check_count("QuantizationPull", "ramp", self.ramp, 1)
        check_count("QuantizationPull", "bits", self.bits, 2)

    def refuses(self, p):
        vector = is_dtensor(p) and (p.dim() < 2 or self.quantize is not None)
        return super().refuses(p) or ("is a DTensor, and it rounds all of it together" if vector else None)

    def each(self, batch: Batch) -> None:
        before = on_device(batch, batch.count(self.name))
        batch.kept[self.name] = ((before + 1 - self.silent) / self.ramp).clamp(0.0, 1.0) * self.kappa

    def after(self, batches: list[Batch]) -> None:
        for batch in batches:
            rest = [w - (self.quantize(w) if self.quantize else round_rows(w, self.bits)) if w.numel() else w
                    for w in batch.weights()]  # fmt: skip
            pull = scaled(rest, -(rates(batch) * batch.kept[self.name]))
            batch.set_weights(torch._foreach_add(batch.weights(), pull))


@dataclass(frozen=True)
class NormLoss(Transform):
    """Before the step p <- p (1 - 2 lr factor (1 - 1 / (N(p) + eps))) with the unit norms N: rows and filters go towards norm 1.

    When to use it: instead of weight decay in networks with normalisation; a component of Ranger21.

    State: none. Sums over rows. Raises ValueError: factor or eps is not positive.
    Source: arXiv 2103.06583, as Ranger21 (arXiv 2106.13731) applies it.
    """

    factor: float = 1e-4
    eps: float = 1e-8
    name = "norm_loss"
    scope = "row"
    reads_weights = True

    def __post_init__(self):
        check_positive("NormLoss", "factor", self.factor)
        check_positive("NormLoss", "eps", self.eps)

    def each(self, batch: Batch) -> None:
        for part in batch.chunks():
            weights = part.weights()
            new = []
            for w, norm, lr in zip(weights, unit_norms(part, weights), rates(part).to(part.dtype), strict=True):
                new.append(w * (1 - 2 * lr * self.factor * (1 - 1 / (norm + self.eps))))
            part.set_weights(new)


@dataclass(frozen=True)
class StableDecay(Transform):
    """Before the step p <- p (1 - lr decay / sigma) with sigma = sqrt(mean of v / (1 - beta2^t)) over all elements of all tensors,
    v the second moment with this step's gradient: decay that does not change with the size of gradients.

    When to use it: with Adam and its kin, in place of weight_decay; a component of Ranger21.

    Args:
        decay: coefficient; None for the weight_decay of each group, of a rule that does not decay by itself.
    State: the count of steps; reads the rule's `exp_avg_sq`. Sums over all tensors. Raises ValueError: decay is not positive;
    at the step: a rule without `exp_avg_sq`. Source: arXiv 2011.11152, as Ranger21 (arXiv 2106.13731) applies it.
    """

    decay: float | None = 1e-4
    name = "stable_decay"
    scope = "model"
    counts = reads_weights = True

    def __post_init__(self):
        if self.decay is not None:
            check_positive("StableDecay", "decay", self.decay)

    def ready(self, batches: list[Batch]) -> None:
        for slot in (s for batch in batches for s in batch.slots):
            group = batches[0].opt.param_groups[slot.group]
            if slot.site is not None or "exp_avg_sq" not in slot.rule.state_names or "betas" not in group:
                raise ValueError(
                    f"StableDecay: rule {slot.rule.name!r} keeps no full exp_avg_sq of parameter {slot.tensor_id} by betas. Use "
                    "Adam, AdamW or another rule with second moments, without projection."
                )

    def before(self, batches: list[Batch]) -> None:
        home, total, size = batches[0].device, 0.0, 0.0
        for batch in batches:
            counts = on_device(batch, batch.count(self.name))
            moments = [
                decode(s.param, s.entry, s.rule.states[s.rule.state_names.index("exp_avg_sq")]) for s in batch.slots
            ]
            betas = each_group(batch, lambda g: g["betas"][1])
            now = betas * batch.sums(moments) + (1 - betas) * batch.square_norms(batch.grads)
            total = total + (now / (1 - betas ** (counts + 1))).sum().to(home)
            size += sum(s.owner.numel() for s in batch.slots)
        sigma = (total / size).sqrt()
        for batch in batches:
            decay = each_group(batch, lambda g: g["weight_decay"]) if self.decay is None else self.decay
            factor = 1 - rates(batch) * decay / sigma.to(batch.device)
            batch.set_weights(scaled(batch.weights(), torch.where(sigma.to(batch.device) > 0, factor, 1.0)))
