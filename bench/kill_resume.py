"""Runs that are killed at random points and resumed: does each go on bit for bit from its last complete checkpoint?

A run trains a small bf16 network (stochastic rounding, int8 AdamW, dropout, data from torch's generator, a schedule) and saves
every few steps. It is killed with SIGKILL at random times and started again until it has done all steps. Checked are: every
file that bears a checkpoint's name can be read, the resumed run starts at the newest one, weights and states have the bits of
an uninterrupted run after every step (a checksum of each step is logged), and the final weights are equal. Every second run
keeps its states in a scratch file (fusedopt.offload). Each attempt is a fork of a process that has imported torch.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
import zlib
from pathlib import Path

import torch

import fusedopt
from bench import machine
from bench.run import RESULTS, save
from fusedopt import files

SCHEMA = 1
WIDTH, BATCH = 128, 16
EVERY = 3  # steps between saves
KEEP = 2
KILLS = 4  # of a run at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=90, help="of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--out", type=Path, help="a .json file or a folder; bench/results by default")


# The training script


def _things(folder: Path, offload: bool) -> dict:
    torch.manual_seed(1)
    layers = [torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(WIDTH, WIDTH)]
    model = torch.nn.Sequential(*layers).to(torch.bfloat16)
    opt = fusedopt.AdamW(
        model.parameters(),
        lr=1e-2,
        weight_decay=0.1,
        state_format="int8",
        param_precision="stochastic",
        clip_grad_norm=1.0,
    )
    if offload:
        sizes = [p.numel() for p in model.parameters()]
        fusedopt.offload(opt, folder=folder, memory_limit=3 * 3 * max(sizes))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 200)
    return {"model": model, "optimizer": opt, "scheduler": schedule}


def _checksum(things: dict) -> int:
    total = 0
    for p in things["model"].parameters():
        entry = things["optimizer"].state[p]
        for t in (p.detach(), *(entry[name] for name in sorted(entry))):
            total = zlib.crc32(t.contiguous().view(-1).view(torch.uint8).numpy(), total)
    return total


def train(folder: Path, steps: int, offload: bool) -> None:
    """Resumes from the newest checkpoint in a folder, trains to the end, logs a line for each step."""
    things, start = _things(folder, offload), 0
    newest = fusedopt.latest_checkpoint(folder / "step-0.pt")
    if newest is not None:
        start = fusedopt.load_checkpoint(newest, **things)["step"]
    model, opt = things["model"], things["optimizer"]
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, f"start {start}\n".encode())
    for step in range(start + 1, steps + 1):
        x = torch.randn(BATCH, WIDTH).to(torch.bfloat16)
        opt.zero_grad()
        (model(x) - x.flip(1)).square().mean().backward()
        opt.step()
        things["scheduler"].step()
        os.write(log, f"step {step} {_checksum(things)}\n".encode())
        if step % EVERY == 0:
            os.write(log, b"saving\n")
            fusedopt.save_checkpoint(folder / f"step-{step}.pt", extra={"step": step}, keep=KEEP, **things)
            os.write(log, b"saved\n")
    with files.replacing(folder / "final.pt") as file:
        torch.save(model.state_dict(), file)


# Killing it


def _fork(folder: Path, steps: int, offload: bool) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        train(folder, steps, offload)
        code = 0
    except BaseException as error:
        (folder / "error").write_text(repr(error))
    finally:
        os._exit(code)


def _lines(folder: Path) -> list[list[str]]:
    """The log's complete lines."""
    text = (folder / "log").read_text() if (folder / "log").exists() else ""
    return [line.split() for line in text.split("\n")[:-1]]


def _finish(child: int, folder: Path) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        error = folder / "error"
        raise RuntimeError(f"a run ended with status {status}: {error.read_text() if error.exists() else 'no message'}")


def reference(folder: Path, steps: int, offload: bool) -> dict:
    """An uninterrupted run: its checksums by step, its weights, its duration."""
    folder.mkdir()
    start = time.monotonic()
    _finish(_fork(folder, steps, offload), folder)
    duration = time.monotonic() - start
    sums = {int(line[1]): int(line[2]) for line in _lines(folder) if line[0] == "step"}
    if len(sums) != steps:
        raise RuntimeError(f"the uninterrupted run logged {len(sums)} steps of {steps}")
    return {"sums": sums, "final": torch.load(folder / "final.pt", weights_only=True), "seconds": duration}


def _check_files(folder: Path) -> int:
    """Reads every checkpoint; the newest one's step. Raises where one is not complete."""
    for path in folder.glob("step-*.pt"):
        step = files.read_checkpoint(path)["extra"]["step"]
        if path.name != f"step-{step}.pt":
            raise RuntimeError(f"{path.name} holds step {step}")
    newest = fusedopt.latest_checkpoint(folder / "step-0.pt")
    return 0 if newest is None else int(newest.stem.split("-")[1])


