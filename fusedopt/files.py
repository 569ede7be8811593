"""Checkpoint files: written whole or not at all, read back with weights_only=True, with everything a run needs to go on.

A file is written under another name in the same folder, brought to the disk, and renamed; the rename is brought to the disk
too. Whatever happens in between, the name stands for the previous file or for the new one.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from fusedopt import checkpoint
from fusedopt.optimizer import FusedOptimizer

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

KIND, VERSION = "fusedopt.checkpoint", 1
_SUFFIX = ".saving"


# Files that are whole


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write, that takes the place of `path` when the block ends without an error; until then `path` is as it was.

    Left-overs of earlier writers of the same name that have been killed are removed.
    """
    path = Path(path)
    _sweep(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks keeps left-overs
                    fcntl.flock(file, fcntl.LOCK_EX)  # says that its writer lives
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(name, _usual_mode())
            os.replace(name, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _usual_mode() -> int:
    """What open() gives a new file; mkstemp gives 0600."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Removes what writers of a path, or of one that differs in its last number, left when they were killed."""
    if fcntl is None:
        return
    pattern = re.compile(rf"\.{_numbered(path.name) or re.escape(path.name)}\..*{re.escape(_SUFFIX)}")
    for other in path.parent.glob(f".*{_SUFFIX}"):
        if pattern.fullmatch(other.name):
            with contextlib.suppress(OSError), open(other, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(other)


# Names with a number


def _numbered(name: str) -> str | None:
    """A pattern of the names that differ from this one in their last number, which is its group; None for names without."""
    match = re.fullmatch(r"(.*?)(\d+)(\D*)", name)
    if match is None:
        return None
    return f"{re.escape(match[1])}(\\d+){re.escape(match[3])}"


def _siblings(path: Path) -> list[Path]:
    """Files whose names differ from this one in their last number, in the order of these numbers."""
    pattern = re.compile(_numbered(path.name) or re.escape(path.name))
    found = [(m, f) for f in path.parent.iterdir() if (m := pattern.fullmatch(f.name))]
    return [f for m, f in sorted(found, key=lambda x: int(x[0][1]) if x[0].re.groups else 0)]


def latest_checkpoint(path: str | os.PathLike) -> Path | None:
    """The file with the highest number among those named like `path` ("run/step-0.pt": the last number counts), or None."""
    path = Path(path)
    found = _siblings(path) if path.parent.is_dir() else []
    return found[-1] if found else None


# Random numbers


def generator_states() -> dict:
    """States of the generators of Python, numpy (if it is in use), torch and the GPUs (if they are in use)."""
    states: dict = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = numpy.random.get_state()
        states["numpy"] = (
            str(kind),
            [int(k) for k in keys],
            *(float(x) if i == 2 else int(x) for i, x in enumerate(rest)),
        )
    return states


def set_generator_states(states: dict) -> None:
    """Puts generators back into the states that `generator_states` gave."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    if "numpy" in states and (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = states["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))


# Checkpoints


def save_checkpoint(
    path: str | os.PathLike, *, extra=None, keep: int | None = None, random_states: bool = True, **objects
) -> None:
    """Saves a run so that it goes on bit for bit: save_checkpoint("run/step-100.pt", model=model, optimizer=opt, scheduler=s).

    A save that is interrupted, by a crash, a kill or a full disk, leaves the file that was there. Of several processes, one
    saves. Plain `torch.load(path, weights_only=True)` reads the file.

    Args:
        objects: anything with state_dict and load_state_dict, each under the name it is given.
        extra: what else the run needs: numbers, strings, tensors and containers of them.
        keep: how many files named like this one but for their last number are kept, this one included; None for all.
        random_states: also save the generators of Python, numpy and torch.

    Raises:
        TypeError: an object has no state_dict. ValueError: keep without a number in the name, or content that
        weights_only=True would not load. OSError: the file cannot be written. The previous file is there in every case.
    """
    path = Path(path)
    if keep is not None and (keep < 1 or _numbered(path.name) is None):
        raise ValueError(f"save_checkpoint: keep={keep} needs a number in the file's name, such as 'step-100.pt'")
    content = {"kind": KIND, "version": VERSION, "objects": {}, "extra": extra}
    for name, thing in objects.items():
        if not hasattr(thing, "state_dict"):
            raise TypeError(f"save_checkpoint: {name} is a {type(thing).__name__}, which has no state_dict()")
        content["objects"][name] = thing.state_dict()
    if random_states:
        content["random"] = generator_states()
    if (what := _unsafe(content)) is not None:
        raise ValueError(f"save_checkpoint: {what}, which weights_only=True does not load. Save tensors and numbers.")
    with replacing(path) as file:
        torch.save(content, file)
    if keep is not None:
        for old in _siblings(path)[:-keep]:
            if old != path:
                old.unlink(missing_ok=True)


def _unsafe(value, where: str = "") -> str | None:
    """Says what in a structure torch.load(weights_only=True) refuses, or None."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if (what := _unsafe(inner, f"{where}[{key!r}]")) is not None:
                return what
        return None
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple, torch.Size):
        return next(
            (what for i, inner in enumerate(value) if (what := _unsafe(inner, f"{where}[{i}]")) is not None), None
        )
    simple = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
    if isinstance(value, torch.Tensor) or type(value) in simple:
        return None
    if type(value) in torch.serialization.get_safe_globals():
        return None
    return f"{where} is a {type(value).__module__}.{type(value).__qualname__}"


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The content of a file of `save_checkpoint`, mapped into memory: {"objects", "extra", "random"}.

    Raises FileNotFoundError, or ValueError for a file that is truncated, damaged or something else.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated, damaged, or no checkpoint: {why} Load an earlier one."
        ) from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ValueError(f"{path} was not written by save_checkpoint. Read it with torch.load.")
    if content["version"] > VERSION:
        raise ValueError(f"{path} was written by a newer fusedopt (version {content['version']}). Update fusedopt.")
    return content


def load_checkpoint(path: str | os.PathLike, *, random_states: bool = True, **objects):
    """Loads a file of `save_checkpoint` into the objects and the random generators. Returns what was saved as `extra`.

    The file is read, and models and optimizers of this package are compared with it, before anything is changed.

    Raises:
        FileNotFoundError. ValueError: the file is truncated, or something in it does not fit; the message says what.
    """
    content = read_checkpoint(path)
    saved = content["objects"]
    if missing := [name for name in objects if name not in saved]:
        raise ValueError(f"{path} holds {', '.join(saved) or 'nothing'}, not {', '.join(missing)}")
    for name, thing in objects.items():
        if isinstance(thing, torch.nn.Module):
            _check_module(path, name, thing, saved[name])
        elif isinstance(thing, FusedOptimizer):
            checkpoint.prepare(thing, saved[name])
    # Models come first: an optimizer may derive fp32 weights from parameters.
    for name in sorted(objects, key=lambda n: not isinstance(objects[n], torch.nn.Module)):
        objects[name].load_state_dict(saved[name])
    if random_states and "random" in content:
        set_generator_states(content["random"])
    return content["extra"]


def _check_module(path, name: str, module: torch.nn.Module, saved: dict) -> None:
    mine = module.state_dict()
    if mine.keys() != saved.keys():
        absent, unknown = [k for k in mine if k not in saved], [k for k in saved if k not in mine]
        parts = [f"has no {', '.join(absent[:5])}"] if absent else []
        parts += [f"has {', '.join(unknown[:5])}, which the model has not"] if unknown else []
        raise ValueError(f"{path}: {name} is of another model: it {' and '.join(parts)}")
    for key, value in mine.items():
        if isinstance(value, torch.Tensor) and value.shape != saved[key].shape:
            raise ValueError(
                f"{path}: {name} is of another model: {key!r} has shape {tuple(saved[key].shape)}, the model's "
                f"{tuple(value.shape)}"
            )
