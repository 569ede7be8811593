"""Charts of `bench report`: memory of a 7B model (computed), shares of the measured bandwidth and times against torch fused."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from bench import plot
from bench.report_tables import BEYOND_CACHE, Results, plain_cpu, seven_b

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
    axes.set_yticks(list(places), [f"{c.name}, {c.params}" for c in choices], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_xlabel("GiB, without activations", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set_title(f"computed memory of training {name}", fontsize=10, loc="left")
    return figure


def write(results: Results, folder: Path) -> list[Path]:
    """The PNGs that the results have something for; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"memory-7b": memory()}
    cpu = results.same("run", lambda d: plain_cpu(d) and any(c["param_dtype"] == "float32" for c in d["cases"]))
    gpus = results.same("run", lambda d: d["machine"]["device"] == "cuda")
    for name, documents, share in (("cpu", cpu, "stream"), ("gpu", gpus, "share")):
        if documents:  # the one with most cases
            document = max(documents, key=lambda d: len(d["cases"]))
            large = [case for case in document["cases"] if case["elements"] >= BEYOND_CACHE]
            figures[f"{name}-share"] = plot.draw({**document, "cases": large}, share)
            figures[f"{name}-ratio"] = plot.draw(document, "ratio")
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"report-{name}.png")
            figure.savefig(paths[-1], dpi=140)
    return paths
