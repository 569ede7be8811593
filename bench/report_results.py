"""Result files by kind, and the pieces that every table of `bench report` is put together from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NONE = "No results of this yet."


@dataclass
class Results:
    """Every result file of some folders by its kind, older ones first."""

    files: list[tuple[Path, dict]] = field(default_factory=list)

    @staticmethod
    def of(paths: Iterable[Path]) -> Results:
        found = []
        for path in paths:
            try:
                content = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if not isinstance(content, dict):
                continue
            if content.keys() == {"setup", "runs"}:  # of `fusedopt demo --json`, which stamps no machine
                content = {"kind": "demo", "machine": {}, **content}
            if "machine" in content and not content.get("dry_run"):
                found.append((path, content))
        return Results(sorted(found, key=lambda item: item[1]["machine"].get("date", "")))

    def all(self, kind: str) -> list[dict]:
        return [content for _, content in self.files if content.get("kind") == kind]

    def newest(self, kind: str) -> dict | None:
        return next(iter(reversed(self.all(kind))), None)

    def same(self, kind: str, accept: Callable[[dict], bool]) -> list[dict]:
        """Those of a kind that are accepted and were made by the same commit on the same processor as the newest of them."""
        found = [content for content in self.all(kind) if accept(content)]
        return [content for content in found if stamp(content) == stamp(found[-1])]

    def demo(self, *names: str) -> dict | None:
        """The demo's run with exactly these optimizers."""
        return next((d for d in self.all("demo") if [r["name"] for r in d["runs"]] == list(names)), None)


def stamp(content: dict) -> tuple:
    """Results with the same one are repetitions of one measurement."""
    return tuple(content["machine"].get(name) for name in ("commit", "processor", "threads"))


def hardware(content: dict) -> str:
    """ "AMD EPYC, 2 threads, AVX512, torch 2.13.0"."""
    m = content["machine"]
    return f"{m['processor']}, {m['threads']} threads, {m['isa']}, torch {m['versions']['torch']}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return (
        "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
        .replace("|  |", "| |")
        .replace(" --- ", "---")
    )


def span(values: Iterable[float], form: str = ".2f", unit: str = "") -> str:
    """ "0.99 to 1.01", or one number where both read alike."""
    ordered = sorted(values)
    texts = [format(x, form) for x in (ordered[0], ordered[-1])]
    return (texts[0] if texts[0] == texts[1] else " to ".join(texts)) + unit


def percent(change: float, error: float | None = None) -> str:
    return f"{change:+.2f} +- {error:.2f} %" if error else f"{change:+.1f} %"


def listed(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
