"""Time of a step against parameters, tensors and threads, and where cost grows faster than work.

parameters: one tensor of 1e5 to 1e8 elements; work is the bytes of a step. tensors: the same elements in 1 to 4000 tensors; work
is the same, so that every growth is overhead. threads: the same step on more threads; cost is time x threads. Providers are
interleaved as in `bench run`; a growth counts where it is beyond the quartiles and beyond `FREE`.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import math
import os
from itertools import pairwise
from pathlib import Path

import torch

from bench import machine, providers, run
from bench.cases import Case
from fusedopt.cli.table import render

PROVIDERS = ("fusedopt-cpu/adamw/fp32", "fusedopt-cpu/adamw/int8", "fusedopt-cpu/lion/int8", "deepspeed/adamw/cpu")
SWEEPS = ("parameters", "tensors", "threads")
PARAMETERS = (10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8)
TENSORS = (1, 4, 16, 64, 250, 1000, 4000)
TOGETHER = 8 * 10**6  # elements of all tensors
FREE = 1.15  # growth beyond work that no machine resolves


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sweep", action="append", choices=SWEEPS, help="may be repeated; all by default")
    parser.add_argument(
        "--provider", action="append", metavar="GLOB", help="may be repeated; torch's fused step always runs"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--largest", type=float, default=1e8, metavar="N", help="leave out more elements than this")
    parser.add_argument("--out", type=Path, help="a .json file or a folder; bench/results by default")


def thread_counts() -> list[int]:
    """1, 2, 4, ... and all that torch uses."""
    most = torch.get_num_threads()
    return [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < most] + [most]


def points(sweep: str, device: torch.device, largest: float) -> list[tuple[int, Case]]:
    """(parameters, tensors or threads, what is stepped there)."""
    together = min(TOGETHER, int(largest))
    if sweep == "parameters":
        return [(n, Case(f"{n} in 1", ((n,),))) for n in PARAMETERS if n <= largest]
    if sweep == "tensors":
        return [(n, Case(f"{together} in {n}", ((together // n,),) * n)) for n in TENSORS if together // n > 0]
    if device.type != "cpu":
        return []
    return [(n, Case(f"{together} in 1", ((together,),))) for n in thread_counts()]


def measure_point(case: Case, device: torch.device, chosen, rounds: int) -> list[dict]:
    """A record of each provider: its bytes, its working set, milliseconds."""
    arena = run.Arena(case, device, 2)
    contenders, out = [], []
    for provider in chosen:
        reason = provider.why_not(case, device)
        if reason is None:
            try:
                contenders.append(arena.enter(provider, 1))
            except Exception as error:  # a rival may fail in any way
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            out.append({"provider": provider.name, "skipped": reason.splitlines()[0]})
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            turn = index % max(1, len(contenders))
            for contender in contenders[turn:] + contenders[:turn]:
                arena.measure(contender, index)
    finally:
        gc.enable()
    for contender in contenders:
        held = case.parameter_bytes + 2 * case.gradient_bytes + contender.provider.state_bytes(case)
        ms = run.quartiles([1e3 * s for s in contender.seconds])
        record = {"provider": contender.provider.name, "bytes": contender.bytes, "working_set": held, "ms": ms}
        out.append({**record, "host_ms": run.quartiles([1e3 * s for s in contender.host])})
    return out


def measure(sweeps, chosen, device: torch.device, rounds: int, largest: float, show=print) -> dict:
    document = {
        "schema": run.SCHEMA, "kind": "scaling", "machine": machine.stamp(device), "settings": {"rounds": rounds}, "points": [],
    }  # fmt: skip
    before = torch.get_num_threads()
    for sweep in sweeps:
        for x, case in points(sweep, device, largest):
            if sweep == "threads":
                torch.set_num_threads(x)
            try:
                records = measure_point(case, device, chosen, rounds)
            finally:
                torch.set_num_threads(before)
            document["points"] += [{"sweep": sweep, "x": x, **record} for record in records]
        show(table(document, sweep))
    document["growth"] = growth(document["points"])
    return document


def cost(sweep: str, point: dict, which: str = "median") -> float:
    return point["ms"][which] * (point["x"] if sweep == "threads" else 1)


def growth(found: list[dict]) -> list[dict]:
    """Neighbouring points between which cost grows faster than work: beyond FREE, and by more than their quartiles explain.

    cost_ratio, work_ratio; exponent: of cost in work where work grows (1 is proportional).
    """
    out = []
    series: dict[tuple[str, str], list[dict]] = {}
    for point in found:
        if "ms" in point:
            series.setdefault((point["sweep"], point["provider"]), []).append(point)
    for (sweep, provider), line in series.items():
        for a, b in pairwise(sorted(line, key=lambda p: p["x"])):
            work = b["bytes"] / a["bytes"]
            ratio = cost(sweep, b) / cost(sweep, a)
            least = cost(sweep, b, "q1") / cost(sweep, a, "q3")
            if ratio > FREE * work and least > work:
                entry = {
                    "sweep": sweep,
                    "provider": provider,
                    "from": a["x"],
                    "to": b["x"],
                    "cost_ratio": ratio,
                    "work_ratio": work,
                }
                if work > 1.01:
                    entry["exponent"] = math.log(ratio) / math.log(work)
                if sweep == "tensors":
                    entry["us_per_tensor"] = 1e3 * (b["ms"]["median"] - a["ms"]["median"]) / (b["x"] - a["x"])
                out.append({**entry, "working_set": [a["working_set"], b["working_set"]]})
    return out


def explained(entry: dict, cache: int) -> str:
    """One line about a growth. cache: bytes of the last level, 0 where unknown."""
    text = (
        f"{entry['sweep']}: {entry['provider']} from {entry['from']:,} to {entry['to']:,}: {entry['cost_ratio']:.2f} times the "
        f"cost for {entry['work_ratio']:.2f} times the work"
    )
    if "exponent" in entry:
        text += f", exponent {entry['exponent']:.2f}"
    if "us_per_tensor" in entry:
        text += f", {entry['us_per_tensor']:.2f} us for each tensor more"
    low, high = entry["working_set"]
    if low < cache <= high:
        text += f" (its working set leaves the {cache / 2**20:.0f} MiB cache)"
    return text


def table(document: dict, sweep: str) -> str:
    """Milliseconds by provider, and nanoseconds per kilobyte of work in brackets, which a proportional cost keeps."""
    mine = [p for p in document["points"] if p["sweep"] == sweep]
    xs = sorted({p["x"] for p in mine})
    if not xs:
        return f"{sweep}: nothing to measure on this device"
    rows = []
    for name in dict.fromkeys(p["provider"] for p in mine if "ms" in p):
        here = {p["x"]: p for p in mine if p["provider"] == name}
        cells = [
            f"{p['ms']['median']:.3f} ({1e9 * cost(sweep, p) / p['bytes']:.0f})" if (p := here.get(x)) else "-"
            for x in xs
        ]
        rows.append([name, *cells])
    heads = [f"{sweep}: ms (ns per KB of work)", *(f"{x:,}" for x in xs)]
    skipped = dict.fromkeys(f"  not here: {p['provider']}, {p['skipped']}" for p in mine if "skipped" in p)
    return "\n".join([render(heads, rows), *skipped])


def report(document: dict) -> str:
    cache = document["machine"]["last_level_cache_bytes"]
    lines = [explained(entry, cache) for entry in document["growth"]]
    if not lines:
        return "Nowhere does cost grow faster than work beyond noise."
    return "\n".join(["Cost grows faster than work:", *(f"  {line}" for line in lines)])


def main(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    default = [name for name in PROVIDERS if device.type == "cpu"] or ["fusedopt-*/adamw/fp32", "fusedopt-*/adamw/int8"]
    try:
        chosen = providers.select(args.provider or default, device)
    except ValueError as error:
        print(f"bench scaling: {error}")
        return 2
    load = machine.load_average()
    if load is not None and load > 0.5 and device.type == "cpu":
        print(f"note: load average {load} before the start, with {os.cpu_count()} processors; do not quote this run.\n")
    document = measure(
        args.sweep or SWEEPS, chosen, device, args.rounds, args.largest, lambda text: print(f"{text}\n", flush=True)
    )
    print(report(document))
    date = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = args.out or run.RESULTS
    path = out if out.suffix == ".json" else out / f"scaling-{date}-{device.type}.json"
    run.save(document, path)
    print(f"written: {path}")
    return 0
