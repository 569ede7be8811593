"""The chart of `bench accuracy`: errors on moments, distance from the fp32 run, and held-out loss with error bars."""

from __future__ import annotations

import statistics

OURS, RIVAL, STATES = "#1b6ca8", "#d9a441", ("first", "second", "update")
SHADES = {"first": "#9fc5e0", "second": "#5b9bc8", "update": "#1b6ca8"}
LABELS = {"first": "first moment", "second": "root of the second", "update": "update m / sqrt(v)"}


def draw(document: dict):
    """A matplotlib figure of one result."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 14), layout="constrained")
    panels = figure.subplot_mosaic([["moments", "spread"], ["drift", "drift"], ["demo", "small"]])
    _moments(panels["moments"], document["moments"])
    _spread(panels["spread"], document["spread"])
    _drift(panels["drift"], document["drift"])
    _losses(panels["demo"], document["losses"]["demo"], "the demo's model, 240 steps")
    _losses(panels["small"], document["losses"]["small"], "0.27 M parameters, 500 steps")
    figure.suptitle(
        f"AdamW on a byte-level GPT: what formats and precisions cost, {document['seeds']} seeds", fontsize=11
    )
    return figure


def _moments(axes, rows: list[dict]) -> None:
    forms = list(dict.fromkeys(r["format"] for r in rows))
    for i, key in enumerate(STATES):
        means = [100 * statistics.fmean(r[key] for r in rows if r["format"] == f) for f in forms]
        axes.barh([p + 0.26 * (i - 1) for p in range(len(forms))], means, 0.26, color=SHADES[key], label=LABELS[key])
    axes.set_yticks(range(len(forms)), forms, fontsize=8)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="upper right")
    axes.set_title("error on the moments of a training run, % rms", fontsize=9, loc="left")


def _spread(axes, errors: dict) -> None:
    for i, (name, points) in enumerate(errors.items()):
        spreads = sorted(points, key=float)
        style = "-" if i < 10 else "--"
        axes.plot(
            [float(s) for s in spreads], [100 * points[s] for s in spreads], style, color=f"C{i % 10}", label=name
        )
    axes.set_yscale("log")
    axes.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title("error of the update, % rms, by the spread of neighbours' gradient scales", fontsize=9, loc="left")


def _drift(axes, drift: dict) -> None:
    styles = ["-", "--", ":", "-."]
    for i, (name, points) in enumerate(drift.items()):
        steps = sorted(k for k in map(int, points) if k > 1)  # the first step is the same, whatever the states will be
        values = [100 * points[k] if k in points else 100 * points[str(k)] for k in steps]
        axes.plot(steps, values, styles[i // 10 % 4], color=f"C{i % 10}", label=name, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    if drift:
        axes.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title("distance from the weights of the fp32 run, % of the way gone, by step", fontsize=9, loc="left")


def _losses(axes, losses: dict, title: str) -> None:
    names = [n for n in losses if n != "fp32"]
    places = range(len(names))
    colours = [RIVAL if losses[n]["group"] == "rivals" else OURS for n in names]
    for place, name, colour in zip(places, names, colours, strict=True):
        r = losses[name]
        axes.errorbar(
            r["change_percent"], place, xerr=r["standard_error"], fmt="o", color=colour, capsize=3, markersize=4
        )
        base = losses["fp32"]["held_out"]
        singles = [100 * (a / b - 1) for a, b in zip(r["held_out"], base, strict=True)]
        axes.plot(singles, [place] * len(singles), ".", color=colour, alpha=0.3, markersize=4)
    axes.axvline(0, color="#333", linewidth=0.8)
    axes.set_yticks(list(places), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(f"held-out loss against fp32 of the same seed, %: {title}", fontsize=9, loc="left")
