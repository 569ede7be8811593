"""Compares two result files: the change of every ratio, flagged where it is larger than the noise of both.

Compared is the time relative to torch fused of the same rounds, or, where a result has no baseline, the inverse share
of the copy bandwidth. A change is flagged when the quartile ranges do not overlap and it exceeds the threshold.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.run import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.05, metavar="SHARE", help="smallest change to flag (0.05)")


def cost(result: dict, relative: bool) -> dict[str, float]:
    """Median and quartiles of a number that grows with time."""
    if relative:
        return result["ratio"]
    share = result["share_of_copy"]
    return {"median": 1 / share["median"], "q1": 1 / share["q3"], "q3": 1 / share["q1"]}


def compare(old: dict, new: dict, threshold: float = 0.05) -> list[dict]:
    """One row per (case, provider) of either file: status "same", "faster", "slower", "only old", "only new"."""
    sides = []
    for document in (old, new):
        found = [(case["case"], r) for case in document["cases"] for r in case["results"]]
        sides.append({(name, r["provider"]): r for name, r in found if r["status"] == "ok"})
    rows = []
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        a, b = sides[0].get(key), sides[1].get(key)
        row = {"case": key[0], "provider": key[1], "metric": None, "old": None, "new": None, "change": None}
        if a is None or b is None:
            rows.append({**row, "status": "only new" if a is None else "only old"})
            continue
        relative = a["ratio"] is not None and b["ratio"] is not None and a["ratio"]["to"] == b["ratio"]["to"]
        relative = relative and a["ratio"]["to"] != key[1]  # a baseline's ratio to itself is 1
        x, y = cost(a, relative), cost(b, relative)
        change = y["median"] / x["median"] - 1
        apart = y["q1"] > x["q3"] or y["q3"] < x["q1"]
        status = "same" if not apart or abs(change) < threshold else "slower" if change > 0 else "faster"
        metric = f"time / {a['ratio']['to']}" if relative else "byte limit / share"
        values = {"old": x["median"], "new": y["median"], "change": change}
        rows.append({**row, "metric": metric, **values, "status": status})
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'case':22}{'provider':34}{'metric':28}{'old':>9}{'new':>9}{'change':>9}  verdict"]
    for r in rows:
        if r["change"] is None:
            lines.append(f"{r['case']:22}{r['provider']:34}{'':55}  {r['status']}")
            continue
        lines.append(
            f"{r['case']:22}{r['provider']:34}{r['metric']:28}{r['old']:9.3f}{r['new']:9.3f}{r['change']:+9.1%}  "
            f"{'within noise' if r['status'] == 'same' else r['status'].upper()}"
        )
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    try:
        old, new = load(args.old), load(args.new)
    except (OSError, ValueError) as error:
        print(f"bench compare: {error}")
        return 2
    for name in ("processor", "threads", "gpu"):
        a, b = old["machine"].get(name), new["machine"].get(name)
        if a != b:
            print(f"note: the machines differ in {name}: {a} and {b}")
    print(table(compare(old, new, args.threshold)))
    return 0
