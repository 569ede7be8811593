"""The commands behind `python -m fusedopt`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why and what to do."""


def dtype_name(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def check_optimizer_name(name: str) -> str:
    """The name itself. Raises UsageError with the known names where `fusedopt.create` does not take it."""
    from fusedopt.factory import parse_name

    try:
        parse_name(name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return name


def split_names(values: list[str] | None) -> list[str]:
    """Names of a repeatable option that also takes comma lists, without repetitions, checked."""
    names = [name.strip() for value in values or [] for name in value.split(",") if name.strip()]
    return [check_optimizer_name(name) for name in dict.fromkeys(names)]


def write_json(path: str, content) -> None:
    """Writes JSON to a file, or to standard output for "-"."""
    text = json.dumps(content, indent=2)
    if path == "-":
        print(text)
        return
    try:
        Path(path).write_text(text + "\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
