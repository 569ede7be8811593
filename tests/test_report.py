"""README's numbers are those of the committed results, and what `bench report` makes of results is what they say."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import report, report_results, report_steps, report_tables, run  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.predict import result_files  # noqa: E402
from bench.report_results import Results  # noqa: E402
from bench.report_tables import SECTIONS  # noqa: E402


def quartiles(x: float) -> dict:
    return {"median": x, "q1": x, "q3": x}


def record(provider: str, ms: float, ratio: float | None, share: float = 0.5, status: str = "ok", moved=28.0) -> dict:
    return {
        "provider": provider, "rule": "adamw", "status": status, "ms": quartiles(ms), "rounds_ms": [ms, ms],
        "ratio": None if ratio is None else {"to": "torch/adamw/fused", **quartiles(ratio)},
        "share_of_stream": quartiles(share), "share_of_copy": quartiles(share), "bytes_per_parameter": moved,
        "host_us_per_tensor": quartiles(1e3 * ms), "extra_bytes": 67108864,
    }  # fmt: skip


def document(
    records: list[dict], date: str, device: str = "cpu", dtype: str = "float32", name="one_large", **machine
) -> dict:
    stamp = {
        "date": date, "device": device, "processor": "P", "threads": 2, "isa": "AVX512", "isa_asked": None, "commit": "a",
        "versions": {"torch": "2"}, **machine,
    }  # fmt: skip
    case = {"case": name, "elements": 67108864, "tensors": 1, "param_dtype": dtype, "results": records}
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
    for name in (*(name for name in SECTIONS if name not in ("gpu", "kernels", "prediction")), "prediction"):
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


NUMBER = re.compile(
    r"\d+\.\d+|\d+(?:\.\d+)? ?(?:times|%|percent|[KMGT]i?B|bytes|ms|us|seconds|minutes|hours|steps|seeds)\b|\d+ ?[x%](?!\w)"
)
DEFINED = (  # numbers of README's own text that nobody measured: what a format, an option or a formula is
    "weight_decay=0.1", "(4, 2, 1.02, 0.531)", "| 1.02 |", "| 0.53 |", "0.2 to 0.4 % of a weight",
    "weights and states in 5.03 bytes",
    "0.52 bytes per number of the projector", "| 4 bytes |", "4 bytes per column", "4 bytes: its projector comes from a seed",
    "largest 1 % in a basis", "(4 bytes per element)", "| 0; 4 bytes |", "4, 2, 1.02 or 0.53 window bytes",
    "x 4, 2 (bf16), 1.02 (8 bits) or 0.53 (int4) bytes", "outputs x parameters x 4 bytes", "2 bytes an element in int8",
    "take 5 bytes an element in the file", "1 MiB;", "a matrix of 1024 x 1024", "Apache-2.0",
)  # fmt: skip


def own_text(page: str) -> str:
    """README without its generated sections, code (comments of code stay), links' targets and names of papers."""
    page = re.sub(r"<!-- (\S+?): written by .*?<!-- end of \1 -->", "", page, flags=re.S)
    comments = lambda match: "\n".join(re.findall(r"(?:^| )#.*$", match[0], re.M))  # noqa: E731
    page = re.sub(r"^```.*?^```", comments, page, flags=re.S | re.M)
    page = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", page)
    return re.sub(r"(arXiv )?\d{4}\.\d{4,5}", "", page)


def test_readme_has_no_measured_number_of_its_own():
    """Measured ones stand in the sections that `bench report` writes from committed files."""
    text = own_text(report.README.read_text())
    for phrase in DEFINED:
        assert phrase in text, f"no longer in README: {phrase}"
        text = re.sub(rf"(?<![\d.]){re.escape(phrase)}", "|" * phrase.endswith("|"), text)
    found = [
        f"{match[0]!r} in {text[max(0, match.start() - 50) : match.end() + 30]!r}" for match in NUMBER.finditer(text)
    ]
    assert not found, "write it by a function of bench/report_*.py from a file of bench/results:\n" + "\n".join(found)


def test_a_measured_number_is_seen():
    for text in ("takes 1.4 times as long", "falls by 12 % in all", "in 50 minutes on", "of 403 MB in", "a 3x gain"):
        assert NUMBER.search(own_text(f"\n{text}\n")), text
        assert NUMBER.search(own_text(f"\n```bash\npython  # {text}\n```\n")), text
    marks = report.marks("speed")
    quiet = (
        f"`lr=0.1`, [a](b1.5.png), arXiv 2401.00001, 2 threads\n```\nx = 1.5\n```\n{marks[0]}\n1.4 times\n{marks[1]}\n"
    )
    assert not NUMBER.search(own_text(quiet))


