"""Zeroth-order training: gradients estimated from losses alone, along random directions that are drawn again from a seed.

SPSA (Spall 1992) in the memory-free form of MeZO (Malladi et al., arXiv 2305.17333, algorithm 1), for any rule; and its
shared-randomness form: a step is one number per worker and direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fusedopt.checks import describe
from fusedopt.distributed import is_dtensor
from fusedopt.projections.base import check_positive_int
from fusedopt.transforms.noise import add_noise_, key_of
from fusedopt.weights import Int8Weight

PURPOSE = 0x5A


@dataclass(frozen=True)
class Direction:
    """A random direction z of all parameters, and the slope of the loss along it: all that a worker has to send.

    seed, step: which z. slope: (L(p + eps z) - L(p - eps z)) / (2 eps), 0-dim, on the device of the losses, or a number.
    """

    seed: int
    step: int
    slope: torch.Tensor | float


class ZerothOrder:
    """Steps an optimizer without backward passes: two losses for each direction.

    When to use it: fine-tuning where activations or gradients do not fit, or the loss has no derivative.

    z ~ N(0, I); p + eps z, loss; p - eps z, loss; p; g = mean over directions of slope z. Where the optimizer can step one
    parameter at a time, one parameter's gradient is alive at a time; else all of them, for the step.

    Args:
        opt: the optimizer, of any rule. eps: length of the perturbations. samples: directions of a step.
        seed: of the directions; `steps` counts them. Save `state_dict()` with the optimizer's.
        copies: keep a copy of the parameters while they are perturbed. Without it they come back through p + eps z - 2 eps z
            + eps z, which is off by their rounding: 1e-7 of a weight in fp32, but 0.4 % of it in bf16.
    Raises:
        TypeError: opt is no optimizer of this package. ValueError: an option is out of range; release_gradients or
        offload; DTensor and int8 parameters; 16-bit parameters with a companion (split24, kahan, ...) without copies.
    """

    def __init__(self, opt, eps: float = 1e-3, samples: int = 1, seed: int = 0, copies: bool = False):
        from fusedopt.optimizer import FusedOptimizer

        if not isinstance(opt, FusedOptimizer):
            raise TypeError(f"ZerothOrder: expected an optimizer of fusedopt, got {type(opt).__name__}")
        if not eps > 0.0:
            raise ValueError(f"ZerothOrder: invalid eps: {eps}; it must be positive")
        check_positive_int(samples, "samples")
        if opt._release is not None or opt.offloading is not None or opt._low_rank is not None:
            raise ValueError(
                f"ZerothOrder: this {type(opt).__name__} has release_gradients, offload or projected_linear, which work on "
                "backward passes. Use an optimizer without them."
            )
        self.opt, self.eps, self.samples, self.seed, self.copies, self.steps = opt, eps, samples, seed, copies, 0
        self._params()

    def _params(self) -> list[tuple[int, torch.Tensor]]:
        """(tensor id, parameter) of those that are trained."""
        out, tensor_id = [], 0
        for group in self.opt.param_groups:
            for p in group["params"]:
                what = describe(type(self.opt).__name__, tensor_id, p)
                if is_dtensor(p) or isinstance(p, Int8Weight):
                    raise ValueError(f"ZerothOrder: {what} is a {type(p).__name__}. It perturbs plain tensors only.")
                kept = group["param_precision"] not in ("nearest", "stochastic") and p.dtype.itemsize == 2
                if kept and not self.copies:
                    raise ValueError(
                        f"ZerothOrder: {what} has param_precision={group['param_precision']!r}, whose low bits would no longer "
                        "fit the perturbed and restored weight. Use copies=True."
                    )
                if p.requires_grad:
                    out.append((tensor_id, p))
                tensor_id += 1
        return out

    @torch.no_grad()
    def estimate(self, closure: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[Direction]]:
        """The mean loss of the perturbed weights, and the directions with their slopes. The weights come back.

        closure: the loss of the present weights, a 0-dim tensor or a number; called twice for each direction, under no_grad.
        """
        params, directions, losses = self._params(), [], []
        kept = [p.detach().clone() for _, p in params] if self.copies else None
        for _ in range(self.samples):
            key = key_of(self.seed, PURPOSE)
            pair = []
            try:
                for factor in (self.eps, -2 * self.eps):
                    for tensor_id, p in params:
                        add_noise_(p, factor, key, tensor_id, self.steps)
                    pair.append(closure())
            finally:
                if kept is not None:
                    torch._foreach_copy_([p for _, p in params], kept)
                else:
                    back = self.eps if len(pair) == 2 or factor < 0 else -self.eps
                    for tensor_id, p in params:
                        add_noise_(p, back, key, tensor_id, self.steps)
            plus, minus = (torch.as_tensor(x).detach() for x in pair)
            losses += [plus, minus]
            directions.append(Direction(self.seed, self.steps, (plus - minus) / (2 * self.eps)))
            self.steps += 1
        return torch.stack(losses).mean(), directions

    @torch.no_grad()
    def gradient(self, tensor_id: int, p: torch.Tensor, directions: Iterable[Direction]) -> torch.Tensor:
        """The estimated gradient of one parameter: the mean of slope z, in its dtype and layout."""
        directions = list(directions)
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        g = torch.zeros_like(p, dtype=wide, requires_grad=False)
        for d in directions:
            factor = torch.as_tensor(d.slope, dtype=wide).to(p.device) / len(directions)
            add_noise_(g, factor.view(1), key_of(d.seed, PURPOSE), tensor_id, d.step)
        return g.to(p.dtype)

    @torch.no_grad()
    def apply(self, directions: Iterable[Direction]) -> None:
        """One step of the optimizer with the gradient of these directions, of this worker or gathered from all."""
        directions, opt = list(directions), self.opt
        params = self._params()
        if not opt.supports_fused_back_pass():
            for tensor_id, p in params:
                p.grad = self.gradient(tensor_id, p, directions)
            opt.step()
            for _, p in params:
                p.grad = None
            return
        for tensor_id, p in params:
            p.grad = self.gradient(tensor_id, p, directions)
            opt.step_parameter(p)
            p.grad = None
        if opt._parts is not None:
            opt._parts.end_round()
        opt._opt_called = True

    def step(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`estimate` and `apply`: one step. Returns the mean loss of the perturbed weights."""
        loss, directions = self.estimate(closure)
        self.apply(directions)
        return loss

    def state_dict(self) -> dict:
        return {"seed": self.seed, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.seed, self.steps = int(state["seed"]), int(state["steps"])


@torch.no_grad()
def apply_directions(params, directions: Iterable[Direction], lr: float, weight_decay: float = 0.0) -> None:
    """p <- (1 - lr weight_decay) p - lr mean over directions of slope z, in place: MeZO's own update, without gradients or
    states. Workers with the same kind of device that apply the same directions in the same order keep the same weights, bit for
    bit; numbers drawn on another kind differ by up to 4e-7 of themselves.

    params: all parameters in the order of the optimizer that made the directions; frozen ones are left out.
    """
    directions = list(directions)
    keys = [key_of(d.seed, PURPOSE) for d in directions]
    for tensor_id, p in enumerate(params):
        if not p.requires_grad:
            continue
        if weight_decay:
            p.mul_(1 - lr * weight_decay)
        for d, key in zip(directions, keys, strict=True):
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            factor = torch.as_tensor(d.slope, dtype=wide).to(p.device) * (-lr / len(directions))
            add_noise_(p, factor.view(1), key, tensor_id, d.step)
