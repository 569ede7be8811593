"""Command line of the benchmarks: `python -m bench COMMAND`, each with --help; the commands are in COMMANDS."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "run": "measure cases x providers, interleaved, against the copy bandwidth of the same run",
    "scaling": "time against parameters, tensors and threads, and where cost grows faster than work",
    "compare": "two result files: which ratios changed beyond noise",
    "plot": "a result file as PNG charts",
    "accuracy": "what formats and precisions cost: errors on real moments, drift, losses over seeds",
    "lowrank": "projected optimizers: steps, refreshes, staggering, state and extra memory",
    "lowrank-accuracy": "what projected and factored optimizers cost in held-out loss, against AdamW",
    "offload": "offloaded steps against ordinary ones and against the disk's bandwidth",
    "kill-resume": "runs killed with SIGKILL at random points: does each resume bit for bit?",
    "conformance": "what training code expects of an optimizer: our classes and every importable rival, on the CPU",
    "release": "gradient release: peak memory and host time against an ordinary loop",
    "muon": "Muon over GPT-2's matrices against torch.optim.Muon: time and memory of a step",
    "rules": "every update rule trains the demo's model, smaller, at its default learning rate",
    "predict": "the expected time of a step on a GPU and its limit, from compiled kernels and planned bytes",
    "report": "the tables and charts of README from result files; --check compares",
    "gates": "registers, spills, access widths, launches and bytes against their limits",
    "gpu": "build, test, measure and plot on the GPU of this machine, one folder",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {}
    for name, text in COMMANDS.items():
        modules[name] = importlib.import_module(f"bench.{name.replace('-', '_')}")
        modules[name].add_arguments(commands.add_parser(name, help=text, description=modules[name].__doc__))
    args = parser.parse_args(argv)
    return modules[args.command].main(args)


if __name__ == "__main__":
    sys.exit(main())
