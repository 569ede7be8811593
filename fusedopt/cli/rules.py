"""A table of every optimizer class, made from the classes themselves: rule, states, bytes, reductions, projections, source."""

from __future__ import annotations

import argparse
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fusedopt.cli import UsageError, write_json
from fusedopt.cli.table import replaced
from fusedopt.projections import GaLore
from fusedopt.rule import optimizers
from fusedopt.states import state_bytes
from fusedopt.transforms import TRANSFORMS

MARKS = ("<!-- rules: written by python -m fusedopt rules --readme README.md -->", "<!-- end of rules -->")
FORMATS = ("fp32", "bf16", "int8", "int4")
SIDE = 1024  # of the matrix whose states are counted
HEAD = "| class | name for `create` | states | bytes per parameter: fp32, bf16, 8-bit, 4-bit | reductions | projections | source |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="PATH", help="write the table to a file as JSON ('-': standard output)")
    parser.add_argument(
        "--stub", type=Path, metavar="FILE", help="write fusedopt/classes.pyi instead: the classes for type checkers"
    )
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="put the table between the marks in this file instead"
    )


def run(args: argparse.Namespace) -> int:
    if args.json is not None:
        write_json(args.json, records())
        return 0
    if args.stub is not None:
        if not args.stub.parent.is_dir():
            raise UsageError(f"{args.stub.parent}: there is no such folder")
        args.stub.write_text(stub())
        return 0
    if args.readme is None:
        print(table())
        return 0
    if not args.readme.is_file():
        raise UsageError(f"{args.readme} does not exist")
    text = args.readme.read_text()
    try:
        args.readme.write_text(with_table(text))
    except ValueError as error:
        raise UsageError(f"{args.readme} {error}") from None
    return 0


def with_table(text: str) -> str:
    """A text with the table between its marks."""
    return replaced(text, MARKS, table())


@cache
def table() -> str:
    rows = [HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
    rows += [row(name, cls) for name, cls in sorted(optimizers().items(), key=lambda item: item[1].__name__.lower())]
    return "\n".join(rows)


def stub() -> str:
    """Imports of every class that `fusedopt` finds when it is imported, which type checkers cannot."""
    found = sorted((cls.__module__, cls.__name__) for cls in {*optimizers().values(), *TRANSFORMS})
    lines = [f"from {module} import {name} as {name}" for module, name in found]
    return "\n".join(
        ["# ruff: noqa: I001", "# Written by python -m fusedopt rules --stub fusedopt/classes.pyi", *lines, ""]
    )


def records() -> list[dict[str, str]]:
    """The rows of the table by column."""
    keys, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table().splitlines())
    return [dict(zip(keys, cells, strict=True)) for cells in rows]


def row(name: str, cls: Any) -> str:
    names, costs = states_and_costs(cls)
    cells = [
        f"`{cls.__name__}`", f"`{name}`", ", ".join(names), ", ".join(costs), reductions(cls),
        "yes" if takes_projections(cls) else "no", source(cls),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def states_and_costs(cls: Any) -> tuple[list[str], list[str]]:
    """Names of the states of a matrix under the default options, and their bytes per element by format."""
    names: list[str] = []
    costs = []
    for form in FORMATS:
        p = torch.zeros(SIDE, SIDE, requires_grad=True)
        opt = cls([p], state_format=form, backend="reference")
        opt.plan()
        memory = cls.rule_for(opt.param_groups[0]).memory
        if not names:
            others = {"step", *memory, *(f"{t.name}_steps" for t in opt.gradient_transforms if t.counts)}
            names = [
                f"`{n}`{'' if v.numel() > 2 else ' (two numbers)'}" for n, v in opt.state[p].items() if n not in others
            ]
            names += [f"`{n}` (a number)" for n in memory]
        costs.append(f"{state_bytes(opt) / p.numel():.3g}")
    return names, costs[:1] if len(set(costs)) == 1 else costs


def reductions(cls: Any) -> str:
    """What a step sums over before it updates: its rule, and the gradient transforms that are a part of the class."""
    if cls.needs_shapes:
        return "rows and columns"
    opt = cls([torch.zeros(SIDE, SIDE)])
    if opt.param_groups[0]["projection"] is not None:
        return "matrix products"
    rule = cls.rule_for(opt.param_groups[0])
    sums = {"row": "sums over rows", "tensor": "sums of a tensor", "group": "sums of a group"}
    norms = {"gradient": "norms of gradient and parameter", "update": "norms of update and parameter"}
    found = []
    if rule.takes_norms or rule.probes:
        found = [sums.get(rule.measures.scope, "sums of all tensors")] if rule.measures is not None else []
    found += ["the loss"] if rule.measures is not None and rule.measures.given else []
    found += [norms[rule.trust_on]] if rule.trust_on else []
    found += [sums.get(t.scope, "sums of all tensors") for t in opt.gradient_transforms if t.scope != "element"]
    return ", ".join(dict.fromkeys(found)) or "none"


def takes_projections(cls: Any) -> bool:
    try:
        cls([torch.zeros(SIDE, SIDE)], projection=GaLore(rank=4))
    except ValueError:
        return False
    return True


def source(cls: Any) -> str:
    """The paper that a class's docstring names, without what is said of the implementation."""
    ends = r", (?:as|with|which|where|in its)\b|, weighted|;|\.\s|\.?$"
    found = re.search(
        rf"Source: (arXiv [^(]+?|.+?)(?: \(with| \(which| \(without|{ends})", inspect.getdoc(cls) or "", re.DOTALL
    )
    if found is None:
        raise ValueError(f"the docstring of {cls.__name__} has no source")
    return " ".join(found.group(1).split()).rstrip(".")
