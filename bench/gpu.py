"""Everything that needs a GPU in one command under 9 minutes: build, test, check, measure, plot, demo; one folder.

Each part is a process with its own time limit and log, and a failed part does not stop the rest. A second call with the
same folder runs what is missing or failed. --dry-run takes tiny sizes on the CPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import machine, run

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 525  # seconds of all parts together
PROJECTED_TESTS = ("test_gpu_matrix.py", "test_gpu_projected.py")
SHORTEST = 5  # seconds left below which no further part starts


@dataclass(frozen=True)
class Part:
    """commands(folder, dry) -> command lines run one after the other within `limit` seconds."""

    name: str
    limit: int
    commands: Callable[[Path, bool], list[list[str]]]


def python(*arguments) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def build(folder: Path, dry: bool) -> list[list[str]]:
    if dry:  # the build machinery without compilers, away from the tree
        return [python("setup.py", "build_ext", "--build-lib", tempfile.gettempdir())]
    return [python("setup.py", "build_ext", "--inplace")]


def pytest(*arguments, workers: int = 0) -> list[str]:
    parallel = ["-n", workers] if workers and importlib.util.find_spec("xdist") else []
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", *parallel, *arguments)


def gpu_tests(folder: Path, dry: bool) -> list[list[str]]:
    others = [f"--ignore=tests/{name}" for name in PROJECTED_TESTS]
    return [pytest("tests/test_gpu.py", "-k", "launches or replay") if dry else pytest("-m", "gpu", "tests", *others)]


def projected_tests(folder: Path, dry: bool) -> list[list[str]]:
    """Most of their time compiles kernels, which each process does for itself."""
    files = [f"tests/{name}" for name in PROJECTED_TESTS]
    return [pytest(files[0], "-k", "found_inf and cpu") if dry else pytest("-m", "gpu", *files, workers=8)]


def kernel_tests(folder: Path, dry: bool) -> list[list[str]]:
    """The Triton suite compiled for the device instead of interpreted."""
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_*triton*.py"))
    if not files:
        return []
    return [pytest("--collect-only", *files) if dry else pytest("-m", "not slow", *files, workers=4)]


def doctor(folder: Path, dry: bool) -> list[list[str]]:
    more = ["--no-timing"] if dry else []
    return [python("-m", "fusedopt", "doctor", "--json", folder / "doctor.json", *more)]


def checks(name: str) -> Callable[[Path, bool], list[list[str]]]:
    def commands(folder: Path, dry: bool) -> list[list[str]]:
        small = ["--device", "cpu", "--elements", "20000"] if dry else []
        return [python("-m", "bench.gpu_checks", name, "--out", folder / f"{name}.json", *small)]

    return commands


def measure(folder: Path, dry: bool) -> list[list[str]]:
    """fp32 and bf16 parameters, large, mixed and tiny tensors; rows with +sr give the cost of stochastic rounding."""
    small = []
    specs = ["one_large", "mixed_400", "tiny_1000", "gpt2_124m:bf16", "llama2_7b@8:bf16"]
    rounds = 15
    if dry:
        specs, rounds = ["gpt2_124m:bf16"], 2
        small = "--device cpu --elements 20000 --probe-mb 4 --provider fusedopt-*/adamw/fp32*".split()
    case_options = [option for spec in specs for option in ("--case", spec)]
    return [python("-m", "bench", "run", *case_options, "--rounds", rounds, "--out", folder / "bench.json", *small)]


def lowrank(module: str, *arguments: str, name: str, seconds: int) -> Callable[[Path, bool], list[list[str]]]:
    """A part of gpu_products or gpu_lowrank, which begins nothing new after some seconds and saves as it goes."""

    def commands(folder: Path, dry: bool) -> list[list[str]]:
        small = ["--device", "cpu", "--tiny", "--rounds", "1"] if dry else []
        file = folder / f"{name}.json"
        return [python("-m", f"bench.{module}", *arguments, "--seconds", seconds, "--out", file, *small)]

    return commands


def newton_schulz(folder: Path, dry: bool) -> list[list[str]]:
    small = ["--device", "cpu", "--tiny", "--rounds", "1"] if dry else []
    return [python("-m", "bench.gpu_newton_schulz", "--out", folder / "newton_schulz.json", *small)]


def plot(folder: Path, dry: bool) -> list[list[str]]:
    return [python("-m", "bench", "plot", folder / "bench.json", "--out", folder)]


def demo(folder: Path, dry: bool) -> list[list[str]]:
    small = []
    if dry:
        small = "--device cpu --optim adamw --steps 2 --layers 1 --width 32 --heads 2 --context 16 --batch 2".split()
    return [python("-m", "fusedopt", "demo", "--out", folder / "demo.png", "--json", folder / "demo.json", *small)]


def gates(folder: Path, dry: bool) -> list[list[str]]:
    if dry:
        return [python("-m", "bench", "gates", "--device", "cpu", "--part", "bytes")]
    arch = ["--arch", f"sm_{capability()}"] if capability() else []
    return [python("-m", "bench", "gates", "--device", "cuda", *arch)]


def capability() -> str | None:
    """Such as "90"; None without an NVIDIA GPU."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    return "".join(map(str, torch.cuda.get_device_capability()))


