"""Shows versions and backends, checks every backend against the fp64 reference and times a step.

For each device and backend: whether it is used, and if not, why. Each available backend steps every rule with every
state format on small tensors. Step times are compared with the time a copy of the same bytes takes.

The exit status is 1 when something is wrong: a backend that differs from the reference or fails, or a native module
that is installed and cannot run. Parts that are not installed are not errors.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import textwrap
from dataclasses import asdict, dataclass, field

import torch

import fusedopt
from fusedopt.backends import select
from fusedopt.backends.base import BucketKey
from fusedopt.cli import write_json
from fusedopt.cli.parity import Outcome, cases, check, settings
from fusedopt.cli.speed import TIMED, Timing, copy_bandwidth, time_step
from fusedopt.cli.table import render

EXTENSIONS = {"cpu": "fusedopt._native_cpu", "cuda": "fusedopt._native_cuda"}


@dataclass
class Standing:
    """A backend on a device. status: "used" (by default), "available", "no" or "broken"."""

    device: str
    backend: str
    status: str
    reason: str = ""


@dataclass
class Diagnosis:
    versions: dict[str, str] = field(default_factory=dict)
    standings: list[Standing] = field(default_factory=list)
    parity: dict[tuple[str, str], list[Outcome]] = field(default_factory=dict)
    bandwidth: dict[str, float] = field(default_factory=dict)
    timings: dict[str, list[Timing]] = field(default_factory=dict)
    untimed: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-timing", action="store_true", help="leave out the step times")
    parser.add_argument("--json", metavar="PATH", help="write everything to a file ('-': standard output)")


def devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        found += [torch.device(accelerator.type, i) for i in range(torch.accelerator.device_count())]
    return found


def _extension(name: str) -> tuple[str, bool]:
    """What is known about a native module, and whether it is installed but cannot be imported."""
    if importlib.util.find_spec(name) is None:
        return "not built", False
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return f"cannot be imported: {error}", True
    isa = getattr(module, "isa", None)
    return "built" if isa is None else f"built; {', '.join(kind for kind, _ in isa())}", False


def versions(out: Diagnosis) -> None:
    from fusedopt.kernels import language

    out.versions = {
        "fusedopt": fusedopt.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "CUDA": torch.version.cuda or "not in this torch",
        "triton": language.missing or language.triton.__version__,
    }
    if torch.version.hip:
        out.versions["ROCm"] = torch.version.hip
    for device in devices():
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            out.versions[str(device)] = f"{torch.cuda.get_device_name(device)}, capability {major}.{minor}"
    for kind, name in EXTENSIONS.items():
        text, broken = _extension(name)
        out.versions[f"native {kind}"] = text
        if broken:
            out.problems.append(f"{name} {text}. Reinstall fusedopt")
    for variable in ("FUSEDOPT_BACKEND", "FUSEDOPT_CPU_ISA", "TRITON_INTERPRET"):
        if variable in os.environ:
            out.versions[variable] = os.environ[variable]


def standings(out: Diagnosis) -> None:
    """Asks every backend about AdamW with fp32 states on every device."""
    asked = os.environ.get("FUSEDOPT_BACKEND")
    if asked and asked not in select.backend_names():
        out.problems.append(f"FUSEDOPT_BACKEND={asked}: known backends are {', '.join(select.backend_names())}")
    for device in devices():
        found = []
        for name in select.backend_names():
            key = BucketKey(device, name, "adam", torch.float32, torch.float32, ("fp32", "fp32"), "nearest", True)
            try:
                backend = select.get_backend(name)
                missing = backend.reason()
                why = missing or backend.supports(key)
            except Exception as error:  # backends promise to give reasons instead
                found.append(Standing(str(device), name, "broken", f"{type(error).__name__}: {error}"))
                continue
            found.append(Standing(str(device), name, "no" if why else "available", why or ""))
            if name == device.type and missing and importlib.util.find_spec(EXTENSIONS[name]) is not None:
                found[-1].status = "broken"
        order = [asked] if asked else select.automatic_order(device)
        first = next((s for name in order for s in found if s.backend == name and s.status == "available"), None)
        if first is not None:
            first.status = "used"
        elif not asked:
            out.problems.append(f"{device}: no backend can step its tensors")
        for s in found:
            if s.status == "broken":
                out.problems.append(f"{s.device}: backend {s.backend} is installed and cannot run: {s.reason}")
        out.standings += found
    if asked in select.backend_names() and not any(s.status == "used" for s in out.standings):
        out.problems.append(f"FUSEDOPT_BACKEND={asked}: that backend cannot run on any device of this machine")


def parity(out: Diagnosis) -> None:
    for s in out.standings:
        if s.status not in ("used", "available"):
            continue
        results = [check(c, s.backend, torch.device(s.device), *pair) for c in cases() for pair in settings()]
        out.parity[s.device, s.backend] = results
        for r in results:
            if not r.ok:
                what = r.failure or f"error {r.error:.3g} times its bound"
                out.problems.append(
                    f"{s.device}: backend {s.backend}, {r.case.label}, {r.params} parameters, {r.states} states: {what}"
                )


def timing(out: Diagnosis) -> None:
    for name in (s.device for s in out.standings if s.status == "used"):
        device = torch.device(name)
        try:
            bandwidth = copy_bandwidth(device)
            out.timings[name] = [time_step(optimizer, device, bandwidth) for optimizer in TIMED]
            out.bandwidth[name] = bandwidth
        except torch.OutOfMemoryError:
            out.untimed[name] = "too little free memory"
        except RuntimeError as error:
            out.problems.append(f"{name}: timing a step failed: {error}")


def diagnose(with_timing: bool = True) -> Diagnosis:
    out = Diagnosis()
    versions(out)
    standings(out)
    parity(out)
    if with_timing:
        timing(out)
    return out


def run(args: argparse.Namespace) -> int:
    out = diagnose(not args.no_timing)
    if args.json:
        write_json(args.json, as_json(out))
    if args.json != "-":
        print(report(out))
    return 1 if out.problems else 0


def as_json(out: Diagnosis) -> dict:
    checks = [
        {"device": device, "backend": backend, "optimizer": r.case.label, "rule": r.case.rule, "params": r.params,
         "states": r.states, "error_share": r.error, "ok": r.ok, "unsupported": r.reason, "failure": r.failure}
        for (device, backend), results in out.parity.items() for r in results
    ]  # fmt: skip
    return {
        "versions": out.versions,
        "backends": [asdict(s) for s in out.standings],
        "parity": checks,
        "copy_bandwidth": out.bandwidth,
        "untimed": out.untimed,
        "steps": {device: [asdict(t) for t in times] for device, times in out.timings.items()},
        "problems": out.problems,
    }


def report(out: Diagnosis) -> str:
    width = max(map(len, out.versions))
    parts = ["\n".join(f"{name:<{width}}  {text}" for name, text in out.versions.items())]
    rows = []
    for s in out.standings:
        first, *more = textwrap.wrap(s.reason, 80) or [""]
        rows += [(s.device, s.backend, s.status, first), *(("", "", "", line) for line in more)]
    parts.append("Backends\n" + render(("device", "backend", "status", "reason"), rows, left=4))
    parts.append(_parity_text(out))
    for device, times in out.timings.items():
        parts.append(_timing_text(device, out.bandwidth[device], times))
    parts += [f"No step times on {device}: {why}." for device, why in out.untimed.items()]
    if out.problems:
        parts.append(f"Problems: {len(out.problems)}\n" + "\n".join(f"  - {text}" for text in out.problems))
    else:
        parts.append("Everything is right.")
    return "\n\n".join(parts)


def _cell(results: list[Outcome]) -> str:
    bad = [r for r in results if not r.ok]
    if bad:
        worst = max(bad, key=lambda r: (r.failure is not None, r.error))
        return f"FAIL {worst.states}" + ("" if worst.failure else f" {worst.error:.3g}")
    if all(r.reason for r in results):
        return "-"
    partly = " (some not supported)" if any(r.reason for r in results) else ""
    return f"ok {max(r.error for r in results):.2f}{partly}"


def _parity_text(out: Diagnosis) -> str:
    rows = []
    for case in cases():
        cells = [_cell([r for r in results if r.case == case]) for results in out.parity.values()]
        rows.append((case.label, *cells))
    names = [f"{backend} on {device}" for device, backend in out.parity]
    sixteen = sorted({f"{d}".removeprefix("torch.") for d, p, _ in settings() if p != "nearest"})
    formats = ", ".join(f for d, _, f in settings() if d == torch.float32)
    precisions = ", ".join(p for d, p, _ in settings() if d != torch.float32)
    checked = f"float32 parameters with states in {formats};\n {', '.join(sixteen)} parameters kept by {precisions}"
    return (
        f"Parity with the fp64 reference: largest error as a share of its bound, 1.00 at most\n({checked})\n"
        f"{render(('optimizer', *names), rows)}"
    )


def _timing_text(device: str, bandwidth: float, times: list[Timing]) -> str:
    rows = [
        (t.optimizer, t.backend, f"{t.numel / 2**20:.0f} Mi", f"{1e3 * t.seconds:.2f}", f"{1e3 * t.limit:.2f}",
         f"{100 * t.limit / t.seconds:.0f} %")
        for t in times
    ]  # fmt: skip
    headers = ("optimizer", "backend", "parameters", "step ms", "limit ms", "of the limit")
    return (
        f"Step time on {device}, fp32 parameters; limit: its bytes at the copy bandwidth, {bandwidth / 1e9:.1f} GB/s\n"
        + render(headers, rows, left=2)
    )
