"""Charts of a result file, one PNG each: share of the byte limit, time against torch fused, host time per tensor."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.run import load

COLOURS = {"fusedopt": "#1b6ca8", "torch": "#9aa5b1"}
OTHER = "#d9a441"
CHARTS = {
    "share": ("share of the byte limit at the copy bandwidth of the same round (longer is better)", "share_of_copy"),
    "ratio": ("time of a step / torch fused of the same round (shorter is better)", "ratio"),
    "stream": (
        "share of the byte limit at the bandwidth of an in-place add, same round (longer is better)",
        "share_of_stream",
    ),
    "host": ("host time per tensor, microseconds (shorter is better)", "host_us_per_tensor"),
}

SHARES = ("share", "stream")
WRITTEN = ("share", "ratio", "host")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", type=Path, help="a JSON file of `python -m bench run`")
    parser.add_argument("--out", type=Path, help="folder; that of the result by default")


def bars(case: dict, key: str) -> list[tuple[str, float, float, float]]:
    """(provider, median, q1, q3) of a case, in the order of the file."""
    found = [(r["provider"], r[key]) for r in case["results"] if r["status"] == "ok" and r[key] is not None]
    return [(name, q["median"], q["q1"], q["q3"]) for name, q in found]


def draw(document: dict, chart: str):
    """A matplotlib figure with one panel per case, or None where there is nothing to draw."""
    from matplotlib.figure import Figure

    title, key = CHARTS[chart]
    panels = [(case, bars(case, key)) for case in document["cases"]]
    panels = [(case, rows) for case, rows in panels if rows]
    if not panels:
        return None
    heights = [0.24 * len(rows) + 0.75 for _, rows in panels]
    figure = Figure(figsize=(9.5, sum(heights) + 0.9), layout="constrained")
    grid = figure.subplots(len(panels), 1, gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
    for axes, (case, rows) in zip(grid, panels, strict=True):
        panel(axes, case, rows, chart)
    machine = document["machine"]
    hardware = machine["gpu"]["name"] if "gpu" in machine else f"{machine['processor']}, {machine['threads']} threads"
    figure.suptitle(f"{title}\n{hardware}, torch {machine['versions']['torch']}", fontsize=10)
    return figure


def panel(axes, case: dict, rows: list, chart: str) -> None:
    names = [name for name, *_ in rows]
    medians = [m for _, m, _, _ in rows]
    spread = [[max(0.0, m - q1) for _, m, q1, _ in rows], [max(0.0, q3 - m) for _, m, _, q3 in rows]]
    colours = [next((c for start, c in COLOURS.items() if name.startswith(start)), OTHER) for name in names]
    places = range(len(rows))
    if chart == "ratio":  # bars grow from 1, where torch fused is; equal factors are equal lengths
        axes.set_xscale("log")
        axes.barh(places, [m - 1 for m in medians], left=1, xerr=spread, color=colours, height=0.72, ecolor="#444")
        axes.axvline(1, color="#333", linewidth=0.8)
        edges = [q for _, _, q1, q3 in rows for q in (q1, q3)]
        axes.set_xlim(min(0.5, 0.8 * min(edges)), max(2.0, 2.2 * max(edges)))
        for tick in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            tick(lambda value, _: f"{value:.1g}" if f"{value:.1g}"[-1] in "1235" else "")
    else:
        axes.barh(places, medians, xerr=spread, color=colours, height=0.72, ecolor="#444")
        axes.set_xlim(0, 1.18 * max(q3 for *_, q3 in rows))
    if chart in SHARES:
        axes.axvline(1, color="#333", linewidth=0.8, linestyle="--")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for place, (_, median, _, q3) in zip(places, rows, strict=True):
        text = f"{median:.0%}" if chart in SHARES else f"{median:.3g}"
        edge = max(q3, 1) if chart == "ratio" else q3
        axes.annotate(text, (edge, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(list(places), names, fontsize=7.5)
    axes.invert_yaxis()
    axes.tick_params(axis="x", which="both", labelsize=7.5)
    axes.spines[["top", "right"]].set_visible(False)
    count = f"{case['tensors']} tensor{'s' if case['tensors'] > 1 else ''}"
    size = f"{case['elements'] / 1e6:.3g}M elements in {count}, {case['param_dtype']}"
    axes.set_title(f"{case['case']}: {size}", fontsize=9, loc="left")


def write(document: dict, folder: Path, stem: str) -> list[Path]:
    """Writes the charts as FOLDER/STEM-CHART.png and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for chart in WRITTEN:
        figure = draw(document, chart)
        if figure is not None:
            paths.append(folder / f"{stem}-{chart}.png")
            figure.savefig(paths[-1], dpi=150)
    return paths


def main(args: argparse.Namespace) -> int:
    try:
        document = load(args.result)
        paths = write(document, args.out or args.result.parent, args.result.stem)
    except (OSError, ValueError) as error:
        print(f"bench plot: {error}")
        return 2
    except ImportError:
        print("bench plot: matplotlib is not installed; pip install matplotlib")
        return 2
    for path in paths:
        print(f"written: {path}")
    return 0
