"""Per-sample gradients: DP-SGD's clipping and noise, DiceSGD's error feedback, and batch-size tests (AdAdaGrad)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fusedopt.projections.base import check_positive_int
from fusedopt.transforms.base import Batch, Transform, _laid_out
from fusedopt.transforms.clipping import check_positive
from fusedopt.transforms.noise import add_noise_, key_of

PURPOSE = 0xD9


def per_sample_gradients(
    model: torch.nn.Module, loss_fn: Callable, inputs: torch.Tensor, targets: torch.Tensor, chunk: int = 16
) -> Iterator[dict[str, torch.Tensor]]:
    """By parameter name, the gradients of `chunk` samples at a time, [chunk, *shape]. loss_fn(model output, target): the loss of
    a batch of one. The model must treat samples apart: no batch normalisation in training mode.

    Memory: `chunk` gradients of the model.
    """
    check_positive_int(chunk, "chunk")
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    fixed = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    fixed.update(dict(model.named_buffers()))

    def loss(values, x, y):
        out = torch.func.functional_call(model, {**values, **fixed}, (x.unsqueeze(0),))
        return loss_fn(out, y.unsqueeze(0))

    every = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")
    for first in range(0, len(inputs), chunk):
        yield every(trained, inputs[first : first + chunk], targets[first : first + chunk])


def _sample_norms(grads: dict[str, torch.Tensor]) -> torch.Tensor:
    """fp64 [chunk]: the norm of each sample's gradient over all tensors."""
    return sum(g.double().flatten(1).square().sum(1) for g in grads.values()).sqrt()


def private_gradients(
    model: torch.nn.Module,
    loss_fn: Callable,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    max_norm: float,
    *,
    normalise: bool = False,
    chunk: int = 16,
    keep_mean: bool = False,
) -> None:
    """Sets each parameter's .grad to (1 / B) sum over samples of g_i min(1, max_norm / |g_i|): DP-SGD without its noise, for which
    the optimizer has `PrivacyNoise(noise_multiplier * max_norm / B)` as a gradient transform.

    Args:
        normalise: g_i / (|g_i| + 0.01) instead of clipping (automatic clipping, arXiv 2206.07136); max_norm is not used,
            and 1 for the noise.
        keep_mean: put the unclipped mean into `mean_grad` of each parameter, for `ErrorFeedback`.
    Raises ValueError: max_norm is not positive; no samples. Source: arXiv 1607.00133, algorithm 1.
    """
    check_positive("private_gradients", "max_norm", max_norm)
    if not len(inputs):
        raise ValueError("private_gradients: there are no samples")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    wide = {n: torch.float64 if p.dtype == torch.float64 else torch.float32 for n, p in named.items()}
    sums, means = ({n: torch.zeros_like(p, dtype=wide[n]).detach() for n, p in named.items()} for _ in "12")
    for grads in per_sample_gradients(model, loss_fn, inputs, targets, chunk):
        norms = _sample_norms(grads)
        factors = 1 / (norms + 0.01) if normalise else (max_norm / norms.clamp(min=1e-300)).clamp(max=1.0)
        for name, g in grads.items():
            sums[name] += torch.tensordot(factors.to(wide[name]), g.to(wide[name]), 1)
            if keep_mean:
                means[name] += g.to(wide[name]).sum(0)
    for name, p in named.items():
        p.grad = (sums[name] / len(inputs)).to(p.dtype)
        p.mean_grad = means[name] / len(inputs) if keep_mean else None


@dataclass(frozen=True)
class PrivacyNoise(Transform):
    """g <- g + std z, z ~ N(0, 1), drawn anew at each step and for each tensor.

    When to use it: last of the transforms, after `private_gradients`, with std = noise_multiplier * max_norm / batch size.
    The numbers are Philox's, of 24 bits, keyed by seed: choose a secret seed, and mind that no accountant is part of this.

    State: the count of steps. Raises ValueError: std is negative. Source: arXiv 1607.00133, algorithm 1.
    """

    std: float
    seed: int = 0
    name = "privacy"
    counts = True
    whole = True  # the shards' numbers would be those of whole tensors from their beginning

    def __post_init__(self):
        if not self.std >= 0.0:
            raise ValueError(f"PrivacyNoise: invalid std: {self.std}; it is 0 or more")

    def each(self, batch: Batch) -> None:
        steps = batch.count(self.name)
        for slot, g, step in zip(batch.slots, batch.grads, steps, strict=True):
            add_noise_(g, self.std, key_of(self.seed, PURPOSE), slot.tensor_id, step)


