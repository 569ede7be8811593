"""Muon over the hidden matrices of a GPT-2 124M, on the CPU, against torch.optim.Muon: times of steps in interleaved rounds,
ratios of the same round, and how far the allocations of a step rise.
"""

from __future__ import annotations

import argparse
import datetime
import gc
from pathlib import Path

import torch

import fusedopt
from bench import machine
from bench.cases import gpt2
from bench.lowrank import allocated_peak, seconds, table
from bench.run import RESULTS, quartiles, save

SCHEMA = 1
CPU = torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, help="of interleaved measurements: 7, with --quick 2")
    parser.add_argument("--layers", type=int, default=12, help="of GPT-2")
    parser.add_argument("--quick", action="store_true", help="matrices of a tenth the width: to try the tool")
    parser.add_argument("--out", type=Path, help="a .json file or a folder; bench/results by default")


def matrices(layers: int, divisor: int) -> list[torch.nn.Parameter]:
    """The hidden matrices with gradients."""
    gen = torch.Generator().manual_seed(0)
    shapes = [s for s in gpt2(layers)[2:] if len(s) == 2]
    params = [torch.nn.Parameter(torch.randn([d // divisor for d in s], generator=gen) * 0.02) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=gen)
    return params


SUBJECTS = {
    "torch.optim.Muon": lambda ps: torch.optim.Muon(ps, lr=1e-4),
    "fusedopt.Muon": lambda ps: fusedopt.Muon(ps, lr=1e-4),
    "fusedopt.Muon, int8 momentum": lambda ps: fusedopt.Muon(ps, lr=1e-4, state_format="int8"),
}


def measure(layers: int, divisor: int, rounds: int) -> list[dict]:
    params = matrices(layers, divisor)
    opts = {name: make(params) for name, make in SUBJECTS.items()}
    peaks, times = {}, {name: [] for name in opts}
    for name, opt in opts.items():
        opt.step()  # states and buffers
        gc.collect()
        peaks[name] = allocated_peak(opt.step)[0]
    for _ in range(rounds):
        for name, opt in opts.items():
            times[name].append(seconds(opt.step))
    largest = 4 * max(p.numel() for p in params)
    first = times["torch.optim.Muon"]
    rows = []
    for name, mine in times.items():
        ratio = quartiles([t / base for t, base in zip(mine, first, strict=True)])
        states = [v for e in opts[name].state.values() for k, v in e.items() if k != "step" and torch.is_tensor(v)]
        rows.append({
            "name": name, "matrices": len(params), "elements": sum(p.numel() for p in params),
            "ratio": round(ratio["median"], 3), "q1": round(ratio["q1"], 3), "q3": round(ratio["q3"], 3),
            "state_bytes": sum(t.numel() * t.element_size() for t in states), "extra_of_largest": round(peaks[name] / largest, 2),
        })  # fmt: skip
    return rows


def main(args: argparse.Namespace) -> int:
    rounds = args.rounds or (2 if args.quick else 7)
    rows = measure(1 if args.quick else args.layers, 12 if args.quick else 1, rounds)
    document = {"schema": SCHEMA, "kind": "muon", "machine": machine.stamp(CPU), "rounds": rounds, "rows": rows}
    print(table("Muon steps: time by that of torch.optim.Muon; extra memory by the largest matrix in fp32", rows))
    path = args.out or RESULTS
    if path.suffix != ".json":
        path = path / f"muon-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}-cpu.json"
    save(document, path)
    print(f"written: {path}")
    return 0
