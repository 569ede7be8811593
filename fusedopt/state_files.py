"""Optimizer states as a safetensors file: `<parameter>.exp_avg` and so on, with rule, formats and steps in the metadata.

The file is 8 bytes with the header's length, the header (JSON: for each tensor dtype, shape and offsets), and the tensors one
after the other (https://github.com/huggingface/safetensors, "Format"). It is written tensor by tensor and mapped when read,
so that states larger than memory pass through, which the library's save_file, collecting all bytes first, would not do.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
from collections.abc import Mapping

import torch

from fusedopt import checkpoint
from fusedopt.files import replacing
from fusedopt.masters import stored_precision
from fusedopt.memory import flat, is_dense
from fusedopt.states import stored_format

KIND, VERSION = "fusedopt.states", 1
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 2**24  # bytes written at a time


# The format


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes tensors (strided, any layout or device) and string metadata; the file appears whole or not at all.

    Raises ValueError for a dtype that the format does not have.
    """
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    # Wide elements first, so that every tensor is aligned when the file is mapped.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in ordered:
        t = tensors[name]
        if t.dtype not in _NAMES:
            raise ValueError(f"{name!r} is {t.dtype}, which safetensors files do not hold")
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in ordered:
            t = tensors[name].detach().contiguous().cpu()
            nbytes = t.numel() * t.element_size()
            if not nbytes:
                continue
            whole = memoryview((ctypes.c_char * nbytes).from_address(t.data_ptr())).cast("B")
            for first in range(0, nbytes, _PIECE):
                file.write(whole[first : first + _PIECE])


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; the tensors map the file and are read when they are used.

    Raises ValueError for a file that is truncated or no safetensors file.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if size < 8 or length > size - 8:
                raise ValueError(f"{size} bytes, where the header alone has {length}")
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
            if size != 8 + length + end:
                raise ValueError(f"{size} bytes instead of {8 + length + end}")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return {name: _mapped(mapped, 8 + length, name, entry) for name, entry in header.items()}, metadata
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is truncated, damaged, or no safetensors file: {error}") from None


def _mapped(buffer: mmap.mmap, base: int, name: str, entry: dict) -> torch.Tensor:
    start, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} has dtype {entry['dtype']}")
    dtype, shape = DTYPES[entry["dtype"]], torch.Size(entry["shape"])
    if not 0 <= start <= end or end - start != shape.numel() * dtype.itemsize:
        raise ValueError(f"{name!r} has shape {list(shape)} in {end - start} bytes")
    if start == end:
        return torch.empty(shape, dtype=dtype)
    if (base + start) % dtype.itemsize:  # of another writer
        return torch.frombuffer(bytearray(buffer[base + start : base + end]), dtype=dtype).view(shape)
    return torch.frombuffer(buffer, dtype=dtype, count=shape.numel(), offset=base + start).view(shape)


# States


def export_states(opt, path: str | os.PathLike, model: torch.nn.Module | None = None) -> None:
    """Writes all states of an optimizer as they are stored to a safetensors file; it appears whole or not at all.

    Tensors are named `<parameter>.<state>`: "head.weight.exp_avg", "head.weight.exp_avg_int8_scale". Names are those of the
    model, else those the optimizer was given (named_parameters), else "param.0" and so on. The metadata entry "fusedopt" is
    JSON: optimizer, version, and for each parameter its shape, rule, step, formats, precision and projection.

    Raises ValueError where the model lacks a parameter of the optimizer.
    """
    tensors, about = {}, {}
    for index, (name, p, group) in enumerate(_named(opt, model, "export_states")):
        entry = opt.state.get(p, {})
        rule, projection = opt.kept_rule(p, group, entry), opt.projection_for(p, group)
        about[name] = {"index": index, "shape": list(p.shape), "dtype": _NAMES[p.dtype]}
        if not entry:
            continue
        formats = {s.name: stored_format(entry, s.name).name for s in rule.states if s.name in entry}
        about[name] |= {
            "rule": rule.name, "step": float(entry.get("step", 0)), "formats": formats,
            "precision": stored_precision(p, entry).name, "projection": projection and projection.describe(),
        }  # fmt: skip
        for key, value in entry.items():
            if isinstance(value, torch.Tensor) and key != "step":
                # Codes lie in memory order, as their scales count them.
                coded = key in formats and value.dtype == torch.uint8 and is_dense(value) and not value.is_contiguous()
                tensors[f"{name}.{key}"] = flat(value) if coded else value
    text = json.dumps({"kind": KIND, "version": VERSION, "optimizer": type(opt).__name__, "parameters": about})
    write_safetensors(path, tensors, {"format": "pt", "fusedopt": text})


