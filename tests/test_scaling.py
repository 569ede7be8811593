"""bench scaling: growths by hand, and a small run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import scaling  # noqa: E402
from bench.__main__ import main  # noqa: E402

CPU = torch.device("cpu")


def point(sweep, x, ms, work, spread=0.0, working_set=1000):
    quartiles = {"median": ms, "q1": ms * (1 - spread), "q3": ms * (1 + spread)}
    return {"sweep": sweep, "x": x, "provider": "p", "bytes": work, "working_set": working_set, "ms": quartiles}


def test_proportional_cost_is_no_growth():
    line = [point("parameters", n, 0.001 * n, 28 * n) for n in (10, 30, 100)]
    assert scaling.growth(line) == []
    assert (
        scaling.growth([point("parameters", 10, 5.0, 280), point("parameters", 30, 5.0, 840)]) == []
    )  # overhead shrinks


def test_cost_that_grows_faster_than_work_is_found():
    line = [point("parameters", 100, 1.0, 100), point("parameters", 10, 0.05, 10), point("parameters", 1, 0.005, 1)]
    (found,) = scaling.growth(line)
    assert (found["from"], found["to"], found["work_ratio"]) == (10, 100, 10)
    assert found["cost_ratio"] == pytest.approx(20) and found["exponent"] == pytest.approx(1.30103, rel=1e-5)
    assert scaling.growth([point("parameters", 10, 1.0, 10), point("parameters", 20, 2.2, 20)]) == []  # within FREE


def test_noise_is_no_growth():
    """1.5 times for the same work, but the quartiles touch."""
    assert scaling.growth([point("tensors", 1, 1.0, 10, 0.25), point("tensors", 4, 1.5, 10, 0.25)]) == []
    (found,) = scaling.growth([point("tensors", 1, 1.0, 10, 0.05), point("tensors", 5, 1.5, 10, 0.05)])
    assert found["us_per_tensor"] == pytest.approx(125) and "exponent" not in found


def test_threads_cost_their_time_together():
    assert scaling.growth([point("threads", 1, 8.0, 10), point("threads", 2, 4.2, 10)]) == []
    (found,) = scaling.growth([point("threads", 1, 8.0, 10), point("threads", 2, 7.0, 10)])
    assert found["cost_ratio"] == pytest.approx(14 / 8) and found["work_ratio"] == 1


def test_the_report_names_the_cache():
    line = [
        point("parameters", 1, 1.0, 10, working_set=10 << 20),
        point("parameters", 2, 4.0, 20, working_set=40 << 20),
    ]
    document = {"machine": {"last_level_cache_bytes": 32 << 20}, "growth": scaling.growth(line)}
    text = scaling.report(document)
    assert "p from 1 to 2: 4.00 times the cost for 2.00 times the work, exponent 2.00" in text
    assert "leaves the 32 MiB cache" in text
    document["machine"]["last_level_cache_bytes"] = 0
    assert "cache" not in scaling.report(document)
    assert scaling.report({**document, "growth": []}).startswith("Nowhere")


def test_points():
    sizes = [x for x, _ in scaling.points("parameters", CPU, 1e8)]
    assert sizes[0] == 10**5 and sizes[-1] == 10**8
    cases = dict(scaling.points("tensors", CPU, 1e8))
    assert list(cases)[0] == 1 and list(cases)[-1] == 4000
    assert {case.elements for case in cases.values()} == {8 * 10**6} and cases[4000].tensors == 4000
    assert [x for x, _ in scaling.points("threads", CPU, 1e8)][0] == 1
    assert scaling.points("threads", torch.device("cuda"), 1e8) == []


def test_a_small_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "TENSORS", (1, 4, 16))
    before = torch.get_num_threads()
    options = "--device cpu --rounds 3 --largest 120000 --provider fusedopt-reference/adamw/fp32 --provider apex/*"
    assert main(["scaling", *options.split(), "--out", str(tmp_path / "s.json")]) == 0
    assert torch.get_num_threads() == before
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["kind"] == "scaling" and {p["sweep"] for p in document["points"]} == set(scaling.SWEEPS)
    measured = [p for p in document["points"] if "ms" in p]
    assert {p["provider"] for p in measured} == {"torch/adamw/fused", "fusedopt-reference/adamw/fp32"}
    assert all(
        p["ms"]["median"] > 0 and p["bytes"] == 28 * 120000 // p["x"] * p["x"]
        for p in measured
        if p["sweep"] == "tensors"
    )
    assert [p["x"] for p in measured if p["sweep"] == "parameters"] == [10**5] * 2
    assert all("not for cpu" in p["skipped"] for p in document["points"] if "skipped" in p)
    text = capsys.readouterr().out
    assert (
        "ns per KB" in text and "not here: apex/adamw/fused" in text and ("grows faster" in text or "Nowhere" in text)
    )
    assert main(["scaling", "--provider", "nothing"]) == 2
