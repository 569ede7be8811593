"""How much accuracy formats and precisions cost, on the demo's byte-level GPT trained with AdamW.

Four measurements: the error of every format on moments of a real run, and on artificial ones whose neighbours differ in
scale; how far the weights of a 2000-step run move away from those of the fp32 run; and the held-out loss over several
seeds, paired with fp32's of the same seed. Rivals take part where they are installed and run on a CPU. Writes
DIR/accuracy.json and DIR/accuracy.png.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from bench.accuracy_runs import (
    BASE,
    DEMO,
    FORMATS,
    LOOKS,
    PRECISIONS,
    RIVALS,
    SMALL,
    Config,
    available,
    drift,
    moment_errors,
    spread_errors,
    train,
)
from bench.machine import stamp
from fusedopt.cli.progress import progress
from fusedopt.cli.table import render
from fusedopt.formats import ALIASES

RESULTS = Path(__file__).parent / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder (bench/results)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs per configuration (5)")
    parser.add_argument(
        "--jobs", type=int, default=torch.get_num_threads(), metavar="N", help="processes of one thread each"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of each, to see that it works")


def _shortened(size: dict, quick: bool) -> dict:
    return {**size, "steps": 12} if quick else size


def jobs(args: argparse.Namespace) -> tuple[list[tuple], dict[str, str]]:
    """(key, function, arguments) of every run, the longest first, and why rivals are left out."""
    left_out = {c.name: why for c in RIVALS if (why := available(c))}
    rivals = [c for c in RIVALS if c.name not in left_out]
    everyone = [*FORMATS, *PRECISIONS, *rivals]
    found: list[tuple] = [(("moments",), moment_errors, (0, (12,) if args.quick else (24, 120, 240)))]
    found.append((("spread",), spread_errors, ()))
    if not args.quick:
        found += [(("drift", c.name), drift, (c, 0)) for c in everyone]
    for seed in range(args.seeds):
        demo = [c for c in FORMATS if c.name != "bf16_stochastic"]
        found += [(("demo", c.name, seed), train, (c, _shortened(DEMO, args.quick), seed)) for c in demo]
        found += [(("small", c.name, seed), train, (c, _shortened(SMALL, args.quick), seed)) for c in everyone]
    return found, left_out


def run_all(found: list[tuple], count: int, label: str = "accuracy", done: Callable | None = None) -> dict:
    """The result of every run by its key. done(key, result) is called after each, to keep it."""
    out: dict = {}
    bar = progress(len(found), label)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        futures = {pool.submit(function, *arguments): key for key, function, arguments in found}
        for future in as_completed(futures):
            out[futures[future]] = future.result()
            if done is not None:
                done(futures[future], out[futures[future]])
            bar.set_postfix_str(" ".join(map(str, futures[future])), refresh=False)
            bar.update(1)
    bar.close()
    return out


def paired(results: dict, part: str, name: str, seeds: int, base_name: str = BASE.name) -> dict:
    """Held-out loss of a configuration, and its difference from `base_name` of the same seed: mean and standard error, %."""
    losses = [results[part, name, seed]["held_out"] for seed in range(seeds)]
    base = [results[part, base_name, seed]["held_out"] for seed in range(seeds)]
    change = [100 * (a / b - 1) for a, b in zip(losses, base, strict=True)]
    error = statistics.stdev(change) / math.sqrt(seeds) if seeds > 1 else 0.0
    return {
        "held_out": losses, "mean": statistics.fmean(losses), "change_percent": statistics.fmean(change),
        "standard_error": error, "state_bytes": results[part, name, 0]["state_bytes"],
    }  # fmt: skip


def distances(results: dict) -> dict[str, dict[int, float]]:
    """|w - w_fp32| / |w_fp32 - w_0| at each look of the long runs."""
    runs = {key[1]: value["weights"] for key, value in results.items() if key[0] == "drift"}
    out = {}
    for name, weights in runs.items():
        base = runs[BASE.name]
        if name != BASE.name:
            out[name] = {
                k: ((weights[k] - base[k]).norm() / (base[k] - base[0]).norm()).item() for k in LOOKS if k in weights
            }
    return out


def by_kind(rows: list[dict]) -> list[dict]:
    """Mean errors, and the largest update, over the tensors of each kind of layer."""
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        if not any(math.isnan(r[k]) for k in ("first", "second", "update")):  # a state that is all zeros
            groups.setdefault((r["format"], r["step"], r["kind"]), []).append(r)
    return [
        {"format": form, "step": step, "kind": kind, "largest": max(r["largest"] for r in mine)}
        | {k: statistics.fmean(r[k] for r in mine) for k in ("first", "second", "update")}
        for (form, step, kind), mine in groups.items()
    ]


def summary(results: dict, args: argparse.Namespace, left_out: dict[str, str]) -> dict:
    groups: dict[str, Config] = {c.name: c for c in (*FORMATS, *PRECISIONS, *RIVALS)}
    losses = {}
    for part in ("demo", "small"):
        names = dict.fromkeys(key[1] for key in results if key[0] == part)
        losses[part] = {
            n: {"group": groups[n].group, **paired(results, part, n, args.seeds)} for n in groups if n in names
        }
    long = {key[1]: value["held_out"] for key, value in results.items() if key[0] == "drift"}
    return {
        "kind": "accuracy", "machine": stamp(torch.device("cpu")), "seeds": args.seeds, "quick": args.quick,
        "aliases": {name: ALIASES[name] for name in ("8bit", "4bit")}, "left_out": left_out,
        "moments": by_kind(results[("moments",)]), "spread": results[("spread",)],
        "drift": distances(results), "drift_held_out": long, "losses": losses,
    }  # fmt: skip


def _moment_table(document: dict) -> str:
    kinds = ["embeddings", "first block", "middle blocks", "last block", "head", "norms"]
    rows = []
    for form in dict.fromkeys(r["format"] for r in document["moments"]):
        mine = [r for r in document["moments"] if r["format"] == form]
        cells = []
        for kind in kinds:
            values = [r["update"] for r in mine if r["kind"] == kind]
            cells.append(f"{100 * statistics.fmean(values):.2f}" if values else "-")
        first, second = (100 * statistics.fmean(r[k] for r in mine) for k in ("first", "second"))
        rows.append([form, f"{first:.2f}", f"{second:.2f}", *cells, f"{max(r['largest'] for r in mine):.2f}"])
    return render(["format", "m", "sqrt v", *kinds, "max |u|"], rows)


def _loss_table(losses: dict) -> str:
    rows = [
        [
            name,
            f"{r['mean']:.4f}",
            f"{r['change_percent']:+.3f}",
            f"{r['standard_error']:.3f}",
            f"{r['state_bytes']:.2f}",
        ]
        for name, r in losses.items()
    ]
    return render(["AdamW states or weights", "held-out", "vs fp32 %", "std err", "state B/p"], rows)


def report(document: dict) -> str:
    parts = [
        "Error of formats on the moments of a training run, % rms: first moment, root of the second, and the update",
        "m / sqrt(v) by kind of layer; max |u| is the largest update in units of lr\n",
        _moment_table(document),
    ]
    spreads = list(next(iter(document["spread"].values())))
    rows = [[name, *(f"{100 * errors[s]:.2f}" for s in spreads)] for name, errors in document["spread"].items()]
    parts += ["\nError of the update, % rms, where neighbours' gradients differ in scale by exp(spread * normal)\n"]
    parts += [render(["spread", *map(str, spreads)], rows)]
    if document["drift"]:
        looks = sorted({k for d in document["drift"].values() for k in d})
        rows = [[n, *(f"{100 * d[k]:.2f}" for k in looks)] for n, d in document["drift"].items()]
        parts += ["\nDistance from the weights of the fp32 run, % of the way they have gone, by step"]
        parts += ["(bf16 weights begin half a unit in the last place away, which is far at first)\n"]
        parts += [render(["AdamW", *map(str, looks)], rows)]
    for part, text in (("demo", "the demo's model, 240 steps"), ("small", "a model of 0.27 M parameters, 500 steps")):
        parts += [f"\nHeld-out loss, {text}, {document['seeds']} seeds, paired with fp32 of the same seed\n"]
        parts += [_loss_table(document["losses"][part])]
    parts += [f"left out: {name} ({why})" for name, why in document["left_out"].items()]
    return "\n".join(parts)


def main(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    found, left_out = jobs(args)
    document = summary(run_all(found, max(1, args.jobs)), args, left_out)
    document["seconds"] = round(time.perf_counter() - begin)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "accuracy.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{report(document)}\n\nwritten: {path}")
    try:
        from bench.accuracy_plot import draw

        draw(document).savefig(path.with_suffix(".png"), dpi=150)
        print(f"written: {path.with_suffix('.png')}")
    except ImportError:
        print("no picture: matplotlib is not installed; pip install matplotlib")
    return 0
