"""U-DoG: Kreisler, Ivgi, Hinder and Carmon, "Accelerated Parameter-Free Stochastic Optimization" (arXiv 2404.00666), with the
accumulators of UniXGrad: two gradients a step, and iterates whose weighted average is what one evaluates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusedopt.checks import describe
from fusedopt.distributed import is_dtensor
from fusedopt.options import check_lr, check_nonnegative
from fusedopt.transforms.base import Tensors

SHARED = ("distance", "distance_sum", "weight_sum", "change_sum")  # numbers of the whole run, the same in every group


class UDoG(torch.optim.Optimizer):
    """U-DoG: accelerated, without a learning rate to tune. With x_1 = y_1 = p_0, r = the largest |x_k - p_0| and |y_k - p_0| so
    far (at least reps_rel (1 + |p_0|)), w = the sum of r over steps, a = w / r, and the average z of all x_{k+1} weighted by w_k:
    m is the gradient at z with y as its next point, x = y - lr a r / sqrt(G) m; g is the gradient at z with x as its next point,
    G' = G + a^2 |g - m|^2, y = y - lr a r / sqrt(G') g; G = G' (eps at first). Norms are over all tensors.

    For convex and nearly convex problems, where two gradients a step pay off; `DoG` and `Prodigy` need one. The parameters are
    at z between steps: evaluate and save them as they are. Two states in fp32 (p_0 and y; of 16-bit parameters z as well).

    Args:
        params: parameters, or groups of them.
        lr: multiplies both steps, a float; groups may differ in it.
        reps_rel: the first r, relative to 1 + |p_0|.
        eps: the first G.
        weight_decay: L2 coefficient, of the point where a gradient is taken.

    A step waits for the device. The numbers that steps share are in the groups, and in the state dict. Plain torch operations: no
    kernel of this package, no state formats and no DTensors. With DDP the closure's gradients are averages, as always.

    Raises:
        ValueError: a hyperparameter is out of range; at the step: no closure. RuntimeError at the step: a parameter is a DTensor.
    Source: arXiv 2404.00666, without the logarithmic factors of its stabilised form.
    """

    def __init__(self, params, lr: float = 1.0, reps_rel: float = 1e-6, eps: float = 1e-8, weight_decay: float = 0.0):
        check_lr(lr, {"foreach": False, "capturable": False})
        check_nonnegative(weight_decay, "weight_decay value")
        if not reps_rel > 0:
            raise ValueError(f"Invalid reps_rel value: {reps_rel}")
        if not eps > 0:
            raise ValueError(f"Invalid epsilon value: {eps}; it is the first divisor, so it must be positive")
        defaults = {"lr": lr, "reps_rel": reps_rel, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, **dict.fromkeys(SHARED, 0.0)})

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None):
        """Performs one step.

        Args:
            closure: as torch.optim's: clears gradients, computes the loss and its gradients, returns it. Called at two points,
                with the same batch or two.

        Returns the first of the two losses.
        """
        if closure is None:
            raise ValueError("UDoG.step needs a closure: a step takes gradients at two points")
        owners = [(p, group) for group in self.param_groups for p in group["params"] if p.requires_grad]
        for tensor_id, (p, _) in enumerate(owners):
            if is_dtensor(p):
                raise RuntimeError(
                    f"{describe('UDoG', tensor_id, p)} is a DTensor, whose norms need all shards. Use DoG."
                )
        if not owners:
            with torch.enable_grad():
                return closure()
        params = [p for p, _ in owners]
        with torch.no_grad():
            z: Tensors
            start, y, z = self._begin(params)
            shared = {name: float(self.param_groups[0][name]) for name in SHARED}
            first = self.param_groups[0]
            if shared["distance_sum"] == 0:
                shared["distance"] = first["reps_rel"] * (1 + _norm(start))
                shared["change_sum"] = first["eps"]
            r = shared["distance"]
            shared["distance_sum"] += r
            weight, before = shared["distance_sum"], shared["weight_sum"]
            a, shared["weight_sum"] = weight / r, before + weight
            share = weight / shared["weight_sum"]
            kept = [p.clone() for p in params]
        try:
            loss, m = self._gradients(closure, owners, torch._foreach_lerp(z, y, share))
            x = self._moved(y, m, owners, a * r / shared["change_sum"] ** 0.5)
            z = torch._foreach_lerp(z, x, share)
            _, g = self._gradients(closure, owners, z)
        except BaseException:  # nothing is half-updated
            with torch.no_grad():
                torch._foreach_copy_(params, kept)
            raise
        with torch.no_grad():
            shared["change_sum"] += (a * _norm(torch._foreach_sub(g, m))) ** 2
            new = self._moved(y, g, owners, a * r / shared["change_sum"] ** 0.5)
            far = max(_norm(torch._foreach_sub(point, start)) for point in (x, new))
            shared["distance"] = max(r, far)
            torch._foreach_copy_(y, new)
            for p, value in zip(params, z, strict=True):
                if "average" in self.state[p]:
                    self.state[p]["average"].copy_(value)
        for group in self.param_groups:
            group.update(shared)
        return loss

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _begin(self, params: list[torch.Tensor]) -> tuple[list, list, list]:
        """p_0, y and z of each parameter, in fp32 or fp64."""
        for p in params:
            entry = self.state[p]
            if "y" not in entry:
                wide = p.detach().to(torch.promote_types(p.dtype, torch.float32))
                entry["initial_param"], entry["y"] = wide.clone(), wide.clone()
                if wide.dtype != p.dtype:
                    entry["average"] = wide.clone()
        entries = [self.state[p] for p in params]
        z = [
            entry["average"] if "average" in entry else p.detach().clone()
            for entry, p in zip(entries, params, strict=True)
        ]
        return [entry["initial_param"] for entry in entries], [entry["y"] for entry in entries], z

    def _gradients(self, closure, owners, point: Tensors):
        """The loss and the decayed gradients at a point, where the parameters are left."""
        params = [p for p, _ in owners]
        with torch.no_grad():
            torch._foreach_copy_(params, point)
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            grads = []
            for (p, group), at in zip(owners, point, strict=True):
                g = torch.zeros_like(at) if p.grad is None else p.grad.to(at.dtype, copy=True)
                grads.append(g.add_(at, alpha=group["weight_decay"]))
        return loss, grads

    @staticmethod
    @torch.no_grad()
    def _moved(y: list, grads: list, owners: list, size: float) -> list[torch.Tensor]:
        return [
            torch.sub(old, g, alpha=float(group["lr"]) * size)
            for old, g, (_, group) in zip(y, grads, owners, strict=True)
        ]

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch.optim; states stay in fp32 beside 16-bit parameters."""
        super().load_state_dict(state_dict)
        ids = (i for group in state_dict["param_groups"] for i in group["params"])
        for i, p in zip(ids, (p for group in self.param_groups for p in group["params"]), strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                self.state[p][name] = value.to(p.device, torch.promote_types(p.dtype, torch.float32), copy=True)


def _norm(tensors: Tensors) -> float:
    """Over all of them, in double precision."""
    home = tensors[0].device
    return float(torch.stack([x.double().square().sum().to(home) for x in tensors]).sum().sqrt())
