"""The demo's picture: loss curves of all runs, and the bytes of optimizer state behind them."""

from __future__ import annotations

from fusedopt.cli.training import Run

# Okabe and Ito's palette (distinguishable with colour-blindness); the first run is the baseline.
COLOURS = ("#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D00")


def smooth(values: list[float], width: int) -> list[float]:
    """Running mean over the last `width` values."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        out.append(total / min(i + 1, width))
    return out


def plot(runs: list[Run], title: str, path: str) -> None:
    """Writes a PNG. Raises ImportError without matplotlib, OSError where the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2.4, 1))
    figure.suptitle(title, fontsize=11)
    width = max(1, len(runs[0].losses) // 20)
    for i, run in enumerate(runs):
        colour = COLOURS[i % len(COLOURS)]
        # The baseline is a wide pale band and each run narrower than the last, so that curves on top of each other all show.
        style = {"lw": 7, "alpha": 0.25} if i == 0 else {"lw": max(1.3, 4.2 - 1.2 * i)}
        left.plot(range(1, len(run.losses) + 1), smooth(run.losses, width), color=colour, label=run.label, **style)
        size = {"s": 130, "alpha": 0.35} if i == 0 else {"s": max(20, 90 - 32 * i)}
        left.scatter(*zip(*run.held_out, strict=True), color=colour, marker="D", zorder=3, linewidths=0, **size)
    left.scatter([], [], color="#777777", marker="D", s=26, label="held-out loss")
    left.set_xlabel("step")
    left.set_ylabel("loss (nats per byte)")
    left.set_title(f"training loss, mean of the last {width} steps" if width > 1 else "training loss", fontsize=10)
    settled = [x for run in runs for x in smooth(run.losses, width)[len(run.losses) // 12 :]]
    settled += [loss for run in runs for _, loss in run.held_out]
    low, high = min(settled), max(settled)
    if high > low:
        left.set_ylim(low - 0.06 * (high - low), high + 0.03 * (high - low))
    left.legend(frameon=False)
    left.grid(alpha=0.25)

    places = range(len(runs))
    bytes_each = [run.state_bytes / run.parameters for run in runs]
    bars = right.barh(places, bytes_each, color=[COLOURS[i % len(COLOURS)] for i in places], height=0.62)
    bars[0].set_alpha(0.45)
    right.bar_label(bars, [f"{x:.2f}" for x in bytes_each], padding=3)
    right.set_yticks(places, [run.label for run in runs])
    right.invert_yaxis()
    right.set_xlim(0, max(*bytes_each, 0.1) * 1.18)
    right.set_xlabel("bytes per parameter")
    right.set_title("optimizer state", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
