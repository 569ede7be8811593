"""The predicted GPU table: its arithmetic against cases computed by hand, its bytes against the plan's, and one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import cases, predict, providers, sass  # noqa: E402
from bench.gpu_table import GPUS, Gpu  # noqa: E402
from fusedopt.abi import Phase  # noqa: E402

LANES = {"issue": 128, "float": 128, "integer": 64, "special": 16, "convert": 64, "load/store": 32}
# 4 TB/s achievable and 100 SMs at 2 GHz: 20 bytes per SM and cycle.
ROUND = Gpu("round", "Round", "sm_90", 100, 2e9, 5e12, 0.8, 1e-6, launch=2e-6, lanes=LANES)


def kernel(registers=64, shared=0, read=64, instructions=0, **units) -> predict.Kernel:
    return predict.Kernel(registers, shared, read, instructions, units)


@pytest.mark.parametrize(
    "registers,shared,programs",
    [
        (32, 0, 8),  # 64 warps of 1024 registers: all threads that an SM has
        (64, 0, 4),
        (65, 0, 3),  # 72 after rounding: 7 warps in a quarter of an SM
        (80, 0, 3),
        (96, 0, 2),  # 5 warps in a quarter are 20, which is 2 programs of 8
        (128, 0, 2),
        (168, 0, 1),
        (255, 0, 1),
        (32, 60 << 10, 3),  # 228 KB hold three of 61 KB
    ],
)
def test_programs_of_an_sm(registers, shared, programs):
    assert predict.resident(GPUS["h200"], registers, shared) == programs


def test_fewer_threads_hold_fewer_programs():
    assert predict.resident(GPUS["4090"], 32, 0) == 6  # 1536 threads
    assert predict.resident(GPUS["a100"], 32, 60 << 10) == 2


def test_times_by_hand():
    """1e9 elements are 4882.8 rounds of 2048 for each of 100 SMs."""
    rounds = 1e9 / 2048 / 100
    found = predict.limits(
        ROUND, kernel(64, instructions=400, float=160, integer=128, special=32, convert=0), 10**9, 8e9
    )
    assert found["memory"] == pytest.approx(2e-3)  # 8 GB at 4 TB/s
    assert found["issue"] == pytest.approx(rounds * 256 * 400 / 128 / 2e9)  # 800 cycles a round
    assert found["integer"] == pytest.approx(rounds * 256 * 128 / 64 / 2e9)
    assert found["special"] == found["integer"] and found["convert"] == 0  # 32 at 16 lanes are 128 at 64
    assert found["float"] == pytest.approx(rounds * 256 * 160 / 128 / 2e9)
    assert found["latency"] == pytest.approx(rounds * (1e-6 + 800 / 2e9) / 4)  # four programs at a time
    assert predict.in_flight(ROUND, kernel(64, read=64)) == 4 * 256 * 64


def test_what_binds():
    launch = predict.Launch("adam", ("fp32",), "nearest", torch.float32, Phase.FUSED, 10**9, 8e9)
    busy, idle = kernel(instructions=2000, float=1000), kernel(instructions=160)
    row = predict.predict(ROUND, [(launch, idle)])
    assert (row["limit"], row["next"]) == ("memory", "latency")
    assert row["predicted_ms"] == pytest.approx(2.002)  # and one launch
    row = predict.predict(ROUND, [(launch, busy), (launch, idle)])
    assert row["limit"] == "issue" and row["limits_ms"]["launches"] == pytest.approx(4e-3)
    assert row["predicted_ms"] == pytest.approx(1e3 * (1e9 / 2048 / 100 * 256 * 2000 / 128 / 2e9) + 2 + 0.004)
    tiny = replace(launch, elements=2048, bytes=2048 * 28)
    assert predict.predict(ROUND, [(tiny, idle)])["limit"] == "launches"
    slow = replace(ROUND, latency=1e-4)
    assert predict.predict(slow, [(launch, idle)])["limit"] == "latency"


def test_twice_the_bytes_take_twice_the_memory_time():
    one, two = (predict.limits(GPUS["h200"], kernel(), 10**8, n)["memory"] for n in (1e9, 2e9))
    assert two == 2 * one == pytest.approx(2e9 / (4.8e12 * 0.9))


def test_bytes_and_launches_are_those_of_the_plan():
    case = cases.select(["gpt2_124m:bf16"])[0]
    small = sum(n for shape in case.shapes if (n := cases.math.prod(shape)) < 4096)
    (one,) = predict.planned(providers.PROVIDERS["fusedopt-cuda/adamw/fp32"], case)
    assert (one.elements, one.bytes, one.rule, one.phase) == (case.elements, 22 * case.elements, "adam", Phase.FUSED)
    coded, plain = sorted(
        predict.planned(providers.PROVIDERS["fusedopt-triton/adamw/int8+sr"], case), key=lambda x: -x.elements
    )
    assert (coded.formats, plain.formats) == (("int8", "int8"), ("fp32", "fp32"))
    assert plain.elements == small and plain.bytes == 22 * small and coded.precision == "stochastic"
    assert coded.bytes == (case.elements - small) * (6 + 4 * (1 + 4 / 256))
    lamb = predict.planned(providers.PROVIDERS["fusedopt-cuda/lamb/fp32"], case)
    assert [x.phase for x in lamb] == [Phase.PROBE, Phase.APPLY]
    assert [x.bytes / case.elements for x in lamb] == [12, 22]


def test_units_of_instructions():
    path = "FFMA IMAD.MOV.U32 LOP3.LUT MUFU.RSQ I2F.U8 LDG.E.128 STG.E.64 BRA UMOV LDS.128".split()
    assert sass.units(path) == {"float": 2, "integer": 1, "convert": 1, "special": 1, "load/store": 3}
    assert all(set(gpu.lanes) == {"issue", *sass.UNITS} for gpu in GPUS.values())


def document_of(gpu="h200") -> dict:
    row = predict.predict(
        GPUS[gpu],
        [(predict.Launch("adam", ("fp32",), "nearest", torch.float32, Phase.FUSED, 10**9, 2.8e10), kernel())],
    )
    row |= {"case": "one_large", "provider": "fusedopt-cuda/adamw/fp32", "rule": "adamw", "launches": 1}
    row |= {"bytes_per_step": 2.8e10, "bytes_per_parameter": 28.0, "registers": 64, "programs_per_sm": 4}
    row |= {"bytes_in_flight_per_sm": 1 << 16, "instructions_per_parameter": 20.0}
    return {"schema": 1, "kind": "prediction", "gpu": predict.asdict(GPUS[gpu]), "left_out": {}, "rows": [row]}


def test_measured_times_stand_beside_and_never_in_the_prediction(tmp_path):
    def result(gpu: str, ms: float) -> dict:
        records = [{"provider": "fusedopt-cuda/adamw/fp32", "status": "ok", "ms": {"median": ms, "q1": ms, "q3": ms}}]
        machine = {"gpu": {"name": gpu}} if gpu else {}
        return {"schema": 1, "kind": "run", "machine": machine, "cases": [{"case": "one_large", "results": records}]}

    content = document_of()
    before = json.dumps(content)
    assert predict.table(content, {}).splitlines()[-1].split()[-1] == "-"
    (tmp_path / "gpu-1").mkdir()
    (tmp_path / "gpu-1" / "bench.json").write_text(json.dumps(result("NVIDIA H200", 7.25)))
    (tmp_path / "other.json").write_text(json.dumps(result("NVIDIA A100-SXM4-80GB", 99.0)))
    (tmp_path / "cpu.json").write_text(json.dumps(result("", 98.0)))
    (tmp_path / "prediction.json").write_text(before)
    times = predict.measured(GPUS["h200"], predict.result_files([tmp_path]))
    assert times == {("one_large", "fusedopt-cuda/adamw/fp32"): 7.25}
    *_, heads, _, cells = predict.table(content, times).splitlines()
    assert heads.index("predicted ms") < heads.index("measured ms")
    predicted = f"{content['rows'][0]['predicted_ms']:.3f}"
    assert cells.split()[-1] == "7.250" and predicted in cells and json.dumps(content) == before
    assert predict.load(tmp_path / "prediction.json")["gpu"]["name"] == "h200"
    with pytest.raises(ValueError, match="not a result of `python -m bench predict`"):
        predict.load(tmp_path / "other.json")


def test_a_run(tmp_path):
    """int8 AdamW on bf16 as both backends compile it: an H200 is limited by memory or instructions, within a factor of two."""
    out = tmp_path / "prediction.json"
    command = "-m bench predict --gpu h200 --case gpt2_124m:bf16 --provider fusedopt-*/adamw/int8 --out".split()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command, str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    if "no kernel could be compiled" in done.stdout:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "PREDICTED" in done.stdout and "measured ms" in done.stdout
    content = predict.load(out)
    backends = {"cuda", "triton"} - content["left_out"].keys()
    assert {row["provider"] for row in content["rows"]} == {f"fusedopt-{name}/adamw/int8" for name in backends}
    case = cases.select(["gpt2_124m:bf16"])[0]
    floor = 1e3 * 10.03 * case.elements / GPUS["h200"].achievable
    for row in content["rows"]:
        assert row["launches"] == 2 and 10.06 < row["bytes_per_parameter"] < 10.08
        assert floor < row["predicted_ms"] < 2 * floor and 2 <= row["programs_per_sm"] <= 3
        assert 60 < row["instructions_per_parameter"] < 136 and row["bytes_in_flight_per_sm"] > 25_000


def test_unknown_names_are_refused(capsys):
    from bench.__main__ import main

    assert main(["predict", "--gpu", "h200", "--provider", "torch/*"]) == 2
    assert main(["predict", "--gpu", "h200", "--case", "nothing"]) == 2
    assert "no provider matches" in capsys.readouterr().out
