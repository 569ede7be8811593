"""Charts of `bench report`: losses and state of the demo, computed memory of a 7B model, steps on a CPU and a GPU."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from bench import plot
from bench.report_losses import DEMOS
from bench.report_results import Results
from bench.report_steps import BEYOND_CACHE, Column, baseline, columns, label, ours, providers, size
from bench.report_tables import seven_b
from fusedopt.cli import curves
from fusedopt.cli.curves import COLOURS
from fusedopt.cli.training import Run

PARTS = {"weights": "#9aa5b1", "gradients": "#d9a441", "master": "#b5651d", "states": "#1b6ca8"}


def memory() -> Figure:
    """Stacked bars: weights, gradients, master weights and states of each way to train."""
    name, choices = seven_b()
    figure = Figure(figsize=(9.5, 0.32 * len(choices) + 1.3), layout="constrained")
    axes = figure.subplots()
    places, left = range(len(choices)), [0.0] * len(choices)
    for part, colour in PARTS.items():
        sizes = [getattr(choice, part) / 2**30 for choice in choices]
        axes.barh(places, sizes, left=left, color=colour, height=0.72, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, total in zip(places, left, strict=True):
        axes.annotate(
            f"{total:.1f}", (total, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(list(places), [f"{c.name}, {c.params} weights" for c in choices], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_xlabel("GiB, without activations", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set_title(f"computed memory of training {name}", fontsize=10, loc="left")
    return figure


OURS, RIVAL, TORCH = "#1b6ca8", "#d9a441", "#9aa5b1"
MARKERS = "osD^vPX"


def colour(provider: str) -> str:
    return OURS if ours(provider) else TORCH if provider.startswith("torch/") else RIVAL


def share(found: list[Column]) -> Figure | None:
    """Bars by rule and format: the share of the measured bandwidth that a step reaches, a panel for each case."""
    found = [column for column in found if column.beyond_cache]
    names = [n for n in providers(found) if ours(n) or baseline(n) or n.startswith("deepspeed/")]
    if not names:
        return None
    down = -(-len(found) // 4)  # rows of four panels at most, as even as they can be
    across = -(-len(found) // down)
    figure = Figure(figsize=(3.1 + 2.1 * across, (0.25 * len(names) + 0.7) * down + 0.5), layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in grid[len(found) :]:
        axes.remove()
    for axes, column in zip(grid, found, strict=False):
        axes.axvline(100, color="#333", linewidth=0.8, linestyle=":", zorder=0)
        for place, name in enumerate(names):
            values = [100 * r["share_of_stream"]["median"] for r in column.records(name)]
            if values:
                middle = statistics.median(values)
                axes.barh(place, middle, color=colour(name), height=0.72)
                axes.annotate(
                    f"{middle:.0f}", (middle, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8,
                    bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
                )  # fmt: skip
        axes.set_xlim(0, 128)
        axes.set_xticks([0, 50, 100])
        axes.tick_params(labelsize=8, labelbottom=True)
        axes.set_title(size(column.case).replace(", ", "\n", 1), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_yticks(range(len(names)), [label(name) for name in names], fontsize=8)
    grid[0].invert_yaxis()
    figure.suptitle(
        "bytes of a step / its time, in % of the bandwidth of an in-place add of the same round", fontsize=10
    )
    return figure


def ratio(found: list[Column]) -> Figure | None:
    """A row for each provider, a mark for each case: its time against torch fused on a logarithmic axis."""
    names = [n for n in providers(found) if not baseline(n) and any(column.ratios(n) for column in found)]
    if not names:
        return None
    figure = Figure(figsize=(9.5, 0.27 * len(names) + 1.9), layout="constrained")
    axes = figure.subplots()
    for index, column in enumerate(found):
        pairs = [(statistics.median(column.ratios(n)), i) for i, n in enumerate(names) if column.ratios(n)]
        style = {"color": COLOURS[1 + index % len(MARKERS)], "marker": MARKERS[index % len(MARKERS)], "linestyle": ""}
        if pairs:
            axes.plot(*zip(*pairs, strict=True), **style, alpha=0.85, markersize=6, label=size(column.case))
    axes.set_xscale("log")
    axes.axvline(1, color="#333", linewidth=0.8)
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
    low, high = axes.get_xlim()
    axes.set_xticks([x for x in ticks if low <= x <= high], [f"{x:g}" for x in ticks if low <= x <= high])
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), [label(name) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        "time of a step / torch's fused step of the same round (further left is faster)", fontsize=10, loc="left"
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def demo(content: dict, path: Path) -> Path:
    """Losses and state of a run of the demo, as it draws them itself."""
    keys = {field.name for field in dataclasses.fields(Run)}
    runs = [Run(**{key: value for key, value in run.items() if key in keys}) for run in content["runs"]]
    setup = content["setup"]
    title = f"byte-level GPT, {runs[0].parameters / 1e6:.2f} M parameters, {setup['steps']} steps, {setup['device'].upper()}"
    curves.plot(runs, title, str(path))
    return path


def write(results: Results, folder: Path) -> list[Path]:
    """The PNGs that the results have something for; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    cpu = columns(results, "float32")
    figures = {"memory-7b": memory(), "cpu-share": share(cpu), "cpu-ratio": ratio(cpu)}
    gpus = results.same("run", lambda d: d["machine"]["device"] == "cuda")
    if gpus:  # the one with most cases
        document = max(gpus, key=lambda d: len(d["cases"]))
        large = [case for case in document["cases"] if case["elements"] >= BEYOND_CACHE]
        figures["gpu-share"] = plot.draw({**document, "cases": large}, "share")
        figures["gpu-ratio"] = plot.draw(document, "ratio")
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"report-{name}.png")
            figure.savefig(paths[-1], dpi=140)
    for name, optimizers in DEMOS.items():
        content = results.demo(*optimizers)
        if content is not None:
            paths.append(demo(content, folder / f"report-{name}.png"))
    return paths
