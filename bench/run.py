"""Measures cases x providers on the present device: interleaved rounds, ratios to torch fused and to the byte limit.

Every round probes the copy bandwidth, then steps each provider once in rotating order with gradients of other addresses
than before. Ratios are formed within a round and only then summarised, so that a slow spell of a shared machine hits
both sides. share = (bytes a step must move / copy bandwidth of the same round) / time of the step.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import bandwidth, cases, machine, providers

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"
QUICK = ("one_large", "mixed_400", "tiny_1000")
WARM_UP = 3
MAX_SETS = 3  # copies of parameters and gradients to cycle through
CHANGING = ("date", "load_average")  # of the machine's stamp, from one run to the next
FIT = 0.85  # share of the free memory that a case may take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = f"NAME[@LAYERS][:DTYPE], may be repeated; {', '.join(cases.DEFAULT)} (low-rank layers: bench lowrank)"
    parser.add_argument("--case", action="append", metavar="GLOB", help=known)
    parser.add_argument("--provider", action="append", metavar="GLOB", help="may be repeated; baselines always run")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="12, with --quick 5")
    parser.add_argument("--elements", type=int, metavar="N", help="shrink every case to at most N elements")
    parser.add_argument(
        "--probe-mb", type=int, metavar="MB", help="buffer of the bandwidth probes, 64 at least to mean anything"
    )
    parser.add_argument("--quick", action="store_true", help="small cases, few rounds: to try the tool")
    parser.add_argument("--list", action="store_true", help="list cases and providers, measure nothing")
    parser.add_argument("--out", type=Path, help="a .json file or a folder; bench/results by default")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the file of --out: its cases are not measured again (it is written after every case)",
    )


@dataclass
class Contender:
    """A provider with its own copies of the parameters, and what was measured."""

    provider: providers.Provider
    sets: list[tuple[list[torch.nn.Parameter], torch.optim.Optimizer]]
    bytes: float = 0.0
    launches: int | None = None
    extra: int | None = None
    inner: int = 1
    host_estimate: float = 0.0
    seconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


class Arena:
    """One case on one device: gradients, and how a step of an optimizer is timed."""

    def __init__(self, case: cases.Case, device: torch.device, gradient_sets: int):
        self.case, self.device, self.turn = case, device, 0
        generator = torch.Generator(device).manual_seed(1)
        self.gradients = [
            [torch.randn(s, generator=generator, device=device).mul_(1e-3).to(case.grad_dtype) for s in case.shapes]
            for _ in range(gradient_sets)
        ]

    def parameters(self) -> list[torch.nn.Parameter]:
        generator = torch.Generator(self.device).manual_seed(2)
        return [
            torch.nn.Parameter(
                torch.randn(shape, generator=generator, device=self.device).mul_(0.02).to(self.case.param_dtype)
            )
            for shape in self.case.shapes
        ]

    def assign(self, params) -> None:
        self.turn = (self.turn + 1) % len(self.gradients)
        for p, g in zip(params, self.gradients[self.turn], strict=True):
            p.grad = g

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def host_time(self, params, optimizer) -> float:
        """Seconds until step() returns; on a CPU that is the whole step."""
        self.assign(params)
        self.synchronize()
        start = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start

    def device_time(self, params, optimizer, head_start: float) -> float:
        """Seconds the device works on a step, with the host `head_start` seconds ahead, as in a training loop."""
        self.assign(params)
        self.synchronize()
        torch.cuda._sleep(int(min(head_start, 0.05) * 2e9))
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        optimizer.step()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def enter(self, provider: providers.Provider, copies: int) -> Contender:
        """Makes the optimizers, warms them up and notes bytes, launches and peak memory."""
        contender = Contender(provider, [])
        for index in range(copies):
            params = self.parameters()
            optimizer = provider.make(params)
            contender.sets.append((params, optimizer))
            for _ in range(WARM_UP - 1):
                self.host_time(params, optimizer)
            with machine.PeakMemory(self.device) as peak:
                contender.host_estimate = self.host_time(params, optimizer)
            if index == 0:
                contender.extra = peak.bytes
        contender.bytes = provider.step_bytes(self.case, optimizer)
        if provider.backend is not None:
            contender.launches = optimizer.plan().launches
        contender.inner = max(1, min(20, int(4e-3 / max(contender.host_estimate, 1e-6))))
        return contender

    def measure(self, contender: Contender, round_index: int) -> None:
        params, optimizer = contender.sets[round_index % len(contender.sets)]
        host = sorted(self.host_time(params, optimizer) for _ in range(contender.inner))
        contender.host.append(host[len(host) // 2])
        seconds = host
        if self.device.type == "cuda":
            head = 1.5 * contender.host_estimate
            seconds = sorted(self.device_time(params, optimizer, head) for _ in range(contender.inner))
        contender.seconds.append(seconds[len(seconds) // 2])


def quartiles(values: list[float]) -> dict[str, float]:
    t = torch.tensor(values, dtype=torch.float64)
    q1, median, q3 = torch.quantile(t, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"median": median, "q1": q1, "q3": q3}


def gradient_sets(sets: int) -> int:
    """Sets of gradients beside so many sets of parameters: two at least, for other addresses at every step."""
    return max(2, sets)


def working_set(case, members, sets: int) -> float:
    """Bytes that a group of providers holds: parameters and states of each, and the gradients of all."""
    held = sum(case.parameter_bytes + m.state_bytes(case) for m in members)
    return sets * held + gradient_sets(sets) * case.gradient_bytes


def grouping(case, chosen, free: float) -> tuple[list[list], int, dict[str, str]]:
    """Splits providers into groups that fit `free` bytes together, each with the baselines of its members.

    Returns (groups, sets of parameters and states, reasons of those that do not fit even alone).
    """
    if not chosen:
        return [], 1, {}

    def cost(members, sets: int) -> float:
        return working_set(case, members, sets) + max(m.temporary_bytes(case) for m in members)

    for sets in range(MAX_SETS, 0, -1):
        if cost(chosen, sets) <= free:
            return [chosen], sets, {}
    groups: list[list] = []
    reasons: dict[str, str] = {}
    names = {m.name: m for m in chosen}
    for member in chosen:
        beside = list(dict.fromkeys([names.get(providers.baseline(member.rule), member), member]))
        for group in groups:
            union = list(dict.fromkeys([*group, *beside]))
            if cost(union, 1) <= free:
                group[:] = union
                break
        else:
            if cost([member], 1) > free:
                reasons[member.name] = (
                    f"does not fit: needs {cost([member], 1) / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; take fewer "
                    "layers (NAME@LAYERS) or --elements"
                )
            else:
                groups.append(beside if cost(beside, 1) <= free else [member])
    return groups, 1, reasons


def summary(contender: Contender, base: Contender | None, case, copies: list[float], streams: list[float]) -> dict:
    """The JSON record of one provider."""
    seconds = contender.seconds
    out = {
        "provider": contender.provider.name,
        "rule": contender.provider.rule,
        "status": "ok",
        "ms": quartiles([1e3 * s for s in seconds]),
        "host_us_per_tensor": quartiles([1e6 * s / case.tensors for s in contender.host]),
        "bytes_per_step": contender.bytes,
        "bytes_per_parameter": contender.bytes / case.elements,
        "share_of_copy": quartiles([contender.bytes / (c * s) for c, s in zip(copies, seconds, strict=True)]),
        "share_of_stream": quartiles([contender.bytes / (c * s) for c, s in zip(streams, seconds, strict=True)]),
        "ratio": None,
        "extra_bytes": contender.extra,
        "launches": contender.launches,
        "rounds_ms": [round(1e3 * s, 6) for s in seconds],
    }
    if base is not None:
        ratios = [a / b for a, b in zip(seconds, base.seconds, strict=True)]
        out["ratio"] = {"to": base.provider.name, **quartiles(ratios)}
    return out


def run_group(case, device, group, sets, rounds, probe, tick) -> tuple[list[dict], dict]:
    """Measures one group of providers; returns their records and the bandwidths."""
    arena = Arena(case, device, gradient_sets(sets))
    contenders, records = [], []
    for provider in group:
        try:
            contenders.append(arena.enter(provider, sets))
        except Exception as error:  # a rival may fail in any way; the others still run
            records.append(skipped(provider, f"{type(error).__name__}: {str(error).strip() or 'no message'}"))
        tick()
    copies, streams = [], []
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            copies.append(probe.copy())
            streams.append(probe.stream())
            turn = index % max(1, len(contenders))
            for contender in contenders[turn:] + contenders[:turn]:
                arena.measure(contender, index)
            tick()
    finally:
        gc.enable()
    by_name = {c.provider.name: c for c in contenders}
    records += [summary(c, by_name.get(providers.baseline(c.provider.rule)), case, copies, streams) for c in contenders]
    info = {
        "copy_gb_per_s": quartiles([c / 1e9 for c in copies]),
        "stream_gb_per_s": quartiles([s / 1e9 for s in streams]),
        "working_set_bytes": working_set(case, group, sets),
    }
    return records, info


def skipped(provider, reason: str) -> dict:
    return {"provider": provider.name, "rule": provider.rule, "status": "skipped", "reason": reason}


def run_case(case, device, chosen, rounds, probe, tick=lambda: None) -> dict:
    """The JSON record of one case."""
    records, able = [], []
    for provider in chosen:
        reason = provider.why_not(case, device)
        if reason is None:
            able.append(provider)
        else:
            records.append(skipped(provider, reason))
    groups, sets, reasons = grouping(case, able, FIT * machine.available_memory(device))
    records += [skipped(p, reasons[p.name]) for p in able if p.name in reasons]
    infos = []
    for group in groups:
        done, info = run_group(case, device, group, sets, rounds, probe, tick)
        done = [{**r, "group": len(infos)} for r in done]
        known = {r["provider"] for r in records}
        records += [r for r in done if r["provider"] not in known]  # a baseline keeps the figures of its first group
        infos.append(info)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    order = {p.name: i for i, p in enumerate(chosen)}
    return {
        "case": case.name,
        "tensors": case.tensors,
        "elements": case.elements,
        "param_dtype": str(case.param_dtype).removeprefix("torch."),
        "grad_dtype": str(case.grad_dtype).removeprefix("torch."),
        "sets": sets,
        "groups": infos,
        "results": sorted(records, key=lambda r: order[r["provider"]]),
    }


def progress(total: int):
    """A function to call once per unit of work: a tqdm bar where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return lambda: None
    bar = tqdm(total=total, unit="round", leave=False, disable=None)  # None: only on a terminal
    return lambda: bar.update(1) if bar.n + 1 < total else bar.close()


