"""The benchmark tool: cases, providers, quick runs of the other commands, the gates, the GPU command's dry run."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fusedopt  # noqa: E402
from bench import __main__ as entry  # noqa: E402
from bench import (  # noqa: E402  # noqa: E402
    cases,
    gates,
    gpu,
    gpu_checks,
    gpu_lowrank,
    gpu_products,
    lowrank,
    providers,
    release,
    rules,
    run,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "spec, tensors, millions",
    [
        ("one_large", 1, 67.1),
        ("mixed_400", 400, 83.8),
        ("tiny_1000", 1000, 0.064),
        ("gpt2_124m", 148, 124.4),
        ("bert_large", 391, 335.1),
        ("vit_h", 392, 632.0),
        ("llama2_7b", 291, 6738.4),
        ("llama3_8b", 291, 8030.3),
        ("llama2_7b@4:bf16", 39, 1071.7),
    ],
)
def test_cases_have_the_sizes_of_the_models(spec, tensors, millions):
    (case,) = cases.select([spec])
    assert (case.name, case.tensors) == (spec, tensors)
    assert case.elements / 1e6 == pytest.approx(millions, abs=0.06)
    assert case.param_dtype == (torch.bfloat16 if spec.endswith("bf16") else torch.float32)


def test_mixed_case_is_mostly_tiny():
    (case,) = cases.select(["mixed_400"])
    assert sum(shape[0] <= 4096 and len(shape) == 1 for shape in case.shapes) == 300


def test_shrinking_keeps_the_number_of_tensors():
    for case in cases.select(["*"]):
        small = case.shrunk(5000)
        assert small.elements <= 5000 and small.tensors == case.tensors
        assert small.name == f"{case.name}<5000"
    assert case.shrunk(10**12) is case


@pytest.mark.parametrize("spec", ["nothing", "gpt2_124m:int8", "gpt2_124m@x", ""])
def test_unknown_cases_are_refused(spec):
    with pytest.raises(ValueError, match="no case matches"):
        cases.select([spec])


def test_the_default_cases_are_there():
    assert [case.name for case in cases.select(cases.DEFAULT)] == list(cases.DEFAULT)
    assert {"bert_large", "llama3_1b:bf16", "tiny_1000"} < set(cases.DEFAULT)


def test_globs_do_not_repeat():
    assert [c.name for c in cases.select(["llama*", "llama2_7b"])] == ["llama3_1b", "llama2_7b", "llama3_8b"]


def test_baselines_are_always_measured():
    names = [p.name for p in providers.select(["fusedopt-cpu/lion/*", "fusedopt-cpu/sgd/*"], CPU)]
    assert names[:2] == ["torch/adamw/fused", "torch/sgd/fused"]
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="no provider matches"):
        providers.select(["nobody/*"], CPU)


def test_bytes_of_rivals_follow_the_same_count():
    case = cases.Case("x", ((1 << 20,),))
    half = cases.Case("x", ((1 << 20,),), torch.bfloat16, torch.bfloat16)
    per = {
        ("torch/adamw/fused", case): 28,
        ("torch/adamw/fused", half): 14,
        ("bitsandbytes/adamw/int8", case): 16.0625,
        ("bitsandbytes/lion/int8", half): 8.03125,
        ("apex/adamw/fused", half): 22,
        ("flashoptim/adamw/int8", half): 12.25,
        ("pytorch_optimizer/lamb/loop", case): 40,
    }
    for (name, what), expected in per.items():
        assert providers.PROVIDERS[name].step_bytes(what, None) / what.elements == pytest.approx(expected)


def test_small_tensors_keep_fp32_states_in_the_count():
    tiny = cases.Case("x", ((64,),) * 10)
    assert providers.PROVIDERS["bitsandbytes/adamw/int8"].state_bytes(tiny) == 8 * 640


def test_why_not_is_a_sentence():
    case = cases.Case("x", ((64,),))
    absent = providers._rival("a/adamw/b", "no_such_module_anywhere", "AdamW", 2, None)
    assert absent.why_not(case, CPU).startswith("cannot import no_such_module_anywhere: ModuleNotFoundError")
    assert "cpu" in providers.PROVIDERS["apex/adamw/fused"].why_not(case, CPU)
    assert "float32" in providers.PROVIDERS["fusedopt-cpu/adamw/int8+sr"].why_not(case, CPU)


def test_bytes_gates_hold():
    rows = gates.bytes_gates(CPU)
    assert len(rows) == 2 * 3 * len(gates.LIMITS)
    assert not [row for row in rows if row.status != gates.OK]
    assert any("physical limit 40" in row.note for row in rows)


def test_launch_gates_hold():
    rows = gates.launch_gates(CPU, 1 << 12)
    assert not [row for row in rows if row.status == gates.FAIL]
    assert sum(row.status == gates.OK for row in rows) >= 16
    assert all(row.note for row in rows if row.status == gates.UNCHECKED)


def test_projected_gates_hold():
    rows = gates.projected_gates(CPU, 1 << 12)
    assert not [row for row in rows if row.status == gates.FAIL]
    assert sum(row.status == gates.OK for row in rows) >= 26
    (galore,) = [row for row in rows if row.what.startswith("galore_adamw bf16 states")]
    assert galore.value == "11.00" and "physical limit 9.00" in galore.note


def test_projected_gates_see_what_falls_short(monkeypatch):
    """A site that writes its full-size update, and one that projects twice."""
    from fusedopt.projections import base, galore

    real, before = base.weight_bytes, galore.BasisSite.before
    monkeypatch.setattr(base, "weight_bytes", lambda slot: tuple(2 * x for x in real(slot)))
    found = {row.what: row.status for row in gates.projected_gates(CPU, 1 << 12) if "galore_adamw" in row.what}
    assert found["galore_adamw bf16 states, p and g bf16, rank m/4"] == gates.FAIL
    monkeypatch.setattr(base, "weight_bytes", real)

    def twice(self, *args):
        before(self, *args)
        before(self, *args)

    monkeypatch.setattr(galore.BasisSite, "before", twice)
    rows = [row for row in gates.projected_gates(CPU, 1 << 12) if row.what.endswith("counted")]
    assert rows and {row.status for row in rows} == {gates.FAIL}


def test_resource_gates_see_what_falls_short():
    row = {"kernel": "Adam", "arch": "sm_90", "registers": 80, "spills": 0}
    row |= {"loads": {128: 8, 64: 2}, "stores": {128: 6, 64: 2}}
    changes = ({"registers": 200}, {"spills": 8}, {"loads": {128: 7, 64: 9}}, {"stores": {32: 99}})
    status = [g.status for g in gates.resource_gates("cuda", row, (8, 2), (6, 2))]
    assert status == [gates.OK] * 4
    for index, change in enumerate(changes):
        assert gates.resource_gates("cuda", {**row, **change}, (8, 2), (6, 2))[index].status == gates.FAIL
    assert gates._rule_name("AdamAmsgrad") == "adam_amsgrad"


def test_gates_exit_status(monkeypatch, capsys):
    def status(rows, strict=False, as_json=False):
        monkeypatch.setattr(gates, "check", lambda *args: rows)
        return gates.main(argparse.Namespace(part=None, device="cpu", arch=None, json=as_json, strict=strict))

    good, bad = gates.Gate("bytes", "a", "1", "1", gates.OK), gates.Gate("bytes", "b", "2", "1", gates.FAIL)
    unknown = gates.Gate("cuda", "c", "-", "-", gates.UNCHECKED, "nvcc not found")
    assert status([good]) == status([good, unknown]) == 0
    assert status([good, bad]) == status([good, unknown], strict=True) == 1
    assert "1 ok, 1 FAIL" in capsys.readouterr().out
    assert status([good], as_json=True) == 0
    assert json.loads(capsys.readouterr().out)[0]["status"] == "ok"


def test_a_part_without_its_tools_says_so(monkeypatch):
    def absent():
        raise ImportError("no tool")

    monkeypatch.setattr(gates, "bytes_gates", lambda device: absent())
    monkeypatch.setattr(gates, "launch_gates", lambda device: 1 / 0)
    rows = gates.check(("bytes", "launches"), CPU)
    assert [row.status for row in rows] == [gates.UNCHECKED, gates.FAIL]


def test_device_checks_on_the_cpu(tmp_path):
    for name in gpu_checks.CHECKS:
        out = tmp_path / f"{name}.json"
        assert gpu_checks.main([name, "--device", "cpu", "--elements", "4000", "--out", str(out)]) == 0
        assert all(row["ok"] for row in json.loads(out.read_text()))


def gpu_arguments(*more):
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return parser.parse_args(more)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_command_refuses_without_one(capsys):
    assert gpu.main(gpu_arguments()) == 2
    assert "finds no GPU" in capsys.readouterr().out


def test_gpu_command_goes_on_after_failures_and_resumes(tmp_path, monkeypatch, capsys):
    def part(name, text, limit=60):
        return gpu.Part(name, limit, lambda folder, dry: [gpu.python("-c", text)])

    parts = [
        part("bad", "print('why'); raise SystemExit(3)"),
        part("slow", "import time; time.sleep(60)", limit=1),
        gpu.Part("none", 5, lambda folder, dry: []),
        part("good", "print('fine')"),
    ]
    monkeypatch.setattr(gpu, "PARTS", tuple(parts))
    assert gpu.main(gpu_arguments("--dry-run", "--out", str(tmp_path))) == 1
    record = {r["part"]: r for r in json.loads((tmp_path / "summary.json").read_text())["parts"]}
    assert {k: r["status"] for k, r in record.items()} == {
        "bad": "failed", "slow": "out of time", "none": "nothing to run", "good": "ok"
    }  # fmt: skip
    assert record["bad"]["code"] == 3 and record["bad"]["said"] == "why"
    parts[0] = part("bad", "print('better')")
    monkeypatch.setattr(gpu, "PARTS", tuple(parts[:1] + parts[2:]))
    capsys.readouterr()
    assert gpu.main(gpu_arguments("--dry-run", "--out", str(tmp_path))) == 0
    assert "good: already done" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "PARTS", tuple(parts[3:]))
    assert gpu.main(gpu_arguments("--dry-run", "--fresh", "--budget", "0", "--out", str(tmp_path))) == 1
    assert "no time left" in capsys.readouterr().out


def test_gpu_parts_fit_the_nine_minutes():
    assert gpu.BUDGET < 9 * 60
    for part in gpu.PARTS:
        for dry in (False, True):
            for command in part.commands(Path("x"), dry):
                assert all(isinstance(word, str) for word in command), part.name


def test_gpu_dry_run_of_the_measuring_parts(tmp_path):
    pytest.importorskip("matplotlib")
    options = "--dry-run --part measure --part plot --part gates --out".split()
    assert gpu.main(gpu_arguments(*options, str(tmp_path))) == 0, (tmp_path / "measure.log").read_text()
    assert run.load(tmp_path / "bench.json")["cases"]
    assert {p.name for p in tmp_path.glob("*.png")} == {"bench-share.png", "bench-ratio.png", "bench-host.png"}


def test_gpu_dry_run_of_the_lowrank_parts(tmp_path):
    """The measurements of projected steps, on small matrices and the reference's products."""
    parts = ("lowrank_products", "lowrank_steps", "lowrank_refresh", "newton_schulz")
    options = ["--dry-run", *(word for part in parts for word in ("--part", part)), "--out", str(tmp_path)]
    logs = lambda: "\n".join((tmp_path / f"{part}.log").read_text() for part in parts)  # noqa: E731
    assert gpu.main(gpu_arguments(*options)) == 0, logs()
    products, steps, refresh, iterations = (json.loads((tmp_path / f"{part}.json").read_text()) for part in parts)
    assert [r["in_use"] for r in iterations["records"]] == [False, True]
    assert not [d["left_out"] for d in (products, steps, refresh) if d["left_out"]]
    kernels = {str(kernel) for kernel in gpu_products.KERNELS}
    assert {r["kernel"] for r in products["records"]} == kernels
    failed = {r["kernel"] for r in products["records"] if "error" in r}
    assert failed == {"project int4", "sums"}  # kernels that the reference does not have
    assert {b["kernel"] for b in products["best"]} == kernels - failed
    assert not [r["error"] for r in steps["records"] if "error" in r]
    names = {(r["dtype"], r["name"]) for r in steps["records"]}
    assert names == {
        (text, n) for text, d in (("bf16", torch.bfloat16), ("fp32", torch.float32)) for n in gpu_lowrank.contenders(d)
    }
    assert {r["name"] for r in refresh["records"]} == {
        "randomised, first", "randomised, warm start", "random", "dct columns", "full SVD"
    }  # fmt: skip


