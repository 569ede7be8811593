"""Expected time of a step on a GPU from what can be known without one: bytes and launches as planned, and the compiled kernels.

For each launch the time that each limit alone would leave it: memory (its bytes at the achievable bandwidth), latency (bytes
that the programs of an SM have in flight), and the issue slots and units that its instructions take; it takes the longest of
them, and `launch` on top. A program loads a tile, works on it and stores it; meanwhile other programs of the SM load. Not
modelled: the end of the grid, caches, the format switches of the CUDA kernels, and how limits add up where two are near.
The result is a prediction and says so. Measured times of `bench gpu` stand in a column of their own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import torch

from bench import cases, machine, providers, run
from bench.gpu_table import GPUS, Gpu
from fusedopt.abi import Phase
from fusedopt.cli.table import render
from fusedopt.explain import bytes_per_step

BACKENDS = ("cuda", "triton")
CASES = ("gpt2_124m", "gpt2_124m:bf16", "llama2_7b:bf16")
THREADS, TILE = 256, 2048  # of a program; elements that it works on in a round
PLANNED = 1 << 20  # elements that a case is shrunk to for its plan
WARPS, ALLOCATED, RESERVED = (
    8,
    256,
    1024,
)  # of a program; registers are given to a warp in pieces of 256; shared bytes kept back
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Kernel:
    """A compiled step kernel. registers: of a thread; shared: bytes of a program; read: bytes that a thread has loaded of its 8
    elements before it uses them; instructions and units: of a thread in a round."""

    registers: int
    shared: int
    read: int
    instructions: int
    units: dict[str, int]


@dataclass(frozen=True)
class Launch:
    """rule, formats, precision, dtype and phase name the kernel; elements and bytes are those of the whole model."""

    rule: str
    formats: tuple[str, ...]
    precision: str
    dtype: torch.dtype
    phase: Phase
    elements: int
    bytes: float


def resident(gpu: Gpu, registers: int, shared: int) -> int:
    """Programs of 256 threads that an SM holds at once."""
    per_warp = -(-32 * registers // ALLOCATED) * ALLOCATED
    warps = gpu.registers // 4 // per_warp * 4  # each quarter of an SM has its own registers
    return min(warps // WARPS, gpu.threads // THREADS, gpu.shared // (shared + RESERVED))


def in_flight(gpu: Gpu, kernel: Kernel) -> int:
    """Bytes that an SM has under way while all its programs wait for their loads."""
    return resident(gpu, kernel.registers, kernel.shared) * THREADS * kernel.read


def limits(gpu: Gpu, kernel: Kernel, elements: int, nbytes: float) -> dict[str, float]:
    """Seconds that each limit alone would leave a launch."""
    rounds = elements / TILE / gpu.sms  # of each SM
    cycles = {"issue": kernel.instructions / gpu.lanes["issue"]}
    cycles |= {unit: count / gpu.lanes[unit] for unit, count in kernel.units.items()}
    work = THREADS * cycles["issue"] / gpu.clock  # of one program in a round, alone on its SM
    out = {"memory": nbytes / gpu.achievable}
    out["latency"] = rounds * (gpu.latency + work) / resident(gpu, kernel.registers, kernel.shared)
    return out | {name: rounds * THREADS * count / gpu.clock for name, count in cycles.items()}


def predict(gpu: Gpu, launches: list[tuple[Launch, Kernel]]) -> dict:
    """The time of a step, what binds it, and the time of the strongest limit of another kind, in milliseconds."""
    total: dict[str, float] = {"launches": gpu.launch * len(launches)}
    seconds = total["launches"]
    for launch, kernel in launches:
        alone = limits(gpu, kernel, launch.elements, launch.bytes)
        seconds += max(alone.values())
        for name, value in alone.items():
            total[name] = total.get(name, 0.0) + value
    first, second, *_ = sorted(total, key=total.__getitem__, reverse=True)
    ms = {name: 1e3 * value for name, value in total.items()}
    return {"predicted_ms": 1e3 * seconds, "limit": first, "next": second, "limits_ms": ms}


# Launches as planned


def planned(provider: providers.Provider, case: cases.Case) -> list[Launch]:
    """The launches of a step with the bytes of the whole model, from the plan of the same tensors scaled down."""
    small_ones = [cases.math.prod(shape) < providers.SMALL for shape in case.shapes]
    shrunk = case.shrunk(PLANNED)
    sizes = [cases.math.prod(shape) for shape in shrunk.shapes]
    below = max((n for n, small in zip(sizes, small_ones, strict=True) if small), default=0) + 1
    if any(n < below for n, small in zip(sizes, small_ones, strict=True) if not small):
        raise ValueError(f"{case.name}: scaled down, large tensors are no larger than small ones")
    twin = providers.PROVIDERS[provider.name.replace(f"-{provider.backend}/", "-reference/")]
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=case.param_dtype)) for shape in shrunk.shapes]
    for p in params:
        p.grad = torch.zeros_like(p, dtype=case.grad_dtype)
    opt = twin.make(params)
    for group in opt.param_groups:
        group["min_quantized_numel"] = below
    out = []
    report = opt.plan()
    for device in report._plan.devices:
        for bucket in device.buckets:
            positions = [slot.position for slot in bucket.slots]
            elements = sum(cases.math.prod(case.shapes[i]) for i in positions)
            scaled = sum(sizes[i] for i in positions)
            for phase in bucket.works:
                if phase == Phase.NORM and bucket not in device.normed:
                    continue
                moved = bytes_per_step(bucket, phase) * elements / scaled
                key = bucket.key
                out.append(Launch(key.rule, key.formats, key.precision, key.param_dtype, phase, elements, moved))
    return out


# Kernels as compiled


@cache
def missing(backend: str) -> str | None:
    """None, or why the kernels of a backend cannot be compiled here."""
    if backend == "cuda":
        return importlib.import_module("bench.gates_cuda").missing()
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set: unset it"
    try:
        importlib.import_module("triton")
    except ImportError:
        return "triton is not installed"
    return None


def compiled(backend: str, arch: str, wanted: Iterable[Launch]) -> dict[tuple, Kernel]:
    """The kernels of launches by `key`."""
    module = importlib.import_module("bench.gates_triton" if backend == "triton" else "bench.gates_cuda_modes")
    found = {}
    if backend == "triton":
        names = {key(launch): module.Case(*_case(launch)) for launch in wanted}
        chosen = tuple(dict.fromkeys(names.values()))
        rows = {row["kernel"]: row for row in module.resources((arch,), chosen)}
        for name, case in names.items():
            row = rows[str(case)]
            found[name] = Kernel(row["registers"], row["shared"], *_loop(row["loop"]))
        return found
    names = {key(launch): _mode(module, launch) for launch in wanted}
    rows = {row["mode"]: row for row in module.compiled((arch,), tuple(sorted(set(names.values()))))}
    for name, mode in names.items():
        row = rows[mode]
        found[name] = Kernel(row["in_use"]["registers"], row["in_use"]["shared"], *_loop(row["loop"]))
    return found


def _loop(loop: dict) -> tuple[int, int, dict[str, int]]:
    return loop["read"], loop["instructions"], loop["units"]


def key(launch: Launch) -> tuple:
    return launch.rule, launch.formats, launch.precision, launch.dtype, launch.phase


def _case(launch: Launch) -> tuple:
    formats = launch.formats if launch.formats else "fp32"
    same = set(formats)
    formats = same.pop() if len(same) == 1 else formats
    return launch.rule, formats, launch.dtype, launch.dtype, launch.precision, launch.phase


def _mode(module, launch: Launch):
    form = launch.formats[0] if launch.formats else "fp32"
    return module.Mode(form, launch.precision, launch.rule, SHORT[launch.dtype], launch.phase == Phase.PROBE)


# The document


def select(globs: list[str] | None) -> list[providers.Provider]:
    """Our providers of GPU backends. Raises ValueError for a glob that matches none."""
    ours = [p for p in providers.PROVIDERS.values() if p.backend in BACKENDS]
    chosen = []
    for glob in globs or ["*"]:
        found = [p for p in ours if fnmatchcase(p.name, glob)]
        if not found:
            raise ValueError(f"no provider matches {glob!r}; they are: {', '.join(p.name for p in ours)}")
        chosen += found
    return list(dict.fromkeys(chosen))


def document(gpu: Gpu, chosen_cases: list[cases.Case], chosen: list[providers.Provider]) -> dict:
    left_out = {name: why for name in BACKENDS if (why := missing(name)) is not None}
    steps = {
        (case, provider): planned(provider, case)
        for case in chosen_cases
        for provider in chosen
        if case.param_dtype in provider.dtypes and provider.backend not in left_out
    }
    kernels = {}
    for backend in BACKENDS:
        wanted = [launch for (_, p), launches in steps.items() if p.backend == backend for launch in launches]
        kernels[backend] = compiled(backend, gpu.arch, wanted) if wanted else {}
    rows = []
    for (case, provider), launches in steps.items():
        pairs = [(launch, kernels[provider.backend][key(launch)]) for launch in launches]
        largest, kernel = max(pairs, key=lambda pair: pair[0].bytes)
        rows.append(
            {
                "case": case.name,
                "provider": provider.name,
                "rule": provider.rule,
                "launches": len(pairs),
                "bytes_per_step": sum(launch.bytes for launch in launches),
                "bytes_per_parameter": sum(launch.bytes for launch in launches) / case.elements,
                "registers": kernel.registers,
                "programs_per_sm": resident(gpu, kernel.registers, kernel.shared),
                "bytes_in_flight_per_sm": in_flight(gpu, kernel),
                "instructions_per_parameter": THREADS * kernel.instructions / TILE,
                **predict(gpu, pairs),
            }
        )
    return {
        "schema": run.SCHEMA, "kind": "prediction", "gpu": asdict(gpu), "machine": machine.stamp(torch.device("cpu")),
        "left_out": left_out, "rows": rows,
    }  # fmt: skip


# What was measured


def measured(gpu: Gpu, paths: Iterable[Path]) -> dict[tuple[str, str], float]:
    """Median milliseconds by (case, provider) in results of `bench run` on this GPU; files of other machines say nothing."""
    found = {}
    for path in paths:
        try:
            content = run.load(path)
        except (OSError, ValueError):
            continue
        if gpu.model not in content["machine"].get("gpu", {}).get("name", ""):
            continue
        for case in content["cases"]:
            for result in case["results"]:
                if result["status"] == "ok":
                    found[case["case"], result["provider"]] = result["ms"]["median"]
    return found


def result_files(folders: list[Path] | None) -> list[Path]:
    """Every JSON file of the folders given, or of bench/results and its folders of `bench gpu`."""
    folders = folders or [run.RESULTS]
    return [path for folder in folders for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])]


def table(content: dict, times: dict[tuple[str, str], float]) -> str:
    """Each case as text. The column "measured ms" is empty where nothing was measured on this GPU."""
    gpu = Gpu(**content["gpu"])
    lines = [
        f"PREDICTED for {gpu.model}: {gpu.sms} SMs at {gpu.clock / 1e9:.2f} GHz, {gpu.bandwidth / 1e12:.2f} TB/s of which "
        f"{gpu.share:.0%} are taken as achievable, {gpu.latency * 1e9:.0f} ns of latency, {gpu.launch * 1e6:.0f} us a launch",
        *(f"not compiled, {backend}: {why}" for backend, why in content["left_out"].items()),
    ]
    heads = "provider,B/param,launches,registers,programs/SM,KB in flight/SM,instr/param,predicted ms,limit,next,measured ms"
    for name in dict.fromkeys(row["case"] for row in content["rows"]):
        cells = []
        for row in (row for row in content["rows"] if row["case"] == name):
            found = times.get((name, row["provider"]))
            second = f"{row['next']} {row['limits_ms'][row['next']] / row['limits_ms'][row['limit']]:.0%}"
            numbers = [f"{row['bytes_per_parameter']:.2f}", row["launches"], row["registers"], row["programs_per_sm"]]
            numbers += [f"{row['bytes_in_flight_per_sm'] / 1e3:.1f}", f"{row['instructions_per_parameter']:.1f}"]
            numbers += [f"{row['predicted_ms']:.3f}", row["limit"], second, "-" if found is None else f"{found:.3f}"]
            cells.append([row["provider"], *map(str, numbers)])
        lines += ["", name, render(heads.split(","), cells)]
    return "\n".join(lines)


def load(path: Path) -> dict:
    """A file of this command. Raises ValueError where it is not one."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or (content.get("kind"), content.get("schema")) != ("prediction", run.SCHEMA):
        raise ValueError(f"{path.name} is not a result of `python -m bench predict` with schema {run.SCHEMA}")
    return content


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", choices=GPUS, required=True)
    parser.add_argument("--case", action="append", metavar="GLOB", help=f"NAME[@LAYERS][:DTYPE]; {', '.join(CASES)}")
    parser.add_argument("--provider", action="append", metavar="GLOB", help="may be repeated; all of ours by default")
    parser.add_argument(
        "--measured", action="append", type=Path, metavar="DIR", help="results of `bench gpu`; bench/results by default"
    )
    parser.add_argument("--out", type=Path, help="a .json file; bench/results/prediction-GPU.json by default")


def main(args: argparse.Namespace) -> int:
    gpu = GPUS[args.gpu]
    try:
        chosen = select(args.provider)
        chosen_cases = cases.select(args.case or CASES)
    except ValueError as error:
        print(f"bench predict: {error}")
        return 2
    content = document(gpu, chosen_cases, chosen)
    print(table(content, measured(gpu, result_files(args.measured))))
    if not content["rows"]:
        print("bench predict: no kernel could be compiled")
        return 2
    path = args.out or run.RESULTS / f"prediction-{gpu.name}.json"
    run.save(content, path)
    print(f"written: {path}")
    return 0
