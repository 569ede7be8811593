"""Writes the generated sources of the native parts: one translation unit per rule header, and the registry of all rules.

A rule is found by its `FO_RULE(Type)` line in csrc/rules/*.h, so adding one touches no list. Used by setup.py, the CUDA
shim of the tests and the bench gates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

CSRC = Path(__file__).resolve().parent


def rules() -> dict[str, list[str]]:
    """Rule types by header stem, in the order that gives rules their ids."""
    found = {}
    for header in sorted((CSRC / "rules").glob("*.h")):
        types = re.findall(r"^FO_RULE\((\w+)\)", header.read_text(), re.MULTILINE)
        if types:
            found[header.stem] = types
    return found


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:  # an unchanged file keeps its time, so ninja rebuilds nothing
        path.write_text(text)
    return path


def unit(out: Path, stem: str, driver: str, suffix: str) -> Path:
    """One translation unit: the rule header, the driver ("cpu/driver.h", "cuda/driver.cuh"), FO_INSTANTIATE per rule."""
    lines = [f'#include "rules/{stem}.h"', f'#include "{driver}"', ""]
    lines += [f"FO_INSTANTIATE({name})" for name in rules()[stem]]
    return _write(out / f"{stem}{suffix}", "\n".join(lines) + "\n")


def registry(out: Path, stems: Iterable[str] | None = None) -> Path:
    """rules.inc: `FO_LIST(Type)` per rule in id order, after the includes of their headers; the including file defines FO_LIST.
    stems: of the headers to list, all by default."""
    lines = []
    chosen = {stem: types for stem, types in rules().items() if stems is None or stem in stems}
    for types in chosen.values():
        lines += [f"FO_LIST({name})" for name in types]
    includes = [f'#include "rules/{stem}.h"' for stem in chosen]
    _write(out / "rule_headers.inc", "\n".join(includes) + "\n")
    return _write(out / "rules.inc", "\n".join(lines) + "\n")
