"""transformers.Trainer: arguments that make it train with one of our optimizers. Nothing of transformers is imported."""

from __future__ import annotations

import torch

from fusedopt.factory import class_and_options
from fusedopt.integrations.groups import parameter_groups


def trainer_kwargs(
    model: torch.nn.Module, name: str, *, weight_decay: float = 0.0, embeddings: dict | None = None, **options
) -> dict:
    """`Trainer(model, args, **trainer_kwargs(model, "adamw8bit", lr=3e-4), ...)`.

    Checkpoints, resuming, schedulers and gradient clipping (`max_grad_norm` of the arguments) work as with the Trainer's own
    optimizers. With `clip_grad_norm=` here, which clips inside the step, set max_grad_norm=0.

    Args:
        model: the model that the Trainer gets.
        name: as in `fusedopt.create`: "adamw8bit", "lion", "galore_adamw8bit", ...
        weight_decay: of matrices; vectors have none. The Trainer's own weight_decay is not used.
        embeddings: options of the embedding tables' group, see `parameter_groups`; fp32 states by default.
        options: arguments of the class, and of the projection. lr is among them: the Trainer hands its own learning_rate to
            no foreign optimizer.
    Returns: {"optimizer_cls_and_kwargs": (class, arguments)}, with the parameter groups among the arguments.
    Raises:
        ValueError: unknown name. TypeError: model is no module, or lr is missing.
    Source: transformers 4.47 and later, Trainer.create_optimizer.
    """
    if "lr" not in options:
        raise TypeError("trainer_kwargs: pass lr=; the Trainer does not hand its learning rate to a foreign optimizer")
    groups = parameter_groups(model, weight_decay, embeddings=embeddings)
    cls, options = class_and_options(name, options)
    return {"optimizer_cls_and_kwargs": (cls, {"params": groups, **options})}
