"""Memory of a model in training: weights, gradients, master weights and optimizer states, side by side.

The model is a number of parameters, a Hugging Face config.json, or a Python callable that builds a torch.nn.Module:

  python -m fusedopt estimate --params 7e9 --optim adamw8bit --param-dtype bf16
  python -m fusedopt estimate --config path/to/config.json --optim galore_adamw8bit --rank 128
  python -m fusedopt estimate --model package.module:build_model

States are counted by allocating them, as the optimizer does, on torch's meta device; those of a projection (galore_adamw)
have its rank and include its projectors, with embeddings stepped in full. Activations are not counted.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import fusedopt
from fusedopt.cli import DTYPES, UsageError, dtype_name, split_names, write_json
from fusedopt.cli.hf_config import Table, read_config
from fusedopt.cli.table import render
from fusedopt.factory import embedding_ids, leave_out, parse_name, take_projection
from fusedopt.masters import configured_precision
from fusedopt.precision import COMPANIONS, list_precisions
from fusedopt.projections.base import places
from fusedopt.states import option_overrides

COMMON = "adamw adamw_bf16 adamw8bit adamw4bit lion lion8bit lion4bit sgd sgd8bit lamb lamb8bit".split()
OPTIONS = {"sgd": {"momentum": 0.9}}


@dataclass
class Choice:
    """Bytes of one way to train. `chosen` marks what --optim asked for."""

    name: str
    params: str
    weights: int
    gradients: int
    master: int
    states: int
    chosen: bool = False

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.master + self.states


@dataclass
class Model:
    """Shapes on the meta device; `frozen` parameters have no gradient and no state; `tables`: those of embeddings."""

    name: str
    trained: list[torch.Tensor]
    frozen: list[torch.Tensor]
    tables: list[torch.Tensor] = field(default_factory=list)

    def numel(self) -> int:
        return sum(p.numel() for p in self.trained + self.frozen)


def _meta(shape, dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))


def from_count(text: str, dtype: torch.dtype) -> Model:
    """A model of one tensor with a number of elements such as "7e9" or "350M"."""
    suffixes = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    scale = suffixes.get(text[-1:].upper(), 1)
    try:
        count = float(text[:-1] if scale != 1 else text) * scale
    except ValueError:
        raise UsageError(f"--params {text!r} is not a number; write 7e9, 350M or 7000000000") from None
    if not (math.isfinite(count) and count >= 1):
        raise UsageError(f"--params {text!r} must be at least 1")
    return Model(f"{count:.4g} parameters", [_meta((round(count),), dtype)], [])


def from_config(path: str, dtype: torch.dtype) -> Model:
    name, shapes = read_config(path)
    trained: list[torch.Tensor] = [_meta(shape, dtype) for shape in shapes]
    return Model(name, trained, [], [p for p, shape in zip(trained, shapes, strict=True) if isinstance(shape, Table)])


def from_module(target: str, dtype: torch.dtype | None) -> Model:
    """A model from "module:callable", built on the meta device. dtype None keeps the model's own."""
    module_name, colon, attribute = target.partition(":")
    if not colon or not module_name or not attribute:
        raise UsageError(f"--model {target!r}: write module:callable, e.g. my_model:build")
    sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
        if not isinstance(found, torch.nn.Module):
            with torch.device("meta"):
                found = found()
    except Exception as error:  # the user's code may fail in any way
        raise UsageError(f"--model {target}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")
    if not isinstance(found, torch.nn.Module):
        raise UsageError(f"--model {target}: expected a torch.nn.Module, got {type(found).__name__}")
    model = Model(target, [], [])
    tables = embedding_ids(found)
    for p in found.parameters():
        copy = _meta(p.shape, dtype or p.dtype)
        if id(p) in tables:
            model.tables.append(copy)
        if option_overrides(p):
            fusedopt.override(copy, **option_overrides(p))
        (model.trained if p.requires_grad else model.frozen).append(copy)
    if not model.trained:
        raise UsageError(f"--model {target}: no parameter requires a gradient")
    return model


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _groups(name: str, model: Model, options: dict) -> list:
    """The parameters of a model as `create` groups them, embeddings without a projection. Takes unused projection options."""
    left = dict(options)
    projection = take_projection(name, left)
    if "rank" in left:  # the name's projection has none, or it has no projection
        del options["rank"]
    if projection is None:
        return model.trained
    return leave_out(model.trained, {id(p) for p in model.tables}, {"projection": None})


def measure(name: str, model: Model, grad_dtype: torch.dtype | None, precision: str, **options) -> Choice:
    """One optimizer on a model. Raises UsageError where the optimizer refuses the options."""
    base, _ = parse_name(name)
    try:
        groups = _groups(name, model, options)
        opt = fusedopt.create(name, groups, param_precision=precision, **OPTIONS.get(base, {}), **options)
        if opt.defaults["projection"] is not None and not places(opt):
            shapes = (
                "--params has no shapes; give --config or --model"
                if len(model.trained) == 1
                else "try a smaller --rank"
            )
            raise UsageError(f"{name}: no matrix of {model.name} is large enough to be projected: {shapes}")
        for p in model.trained:
            configured_precision(p, opt.param_groups[0])
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name}: {error}") from None
    states = extra = 0
    for group in opt.param_groups:
        for p in group["params"]:
            rule = opt.kept_rule(p, group)
            entry = dict(opt.init_state(p, group, rule))
            del entry["step"]
            extra += _bytes(entry.pop(key) for key in COMPANIONS if key in entry)
            states += _bytes(t for t in entry.values() if isinstance(t, torch.Tensor))
    gradients = sum(p.numel() * (grad_dtype or p.dtype).itemsize for p in model.trained)
    label = f"{name} momentum" if base == "sgd" else name
    return Choice(label, _dtypes(model.trained), _bytes(model.trained + model.frozen), gradients, extra, states)


