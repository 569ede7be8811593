"""Parameter groups of a model: weight decay for matrices only, and 32-bit states for embeddings whatever the others get.

Rows of an embedding are seen rarely, and 8-bit states of theirs made training of T5 and others unstable (bitsandbytes#11,
transformers#14819).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusedopt.factory import embedding_ids
from fusedopt.states import override


def parameter_groups(
    model: torch.nn.Module,
    weight_decay: float = 0.0,
    *,
    embeddings: dict | None = None,
    decay: Callable[[str, torch.nn.Parameter], bool] | None = None,
) -> list[dict]:
    """The trainable parameters of a model as up to three groups: with decay, without, and embedding tables.

    A group, unlike `override`, survives that FSDP2 or accelerate replace the parameters in it. Groups are never empty, and
    are the same for the same model, so that a checkpoint fits.

    Args:
        model: its parameters that require a gradient are taken, shared ones once.
        weight_decay: of the first group, and of embeddings; the second has none.
        embeddings: options of the group of torch.nn.Embedding and EmbeddingBag tables (and of output heads that share them),
            {"state_format": "fp32", "projection": None} by default; {} leaves embeddings in the other groups.
        decay: which parameters decay, by name and tensor; those of two and more dimensions by default. For Llama, GPT-2 and
            most others these are the ones that transformers.Trainer picks.
    Raises:
        TypeError: model is no module. ValueError: it has no parameter to train.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"parameter_groups: expected a torch.nn.Module, got {type(model).__name__}")
    options = {"state_format": "fp32", "projection": None} if embeddings is None else embeddings
    tables = embedding_ids(model) if options else set()
    decay = decay or (lambda name, p: p.dim() >= 2)
    groups = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
        {"params": [], "weight_decay": weight_decay, **options},
    ]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[2 if id(p) in tables else 0 if decay(name, p) else 1]["params"].append(p)
    if not any(group["params"] for group in groups):
        raise ValueError("parameter_groups: no parameter of the model requires a gradient")
    return [group for group in groups if group["params"]]


def keep_embeddings_fp32(model: torch.nn.Module) -> int:
    """Gives the embedding tables of a model fp32 states and no projection, whatever the optimizer's state_format is.

    For code that makes its own parameter groups; call it before the first step. It marks the parameters themselves: where
    something replaces them (FSDP2), use `parameter_groups`.

    Returns the number of elements that were marked. Raises TypeError: model is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"keep_embeddings_fp32: expected a torch.nn.Module, got {type(model).__name__}")
    tables = embedding_ids(model)
    marked = [p for p in model.parameters() if id(p) in tables]
    for p in marked:
        override(p, state_format="fp32", projection=None)
    return sum(p.numel() for p in marked)
