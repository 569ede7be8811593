"""Which backend steps a bucket: the `backend=` argument, `use_backend(...)`, FUSEDOPT_BACKEND, then the best that can."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from functools import cache

import torch

from fusedopt.backends.base import Backend, BucketKey

log = logging.getLogger("fusedopt")

_CLASSES = {"cuda": "CudaBackend", "triton": "TritonBackend", "cpu": "CpuBackend", "reference": "ReferenceBackend"}
_forced: list[str] = []
_told: set[str] = set()


def backend_names() -> tuple[str, ...]:
    return tuple(_CLASSES)


@cache
def get_backend(name: str) -> Backend:
    """The shared instance of a backend. Never fails for a known name: what is missing is its `reason()`."""
    if name not in _CLASSES:
        raise ValueError(f"unknown backend {name!r}; known backends: {', '.join(_CLASSES)}")
    return getattr(importlib.import_module(f"fusedopt.backends.{name}"), _CLASSES[name])()


@contextlib.contextmanager
def use_backend(name: str):
    """Within the context every step uses the named backend, except for optimizers that were given `backend=`."""
    get_backend(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def automatic_order(device: torch.device) -> tuple[str, ...]:
    return ("cpu", "reference") if device.type == "cpu" else ("cuda", "triton", "reference")


def requested(argument: str | None) -> str | None:
    """The backend that was asked for by name, or None for automatic choice."""
    return argument or (_forced[-1] if _forced else os.environ.get("FUSEDOPT_BACKEND") or None)


def choose(key: BucketKey, asked: str | None) -> tuple[str, list[str]]:
    """Name of the backend for a bucket (its key with backend=""), and why better ones cannot.

    Raises RuntimeError with the reason where a backend was asked for by name and cannot run.
    """
    if asked is not None:
        why = get_backend(asked).supports(key._replace(backend=asked))
        if why is not None:
            raise RuntimeError(why)
        return asked, []
    reasons: list[str] = []
    for name in automatic_order(key.device):
        why = get_backend(name).supports(key._replace(backend=name))
        if why is None:
            if reasons and name == "reference":
                _tell(f"{key.rule}: using the pure-torch reference: {'; '.join(reasons)}")
            return name, reasons
        reasons.append(f"{name}: {why}")
    raise AssertionError("the reference backend supports every key")


def _tell(message: str) -> None:
    if message not in _told:
        _told.add(message)
        log.warning(message)