def begin(chosen, device: torch.device, rounds: int, probe_bytes: int, path: Path | None = None) -> dict:
    """A document without cases, or the one at `path` to be gone on with.

    Raises ValueError where that one was measured on another machine, by other code or with other settings.
    """
    settings = {"rounds": rounds, "warm_up": WARM_UP, "probe_bytes": probe_bytes}
    settings["providers"] = [p.name for p in chosen]
    document = {"schema": SCHEMA, "kind": "run", "machine": machine.stamp(device), "settings": settings, "cases": []}
    if path is None or not path.exists():
        return document
    found = load(path)
    old, new = ({**d["machine"], **d["settings"]} for d in (found, document))
    other = [name for name in {**old, **new} if name not in CHANGING and old.get(name) != new.get(name)]
    if other:
        raise ValueError(
            f"{path.name} was measured with another {', '.join(other)}: its cases and new ones do not belong in one file. "
            "Give another --out, or leave out --resume to write it anew."
        )
    return found


def measure(document: dict, chosen_cases, chosen, device: torch.device, show=print, path: Path | None = None) -> dict:
    """Measures the cases that the document does not have, and returns it.

    show(text) gets each case's table as it is done. path: where the document is written after every case.
    """
    known = {record["case"] for record in document["cases"]}
    rounds = document["settings"]["rounds"]
    probe = bandwidth.Probe(device, document["settings"]["probe_bytes"])
    for case in chosen_cases:
        if case.name in known:
            show(f"{case.name}: there already")
            continue
        able = sum(p.why_not(case, device) is None for p in chosen)
        record = run_case(case, device, chosen, rounds, probe, progress(rounds + able))
        document["cases"].append(record)
        if path is not None:
            save(document, path)
        show(table(record, document["machine"]["last_level_cache_bytes"]))
    return document


