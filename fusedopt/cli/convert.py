"""Converts the optimizer state of a saved checkpoint between formats, and between fusedopt, torch.optim and bitsandbytes.

IN is a file of torch.save: an optimizer's state dict, or a checkpoint that holds one (--key); all else in it is copied.
It may be of fusedopt, torch.optim, bitsandbytes or torchao. Files are mapped, so that a state larger than memory is no
obstacle:

  python -m fusedopt convert optimizer.pt optimizer-int8.pt --state-format int8
  python -m fusedopt convert last.ckpt out.ckpt --key optimizer --state-format exp_avg=int8,exp_avg_sq=bf16
  python -m fusedopt convert bnb.pt torch.pt --to torch
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from fusedopt.cli import UsageError, write_json
from fusedopt.cli.progress import progress
from fusedopt.cli.table import render
from fusedopt.conversion import FORMS, Summary
from fusedopt.conversion.files import convert_file
from fusedopt.conversion.foreign import BITSANDBYTES_NAMES
from fusedopt.formats import get_format, list_formats

UNIT = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="the file to convert")
    parser.add_argument("target", metavar="OUT", help="the file to write")
    parser.add_argument(
        "--state-format",
        metavar="FORMAT",
        help=f"one of {', '.join(list_formats())}, or NAME=FORMAT,... by state "
        "(needed for --to native; default fp32 for torch, int8 for bitsandbytes)",
    )
    parser.add_argument("--to", choices=FORMS, default="native", help="whose state dict to write (native: fusedopt's)")
    parser.add_argument("--key", help="where the state dict is in a checkpoint, nested as a.b (default: found)")
    parser.add_argument(
        "--optimizer", choices=BITSANDBYTES_NAMES, help="of a bitsandbytes state dict with one state per parameter"
    )
    parser.add_argument(
        "--min-quantized-numel", type=int, default=4096, metavar="N", help="smaller tensors stay fp32 (4096)"
    )
    parser.add_argument("--json", metavar="PATH", help="write the closing numbers to a file ('-': standard output)")


def state_format(text: str | None, to: str) -> str | dict[str, str]:
    """What --state-format asks for. Raises UsageError."""
    allowed = {"native": list_formats(), "torch": ["fp32"], "bitsandbytes": ["int8", "fp32"]}[to]
    if text is None:
        if to == "native":
            raise UsageError("--state-format is needed: one of " + ", ".join(allowed))
        return allowed[0]
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        names = {name.strip(): get_format(form.strip()).name for name, equals, form in pairs if equals}
        single = [get_format(name.strip()).name for name, equals, _ in pairs if not equals]
    except ValueError as error:
        raise UsageError(f"--state-format {text}: {error}") from None
    if single and (names or len(single) > 1):
        raise UsageError(f"--state-format {text}: give one format, or NAME=FORMAT for each state")
    if to != "native" and (names or single[0] not in allowed):
        raise UsageError(f"--state-format {text}: --to {to} takes {' or '.join(allowed)}")
    return names or single[0]


def run(args: argparse.Namespace) -> int:
    asked = state_format(args.state_format, args.to)
    bar = None
    before = 0

    def show(done: int, total: int) -> None:
        nonlocal bar, before
        if bar is None:
            bar = progress(max(1, total // UNIT), "convert (Mi elements)")
        bar.update(done // UNIT - before)
        before = done // UNIT

    try:
        summary = convert_file(
            args.source, args.target, asked, key=args.key, min_quantized_numel=args.min_quantized_numel,
            optimizer=args.optimizer, to=args.to, progress=show,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"{error.filename or args.target}: {error.strerror or error}") from None
    finally:
        if bar is not None:
            bar.close()
    if args.json:
        write_json(args.json, asdict(summary))
    if args.json != "-":
        print(report(summary, args.to, asked))
    return 0


def report(summary: Summary, to: str, asked: str | dict[str, str]) -> str:
    formats = asked if isinstance(asked, str) else ", ".join(f"{k} {v}" for k, v in asked.items())
    each = max(1, summary.elements)
    rows = [
        [name, str(summary.tensors), f"{summary.elements:,}", f"{size:,}", f"{size / each:.3f}"]
        for name, size in (
            (f"before ({summary.source})", summary.bytes_before),
            (f"after ({'fusedopt' if to == 'native' else to}, {formats})", summary.bytes_after),
        )
    ]
    lines = [render(["optimizer states", "tensors", "elements", "bytes", "B/element"], rows)]
    if summary.zeroed:
        lines.append(f"{summary.zeroed:,} first moments set to zero: their second moments had been rounded to zero.")
    if summary.dropped:
        lines.append(f"Left out: {', '.join(summary.dropped)}, for which {to} has no place.")
    return "\n".join(lines)
