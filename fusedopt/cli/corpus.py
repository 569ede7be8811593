"""The demo's text as bytes: the source of Python's standard library, or the user's files, with some held out."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedopt.cli import UsageError

HELD_OUT = 10  # every tenth file; the last tenth of each where there are fewer files
LIMIT = 64 * 2**20  # bytes read at most
_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass
class Corpus:
    """uint8 tensors; `name` says where the text is from."""

    name: str
    train: torch.Tensor
    held_out: torch.Tensor

    def windows(self, count: int, context: int, seed: int, held_out: bool = False) -> torch.Tensor:
        """int64 [count, context + 1]: windows at random places, the same for the same seed on every device."""
        text = self.held_out if held_out else self.train
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(text.numel() - context, (count, 1), generator=generator)
        return text[starts + torch.arange(context + 1)].long()


def _files(path: str | None) -> tuple[str, list[Path]]:
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        found = [f for f in root.rglob("*.py") if _SKIP.isdisjoint(f.relative_to(root).parts)]
        name = f"Python's standard library ({sysconfig.get_python_version()})"
        return name, sorted(found, key=lambda f: f.relative_to(root).as_posix())
    given = Path(path)
    if not given.exists():
        raise UsageError(f"--text {path}: no such file or folder")
    if given.is_file():
        return path, [given]
    return path, sorted(f for f in given.rglob("*") if f.is_file() and "__pycache__" not in f.parts)


def load(path: str | None, context: int) -> Corpus:
    """Reads the corpus. Raises UsageError where there is too little text."""
    name, files = _files(path)
    texts, size = [], 0
    for file in files:
        try:
            text = file.read_bytes()
        except OSError:
            continue  # unreadable files of a folder are left out, as binary ones are
        if text and b"\0" not in text[:8192] and size + len(text) <= LIMIT:
            texts.append(text)
            size += len(text)
    if len(texts) >= HELD_OUT:
        held = texts[HELD_OUT - 1 :: HELD_OUT]
        train = [t for i, t in enumerate(texts) if i % HELD_OUT != HELD_OUT - 1]
    else:
        cuts = [len(t) - len(t) // HELD_OUT for t in texts]
        train = [t[:cut] for t, cut in zip(texts, cuts, strict=True)]
        held = [t[cut:] for t, cut in zip(texts, cuts, strict=True)]
    parts = [b"".join(train), b"".join(held)]
    if min(map(len, parts)) < 2 * (context + 1):
        raise UsageError(
            f"{name}: {size} bytes of text in {len(texts)} files are too little; "
            f"at least {2 * HELD_OUT * (context + 2)} are needed for context {context}"
        )
    return Corpus(name, *(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts))