def import_states(opt, path: str | os.PathLike, model: torch.nn.Module | None = None) -> None:
    """Loads the states that `export_states` wrote, by the parameters' names; groups and their options stay as they are.

    States in another format are converted, as `load_state_dict` does. Parameters without states in the file have none then.

    Raises ValueError for a file that is truncated or is of other parameters or rules, and for a state of a wrong shape or
    dtype; the message names the parameter, and the optimizer is as it was.
    """
    tensors, metadata = read_safetensors(path)
    about = _about(path, metadata)
    named = _named(opt, model, "import_states")
    names = [name for name, *_ in named]
    if set(names) != about.keys():
        unknown, absent = sorted(about.keys() - set(names)), sorted(set(names) - about.keys())
        parts = [f"it has {', '.join(unknown[:5])}, which the optimizer does not step"] if unknown else []
        parts += [f"it lacks {', '.join(absent[:5])}"] if absent else []
        raise ValueError(f"{path} is of other parameters: {'; '.join(parts)}. Pass the model whose names it has.")
    state: dict[int, dict] = {}
    for index, (name, p, group) in enumerate(named):
        told = about[name]
        if "rule" not in told:
            continue
        if told["shape"] != list(p.shape):
            raise ValueError(
                f"{path}: {name!r} has shape {told['shape']} in the file and {list(p.shape)} in the optimizer"
            )
        prefix = f"{name}."
        entry = {key: tensors[prefix + key] for key in _keys(prefix, tensors)}
        kept = opt.kept_rule(p, group, entry).name
        if told["rule"] != kept:
            raise ValueError(
                f"{path}: {name!r} has states of rule {told['rule']!r} (of {json.loads(metadata['fusedopt'])['optimizer']}), "
                f"this {type(opt).__name__} keeps those of {kept!r}"
            )
        lost = [s for s in told["formats"] if s not in entry]
        if lost:
            raise ValueError(f"{path}: {name!r} lacks its state {', '.join(lost)}")
        state[index] = {"step": torch.tensor(told["step"]), **entry}
    groups = opt.state_dict()["param_groups"]
    opt.__setstate__(checkpoint.prepare(opt, {"state": state, "param_groups": groups}, names))


def _keys(prefix: str, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """What follows a parameter's name in the names of its tensors. State names have no dots: "a.b.exp_avg" is not of "a"."""
    return [key for full in tensors if full.startswith(prefix) and "." not in (key := full[len(prefix) :])]


def _about(path, metadata: Mapping[str, str]) -> dict[str, dict]:
    try:
        told = json.loads(metadata["fusedopt"])
    except (KeyError, ValueError):
        raise ValueError(f"{path} holds no optimizer states of export_states") from None
    if told.get("kind") != KIND or told["version"] > VERSION:
        raise ValueError(f"{path} holds {told.get('kind')} of version {told.get('version')}. Update fusedopt.")
    return told["parameters"]


def _named(opt, model: torch.nn.Module | None, what: str) -> list[tuple[str, torch.Tensor, dict]]:
    """(name, parameter, group) of every parameter of an optimizer. Raises ValueError for one that the model lacks."""
    of_model = None if model is None else {p: name for name, p in model.named_parameters()}
    out: list[tuple[str, torch.Tensor, dict]] = []
    for group in opt.param_groups:
        own = group.get("param_names")
        for i, p in enumerate(group["params"]):
            if of_model is not None and p not in of_model:
                raise ValueError(
                    f"{what}: parameter {len(out)} (shape {tuple(p.shape)}) is not in the model. Pass its model."
                )
            out.append((of_model[p] if of_model is not None else own[i] if own else f"param.{len(out)}", p, group))
    if len({name for name, *_ in out}) < len(out):
        raise ValueError(f"{what}: several parameters have the same name. Pass the model.")
    return out
