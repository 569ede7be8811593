"""SMB: Birbil et al., "Bolstering Stochastic Gradient Descent with Model Building" (arXiv 2111.07058), algorithm 1: a trial step of
SGD, and where it does not lower the loss enough, one from a quadratic model of what it found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusedopt.checks import describe
from fusedopt.distributed import is_dtensor
from fusedopt.optimizer import FusedOptimizer
from fusedopt.projections.base import check_positive_int
from fusedopt.rule import Rule
from fusedopt.rules.sgd import SGD_PLAIN

SMALL = 1e-8  # a gradient of this norm accepts any trial


class SMB(FusedOptimizer):
    """SGD whose step is tried before it is kept: s = -lr g. Where the loss at p + s is at most L - c lr |g|^2 (norms over all
    tensors), p += s. Otherwise, for each tensor, with y the change of its gradient over s and a = <s, y>:
    r = (|s| (|y| + |g| / kappa) - a) / 2, d = (a + 2 r)^2 - |s|^2 |y|^2, k = -|s|^2 / (2 r),
    p += k (g + (-(a + 2 r) <y, g> + |y|^2 <s, g>) / d s + (-(a + 2 r) <s, g> + |s|^2 <y, g>) / d y).

    For small models trained with SGD whose rate nobody wants to tune: one a few times too large still converges, and costs a
    second evaluation. A step keeps copies of parameters and gradients while it runs; there are no states.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate of the trial, a float; groups may differ in it.
        c: how much of the decrease that the gradient promises a trial must bring.
        kappa: in (0, 1); smaller gives shorter model steps.
        autoschedule: every `period` steps lr is multiplied by `shrink` if more than a share of `tolerance` of them took the model,
            else divided by it unless that is above `max_lr`. Counts are in the groups, and in the state dict.
        period, tolerance, shrink, max_lr: of the schedule.
        backend: of the trial step; None takes the best that can.

    The decision waits for the loss. Steps take no weight decay: add it to the loss. No DTensor: with DDP the closure must return
    the average loss, so that all processes decide alike.

    Raises:
        ValueError: a hyperparameter is out of range; at the step: no closure. RuntimeError at the step: a parameter is a DTensor.
    Source: arXiv 2111.07058, algorithm 1, both evaluations on the same batch.
    """

    decay_mode = "decoupled"
    torch_counts_steps = False

    def __init__(
        self,
        params,
        lr: float = 0.5,
        c: float = 0.1,
        kappa: float = 0.99,
        autoschedule: bool = False,
        period: int = 500,
        tolerance: float = 0.05,
        shrink: float = 0.9,
        max_lr: float = 20.0,
        backend: str | None = None,
    ):
        for name, value in (("c", c), ("kappa", kappa), ("shrink", shrink)):
            if not 0.0 < value < 1.0:
                raise ValueError(f"Invalid {name} value: {value}; it lies between 0 and 1")
        check_positive_int(period, "period")
        defaults = {
            "lr": lr,
            "c": c,
            "kappa": kappa,
            "autoschedule": autoschedule,
            "period": period,
            "tolerance": tolerance,
            "shrink": shrink,
            "max_lr": max_lr,
            "steps_taken": 0,
            "model_steps": 0,
            "weight_decay": 0.0,
        }
        super().__init__(params, defaults, backend=backend)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return SGD_PLAIN

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None, trial: Callable[[], Any] | None = None):
        """Performs one step.

        Args:
            closure: as torch.optim's: clears gradients, computes the loss and its gradients, returns it. Called again at the trial
                point, with the same batch.
            trial: returns the loss alone. Where it is given it judges the trial point, and closure is called there only if the
                model is needed: most steps then cost one backward pass.

        Returns the loss at the start of the step. Gradients are left as the last call of closure made them.
        """
        if closure is None:
            raise ValueError("SMB.step needs a closure: a trial step is judged by the loss that it leads to")
        with torch.enable_grad():
            loss = closure()
        owners = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for tensor_id, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if is_dtensor(p):
                raise RuntimeError(
                    f"{describe('SMB', tensor_id, p)} is a DTensor, whose products need all shards. Use SGD."
                )
        if not owners:
            return loss
        with torch.no_grad():
            params, rates = [p for p, _ in owners], [float(group["lr"]) for _, group in owners]
            starts, grads = [p.detach().clone() for p in params], [p.grad.clone() for p in params]
            squares = [float(x) ** 2 for x in torch._foreach_norm([_wide(g) for g in grads])]
        super().step()
        promised = sum(
            group["c"] * rate * square for (_, group), rate, square in zip(owners, rates, squares, strict=True)
        )
        try:
            if trial is None:
                with torch.enable_grad():
                    reached = closure()
            else:
                with torch.no_grad():
                    reached = trial()
            accepted = _number(reached) <= _number(loss) - promised or sum(squares) ** 0.5 < SMALL
            if not accepted and trial is not None:
                with torch.enable_grad():
                    closure()
        except BaseException:  # nothing is half-updated
            self._take_back(params, starts)
            raise
        if not accepted:
            self._take_model(owners, starts, grads, rates)
        self._count(accepted)
        return loss

    step._wrapped_by_lr_sched = True

    @torch.no_grad()
    def _take_back(self, params: list, starts: list) -> None:
        """Undoes the trial step."""
        torch._foreach_copy_(params, starts)
        if self._plan is not None:
            for device in self._plan.devices:
                device.count(-1)

    @torch.no_grad()
    def _take_model(self, owners, starts: list, grads: list, rates: list[float]) -> None:
        """From the start of the step, for all tensors at once; coefficients in double precision on the devices."""
        g = [_wide(x) for x in grads]
        s = torch._foreach_mul(g, [-rate for rate in rates])
        after = [torch.zeros_like(x) if p.grad is None else _wide(p.grad) for (p, _), x in zip(owners, g, strict=True)]
        y = torch._foreach_sub(after, g)
        kappa = [group["kappa"] for _, group in owners]
        sums = []
        for one, other in ((s, y), (y, g), (s, g), (s, s), (y, y), (g, g)):
            sums.append([x.double().sum() for x in torch._foreach_mul(one, other)])
        moved = []
        for k, sy, yg, sg, ss, yy, gg in zip(kappa, *sums, strict=True):
            r = 0.5 * (ss.sqrt() * (yy.sqrt() + gg.sqrt() / k) - sy)
            moving = r > 0
            wide = sy + 2 * r
            scale = torch.where(moving, -ss / (2 * torch.where(moving, r, 1.0)), 0.0)
            d = torch.where(moving, wide.square() - ss * yy, 1.0)
            moved.append((scale, scale / d * (-wide * yg + yy * sg), scale / d * (-wide * sg + ss * yg)))
        for i, vectors in enumerate((g, s, y)):
            factors = [m[i].to(x.dtype) for m, x in zip(moved, vectors, strict=True)]
            torch._foreach_mul_(vectors, factors)
        total = torch._foreach_add(torch._foreach_add(g, s), y)
        for (p, _), start, step in zip(owners, starts, total, strict=True):
            p.copy_(_wide(start) + step)

    def _count(self, accepted: bool) -> None:
        for group in self.param_groups:
            group["steps_taken"] += 1
            group["model_steps"] += not accepted
            if not group["autoschedule"] or group["steps_taken"] < group["period"]:
                continue
            if group["model_steps"] > group["tolerance"] * group["steps_taken"]:
                group["lr"] *= group["shrink"]
            elif group["lr"] / group["shrink"] <= group["max_lr"]:
                group["lr"] /= group["shrink"]
            group["steps_taken"] = group["model_steps"] = 0


def _number(loss) -> float:
    return float(loss.detach()) if isinstance(loss, torch.Tensor) else float(loss)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float()