def test_ranges_are_over_the_runs_of_one_commit():
    def runs(ratio, date, **machine):
        ours = record("fusedopt-cpu/adamw/int8", 1.0, ratio, ratio)
        return document([record("torch/adamw/fused", 1.0, 1.0), ours], date, **machine)

    old = runs(0.1, "2026-01-01", commit="old")
    asked = runs(1.5, "2026-01-09", isa_asked="avx2")
    found = results(old, runs(0.7, "2026-01-02"), runs(0.8, "2026-01-03"), asked)
    text = report_steps.speed(found)
    assert "| fusedopt AdamW, int8 state | 0.70 to 0.80 |" in text
    assert (
        "The newest measurement of each, from 2 runs on P, 2 threads, AVX512, torch 2 (2026-01-02 to 2026-01-03); an "
        "in-place add reached 60 GB/s."
    ) in text
    assert (
        "With AVX2 on the same machine AdamW takes, 67M in 1 tensor: int8 1.50." in text and "torch AdamW" not in text
    )
    assert "| fusedopt AdamW, int8 state | 70 to 80 % | 1.0 | - |" in report_steps.limits(found)


def test_the_newest_measurement_of_each_case_and_provider_counts():
    fused, ours = record("torch/adamw/fused", 1.0, 1.0), record("fusedopt-cpu/adamw/fp32", 1.0, 0.5)
    rival = record("optimi/adamw/default", 1.0, 4.0)
    first = document([fused, ours, rival], "2026-01-01", commit="old")
    second = document([fused, record("fusedopt-cpu/adamw/fp32", 1.0, 0.6)], "2026-01-02", processor="Q")
    other = document([fused, record("fusedopt-cpu/adamw/fp32", 1.0, 0.9)], "2026-01-03", name="gpt2_124m")
    quick = document([fused, record("fusedopt-cpu/adamw/fp32", 1.0, 7.0)], "2026-01-04", name="gpt2_124m<99")
    found = results(first, second, other, quick)
    lines = report_steps.speed(found).splitlines()
    assert lines[0] == "| fp32 parameters and gradients | 67M in 1 tensor | GPT-2, 67M in 1 tensor |"
    assert lines[2] == "| fusedopt AdamW, fp32 state | 0.60 | 0.90 |" and "7.00" not in "".join(lines)
    assert "2 runs on P" in lines[-1] and "1 run on Q" in lines[-1]
    assert "| optimi AdamW, default | 4.00* | - |" in report_steps.rivals(found) and "Cells with *" in lines[-1]
    assert "Cells with *" not in report_steps.speed(results(first, other))


def test_a_faster_rival_is_named():
    """Against our best step of the same rule that moves as many bytes, in the decimals of the tables."""
    rows = [
        record("torch/adamw/fused", 1, 1.0),
        record("deepspeed/adamw/cpu", 1, 0.96),
        record("fusedopt-cpu/adamw/fp32", 1, 1.004),
        record("fusedopt-reference/adamw/fp32", 1, 9.0),
        record("fusedopt-cpu/adamw/int8", 1, 0.5, moved=16.06),
        record("fusedopt-cpu/adamw/int8c", 1, 0.4, moved=16.06),
        record("torchao/adamw/int8", 1, 0.45, moved=16.06),
    ]
    text = report_steps.rivals(results(document(rows, "2026-01-02")))
    wanted = "Faster than our step of the same rule with states of the same size: "
    assert text.endswith(f"{wanted}DeepSpeed AdamW, cpu (67M in 1 tensor: 0.96 against 1.00).")
    rows[-1] = record("torchao/adamw/int8", 1, 0.3, moved=16.06)
    half = document([rows[0], record("fusedopt-cpu/adamw/bf16", 1, 1.1)], "2026-01-03", dtype="bfloat16")
    text = report_steps.rivals(results(document(rows, "2026-01-02"), half))
    assert "torchao AdamW, int8 (67M in 1 tensor: 0.30 against 0.40)" in text
    assert "torch AdamW, fused (67M in 1 tensor, bf16: 1.00 against 1.10)" in text
    slower = results(document([rows[0], record("fusedopt-cpu/adamw/fp32", 1, 0.9)], "2026-01-02"))
    assert "None is faster here than our step" in report_steps.rivals(slower)


def test_a_step_that_did_not_fit_beside_torchs_is_marked():
    rows = [record("torch/adamw/fused", 2.0, 1.0), record("fusedopt-cpu/adamw/fp32", 3.2, None)]
    lines = report_steps.speed(results(document(rows, "2026-01-02"))).splitlines()
    assert lines[2] == "| fusedopt AdamW, fp32 state | ~1.60 |" and "~: of other rounds" in lines[-1]
    rows[1]["ratio"] = {"to": "torch/adamw/fused", **quartiles(1.5)}
    lines = report_steps.speed(results(document(rows, "2026-01-02"))).splitlines()
    assert lines[2] == "| fusedopt AdamW, fp32 state | 1.50 |" and "~" not in lines[-1]
    rows[1]["ratio"] = None
    assert "0.50" not in report_steps.speed(results(document(rows[1:], "2026-01-02")))