def test_limits_of_projected_steps():
    """DESIGN, section 5: 9.0 bytes of GaLore at r = m / 4 with bf16 states, 8.0 with 8 bits; AdamW 22 with fp32 states."""
    shapes, bf16 = [(4096, 4096)] * 2, torch.bfloat16

    def limit(kind, width, rank=1024, shapes=shapes, dtype=bf16):
        return gpu_lowrank.limit_bytes(kind, width, shapes, dtype, rank) / sum(map(math.prod, shapes))

    assert limit("galore", 2) == 9.0 and limit("galore", 1 + 4 / 256) == pytest.approx(8.0, abs=0.02)
    assert limit("full", 4) == 22 and limit("full", 4, dtype=torch.float32) == 28
    assert limit("apollo_mini", 4) == pytest.approx(8, abs=0.01) and limit("adafactor", 0) == 10
    assert limit("galore", 2, shapes=[(4096, 11008)]) == pytest.approx(6 + 12 / 4)
    assert limit("galore", 4, shapes=[(4096,)]) == 22


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_the_products_alone_are_down_and_back(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    alone = lowrank.Products(p, 5)
    basis, g = alone.basis, p.grad
    alone.step()
    want = basis @ (basis.t() @ g) if shape[0] < shape[1] else (g @ basis.t()) @ basis
    assert 5 in basis.shape and min(shape) in basis.shape
    torch.testing.assert_close(alone.out, want)


def test_medium_is_set_for_the_time_of_a_step():
    seen = []
    for name in ("galore", "galore" + lowrank.MEDIUM):
        lowrank.timed(name, lambda: seen.append(torch.get_float32_matmul_precision()))
    assert seen == ["highest", "medium"] and torch.get_float32_matmul_precision() == "highest"
    fp32, bf16 = ([n for n in lowrank.CONTENDERS if lowrank.suits(n, d)] for d in (torch.float32, torch.bfloat16))
    assert "fusedopt/galore_adamw, medium" in fp32 and "fusedopt/galore_adamw+sr" not in fp32
    assert "fusedopt/galore_adamw+sr" in bf16 and not [n for n in bf16 if n.endswith(lowrank.MEDIUM)]


def test_peaks_of_allocations_with_some_apart():
    def work():
        one = torch.empty(1000, dtype=torch.uint8)
        other = torch.empty(3000, dtype=torch.uint8)
        del one, other
        torch.empty(3500, dtype=torch.uint8)

    assert lowrank.allocated_peak(work) == (4000, 4000)
    assert lowrank.allocated_peak(work, apart=lambda size: size == 3000) == (4000, 3500)


def test_tiles_are_patched_for_a_variant_only():
    from fusedopt.backends import triton_matrix

    kernel, before = gpu_products.KERNELS[0], dict(triton_matrix.TILES)
    assert gpu_products.tiles_of(kernel)[0] == gpu_products.in_use(kernel) == before["half"][0]
    assert len(set(gpu_products.tiles_of(kernel))) == len(gpu_products.tiles_of(kernel)) > 8
    with gpu_products.with_tiles(kernel, gpu_products.PRODUCT_TILES[0]):
        assert gpu_products.in_use(kernel) == gpu_products.PRODUCT_TILES[0]
    assert triton_matrix.TILES == before


def test_eager_galore_is_galore():
    """The baseline of the steps: as ours with its basis, at a constant gradient."""
    base = torch.nn.Parameter(torch.randn(24, 32, generator=torch.Generator().manual_seed(0)))
    mine = torch.nn.Parameter(base.detach().clone())
    base.grad = mine.grad = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    theirs = gpu_lowrank.EagerGaLore([base], 8, 0.01, 0.1)
    ours = fusedopt.AdamW([mine], lr=0.01, weight_decay=0.1, projection=fusedopt.GaLore(8, 10**6, method="random"))
    ours.step()
    theirs.state[base]["basis"] = ours.state[mine]["projector"].clone()
    theirs.step()
    for _ in range(3):
        ours.step()
        theirs.step()
    torch.testing.assert_close(mine, base, rtol=1e-4, atol=1e-5)


def test_lowrank_quick_run(tmp_path, capsys):
    """Every part on small matrices: what does not depend on the clock is right, and the file holds it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert entry.main(["lowrank", "--quick", "--out", str(tmp_path / "lowrank.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    text = capsys.readouterr().out
    document = json.loads((tmp_path / "lowrank.json").read_text())
    assert document["kind"] == "lowrank" and list(document["parts"]) == list(lowrank.PARTS)
    assert all(f"\n{part}\n" in "\n" + text for part in lowrank.PARTS) and document["machine"]["processor"]
    parts = document["parts"]
    state = {(r["name"], r["dtype"]): r for r in parts["state"]}
    assert all(0.99 < r["bytes_over_formula"] < 1.01 for r in state.values())
    assert state["adamw", "fp32"]["bytes"] == 8 * 48 * 64
    assert state["galore_adamw", "bf16"]["bytes"] == 8 * 8 * 64 + 2 * 8 * 48
    names = {r["name"] for r in parts["step"]}
    assert {"torch/adamw/fused", "fusedopt/galore_adamw", "fusedopt/galore_adamw8bit"} <= names
    energies = {(r["name"], r["dtype"]): r["share_of_best_energy"] for r in parts["refresh"]}
    assert energies["full SVD", "fp32"] == 1.0
    assert energies["randomised, warm start", "fp32"] > 0.99 > 0.4 > energies["random", "fp32"]
    assert [r["gradient_bytes"] for r in parts["linear"]] == [r["predicted_gradient_bytes"] for r in parts["linear"]]
    plain, early = parts["linear"]
    assert plain["peak_bytes"] > plain["gradient_bytes"] and plain["peak_bytes"] > early["peak_bytes"] > 0
    assert parts["linear"][1]["gradient_bytes"] * 8 == parts["linear"][0]["gradient_bytes"]


def test_rules_quick_run(tmp_path, capsys):
    """Runs are added to those of an earlier call; a rule whose loss has not fallen is said so."""
    argv = ["rules", "--quick", "--out", str(tmp_path), "--only"]
    assert entry.main([*argv, "adamw"]) == 0 and entry.main([*argv, "lion", "microadam"]) == 0
    document = json.loads((tmp_path / "rules.json").read_text())
    assert sorted(document["rules"]) == ["adamw", "lion", "microadam"]
    record = document["rules"]["adamw"]
    assert record["lr"] == 1e-3 and record["held_out"][-1][1] < record["start"] and record["fell"]
    assert len(record["losses"]) == document["size"]["steps"]
    assert "AdamW" in capsys.readouterr().out and (tmp_path / "rules.png").stat().st_size > 10_000
    record["held_out"][-1][1] = record["start"]
    rules.judge(document["rules"])
    assert not record["fell"] and "(has not fallen)" in rules.report(document)


def test_release_quick_run(tmp_path, capsys):
    """Released, a decoder's step needs less memory by its gradients without the largest one, and makes the same weights."""
    assert entry.main(["release", "--quick", "--out", str(tmp_path / "release.json")]) == 0
    text = capsys.readouterr().out
    document = json.loads((tmp_path / "release.json").read_text())
    assert document["kind"] == "release" and list(document["parts"]) == list(release.PARTS)
    assert all(f"\n{part}\n" in "\n" + text for part in release.PARTS)
    for record in document["parts"]["memory"]:
        assert record["same_weights"], record["name"]
        room = record["forward_bytes"] if record["name"] == "equal matrices" else 0
        assert record["saved_bytes"] >= record["wanted_bytes"] - room, record
        assert record["enough"] == (record["saved_bytes"] >= record["wanted_bytes"])
    assert {r["name"] for r in document["parts"]["time"]} >= {"fusedopt, step()", "fusedopt released", "backward alone"}
    assert len(document["parts"]["single"]) == 4
