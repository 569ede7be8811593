"""README's numbers are those of the committed results, and what `bench report` makes of results is what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import report, report_tables, run  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.predict import result_files  # noqa: E402
from bench.report_tables import SECTIONS, Results  # noqa: E402


def quartiles(x: float) -> dict:
    return {"median": x, "q1": x, "q3": x}


def record(provider: str, ms: float, ratio: float | None, share: float = 0.5, status: str = "ok") -> dict:
    return {
        "provider": provider, "rule": "adamw", "status": status, "ms": quartiles(ms), "rounds_ms": [ms, ms],
        "ratio": None if ratio is None else {"to": "torch/adamw/fused", **quartiles(ratio)},
        "share_of_stream": quartiles(share), "share_of_copy": quartiles(share), "bytes_per_parameter": 28.0,
    }  # fmt: skip


def document(records: list[dict], date: str, device: str = "cpu", dtype: str = "float32", **machine) -> dict:
    stamp = {
        "date": date, "device": device, "processor": "P", "threads": 2, "isa": "AVX512", "isa_asked": None, "commit": "a",
        "versions": {"torch": "2"}, **machine,
    }  # fmt: skip
    case = {"case": "one_large", "elements": 67108864, "tensors": 1, "param_dtype": dtype, "results": records}
    case["groups"] = [{"stream_gb_per_s": quartiles(60.0), "copy_gb_per_s": quartiles(40.0)}]
    return {"schema": 1, "kind": "run", "machine": stamp, "cases": [case]}


def results(*documents: dict) -> Results:
    return Results(sorted([(Path("x"), d) for d in documents], key=lambda item: item[1]["machine"]["date"]))


def test_readme_is_what_the_results_give(capsys):
    assert main(["report", "--check"]) == 0, capsys.readouterr().out
    text = report.README.read_text() + report.NOTES.read_text()
    assert all(mark in text for name in SECTIONS for mark in report.marks(name))


def test_a_changed_number_is_seen(tmp_path, capsys):
    """In every section with numbers, of README as it is."""
    text = report.README.read_text()
    found = Results.of(result_files([run.RESULTS]))
    for name in ("speed", "memory", "accuracy", "prediction"):
        start, end = report.marks(name)
        inner = text.split(start)[1].split(end)[0]
        digit = next(c for c in reversed(inner) if c.isdigit())
        at = text.index(start) + len(start) + inner.rindex(digit)
        changed = text[:at] + str((int(digit) + 1) % 10) + text[at + 1 :]
        assert report.rewritten(changed, found, [name]) == text != changed
    page = tmp_path / "page.md"
    page.write_text(changed)
    assert main(["report", "--check", "--readme", str(page)]) == 1
    assert "prediction is not what the results give" in capsys.readouterr().out and page.read_text() == changed
    assert main(["report", "--no-charts", "--readme", str(page)]) == 0 and page.read_text() == text
    page.write_text(report.marks("speed")[0])
    assert main(["report", "--no-charts", "--readme", str(page)]) == 2
    assert "lacks the marks" in capsys.readouterr().out


def test_ranges_are_over_the_runs_of_one_commit():
    def runs(ratio, date, **machine):
        ours = record("fusedopt-cpu/adamw/int8", 1.0, ratio, ratio)
        return document([record("torch/adamw/fused", 1.0, 1.0), ours], date, **machine)

    old = runs(0.1, "2026-01-01", commit="old")
    asked = runs(1.5, "2026-01-09", isa_asked="avx2")
    text = report_tables.speed(results(old, runs(0.7, "2026-01-02"), runs(0.8, "2026-01-03"), asked))
    assert "| fusedopt AdamW, int8 state | 0.70 to 0.80 | 70 to 80 % |" in text
    assert "2 runs on P, 2 threads, AVX512, torch 2; the in-place add reached 60 GB/s." in text
    assert (
        "With AVX2 on the same machine AdamW takes, 67M in 1 tensor: int8 1.50." in text and "torch AdamW" not in text
    )


def test_our_steps_come_first_and_skipped_ones_not_at_all():
    rows = [
        record("torch/adamw/fused", 1, 1.0),
        record("deepspeed/adamw/cpu", 1, 1.02),
        record("fusedopt-cpu/lion/fp32", 1, 0.5),
    ]
    rows.append(record("torchao/adamw/int8", 1, 9.0, status="skipped"))
    lines = report_tables.speed(results(document(rows, "2026-01-02"))).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| fusedopt Lion, fp32 state", "| DeepSpeed AdamW, cpu"]
    assert "torchao" not in "".join(lines)
    rows[-1]["status"] = "ok"
    both = results(document(rows[:3], "2026-01-02"), document(rows, "2026-01-03"))
    assert "torchao" not in report_tables.speed(both)
    assert "| torchao AdamW, int8 | 9.00 |" in report_tables.rivals(both)


def test_bf16_is_held_against_deepspeed_round_by_round():
    base, ours = record("deepspeed/adamw/cpu", 2.0, 1.0), record("fusedopt-cpu/adamw/fp32+sr", 2.0, 1.2)
    base["rounds_ms"], ours["rounds_ms"] = [1.0, 2.0, 8.0], [2.0, 2.0, 4.0]
    text = report_tables.halves(results(document([ours, base], "2026-01-02", dtype="bfloat16")))
    assert "| fusedopt AdamW, fp32 state, stochastic | 1.20 | 1.00 |" in text


def test_gpu_results_and_predictions_do_not_mix():
    nothing = "There are no GPU measurements yet"
    cpu = document([record("fusedopt-cpu/adamw/fp32", 5, 1.0)], "2026-01-01")
    assert report_tables.gpu(results(cpu)).startswith(nothing)
    prediction = json.loads((run.RESULTS / "prediction-h200.json").read_text())
    assert report_tables.gpu(results(cpu, prediction)).startswith(nothing)
    measured = document(
        [record("fusedopt-cuda/adamw/int8", 5, 0.6, 0.91)], "2026-01-03", device="cuda", gpu={"name": "NVIDIA H200"}
    )
    text = report_tables.gpu(results(cpu, prediction, measured))
    assert "Measured on NVIDIA H200" in text and "| fusedopt cuda AdamW, int8 state | 5.000 | 0.60 | 91% |" in text
    assert "fusedopt" not in report_tables.speed(results(measured)).lower()


def test_a_measured_time_gets_a_column_of_its_own(tmp_path):
    rows = lambda text: [line for line in text.splitlines() if line.startswith("| ")]  # noqa: E731
    prediction = json.loads((run.RESULTS / "prediction-h200.json").read_text())
    (tmp_path / "prediction-h200.json").write_text(json.dumps(prediction))
    before = report_tables.prediction(Results.of(result_files([tmp_path])))
    measured = document(
        [record("fusedopt-cuda/adamw/int8", 17.25, 0.6)], "2026-01-03", device="cuda", gpu={"name": "NVIDIA H200"}
    )
    measured["cases"][0]["case"] = report_tables.SHOWN
    (tmp_path / "bench.json").write_text(json.dumps(measured))
    after = report_tables.prediction(Results.of(result_files([tmp_path])))
    assert "measured" not in before and "| measured ms, H200, CUDA |" in after.splitlines()[0]
    predicted = {line.split(" | ")[0]: line.split(" | ")[2] for line in rows(before)}
    assert {line.split(" | ")[0]: line.split(" | ")[2] for line in rows(after)} == predicted
    assert (
        next(line for line in after.splitlines() if line.startswith("| AdamW, int8 state |")).split(" | ")[3] == "17.2"
    )


def test_memory_is_that_of_the_formulas():
    """8 bits: two states of 1 + 4 / 256 bytes; weights and gradients in bf16."""
    name, choices = report_tables.seven_b()
    n = 6738415616
    found = {c.name: c for c in choices}
    assert found["adamw8bit"].weights == found["adamw8bit"].gradients == 2 * n and "6.74e9" in name
    assert found["adamw8bit"].states == pytest.approx(2 * n * (1 + 4 / 256), rel=1e-6)
    assert found["torch AdamW"].total == 16 * n and f"| {16 * n / 2**30:.1f} |" in report_tables.memory(results())


def test_dry_runs_and_foreign_files_are_left_out(tmp_path):
    dry = {**document([], "2026-01-01"), "dry_run": True}
    for name, content in (("a.json", dry), ("b.json", [1]), ("c.json", {"kind": "run"})):
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "d.json").write_text("{")
    assert Results.of(result_files([tmp_path])).files == []
    empty = results()
    assert {SECTIONS[name](empty) for name in SECTIONS if name not in ("memory", "gpu")} == {report_tables.NONE}


def test_charts(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.report_charts import write

    paths = write(Results.of(result_files([run.RESULTS])), tmp_path)
    assert {p.name for p in paths} >= {"report-memory-7b.png", "report-cpu-share.png", "report-cpu-ratio.png"}
    assert all(p.stat().st_size > 20_000 for p in paths)
