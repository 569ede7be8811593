"""Rules that look at the loss (Measures.given): `step` takes it from a closure or as an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusedopt.optimizer import FusedOptimizer


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
        if loss is None:
            raise ValueError(
                f"{type(self).__name__}.step needs the loss: step(closure), or step(loss=loss) after backward()"
            )
        value = loss.detach() if isinstance(loss, torch.Tensor) else torch.tensor(float(loss), dtype=torch.float64)
        if value.numel() != 1:
            raise ValueError(
                f"{type(self).__name__}.step: the loss must be one number, not of shape {tuple(value.shape)}. Use its mean."
            )
        self.given = {"loss": value.view(()).double()}
        super().step()
        return loss

    # As in FusedOptimizer: schedulers must not wrap the step, which notes that it was called.
    step._wrapped_by_lr_sched = True
