"""Runs killed with SIGKILL at random points resume bit for bit; the check notices runs that do not."""

import json
import os

import pytest
import torch

from bench import __main__ as entry
from bench import kill_resume
from fusedopt import files

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runs")


def in_a_process(*arguments) -> dict:
    """The summary of `python -m bench kill-resume`: it forks, which a process with other threads should not."""
    import subprocess
    import sys

    from bench.machine import ROOT

    out = arguments[-1]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "kill-resume", *map(str, arguments[:-1]), "--out", str(out)],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_killed_runs_resume_bit_for_bit(tmp_path):
    document = in_a_process("--runs", 6, "--steps", 45, "--seed", 1, tmp_path / "kills.json")
    summary = document["summary"]
    assert document["failures"] == [] and summary["equal_to_uninterrupted"] == 6
    assert summary["kills"] >= 6 and summary["resumed"] >= 3
    assert [r["offload"] for r in document["runs"]] == [False, True] * 3


def test_a_run_that_resumes_wrongly_is_noticed(tmp_path):
    """The log of a run says what happened: another start, and other bits."""
    sums = {1: 11, 2: 22, 3: 33, 4: 44}
    record = {"kills": 1, "resumed_at": [], "lost_steps": [], "kills_while_saving": 0}
    (tmp_path / "log").write_text("start 3\nstep 4 44\nsaving\nhalf a li")
    kill_resume._check_log(tmp_path, 0, 3, sums, record, True)
    assert record["resumed_at"] == [3] and record["lost_steps"] == [4] and record["kills_while_saving"] == 1
    with pytest.raises(RuntimeError, match="resumed at step 3, the last complete checkpoint is of step 2"):
        kill_resume._check_log(tmp_path, 0, 2, sums, record, True)
    with pytest.raises(RuntimeError, match="after step 4 weights or states differ"):
        kill_resume._check_log(tmp_path, 0, 3, sums | {4: 45}, record, True)


def test_an_incomplete_checkpoint_is_noticed(tmp_path):
    for n in (3, 6):
        files.save_checkpoint(tmp_path / f"step-{n}.pt", extra={"step": n})
    assert kill_resume._check_files(tmp_path) == 6
    (tmp_path / "step-6.pt").write_bytes((tmp_path / "step-6.pt").read_bytes()[:-30])
    with pytest.raises(ValueError, match="truncated"):
        kill_resume._check_files(tmp_path)


def test_offload_quick_run(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        options = ["--quick", "--folder", str(tmp_path), "--out", str(tmp_path / "offload.json")]
        assert entry.main(["offload", *options]) == 0
    finally:
        torch.set_num_threads(threads)
    document = json.loads((tmp_path / "offload.json").read_text())
    memory, file = document["parts"]["memory"], document["parts"]["file"]
    assert [(r["kind"], r["name"]) for r in memory] == [
        (kind, name) for kind in ("fp32", "bf16 + int8") for name in ("step_on cpu", "step_on device")
    ]
    assert [(r["kind"], r["pages"]) for r in file] == [
        (k, p) for k in ("fp32", "bf16 + int8") for p in ("cached", "disk")
    ]
    for r in file:
        assert 0 < r["staging_bytes"] <= r["memory_limit"]
        assert all(r[k]["median"] > 0 for k in ("staged_seconds", "io_seconds", "step_to_io", "mapped_to_staged"))
    fp32 = file[0]
    assert fp32["state_bytes"] == 4 * fp32["memory_limit"] == 24 * 20_000 * 8
    assert "written:" in capsys.readouterr().out
