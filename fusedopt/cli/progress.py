"""A progress bar: tqdm's where it is installed, one line of our own elsewhere."""

from __future__ import annotations

import sys
import time

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Line:
    """Rewrites one line of standard error; without a terminal it writes a line every tenth of the way."""

    def __init__(self, total: int, desc: str):
        self.total, self.desc, self.done, self.note = total, desc, 0, ""
        self.start, self.tty = time.perf_counter(), sys.stderr.isatty()

    def update(self, count: int) -> None:
        self.done += count
        if self.tty:
            full = 30 * self.done // self.total
            text = f"\r{self.desc} |{'#' * full}{' ' * (30 - full)}| {self.done}/{self.total} {self.note}"
            print(text, end="", file=sys.stderr, flush=True)
        elif self.done * 10 // self.total != (self.done - count) * 10 // self.total:
            print(f"{self.desc} {self.done}/{self.total} {self.note}", file=sys.stderr, flush=True)

    def set_postfix_str(self, note: str, refresh: bool = True) -> None:
        self.note = note

    def close(self) -> None:
        if self.tty:
            print(f"  {time.perf_counter() - self.start:.0f} s", file=sys.stderr)


def progress(total: int, desc: str):
    """An object with update(count), set_postfix_str(text) and close()."""
    if tqdm is None:
        return Line(total, desc)
    every = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=desc, unit="step", mininterval=every, dynamic_ncols=True)
