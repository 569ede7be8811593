"""What rules read beside gradients, for commands that step every class alike: the loss, and a diagonal of the Hessian."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusedopt.curvature import EstimatesHessian
from fusedopt.losses import TakesLoss
from fusedopt.rules.dasa import DASA


def step(opt, loss: torch.Tensor | float = 1.0) -> None:
    """A step of any class; loss: of its gradients, or what stands for it."""
    opt.step(loss=loss) if isinstance(opt, TakesLoss) else opt.step()


def give_curvature(opt) -> None:
    """A diagonal of ones to a class that would have to estimate it, where there is no loss."""
    if isinstance(opt, EstimatesHessian):
        for tensor_id, (p, group) in enumerate((p, g) for g in opt.param_groups for p in g["params"]):
            opt.put_estimate(tensor_id, p, group, torch.ones_like(p))


def backward(opt, forward) -> torch.Tensor:
    """Gradients of forward(), and an estimate of the Hessian where the class wants one; returns the loss."""
    if isinstance(opt, DASA):
        opt.last_gradients(forward)
    if not isinstance(opt, EstimatesHessian):
        loss = forward()
        loss.backward()
        return loss
    with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivative
        loss = forward()
        opt.estimate_hessian(loss)
    return loss