def table(record: dict, cache: int = 0) -> str:
    """A case as text."""
    size = f"{record['tensors']} tensors, {record['elements'] / 1e6:.2f}M elements"
    lines = [f"{record['case']}: {size}, {record['param_dtype']}"]
    for info in record["groups"]:
        copy, stream = (info[name]["median"] for name in ("copy_gb_per_s", "stream_gb_per_s"))
        size = info["working_set_bytes"]
        note = "; fits in cache, shares of memory bandwidth mean little" if size < 2 * cache else ""
        lines.append(
            f"  copy {copy:.1f} GB/s, in-place stream {stream:.1f} GB/s; working set {size / 1e6:.0f} MB{note}"
        )
    lines.append(
        f"  {'provider':34}{'B/param':>8}{'ms median (quartiles)':>30}{'x baseline':>11}{'of copy':>9}{'of stream':>10}"
        f"{'host us/tensor':>15}{'extra MB':>9}{'launches':>9}"
    )
    for r in record["results"]:
        if r["status"] != "ok":
            continue
        ms, extra = r["ms"], r["extra_bytes"]
        times = f"{ms['median']:.3f} ({ms['q1']:.3f}-{ms['q3']:.3f})"
        ratio = "-" if r["ratio"] is None else f"{r['ratio']['median']:.2f}"
        lines.append(
            f"  {r['provider']:34}{r['bytes_per_parameter']:8.2f}{times:>30}{ratio:>11}"
            f"{r['share_of_copy']['median']:9.0%}{r['share_of_stream']['median']:10.0%}{r['host_us_per_tensor']['median']:15.3f}"
            f"{'-' if extra is None else f'{extra / 1e6:.1f}':>9}{'-' if r['launches'] is None else r['launches']:>9}"
        )
    reasons: dict[str, list[str]] = {}
    for r in record["results"]:
        if r["status"] == "skipped":
            reasons.setdefault(r["reason"], []).append(r["provider"])
    lines += [f"  skipped, {reason}: {', '.join(names)}" for reason, names in reasons.items()]
    return "\n".join(lines)


