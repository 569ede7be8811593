"""create("adamw8bit", model): optimizers by name: a rule's, with an optional projection before and format after it."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from fusedopt.formats import ALIASES, get_format, list_formats
from fusedopt.projections import Projection, get_projection, list_projections
from fusedopt.rule import optimizers

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

SUFFIXES = {"": None, "8bit": "8bit", "4bit": "4bit", **{f"_{name}": name for name in list_formats()}}


FAMILIAR = {"adamw_sn": "subset_norm_adamw", "conda": "conda_adamw"}  # names that other packages use


def _in_full(name: str) -> str:
    """A name in lower case; a familiar one with its projection and class spelled out."""
    name = name.lower()
    for short, full in FAMILIAR.items():
        if name.startswith(short) and name.removeprefix(short) in SUFFIXES:
            return full + name.removeprefix(short)
    return name


def parse_name(name: str) -> tuple[str, str | None]:
    """("adamw", "int8") of "adamw8bit" and of "galore_adamw8bit". ValueError for an unknown name, listing the known ones."""
    known = optimizers()
    rest = _in_full(name)
    prefix = _prefix(rest)
    if prefix is not None:
        rest = rest.removeprefix(f"{prefix}_")
    for suffix, form in SUFFIXES.items():
        base = rest.removesuffix(suffix) if suffix else rest
        if base in known and (not suffix or base != rest):
            return base, form and get_format(form).name
    raise ValueError(
        f"unknown optimizer {name!r}; names are {', '.join(sorted(known))}, each with an optional suffix "
        f"{', '.join(s for s in SUFFIXES if s)} and an optional prefix {', '.join(f'{p}_' for p in list_projections())}"
    )


def _prefix(name: str) -> str | None:
    """The projection that a name begins with, the longest that fits."""
    found = [p for p in list_projections() if name.startswith(f"{p}_")]
    return max(found, key=len, default=None)


def projection_of(name: str) -> type[Projection] | None:
    """The projection class that a name asks for, or None."""
    prefix = _prefix(_in_full(name))
    return None if prefix is None else get_projection(prefix)


def take_projection(name: str, options: dict) -> Projection | None:
    """The projection that a name asks for, or None. Its options (rank, update_every, ...) are taken out of `options`."""
    cls = projection_of(name)
    if cls is None:
        return None
    names = [f.name for f in fields(cls) if f.name in options]
    return cls(**{key: options.pop(key) for key in names})


def create(name: str, params_or_model, **options) -> FusedOptimizer:
    """An optimizer by name, e.g. create("adamw8bit", model, lr=3e-4) or create("galore_adamw8bit", model, rank=128).

    Args:
        name: a class name in lower case ("adamw", "lion", "lamb", ...), with an optional state format suffix and an
            optional projection before it ("galore_", "dct_", ...). Of a model, a projection leaves embeddings as they are.
        params_or_model: a module, parameters, or parameter groups.
        options: arguments of the class, and of the projection.
    Raises:
        ValueError: unknown name, two state formats, or two projections.
    """
    cls, options = class_and_options(name, options)
    params = params_or_model
    if isinstance(params, torch.nn.Module) and not cls.splits_models:
        tables = embedding_ids(params)
        params = [p for p in params.parameters() if p.requires_grad]
        if projection_of(name) is not None:
            params = leave_out(params, tables, {"projection": None})
    return cls(params, **options)


def class_and_options(name: str, options: dict) -> tuple[Any, dict]:
    """The class and its arguments that a name and options mean together: what `create` calls."""
    base, form = parse_name(name)
    options = dict(options)
    if form is not None:
        if options.get("state_format", form) not in (form, *(a for a, f in ALIASES.items() if f == form)):
            raise ValueError(
                f"create: {name!r} means state_format={form!r}, but state_format={options['state_format']!r} is given"
            )
        options["state_format"] = form
    projection = take_projection(name, options)
    if projection is not None:
        if options.get("projection") is not None:
            raise ValueError(f"create: {name!r} names a projection, and projection={options['projection']!r} is given")
        options["projection"] = projection
    return optimizers()[base], options


def embedding_ids(model: torch.nn.Module) -> set[int]:
    """The ids of a model's embedding tables: parameters that `create` does not project, also where a head shares them."""
    return {id(m.weight) for m in model.modules() if isinstance(m, (torch.nn.Embedding, torch.nn.EmbeddingBag))}


def leave_out(params: list, ids: set[int], options: dict) -> list:
    """Parameters as groups: those of `ids` in one of their own, with options; the list itself where there are none of them."""
    kept, left = ([p for p in params if (id(p) in ids) == chosen] for chosen in (False, True))
    if not left:
        return params
    return [group for group in ({"params": kept}, {"params": left, **options}) if group["params"]]
