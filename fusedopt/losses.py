"""Rules that look at the loss (Measures.given): `step` takes it from a closure or as an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusedopt.optimizer import FusedOptimizer


def sign_of(h) -> float:
    """-1 where a group maximises: what it minimises is then minus the loss."""
    return -1.0 if h["maximize"] else 1.0


class TakesLoss(FusedOptimizer):
    """Base of the classes whose rule reads the loss of the step's gradients.

    The loss stays on its device: nothing waits for it. Of several processes that average gradients, each must give the
    average loss; with a loss scale (GradScaler), the loss before scaling.
    """

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None, loss: torch.Tensor | float | None = None):
        """Performs one step over all parameters that have a gradient.

        Args:
            closure: re-evaluates the model, computes gradients and returns the loss.
            loss: the loss that the gradients are of, where there is no closure; one number. `scaler.step(opt, loss=loss)`
                hands it on.

        Raises ValueError where the loss is missing or not one number; nothing is changed then.
        """
        if closure is not None:
            if loss is not None:
                raise ValueError(f"{type(self).__name__}.step: give it a closure or the loss, not both")
            with torch.enable_grad():
                loss = closure()
        if self.reads_loss():
            value = self._without_loss() if loss is None else loss
            if not isinstance(value, torch.Tensor):
                value = torch.tensor(float(value), dtype=torch.float64, device="cpu")
            value = value.detach()
            if value.numel() != 1:
                raise ValueError(
                    f"{type(self).__name__}.step: the loss must be one number, not of shape {tuple(value.shape)}. Use its mean."
                )
            value = value.reshape(()).double()
            self.check_loss(value)
            self.given = {"loss": value}
        try:
            super().step()
        finally:
            self.given = {}
        return loss

    # As in FusedOptimizer: schedulers must not wrap the step, which notes that it was called.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def reads_loss(self) -> bool:
        """Whether the rule of any group does."""
        measures = [self.rule_for(group).measures for group in self.param_groups]
        return any(m is not None and m.given for m in measures)

    def check_loss(self, loss: torch.Tensor) -> None:
        """Raises ValueError for a loss that the rule cannot step with, where that can be seen without waiting for a device."""

    def _without_loss(self) -> float:
        """What stands for a loss that is missing: a number where no weight moves, as in the step by which
        torch.distributed.checkpoint makes states."""
        params = [p for group in self.param_groups for p in group["params"]]
        if not self.state and self._moves_nothing(params, self._gradients(params)):
            return 0.0
        raise ValueError(
            f"{type(self).__name__}.step needs the loss: step(closure), or step(loss=loss) after backward()"
        )
