"""Tables as plain text: first columns to the left, numbers to the right."""

from __future__ import annotations

from collections.abc import Sequence


def render(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, indent: str = "  ") -> str:
    """Lines of a table with a rule under the headers. left: columns from the start that are aligned to the left."""
    table = [list(headers), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(headers))]
    table.insert(1, ["-" * width for width in widths])
    lines = []
    for row in table:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def replaced(text: str, marks: tuple[str, str], content: str) -> str:
    """A text with other content between two lines that mark its place. Raises ValueError where these are not there once each."""
    if any(text.count(mark) != 1 for mark in marks):
        raise ValueError(f"lacks the marks {marks[0]!r} and {marks[1]!r}, each once")
    before, rest = text.split(marks[0])
    return f"{before}{marks[0]}\n{content}\n{marks[1]}{rest.split(marks[1])[1]}"
