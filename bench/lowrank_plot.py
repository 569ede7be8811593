"""The chart of `bench lowrank-accuracy`: held-out loss against AdamW's, seed by seed, beside the bytes of state."""

from __future__ import annotations

from bench.accuracy_plot import OURS, RIVAL

PERCENT = 1.0  # what the chart marks as close to AdamW


def draw(document: dict):
    """A matplotlib figure of one result."""
    from matplotlib.figure import Figure

    losses = document["losses"]
    names = list(losses)
    base = losses[names[0]]["held_out"]
    places = range(len(names))
    figure = Figure(figsize=(11, 0.36 * len(names) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2.2, 1))
    for place, name in zip(places, names, strict=True):
        r = losses[name]
        colour = RIVAL if r["optim"].startswith("torch") else OURS
        singles = [100 * (a / b - 1) for a, b in zip(r["held_out"], base, strict=False)]
        left.plot(singles, [place] * len(singles), ".", color=colour, alpha=0.35, markersize=6)
        left.errorbar(
            r["change_percent"], place, xerr=r["standard_error"], fmt="o", color=colour, capsize=3, markersize=5
        )
        right.barh(place, r["state_bytes"], color=colour, height=0.62)
        right.annotate(f"{r['state_bytes']:.2f}", (r["state_bytes"], place), xytext=(4, 0), textcoords="offset points",
                       va="center", fontsize=8)  # fmt: skip
    left.axvspan(-PERCENT, PERCENT, color="#777", alpha=0.13, linewidth=0)
    left.axvline(0, color="#333", linewidth=0.8)
    seeds = [len(losses[n]["held_out"]) for n in names]
    labels = [f"{n} ({k} seed{'s' * (k > 1)})" for n, k in zip(names, seeds, strict=True)]
    left.set_yticks(places, labels, fontsize=8)
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.25)
    left.set_title(
        f"held-out loss against AdamW of the same seed, %; grey: within {PERCENT:g} %", fontsize=9, loc="left"
    )
    right.set_xlim(0, 1.2 * max(r["state_bytes"] for r in losses.values()))
    right.set_title("bytes of state per parameter", fontsize=9, loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    size = document["size"]
    figure.suptitle(
        f"byte-level GPT of 2.5 M parameters, {size['steps']} steps of {size['batch']} windows, rank {document['rank']}: each "
        "method at its learning rate of a grid",
        fontsize=10,
    )
    return figure
