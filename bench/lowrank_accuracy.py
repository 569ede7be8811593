"""What projected and factored optimizers cost in held-out loss, on the demo's byte-level GPT, against fp32 torch AdamW.

Each method first gets a learning rate of the blocks' matrices on a seed of its own: half, once and twice what its recipe has
(fusedopt.cli.training), further where the best is at an edge. Then runs over several seeds, paired with AdamW's of the same
seed. Embeddings, head and norms are stepped by AdamW at one learning rate in all runs (Adafactor and MicroAdam step them
themselves). Every run is kept in DIR/lowrank_accuracy.json when it ends; a later call goes on from there. Draws
DIR/lowrank_accuracy.png.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bench.accuracy import RESULTS, paired, run_all
from bench.accuracy_runs import train
from bench.machine import stamp
from fusedopt.cli.gpt import GPT
from fusedopt.cli.table import render
from fusedopt.cli.training import PROJECTED, RECIPES, TORCH, Setup, build_optimizer
from fusedopt.factory import projection_of
from fusedopt.weights import quantize_weights_

SIZE = {"steps": 240, "batch": 8}  # the demo's own otherwise, whose batch is 24
TUNING = {"steps": 120, "batch": 8}
TUNING_SEED = 100
FACTORS = (0.5, 1.0, 2.0)
LIMITS = (0.125, 16.0)  # of factors, where the best one is at an edge


@dataclass(frozen=True)
class Method:
    """An optimizer of the study. tuned_as: the method whose learning rate it takes; itself where empty."""

    name: str
    optim: str
    seeds: int = 1
    tuned_as: str = ""
    factor: float = 1.0
    dtype: str = "float32"
    int8_weights: bool = False  # of the blocks' linear layers
    options: dict = field(default_factory=dict)

    def ratio(self) -> float:
        """Learning rate of the blocks' matrices over that of embeddings and head."""
        cls = None if self.optim == TORCH else projection_of(self.optim)
        return self.factor * (PROJECTED.get(cls.name, {}).get("ratio", 1.0) if cls else 1.0)

    def optimizer(self, model: GPT) -> torch.optim.Optimizer:
        if self.int8_weights:
            quantize_weights_(model, filter=lambda name, _: name.startswith("blocks."))
        setup = Setup(None, torch.device("cpu"), 0)
        return build_optimizer(self.optim, model, setup, ratio=self.ratio(), **self.options)


