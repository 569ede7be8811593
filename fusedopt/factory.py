"""create("adamw8bit", model): optimizers by name, a rule's name and an optional format suffix."""

from __future__ import annotations

import torch

from fusedopt.formats import ALIASES, get_format, list_formats
from fusedopt.rule import optimizers

SUFFIXES = {"": None, "8bit": "8bit", "4bit": "4bit", **{f"_{name}": name for name in list_formats()}}


def parse_name(name: str) -> tuple[str, str | None]:
    """("adamw", "int8") of "adamw8bit". Raises ValueError for an unknown name, listing the known ones."""
    known = optimizers()
    for suffix, form in SUFFIXES.items():
        base = name.lower().removesuffix(suffix) if suffix else name.lower()
        if base in known and (not suffix or base != name.lower()):
            return base, form and get_format(form).name
    raise ValueError(
        f"unknown optimizer {name!r}; names are {', '.join(sorted(known))}, each with an optional suffix "
        f"{', '.join(s for s in SUFFIXES if s)}"
    )


def create(name: str, params_or_model, **options) -> torch.optim.Optimizer:
    """An optimizer by name, e.g. create("adamw8bit", model, lr=3e-4).

    Args:
        name: a class name in lower case ("adamw", "lion", "lamb", ...), with an optional state format suffix.
        params_or_model: a module, parameters, or parameter groups.
        options: arguments of the class.
    Raises:
        ValueError: unknown name, or two state formats.
    """
    base, form = parse_name(name)
    if form is not None:
        if options.get("state_format", form) not in (form, *(a for a, f in ALIASES.items() if f == form)):
            raise ValueError(
                f"create: {name!r} means state_format={form!r}, but state_format={options['state_format']!r} is given"
            )
        options["state_format"] = form
    params = params_or_model
    if isinstance(params, torch.nn.Module):
        params = [p for p in params.parameters() if p.requires_grad]
    return optimizers()[base](params, **options)
