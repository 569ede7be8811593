"""README's tables and charts from result files: what stands between its marks is made here and nowhere else.

Reads bench/results and the folders given (of `bench gpu`), writes Markdown between `<!-- NAME: written by python -m bench report
-->` and `<!-- end of NAME -->`, and PNGs beside the results. --check compares instead, and exits 1 where README says something
else than the results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import machine, run
from bench.predict import result_files
from bench.report_results import Results
from bench.report_tables import SECTIONS
from fusedopt.cli.table import replaced

README, NOTES = machine.ROOT / "README.md", machine.ROOT / "bench" / "NOTES.md"


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by python -m bench report -->", f"<!-- end of {name} -->"


def rewritten(text: str, results: Results, names=SECTIONS) -> str:
    """A text with every section that it has marks for. Raises ValueError for a mark without its partner."""
    for name in names:
        if any(mark in text for mark in marks(name)):
            text = replaced(text, marks(name), SECTIONS[name](results))
    return text


def stale(text: str, results: Results) -> list[str]:
    """Sections whose text is not what the results give."""
    return [name for name in SECTIONS if rewritten(text, results, [name]) != text]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="*", type=Path, help="folders of `bench gpu`, read beside bench/results")
    parser.add_argument(
        "--readme", type=Path, action="append", help="a file with marks; README.md and bench/NOTES.md by default"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where the file differs from the results"
    )
    parser.add_argument("--no-charts", action="store_true", help="write no PNGs")
    parser.add_argument("--out", type=Path, default=run.RESULTS, help="folder of the PNGs")


def main(args: argparse.Namespace) -> int:
    results = Results.of(result_files([run.RESULTS, *args.folder]))
    old = 0
    for path in args.readme or (README, NOTES):
        try:
            text = path.read_text()
            if args.check:
                names = stale(text, results)
                old += len(names)
                for name in names:
                    print(f"{path.name}: {name} is not what the results give: run python -m bench report")
                continue
            path.write_text(rewritten(text, results))
        except (OSError, ValueError) as error:
            print(f"bench report: {path} {error}" if isinstance(error, ValueError) else f"bench report: {error}")
            return 2
        print(f"written: {path}")
    if args.check:
        return int(old > 0)
    if not args.no_charts:
        try:
            from bench.report_charts import write
        except ImportError:
            print("no charts: matplotlib is not installed; pip install matplotlib")
            return 0
        for path in write(results, args.out):
            print(f"written: {path}")
    return 0