PARTS = (
    Part("build", 170, build),
    Part("doctor", 40, doctor),
    Part("tests", 110, gpu_tests),
    Part("projected_tests", 100, projected_tests),
    Part("launches", 60, checks("launches")),
    Part("graph", 40, checks("graph")),
    Part("measure", 170, measure),
    Part("lowrank_products", 110, lowrank("gpu_products", name="lowrank_products", seconds=80)),
    Part("lowrank_steps", 130, lowrank("gpu_lowrank", "steps", name="lowrank_steps", seconds=80)),
    Part("lowrank_refresh", 45, lowrank("gpu_lowrank", "refresh", name="lowrank_refresh", seconds=25)),
    Part("newton_schulz", 60, newton_schulz),
    Part("plot", 30, plot),
    Part("demo", 90, demo),
    Part("gates", 90, gates),
    Part("kernel_tests", 100, kernel_tests),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder of all results; bench/results/gpu-DATE by default")
    names = [p.name for p in PARTS]
    parser.add_argument("--part", action="append", choices=names, help="only this one; may be repeated")
    parser.add_argument("--fresh", action="store_true", help="run again what is already done in the folder")
    parser.add_argument("--budget", type=int, default=BUDGET, metavar="S", help=f"seconds for all parts ({BUDGET})")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: tests this command, not a GPU")


def environment(dry: bool) -> dict[str, str]:
    """Of the parts: our tree first on the path, the CUDA extension wanted and for the present GPU only."""
    out = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if dry:
        return {
            **out,
            "FUSEDOPT_NATIVE": "0",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "TRITON_INTERPRET": "1",
        }
    out.pop("TRITON_INTERPRET", None)
    if capability():
        out |= {"FUSEDOPT_CUDA": "1", "FUSEDOPT_CUDA_ARCHS": capability()}
    return out


def execute(part: Part, folder: Path, dry: bool, seconds: float) -> dict:
    """Runs a part; returns its record. All it prints goes to FOLDER/PART.log."""
    start, code = time.monotonic(), 0
    commands = part.commands(folder, dry)
    with open(folder / f"{part.name}.log", "w") as log:
        for command in commands:
            left = seconds - (time.monotonic() - start)
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(dry), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(max(1.0, left))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
            if code != 0:
                break
    status = "nothing to run" if not commands else "ok" if code == 0 else "out of time" if code is None else "failed"
    return {"part": part.name, "status": status, "code": code, "seconds": round(time.monotonic() - start, 1)}


def last_line(folder: Path, name: str) -> str:
    """What a part said last, for the summary."""
    lines = [line.strip() for line in (folder / f"{name}.log").read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][-160:] if lines else ""


def summary(records: list[dict]) -> str:
    lines = [f"{'part':14}{'status':16}{'seconds':>8}  last line of its log"]
    lines += [f"{r['part']:14}{r['status']:16}{r['seconds']:8.1f}  {r.get('said', '')}" for r in records]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    dry = args.dry_run
    if not dry and not torch.cuda.is_available():
        print(
            "bench gpu: torch finds no GPU (torch.cuda.is_available() is False). Run it on a machine with a CUDA or "
            "ROCm GPU and a torch build for it, or try the command itself with --dry-run."
        )
        return 2
    started = time.monotonic()
    date = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = (args.out or run.RESULTS / f"gpu-{date}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "summary.json"
    done: dict[str, dict] = {}
    if file.exists():
        before = json.loads(file.read_text())
        done = {r["part"]: r for r in before["parts"]} if before["dry_run"] == dry else {}
    document = {
        "schema": run.SCHEMA, "kind": "gpu", "dry_run": dry, "parts": [],
        "machine": machine.stamp(torch.device("cpu" if dry else "cuda")),
    }  # fmt: skip
    chosen = [p for p in PARTS if not args.part or p.name in args.part]
    for part in chosen:
        if done.get(part.name, {}).get("status") == "ok" and not (args.fresh or args.part):
            print(f"{part.name}: already done", flush=True)
            continue
        left = args.budget - (time.monotonic() - started)
        if left < SHORTEST:
            done[part.name] = {"part": part.name, "status": "no time left", "code": None, "seconds": 0.0}
        else:
            print(f"{part.name} ...", end=" ", flush=True)
            record = execute(part, folder, dry, min(left, part.limit))
            done[part.name] = {**record, "said": last_line(folder, part.name)}
            print(f"{record['status']} ({record['seconds']:.0f} s)", flush=True)
        document["parts"] = [done[p.name] for p in PARTS if p.name in done]
        run.save(document, file)
    print(summary([done[p.name] for p in PARTS if p.name in done]))
    print(f"all of it in {folder}")
    return int(any(done[p.name]["status"] not in ("ok", "nothing to run") for p in chosen))