def killed_run(folder: Path, steps: int, offload: bool, expected: dict, rng: random.Random) -> dict:
    """One run with its kills. Raises RuntimeError for whatever does not go on as it should."""
    folder.mkdir()
    record = {
        "offload": offload,
        "kills": 0,
        "kills_while_saving": 0,
        "left_overs": 0,
        "resumed_at": [],
        "lost_steps": [],
    }
    for attempt in range(KILLS + 1):
        wanted = _check_files(folder)
        known = len(_lines(folder))
        child = _fork(folder, steps, offload)
        killed = False
        if attempt < KILLS:
            deadline = time.monotonic() + rng.uniform(0.02, 0.6) * expected["seconds"]
            done = 0
            while not done and time.monotonic() < deadline:
                time.sleep(0.0005)
                done, status = os.waitpid(child, os.WNOHANG)
            if not done:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                killed = os.WIFSIGNALED(status)
            if not killed and status:
                raise RuntimeError(f"a run failed: {(folder / 'error').read_text()}")
        else:
            _finish(child, folder)
        _check_log(folder, known, wanted, expected["sums"], record, killed)
        if killed:
            record["kills"] += 1
            record["left_overs"] += len(list(folder.glob(".*.saving")))
        if (folder / "final.pt").exists():
            break
    final = torch.load(folder / "final.pt", weights_only=True)
    for name, weight in expected["final"].items():
        if not torch.equal(weight.view(torch.int16), final[name].view(torch.int16)):
            raise RuntimeError(f"{name} differs from the uninterrupted run")
    return record


def _check_log(folder: Path, known: int, wanted: int, sums: dict, record: dict, killed: bool) -> None:
    lines = _lines(folder)[known:]
    last = wanted
    for line in lines:
        if line[0] == "start" and int(line[1]) != wanted:
            raise RuntimeError(f"resumed at step {line[1]}, the last complete checkpoint is of step {wanted}")
        if line[0] == "step":
            last = int(line[1])
            if int(line[2]) != sums[last]:
                raise RuntimeError(f"after step {last} weights or states differ from those of the uninterrupted run")
    if lines and lines[0][0] == "start" and record["kills"]:
        record["resumed_at"].append(wanted)
    if killed:
        record["lost_steps"].append(last - _check_files(folder))
        record["kills_while_saving"] += bool(lines) and lines[-1][0] == "saving"


def measure(runs: int, steps: int, seed: int, show=print) -> dict:
    """The JSON document; "failures" says which runs did not go on as they should."""
    torch.set_num_threads(1)  # before any fork: a child has none of its parent's threads
    rng = random.Random(seed)
    records, failures = [], []
    with tempfile.TemporaryDirectory() as home:
        train(Path(home), EVERY, False)  # imports what a first step and a first save import
        expected = {
            offload: reference(Path(home) / f"reference-{offload}", steps, offload) for offload in (False, True)
        }
        for run in range(runs):
            folder, offload = Path(home) / f"run-{run}", run % 2 == 1
            try:
                records.append(killed_run(folder, steps, offload, expected[offload], rng))
            except Exception as error:
                failures.append({"run": run, "offload": offload, "error": f"{type(error).__name__}: {error}"})
                show(f"run {run}: {failures[-1]['error']}")
            shutil.rmtree(folder)
    lost = [n for r in records for n in r["lost_steps"]]
    return {
        "schema": SCHEMA, "kind": "kill-resume", "machine": machine.stamp(torch.device("cpu")),
        "settings": {"runs": runs, "steps": steps, "every": EVERY, "keep": KEEP, "seed": seed, "kills_at_most": KILLS},
        "summary": {
            "runs": runs, "equal_to_uninterrupted": len(records), "kills": sum(r["kills"] for r in records),
            "kills_while_saving": sum(r["kills_while_saving"] for r in records),
            "kills_with_left_over_files": sum(r["left_overs"] for r in records),
            "resumed": sum(len(r["resumed_at"]) for r in records), "most_steps_lost": max(lost, default=0),
            "seconds_uninterrupted": statistics.median(e["seconds"] for e in expected.values()),
        },
        "failures": failures, "runs": records,
    }  # fmt: skip


def main(args: argparse.Namespace) -> int:
    document = measure(args.runs, args.steps, args.seed, show=lambda text: print(text, flush=True))
    path = args.out or RESULTS
    if path.suffix != ".json":
        path = path / f"kill-resume-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}.json"
    save(document, path)
    print("\n".join(f"{key}: {value}" for key, value in document["summary"].items()))
    print(f"written: {path}")
    return 1 if document["failures"] else 0
