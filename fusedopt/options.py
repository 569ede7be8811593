"""Validation of hyperparameters, with torch.optim's messages where torch has one."""

from __future__ import annotations

from numbers import Integral, Real

import torch


def check_number(value, what: str) -> None:
    if not isinstance(value, (Real, torch.Tensor)):
        raise TypeError(f"Invalid {what}: {value!r}; it must be a number")


def check_nonnegative(value, what: str) -> None:
    check_number(value, what)
    if not 0.0 <= value:
        raise ValueError(f"Invalid {what}: {value}")


def check_lr(lr, options) -> None:
    if isinstance(lr, torch.Tensor):
        if options.get("foreach") and not options.get("capturable"):
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
    check_nonnegative(lr, "learning rate")


def check_betas(betas, options, count: int = 2) -> None:
    several = isinstance(betas, (tuple, list, torch.Tensor))
    if several and any(isinstance(b, torch.Tensor) for b in betas):
        if not all(isinstance(b, torch.Tensor) for b in betas):
            raise ValueError("betas must be either both floats or both Tensors")
        for i, beta in enumerate(betas):
            if options.get("foreach") and not options.get("capturable"):
                raise ValueError(f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True")
            if beta.numel() != 1:
                raise ValueError(f"Tensor betas[{i}] must be 1-element")
    for i, beta in enumerate(betas if several else ()):
        check_number(beta, f"beta parameter at index {i}")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if not several or len(betas) != count:  # after what torch.optim says of single ones
        raise ValueError(f"Invalid betas: {betas!r}; it takes {count} of them")


def check_fraction(value, what: str) -> None:
    """Of averages: a share of what they keep."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"Invalid {what}: {value}; it is in [0, 1)")


def check_nesterov(nesterov: bool, momentum: float, dampening: float) -> None:
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def check_clip(max_norm) -> None:
    if isinstance(max_norm, torch.Tensor) and max_norm.numel() != 1:
        raise ValueError("Tensor clip_grad_norm must be 1-element")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"Invalid clip_grad_norm value: {max_norm}; it must be positive, or None for no clipping")


def check_storage_numbers(group: dict) -> None:
    """Of the options that say how states and parameters are kept, those that are numbers."""
    for name, least in (("seed", None), ("min_quantized_numel", 0)):
        value = group[name]
        if not isinstance(value, Integral) or isinstance(value, bool) or least is not None and value < least:
            raise ValueError(
                f"Invalid {name}: {value!r}; it must be an integer{'' if least is None else ', 0 or more'}"
            )
