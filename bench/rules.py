"""Every update rule on the demo's byte-level GPT, smaller: does the held-out loss fall at the class's default learning rate?

One run for each class, all from the same weights and over the same batches, with the warm-up and cosine of the demo. A class
steps at its default options, or at those of the demo's recipe where it has one (fusedopt.cli.training). A row fails where the
held-out loss has not fallen by a fifth of what the best rule takes away. Writes rules.json and rules.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from bench.machine import stamp
from fusedopt.cli.corpus import load
from fusedopt.cli.table import render
from fusedopt.cli.training import RECIPES, Setup, evaluate, train
from fusedopt.rule import optimizers

RESULTS = Path(__file__).resolve().parent / "results"
SIZE = {"steps": 150, "batch": 8, "context": 64, "width": 128, "layers": 2, "heads": 4, "held_out_windows": 96}
QUICK = {**SIZE, "steps": 8, "width": 64, "held_out_windows": 8}
SHARE = 0.2  # of the best rule's progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rules.json and rules.png")
    parser.add_argument(
        "--only", nargs="*", metavar="NAME", help="names as fusedopt.create takes them; the others stay"
    )
    parser.add_argument("--quick", action="store_true", help="8 steps: tests the command, the numbers say nothing")


def main(args: argparse.Namespace) -> int:
    size = QUICK if args.quick else SIZE
    path = args.out / "rules.json"
    names = args.only or sorted(optimizers())
    document = {"schema": 1, "kind": "rules", "machine": stamp(torch.device("cpu")), "size": size, "rules": {}}
    if args.only and path.is_file():
        document["rules"] = json.loads(path.read_text())["rules"]
    setup = Setup(load(None, size["context"]), torch.device("cpu"), **size)
    start = first_loss(setup)
    for name in names:
        done = train(name, setup)
        document["rules"][name] = {
            "class": optimizers()[name].__name__,
            "options": RECIPES.get(name, {}),
            "lr": RECIPES.get(name, {}).get("lr", default_rate(name)),
            "start": start,
            "held_out": done.held_out,
            "losses": done.losses,
            "state_bytes": done.state_bytes / done.parameters,
        }
    judge(document["rules"])
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(report(document))
    print(f"wrote {path} and {draw(document, args.out / 'rules.png')}")
    return int(not args.quick and any(not r["fell"] for r in document["rules"].values()))


def first_loss(setup: Setup) -> float:
    """Held-out loss of the weights that every run begins with."""
    windows = setup.corpus.windows(setup.held_out_windows, setup.context, setup.seed + 1, held_out=True)
    return evaluate(setup.model(), windows, setup.batch)


def default_rate(name: str) -> float | None:
    rate = optimizers()[name]([torch.zeros(2, 2)]).param_groups[0]["lr"]
    return None if rate is None else float(rate)


def judge(rules: dict) -> None:
    best = max(r["start"] - r["held_out"][-1][1] for r in rules.values())
    for r in rules.values():
        r["fell"] = r["start"] - r["held_out"][-1][1] >= SHARE * best


def by_loss(document: dict) -> list[dict]:
    return sorted(document["rules"].values(), key=lambda r: r["held_out"][-1][1])


def report(document: dict) -> str:
    rows = []
    for r in by_loss(document):
        options = ", ".join(f"{k}={v}" for k, v in r["options"].items() if k != "lr") or "defaults"
        rate = "of the step" if r["lr"] is None else f"{r['lr']:g}"
        loss = f"{r['held_out'][-1][1]:.3f}" + ("" if r["fell"] else " (has not fallen)")
        rows.append([r["class"], rate, options, f"{r['start']:.3f}", loss, f"{r['state_bytes']:.2f}"])
    return render(["class", "lr", "other options", "first loss", "last loss", "state bytes"], rows, left=3)


def draw(document: dict, path: Path) -> Path:
    """Held-out losses along the run, and the last of each beside its name."""
    from matplotlib.figure import Figure

    rules = by_loss(document)
    figure = Figure(figsize=(11, max(4.5, 0.22 * len(rules) + 1.5)), layout="constrained")
    curves, last = figure.subplots(1, 2, width_ratios=(1, 1.3))
    for place, r in enumerate(rules):
        colour = f"C{place % 10}"
        steps, losses = zip((0, r["start"]), *r["held_out"], strict=True)
        curves.plot(steps, losses, color=colour, linewidth=1, alpha=0.8)
        last.plot(r["held_out"][-1][1], place, "o", color=colour, markersize=5)
        last.annotate(f"{r['held_out'][-1][1]:.2f}", (r["held_out"][-1][1], place), xytext=(6, -3), fontsize=8,
                      textcoords="offset points")  # fmt: skip
    last.axvline(rules[0]["start"], color="#333", linewidth=0.8, linestyle=":")
    last.annotate("before training", (rules[0]["start"], -0.6), fontsize=8, ha="right", rotation=0)
    rates = ["" if r["lr"] is None else f", lr {r['lr']:g}" for r in rules]
    last.set_yticks(range(len(rules)), [r["class"] + rate for r, rate in zip(rules, rates, strict=True)], fontsize=8)
    last.invert_yaxis()
    last.margins(x=0.12)
    last.grid(axis="x", alpha=0.25)
    last.set_title("after training", fontsize=9, loc="left")
    curves.set_title("held-out loss, nats per byte, by step", fontsize=9, loc="left")
    curves.set_ylim(
        0.95 * rules[0]["held_out"][-1][1], 1.15 * rules[0]["start"]
    )  # one rule's leap would flatten the others
    curves.grid(alpha=0.25)
    for axes in (curves, last):
        axes.spines[["top", "right"]].set_visible(False)
    size = document["size"]
    figure.suptitle(
        f"byte-level GPT, width {size['width']}, {size['layers']} layers, {size['steps']} steps of {size['batch']} windows, one "
        "seed; rates are not tuned",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    return path