def _dtypes(tensors) -> str:
    return "/".join(sorted({dtype_name(t.dtype) for t in tensors}))


def torch_choices(model: Model, grad_dtype: torch.dtype | None) -> list[Choice]:
    """torch.optim.AdamW in fp32, and on an fp32 master copy of 16-bit weights: two states in the dtype it steps."""
    n, full, half = sum(p.numel() for p in model.trained), torch.float32.itemsize, torch.bfloat16.itemsize
    frozen = sum(p.numel() for p in model.frozen)
    grad = grad_dtype.itemsize if grad_dtype else None
    return [
        Choice("torch AdamW", "fp32", (n + frozen) * full, n * full, 0, 2 * n * full),
        Choice("torch AdamW, fp32 master", "bf16", (n + frozen) * half, n * (grad or half), n * full, 2 * n * full),
    ]


def choices(model: Model, names: list[str], grad_dtype=None, precision="nearest", **options) -> list[Choice]:
    """The common choices, then those of `names` that are not among them; `names` are marked."""
    out = torch_choices(model, grad_dtype)
    for name in dict.fromkeys([*COMMON, *names]):
        choice = measure(name, model, grad_dtype, precision, **options)
        choice.chosen = name in names
        out.append(choice)
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--params", metavar="N", help="number of parameters: 7e9, 350M, 7B")
    source.add_argument("--config", metavar="PATH", help="a Hugging Face config.json, or the folder that holds one")
    source.add_argument("--model", metavar="MODULE:CALLABLE", help="a callable that returns a torch.nn.Module")
    parser.add_argument(
        "--optim", action="append", metavar="NAME",
        help="mark (and add) an optimizer, e.g. adamw8bit or galore_adamw8bit; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--rank", type=int, metavar="R", help="of projections such as galore_ (default: the projection's)"
    )
    parser.add_argument("--param-dtype", choices=DTYPES, help="of the weights (default bf16; the model's with --model)")
    parser.add_argument("--grad-dtype", choices=DTYPES, help="of the gradients (default: as the weights)")
    parser.add_argument(
        "--param-precision",
        choices=list_precisions(),
        help="how 16-bit weights are updated (default: stochastic for 16-bit weights, nearest for fp32)",
    )
    parser.add_argument(
        "--min-quantized-numel", type=int, default=4096, metavar="N", help="smaller tensors keep fp32 states (4096)"
    )
    parser.add_argument("--json", metavar="PATH", help="write the numbers, in bytes, to a file ('-': standard output)")


def run(args: argparse.Namespace) -> int:
    names = split_names(args.optim)
    dtype = DTYPES.get(args.param_dtype)
    if args.model:
        model = from_module(args.model, dtype)
    else:
        build, value = (from_config, args.config) if args.config else (from_count, args.params)
        model = build(value, dtype or torch.bfloat16)
    sixteen = any(p.element_size() == 2 for p in model.trained)
    precision = args.param_precision or ("stochastic" if sixteen else "nearest")
    options = {"min_quantized_numel": args.min_quantized_numel}
    if args.rank is not None:
        if not any(hasattr(take_projection(name, {}), "rank") for name in names):
            raise UsageError("--rank is that of a projection: name one that has it, e.g. --optim galore_adamw8bit")
        options["rank"] = args.rank
    rows = choices(model, names, DTYPES.get(args.grad_dtype), precision, **options)
    if args.json:
        count = {"model": model.name, "parameters": model.numel(), "tensors": len(model.trained) + len(model.frozen)}
        write_json(args.json, {**count, "choices": [{**asdict(c), "total": c.total} for c in rows]})
    if args.json != "-":
        print(report(model, rows, precision, args.min_quantized_numel))
    return 0


def report(model: Model, rows: list[Choice], precision: str, min_numel: int) -> str:
    """The table and what it leaves out, as text."""
    n = model.numel()
    unit, size = ("GiB", 2**30) if max(c.total for c in rows) >= 2**30 else ("MiB", 2**20)
    lines = [f"{model.name}: {n:,} parameters in {len(model.trained) + len(model.frozen)} tensors, sizes in {unit}", ""]
    cells = []
    for c in rows:
        parts = [c.weights, c.gradients, c.master, c.states, c.total]
        numbers = [f"{x / size:.2f}" if x else "-" for x in parts]
        row = [("> " if c.chosen else "  ") + c.name, c.params, *numbers]
        cells.append([*row, f"{c.states / n:.3f}", f"{c.total / n:.2f}"])
    headers = ["  optimizer", "params", "weights", "gradients", "master", "states", "total", "state B/p", "total B/p"]
    lines += [render(headers, cells, left=2, indent=""), ""]
    small = [p for p in model.trained if p.numel() < min_numel]
    if small:
        lines.append(
            f"{len(small)} tensors below {min_numel} elements ({sum(p.numel() for p in small):,} in all) "
            "keep fp32 states under an 8- or 4-bit format."
        )
    if model.frozen:
        lines.append(f"{sum(p.numel() for p in model.frozen):,} parameters are frozen: no gradient, no state.")
    if any(p.element_size() == 2 for p in model.trained):
        how = {
            "nearest": "Rounding to nearest loses updates below half a unit in the last place: consider stochastic.",
            "stochastic": "Stochastic rounding needs no master copy.",
            "kahan": "The master column holds the compensations.",
            "split24": "The master column holds 8 more bits of each weight.",
            "split32": "The master column holds the other 16 bits of each weight.",
        }
        lines.append(f"16-bit weights with param_precision={precision!r}. {how.get(precision, '')}".rstrip())
    return "\n".join([*lines, "Activations, temporary buffers and the allocator's reserve come on top."])