def output_path(out: Path | None, device: torch.device) -> Path:
    if out is not None and out.suffix == ".json":
        return out
    date = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return (out or RESULTS) / f"run-{date}-{device.type}.json"


def save(document: dict, path: Path) -> None:
    """Whole or not at all: a process killed here leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def load(path: Path) -> dict:
    """A result file. Raises ValueError where it is not one of this schema."""
    document = json.loads(Path(path).read_text())
    if not isinstance(document, dict) or document.get("kind") != "run" or document.get("schema") != SCHEMA:
        raise ValueError(f"{Path(path).name} is not a result of `python -m bench run` with schema {SCHEMA}")
    return document


def main(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    if args.list:
        sizes = [f"{c.name}: {c.tensors} tensors, {c.elements / 1e6:.1f}M" for c in cases.select(["*"])]
        print("cases:\n  " + "\n  ".join(sizes))
        print("providers:\n  " + "\n  ".join(providers.PROVIDERS))
        return 0
    try:
        chosen_cases = cases.select(args.case or (QUICK if args.quick else cases.DEFAULT))
        chosen = providers.select(args.provider, device)
    except ValueError as error:
        print(f"bench run: {error}")
        return 2
    if args.resume and (args.out is None or args.out.suffix != ".json"):
        print("bench run: --resume needs the file: --out FILE.json")
        return 2
    limit = args.elements or (1 << 22 if args.quick else math.inf)
    chosen_cases = [case.shrunk(limit) for case in chosen_cases]
    rounds = args.rounds or (5 if args.quick else 12)
    load = machine.load_average()
    if load is not None and load > 0.5:
        print(
            f"note: load average {load} before the start. Other processes stretch every parallel region to their time "
            "slice, most of all for optimizers that open many; do not quote this run.\n"
        )
    probe = (args.probe_mb or (64 if args.quick else 1024 if device.type == "cuda" else 256)) << 20
    path = output_path(args.out, device)
    try:
        document = begin(chosen, device, rounds, probe, path if args.resume else None)
    except (OSError, ValueError) as error:
        print(f"bench run: {error}")
        return 2
    measure(document, chosen_cases, chosen, device, lambda text: print(text + "\n", flush=True), path)
    print(f"written: {path}")
    return 0