@dataclass(frozen=True)
class ErrorFeedback(Transform):
    """DiceSGD: v = g + e min(1, max_norm / |e|), e <- e + mean - v, g <- v, with the norm of e over all tensors; g is the mean of
    clipped and `mean` that of unclipped gradients of samples: private_gradients(..., keep_mean=True). `PrivacyNoise` is next.

    When to use it: DP-SGD whose clipping threshold biases it.

    Args:
        max_norm: at least that of the clipping.
    State: `feedback_error`, fp32, 4 bytes per element. Sums over all tensors. mean_grad is dropped by the step.
    Raises ValueError: max_norm is not positive; at the step: no mean_grad. Source: arXiv 2311.14632.
    """

    max_norm: float
    name = "feedback"
    scope = "model"
    whole = True
    keeps = ("feedback_error",)

    def __post_init__(self):
        check_positive("ErrorFeedback", "max_norm", self.max_norm)

    def ready(self, batches: list[Batch]) -> None:
        lost = [s.tensor_id for b in batches for s in b.slots if getattr(s.owner, "mean_grad", None) is None]
        if lost:
            raise ValueError(
                f"ErrorFeedback: parameter {lost[0]} has no mean_grad. Call private_gradients(..., keep_mean=True) before the step."
            )

    def before(self, batches: list[Batch]) -> None:
        home = batches[0].device
        square = sum(b.square_norms(b.states("feedback_error")).sum().to(home) for b in batches)
        factor = (self.max_norm / square.sqrt().clamp(min=1e-300)).clamp(max=1.0)
        for batch in batches:
            errors = batch.states("feedback_error")
            torch._foreach_add_(batch.grads, torch._foreach_mul(errors, factor.to(batch.device, batch.dtype)))
            means = [
                _laid_out(s.owner.mean_grad.to(batch.dtype), g) for s, g in zip(batch.slots, batch.grads, strict=True)
            ]
            batch.put(errors, torch._foreach_sub(torch._foreach_add(errors, means), batch.grads))
            for slot in batch.slots:
                slot.owner.mean_grad = None


def batch_size_tests(
    model: torch.nn.Module,
    loss_fn: Callable,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    eta: float = 0.5,
    theta: float = 0.9,
    nu: float = 5.8,
    chunk: int = 16,
) -> dict[str, float]:
    """AdAdaGrad's tests of whether a batch is large enough, from its samples' gradients g_i with mean g; changes nothing.

    norm: V / (eta^2 |g|^2) with V the sum over coordinates of their unbiased variance. inner_product: Var <g_i, g> / (theta^2
    |g|^4). orthogonality: sum of the variances of g_i - (<g_i, g> / |g|^2) g by (nu^2 |g|^2). Each is a batch size that would
    pass. batch_size: that of the norm test, never below this batch; augmented: that of the larger of the other two. Two passes.

    Raises ValueError: fewer than two samples; a mean gradient of zero. Source: arXiv 2402.11215.
    """
    count = len(inputs)
    if count < 2:
        raise ValueError(f"batch_size_tests: {count} samples; a variance needs two")
    mean: dict[str, torch.Tensor] = {}
    squares = 0.0
    for grads in per_sample_gradients(model, loss_fn, inputs, targets, chunk):
        squares += float(_sample_norms(grads).square().sum())
        for name, g in grads.items():
            mean[name] = mean.get(name, 0.0) + g.double().sum(0) / count
    square = float(sum(m.square().sum() for m in mean.values()))
    if square == 0.0:
        raise ValueError("batch_size_tests: the mean gradient is zero, which no batch size tells from noise")
    dots = torch.cat([
        sum((g.double() * mean[name]).flatten(1).sum(1) for name, g in grads.items())
        for grads in per_sample_gradients(model, loss_fn, inputs, targets, chunk)
    ])  # fmt: skip
    variance = (squares - count * square) / (count - 1)
    out = {
        "norm": variance / (eta**2 * square),
        "inner_product": float(dots.var()) / (theta**2 * square**2),
        "orthogonality": (squares - float(dots.square().sum()) / square) / (count - 1) / (nu**2 * square),
    }
    out["batch_size"] = float(math.ceil(max(count, out["norm"])))
    out["augmented"] = float(math.ceil(max(count, out["inner_product"], out["orthogonality"])))
    return out