BASE = Method("AdamW", TORCH, seeds=5)
RECIPE = Method("AdamW, the demo's rate", TORCH, seeds=5, tuned_as="-")
METHODS = [
    BASE,
    RECIPE,
    Method("GaLore, svd", "galore_adamw", 5, "GaLore", options={"method": "svd"}),
    Method("GaLore", "galore_adamw", 5),
    Method("GaLore 8-bit", "galore_adamw8bit", 5, "GaLore"),
    Method("Q-GaLore, fp32 weights", "qgalore_adamw8bit", 1, "GaLore"),
    Method("Q-GaLore, int8 weights", "qgalore_adamw8bit", 1, "GaLore", int8_weights=True),
    Method("FRUGAL", "frugal_adamw"),
    Method("DCT", "dct_adamw"),
    Method("APOLLO", "apollo_adamw"),
    Method("APOLLO-Mini", "apollo_mini_adamw"),
    Method("Subset-Norm", "subset_norm_adamw"),
    Method("Subspace-Momentum", "subspace_momentum_adamw"),
    Method("Conda", "conda_adamw"),
    Method("Adafactor", "adafactor"),
    Method("MicroAdam", "microadam"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder (bench/results)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes of one thread each (2)")
    parser.add_argument("--quick", action="store_true", help="a few steps of each, to see that it works")


def tuning(method: Method, runs: dict) -> tuple[list[float], float | None]:
    """(factors that are still to be tried, the best one or None until it is found) for a method that tunes its own rate."""
    tried = {key[2]: value["held_out"] for key, value in runs.items() if key[:2] == ("tune", method.name)}
    missing = [f for f in FACTORS if f not in tried]
    if missing:
        return missing, None
    best = min(tried, key=tried.get)
    edge = 2 * best if best == max(tried) else best / 2 if best == min(tried) else None
    if edge is not None and LIMITS[0] <= edge <= LIMITS[1]:
        return [edge], None
    return [], best


def tuner(method: Method) -> Method | None:
    """The method whose learning rate a method takes."""
    return next((m for m in METHODS if m.name == (method.tuned_as or method.name)), None)


def wanted(runs: dict, quick: bool) -> list[tuple]:
    """(key, function, arguments) of the runs that can be made now and are missing, the same seeds of all methods together."""
    sizes = [{**size, "steps": 3} if quick else size for size in (TUNING, SIZE)]
    found, last = [], []
    for m in METHODS:
        own = tuner(m)
        missing, factor = tuning(own, runs) if own else ([], 1.0)
        if own is m:
            found += [(("tune", m.name, f), train, (replace(m, factor=f), sizes[0], TUNING_SEED)) for f in missing]
        if factor is not None:
            last += [
                (("main", m.name, seed), train, (replace(m, factor=factor), sizes[1], seed)) for seed in range(m.seeds)
            ]
    last = [job for job in last if job[0] not in runs]
    return found or sorted(last, key=lambda job: job[0][2])


def summary(runs: dict, quick: bool) -> dict:
    losses = {}
    for m in METHODS:
        factor = tuning(tuner(m), runs)[1] if tuner(m) else 1.0
        rate = RECIPES["adamw"]["lr"] * replace(m, factor=factor).ratio()
        results = {("main", n, seed): runs["main", n, seed] for n in (BASE.name, m.name) for seed in range(m.seeds)}
        losses[m.name] = {
            "optim": m.optim,
            "lr": rate,
            **m.options,
            **paired(results, "main", m.name, m.seeds, BASE.name),
        }
    losses["GaLore"]["against_svd"] = between(runs, "GaLore", "GaLore, svd")
    tuned = {}
    for kind, name, factor in sorted(k for k in runs if k[0] == "tune"):
        tuned.setdefault(name, {})[str(factor)] = runs[kind, name, factor]["held_out"]
    return {
        "kind": "lowrank_accuracy", "machine": stamp(torch.device("cpu")), "quick": quick,
        "size": SIZE, "tuning_size": TUNING, "tuning_seed": TUNING_SEED, "rank": Setup.rank,
        "update_every": Setup.update_every, "tuning": tuned, "losses": losses,
    }  # fmt: skip


def between(runs: dict, a: str, b: str) -> dict:
    """Held-out loss of one method against another's of the same seed, percent: mean and standard error of the pairs; and the
    standard deviation over seeds of each."""
    seeds = min(m.seeds for m in METHODS if m.name in (a, b))
    losses = [[runs["main", name, seed]["held_out"] for seed in range(seeds)] for name in (a, b)]
    change = [100 * (x / y - 1) for x, y in zip(*losses, strict=True)]
    return {
        "change_percent": statistics.fmean(change),
        "standard_error": statistics.stdev(change) / math.sqrt(seeds),
        "seeds_spread_percent": [100 * statistics.stdev(x) / statistics.fmean(x) for x in losses],
    }


def report(document: dict) -> str:
    size = document["size"]
    rows = [
        [
            name, f"{1e3 * r['lr']:g}", str(len(r["held_out"])), f"{r['mean']:.4f}", f"{r['change_percent']:+.2f}",
            f"{r['standard_error']:.2f}" if len(r["held_out"]) > 1 else "-", f"{r['state_bytes']:.2f}",
        ]
        for name, r in document["losses"].items()
    ]  # fmt: skip
    pair = document["losses"]["GaLore"]["against_svd"]
    return (
        f"Held-out loss after {size['steps']} steps of {size['batch']} windows, rank {document['rank']}, refreshes every "
        f"{document['update_every']} steps, paired with AdamW of the same seed\n\n"
        + render(["method", "lr 1e-3", "seeds", "held-out", "vs AdamW %", "std err", "state B/p"], rows)
        + f"\n\nGaLore, randomized against svd: {pair['change_percent']:+.3f} % +- {pair['standard_error']:.3f}; "
        + "seeds differ by {:.2f} and {:.2f} %".format(*pair["seeds_spread_percent"])
    )


def main(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "lowrank_accuracy.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    same = [old.get(key) for key in ("size", "tuning_size", "quick")] == [SIZE, TUNING, args.quick]
    runs = {tuple(r["key"]): r["result"] for r in old["runs"]} if same else {}
    seconds = old.get("seconds", 0) if same else 0
    begin = time.perf_counter()
    document = {"size": SIZE, "tuning_size": TUNING, "quick": args.quick}

    def keep(key: tuple, result: dict) -> None:
        runs[key] = {k: result[k] for k in ("held_out", "train", "state_bytes")}
        document["runs"] = [{"key": list(k), "result": r} for k, r in runs.items()]
        document["seconds"] = round(seconds + time.perf_counter() - begin)
        path.write_text(json.dumps(document, indent=1) + "\n")

    while found := wanted(runs, args.quick):
        run_all(found, max(1, args.jobs), "lowrank accuracy", keep)
    document = {**summary(runs, args.quick), "seconds": document.get("seconds", seconds),
                "runs": [{"key": list(k), "result": r} for k, r in runs.items()]}  # fmt: skip
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{report(document)}\n\nwritten: {path}")
    try:
        from bench.lowrank_plot import draw

        draw(document).savefig(path.with_suffix(".png"), dpi=150)
        print(f"written: {path.with_suffix('.png')}")
    except ImportError:
        print("no picture: matplotlib is not installed; pip install matplotlib")
    return 0