def test_our_steps_and_the_rivals_have_tables_of_their_own():
    rows = [
        record("torch/adamw/fused", 1, 1.0),
        record("deepspeed/adamw/cpu", 1, 1.02),
        record("fusedopt-cpu/lion/fp32", 1, 0.5),
    ]
    rows.append(record("torchao/adamw/int8", 1, 9.0, status="skipped"))
    found = results(document(rows, "2026-01-02"))
    lines = report_steps.speed(found).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| fusedopt Lion, fp32 state", "| DeepSpeed AdamW, cpu"]
    assert "torchao" not in report_steps.speed(found) + report_steps.rivals(found)
    rows[-1]["status"] = "ok"
    assert "torchao" not in report_steps.speed(found) and "| torchao AdamW, int8 | 9.00 |" in report_steps.rivals(found)
    assert "fusedopt" not in report_steps.rivals(found)


def test_bf16_is_held_against_deepspeed_round_by_round():
    base, ours = record("deepspeed/adamw/cpu", 2.0, 1.0), record("fusedopt-cpu/adamw/fp32+sr", 2.0, 1.2)
    base["rounds_ms"], ours["rounds_ms"] = [1.0, 2.0, 8.0], [2.0, 2.0, 4.0]
    text = report_steps.halves(results(document([ours, base], "2026-01-02", dtype="bfloat16")))
    assert "| fusedopt AdamW, fp32 state, stochastic | 1.20 / 1.00 |" in text
    apart = document([ours, base], "2026-01-02", dtype="bfloat16")
    apart["cases"][0]["groups"] *= 2
    assert "| fusedopt AdamW, fp32 state, stochastic | 1.20 |" in report_steps.halves(results(apart))
    ours["group"] = base["group"] = 1
    assert "| fusedopt AdamW, fp32 state, stochastic | 1.20 / 1.00 |" in report_steps.halves(results(apart))


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
    assert "fusedopt" not in report_steps.speed(results(measured)).lower()


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


def test_sentences_say_what_the_files_hold():
    """Numbers looked up in the files by another way than the report's."""
    found = Results.of(result_files([run.RESULTS]))
    text = {name: SECTIONS[name](found) for name in ("muon", "lowrank", "offload", "scaling", "demo")}
    row = next(r for r in found.newest("muon")["rows"] if r["name"] == "fusedopt.Muon")
    assert f"takes {row['ratio']:.2f} times that of `torch.optim.Muon`" in text["muon"]
    steps = [r for r in found.newest("lowrank")["parts"]["step"] if r["shape"] == [4096, 4096] and r["dtype"] == "bf16"]
    for name, shown in (
        ("fusedopt/galore_adamw", "fusedopt GaLore AdamW"),
        ("galore-torch/galore_adamw", "galore-torch GaLore AdamW"),
    ):
        (ratio,) = [r["to_torch_fused"]["median"] for r in steps if r["name"] == name]
        (line,) = [line for line in text["lowrank"].splitlines() if line.startswith(f"| {shown} |")]
        assert line.endswith(f" {ratio:.1f} |")
    (disk,) = [r for r in found.newest("offload")["parts"]["file"] if (r["kind"], r["pages"]) == ("fp32", "disk")]
    assert f"takes {disk['step_to_io']['median']:.1f} (fp32)" in text["offload"]
    times = {p["x"]: p["ms"]["median"] for p in found.newest("scaling")["points"]
             if (p["sweep"], p["provider"]) == ("tensors", "torch/adamw/fused")}  # fmt: skip
    assert f"torch AdamW, fused: {(times[4000] - times[1000]) / 3:.1f} and" in text["scaling"]
    (coded,) = [r for d in found.all("demo") for r in d["runs"] if r["name"] == "adamw8bit"]
    assert (
        f"AdamW int8 {coded['held_out'][-1][1]:.3f} and {coded['state_bytes'] / coded['parameters']:.2f}"
        in text["demo"]
    )


def test_dry_runs_and_foreign_files_are_left_out(tmp_path):
    dry = {**document([], "2026-01-01"), "dry_run": True}
    for name, content in (("a.json", dry), ("b.json", [1]), ("c.json", {"kind": "run"})):
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "d.json").write_text("{")
    assert Results.of(result_files([tmp_path])).files == []
    empty = results()
    assert {SECTIONS[name](empty) for name in SECTIONS if name not in ("memory", "gpu")} == {report_results.NONE}


def test_charts(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.report_charts import write

    paths = write(Results.of(result_files([run.RESULTS])), tmp_path)
    assert {p.name for p in paths} >= {"report-memory-7b.png", "report-cpu-share.png", "report-cpu-ratio.png"}
    assert all(p.stat().st_size > 20_000 for p in paths)
