"""`python -m fusedopt convert | demo | doctor | estimate | rules`: the command line."""

from __future__ import annotations

import argparse
import importlib
import sys

from fusedopt.cli import UsageError

COMMANDS = {
    "convert": "convert the optimizer state of a checkpoint between formats, torch.optim and bitsandbytes",
    "demo": "train a small byte-level GPT with torch.optim.AdamW and with fusedopt, and compare",
    "doctor": "show versions and backends, check every backend against the fp64 reference, time a step",
    "estimate": "memory of weights, gradients and optimizer states of a model, for the common choices",
    "rules": "a table of every optimizer class: states, bytes, reductions, projections, source",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedopt", description="Optimizer steps at memory bandwidth.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"fusedopt.cli.{name}")
        sub = commands.add_parser(
            name,
            help=text,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 0, 1 where something is wrong, 2 for wrong arguments."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return args.run(args)
    except UsageError as error:
        print(f"python -m fusedopt {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
