"""`bench run`: a tiny run, what fits into memory, a killed run that goes on, its comparison and charts."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import __main__ as entry  # noqa: E402
from bench import bandwidth, cases, compare, machine, plot, providers, run  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def document():
    """A measured run of two small cases with every kind of provider outcome."""
    chosen = providers.select(["fusedopt-reference/adamw/fp32", "torch/sgd/foreach", "fusedopt-cuda/adamw/fp32"], CPU)
    small = [case.shrunk(3000) for case in cases.select(["tiny_1000", "gpt2_124m@1:bf16"])]
    small[0] = cases.Case("tiny_9", ((64,),) * 9)
    return run.measure(run.begin(chosen, CPU, 3, 1 << 20), small, chosen, CPU, show=lambda text: None)


def test_document(document):
    assert document["schema"] == run.SCHEMA and document["kind"] == "run"
    text = json.dumps(document, allow_nan=False)
    assert str(Path.home()) not in text and str(machine.ROOT) not in text
    stamp = document["machine"]
    assert {"date", "processor", "threads", "versions", "commit", "device", "isa"} <= stamp.keys()
    assert [c["case"] for c in document["cases"]] == ["tiny_9", "gpt2_124m@1:bf16<3000"]
    for case in document["cases"]:
        by_name = {r["provider"]: r for r in case["results"]}
        assert by_name["fusedopt-cuda/adamw/fp32"]["status"] == "skipped"
        assert by_name["fusedopt-cuda/adamw/fp32"]["reason"] == "not for cpu tensors"
        ours = by_name["fusedopt-reference/adamw/fp32"]
        assert ours["bytes_per_parameter"] == (28 if case["param_dtype"] == "float32" else 22)
        assert len(ours["rounds_ms"]) == 3 and ours["ratio"]["to"] == "torch/adamw/fused"
        assert by_name["torch/sgd/foreach"]["ratio"]["to"] == "torch/sgd/fused"
        for r in case["results"]:
            if r["status"] == "ok":
                for key in ("ms", "host_us_per_tensor", "share_of_copy", "share_of_stream", "ratio"):
                    assert 0 < r[key]["q1"] <= r[key]["median"] <= r[key]["q3"]
        assert by_name["torch/adamw/fused"]["ratio"]["median"] == 1


def test_table_and_files(document, tmp_path):
    text = run.table(document["cases"][0], 1 << 40)
    assert "fusedopt-reference/adamw/fp32" in text and "fits in cache" in text
    assert "skipped, not for cpu tensors: fusedopt-cuda/adamw/fp32" in text
    path = run.output_path(tmp_path / "a.json", CPU)
    run.save(document, path)
    assert run.load(path) == document
    assert run.output_path(tmp_path, CPU).parent == tmp_path
    path.write_text(json.dumps({**document, "schema": 0}))
    with pytest.raises(ValueError, match="schema"):
        run.load(path)


def test_a_failing_provider_does_not_stop_the_others():
    def broken(params):
        raise RuntimeError("no such instruction")

    bad = providers.Provider("bad/adamw/x", "adamw", broken, 2)
    good = providers.PROVIDERS["torch/adamw/fused"]
    record = run.run_case(cases.Case("x", ((64,),)), CPU, [good, bad], 2, bandwidth.Probe(CPU, 1 << 20))
    assert [(r["provider"], r["status"]) for r in record["results"]] == [(good.name, "ok"), (bad.name, "skipped")]
    assert record["results"][1]["reason"] == "RuntimeError: no such instruction"


def test_memory_guard():
    case = cases.Case("x", ((1000, 1000),))
    names = ("torch/adamw/fused", "torch/adamw/loop", "fusedopt-cpu/lion/fp32")
    fused, loop, ours = (providers.PROVIDERS[name] for name in names)
    everything = [fused, loop, ours]
    assert run.grouping(case, everything, 1e12) == ([everything], run.MAX_SETS, {})
    # p 4, two gradients 8, states 8, 8, 4 MB; the loop takes 8 MB more
    assert run.grouping(case, everything, 1e6 * (3 * (12 + 12 + 8) + 3 * 4 + 8))[1] == 3
    assert run.grouping(case, everything, 1e6 * (2 * (12 + 12 + 8) + 2 * 4 + 8))[1] == 2
    assert run.grouping(case, everything, 1e6 * (2 * (12 + 12 + 8) + 2 * 4 + 7))[1] == 1
    groups, sets, reasons = run.grouping(case, everything, 41e6)
    assert sets == 1 and not reasons and groups == [[fused, loop], [fused, ours]]
    assert run.grouping(case, everything, 39e6)[0] == [[fused, ours], [loop]]
    groups, _, reasons = run.grouping(case, everything, 16e6)
    assert groups == [[ours]] and reasons.keys() == {fused.name, loop.name}
    assert "does not fit: needs 0.0 GB" in reasons[fused.name]
    assert run.grouping(case, [], 1) == ([], 1, {})
    arena = run.Arena(case, CPU, run.gradient_sets(1))
    assert sum(g.nbytes for gradients in arena.gradients for g in gradients) == run.working_set(case, [], 1) == 8e6
    two = cases.Case("x", ((1000, 1000), (500, 1000)))
    assert loop.temporary_bytes(two) == 8e6  # one tensor after the other
    assert providers.PROVIDERS["torch/adamw/foreach"].temporary_bytes(two) == 6e6


def test_peak_memory():
    with machine.PeakMemory(CPU) as peak:
        block = torch.ones(1 << 25)
        del block
    if peak.bytes is None:
        pytest.skip("this system does not tell")
    assert peak.bytes < 1 << 29
    assert machine.available_memory(CPU) > 1 << 20


def test_compare(document):
    same = compare.compare(document, document)
    assert {row["status"] for row in same} == {"same"}
    document, slower = (json.loads(json.dumps(document)) for _ in range(2))
    for content, ratio in (
        (document, 1.0),
        (slower, 50.0),
    ):  # not as measured: that may have any spread on a busy machine
        for case in content["cases"]:
            for r in case["results"]:
                if r["provider"] == "fusedopt-reference/adamw/fp32":
                    r["ratio"] |= {"median": ratio, "q1": 0.9 * ratio, "q3": 1.1 * ratio}
    del slower["cases"][0]["results"][0]
    rows = {(r["case"], r["provider"]): r for r in compare.compare(document, slower)}
    found = rows["tiny_9", "fusedopt-reference/adamw/fp32"]
    assert found["status"] == "slower" and found["change"] == pytest.approx(49)
    assert compare.compare(slower, document)[-1]["status"] in ("faster", "only new", "same")
    assert rows["tiny_9", document["cases"][0]["results"][0]["provider"]]["status"] == "only old"
    assert "SLOWER" in compare.table(list(rows.values()))


def test_plots(document, tmp_path):
    pytest.importorskip("matplotlib")
    paths = plot.write(document, tmp_path, "r")
    assert [p.name for p in paths] == ["r-share.png", "r-ratio.png", "r-host.png"]
    assert all(p.read_bytes()[:4] == b"\x89PNG" and p.stat().st_size > 5000 for p in paths)
    assert plot.write({**document, "cases": []}, tmp_path, "none") == []


def test_command_line(tmp_path, capsys):
    out = tmp_path / "r.json"
    options = "run --case tiny_1000 --elements 1000 --rounds 2 --probe-mb 1 --provider torch/adamw/fused".split()
    assert entry.main([*options, "--device", "cpu", "--out", str(out)]) == 0
    assert entry.main(["compare", str(out), str(out)]) == 0
    assert entry.main(["run", "--list"]) == 0
    assert entry.main(["run", "--case", "nothing", "--device", "cpu"]) == 2
    assert entry.main(["compare", str(tmp_path / "absent.json"), str(out)]) == 2
    text = capsys.readouterr().out
    assert "x baseline" in text and "within noise" in text and "llama3_8b: 291 tensors" in text


def test_a_killed_run_keeps_its_cases_and_goes_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "r.json"
    options = "run --elements 1000 --rounds 2 --probe-mb 1 --provider torch/adamw/fused --device cpu".split()
    both = ["--case", "tiny_1000", "--case", "one_large", "--resume", "--out", str(out)]
    real = run.run_case
    seen = []

    def killed(case, *rest):
        seen.append(case.name)
        if case.name.startswith("one_large") and seen.count(case.name) == 1:
            raise KeyboardInterrupt
        return real(case, *rest)

    monkeypatch.setattr(run, "run_case", killed)
    with pytest.raises(KeyboardInterrupt):
        entry.main([*options, *both])
    (first,) = run.load(out)["cases"]
    assert entry.main([*options, *both]) == 0 and "there already" in capsys.readouterr().out
    done = run.load(out)
    assert seen == ["tiny_1000<1000", "one_large<1000", "one_large<1000"]
    assert done["cases"][0] == first and [c["case"] for c in done["cases"]] == ["tiny_1000<1000", "one_large<1000"]
    assert entry.main([*options, *both, "--rounds", "3"]) == 2
    assert "measured with another rounds" in capsys.readouterr().out
    monkeypatch.setattr(machine, "processor", lambda: "another one")
    assert entry.main([*options, *both, "--provider", "torch/adamw/loop"]) == 2
    assert "another processor, providers" in capsys.readouterr().out
    assert run.load(out) == done and not list(tmp_path.glob("*.part"))
    assert entry.main([*options, "--resume", "--out", str(tmp_path)]) == 2
    assert "--out FILE.json" in capsys.readouterr().out
    assert entry.main([*options, "--case", "tiny_1000", "--out", str(out)]) == 0 and len(run.load(out)["cases"]) == 1
