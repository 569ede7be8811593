"""Offloaded AdamW on CPU tensors: steps against ordinary ones, steps from a file against that file's bandwidth, memory.

Parts, each a list of records in the result: `memory` (states in host memory: the time of a step relative to an ordinary one of
the same round) and `file` (states in a scratch file, read and written by the pipeline, or stepped where they are mapped).
A file is measured twice: `cached`, where its pages are in memory and nothing waits for the disk, and `disk`, where they are
dropped before a step and brought to the disk within its time. `io` is the time of the same reads and writes without a step,
by the same two threads; a perfect overlap takes the longer one of `io` and the ordinary step.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import mmap
import os
import tempfile
import time
from pathlib import Path

import torch

import fusedopt
from bench import machine
from bench.run import RESULTS, quartiles, save
from fusedopt.offloading import staging_bytes
from fusedopt.offloading.storage import ScratchFile, lay_out

SCHEMA = 1
PARTS = ("memory", "file")
KINDS = {
    "fp32": (torch.float32, {}),
    "bf16 + int8": (torch.bfloat16, {"state_format": "int8", "param_precision": "stochastic"}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; all by default")
    parser.add_argument("--rounds", type=int, help="of interleaved measurements: 9, with --quick 2")
    parser.add_argument("--folder", type=Path, help="of the scratch file; by default the system's for temporary files")
    parser.add_argument("--quick", action="store_true", help="small tensors, few rounds: to try the tool")
    parser.add_argument("--out", type=Path, help="a .json file or a folder; bench/results by default")


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def optimizer(kind: str, count: int, numel: int):
    """An optimizer over `count` tensors that have gradients, before its first step."""
    dtype, options = KINDS[kind]
    gen = torch.Generator().manual_seed(0)
    params = []
    for _ in range(count):
        p = torch.nn.Parameter(torch.randn(numel, generator=gen).to(dtype))
        p.grad = torch.randn(numel, generator=gen).to(dtype)
        params.append(p)
    return fusedopt.AdamW(params, **options)


def mapped(opt, folder: Path) -> tuple[ScratchFile, list]:
    """Puts the states of an optimizer into a file, of which they are mapped tensors, as a simpler design would step them.
    Returns the file and its segments."""
    opt.step()
    file, segments = ScratchFile(str(folder)), []
    for p, entry in opt.state.items():
        places, nbytes = lay_out(entry, 0)
        segment = file.segment(nbytes)
        for place in places:
            segment.put(place, entry[place.name])
        opt.state[p] = entry | {place.name: segment.tensor(place) for place in places}
        segments.append(segment)
    return file, segments


def drop(file: ScratchFile, segments: list) -> None:
    """Brings a file to the disk and its pages out of memory, first of all those that are mapped."""
    for segment in segments:
        segment._buffer.madvise(mmap.MADV_DONTNEED)
    os.fsync(file.descriptor)
    os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def moves(opt) -> None:
    """The pipeline of a step that steps nothing."""
    engine = opt._offload
    engine._pipeline.run([c for c in engine.chunks if c.live], lambda chunk: None)


def memory_part(count: int, numel: int, rounds: int, limit: int) -> list[dict]:
    records = []
    for kind in KINDS:
        opts = {name: optimizer(kind, count, numel) for name in ("ordinary", "step_on cpu", "step_on device")}
        fusedopt.offload(opts["step_on cpu"])
        fusedopt.offload(opts["step_on device"], step_on="device", memory_limit=limit)
        times = {name: [] for name in opts}
        for opt in opts.values():
            opt.step()
        for index in range(rounds):
            for name in list(opts)[:: 1 if index % 2 else -1]:
                times[name].append(seconds(opts[name].step))
        for name in list(opts)[1:]:
            ratio = quartiles([a / b for a, b in zip(times[name], times["ordinary"], strict=True)])
            records.append({
                "kind": kind, "name": name, "state_bytes": fusedopt.state_bytes(opts[name]),
                "staging_bytes": sum(staging_bytes(opts[name])[k] for k in ("host_peak", "device_peak")),
                "seconds": quartiles(times[name]), "ordinary_seconds": quartiles(times["ordinary"]), "ratio": ratio,
            })  # fmt: skip
        del opts
        gc.collect()
    return records


def file_part(count: int, numel: int, rounds: int, limit: int, folder: Path) -> list[dict]:
    records = []
    for kind in KINDS:
        plain, staged, direct = (optimizer(kind, count, numel) for _ in range(3))
        plain.step()
        fusedopt.offload(staged, folder=folder, memory_limit=limit)
        rises = {}
        with machine.PeakMemory(torch.device("cpu")) as peak:
            for _ in range(2):
                staged.step()
        rises["staged"] = peak.bytes
        file, segments = mapped(direct, folder)
        gc.collect()
        with machine.PeakMemory(torch.device("cpu")) as peak:
            direct.step()
        rises["mapped"] = peak.bytes
        own = staged._offload._file, [chunk.segment for chunk in staged._offload.chunks]
        sources = {"staged": (staged.step, *own), "mapped": (direct.step, file, segments),
                   "io": (lambda opt=staged: moves(opt), *own)}  # fmt: skip
        for state in ("cached", "disk"):
            times: dict[str, list[float]] = {name: [] for name in ("ordinary", *sources)}
            for index in range(rounds):
                times["ordinary"].append(seconds(plain.step))
                for name in list(sources)[:: 1 if index % 2 else -1]:
                    work, its_file, parts = sources[name]
                    if state == "disk":
                        drop(its_file, parts)

                    def whole(work=work, its_file=its_file, state=state):
                        work()
                        if state == "disk":
                            os.fsync(its_file.descriptor)

                    times[name].append(seconds(whole))
            pairs = list(zip(times["staged"], times["io"], times["ordinary"], times["mapped"], strict=True))
            moved = 2 * fusedopt.state_bytes(staged)
            records.append({
                "kind": kind, "pages": state, "state_bytes": fusedopt.state_bytes(staged), "memory_limit": limit,
                "staging_bytes": staging_bytes(staged)["host_peak"],
                "resident_rise_staged_bytes": rises["staged"], "resident_rise_mapped_bytes": rises["mapped"],
                "io_bytes_per_second": quartiles([moved / t for t in times["io"]]),
                **{f"{name}_seconds": quartiles(values) for name, values in times.items()},
                "step_to_io": quartiles([s / io for s, io, *_ in pairs]),
                "step_to_perfect_overlap": quartiles([s / max(io, p) for s, io, p, _ in pairs]),
                "mapped_to_staged": quartiles([m / s for s, _, _, m in pairs]),
            })  # fmt: skip
        del plain, staged, direct, file, segments, own, sources
        gc.collect()
    return records


def measure(parts, quick: bool, rounds: int, folder: Path, show=print) -> dict:
    """The JSON document. show(text) gets each part's table as it is done."""
    count, numel = (24, 20_000) if quick else (24, 2 << 20)
    limit = count * numel * 8 // 4  # of fp32 states, a quarter
    document = {
        "schema": SCHEMA, "kind": "offload", "machine": machine.stamp(torch.device("cpu")),
        "settings": {"rounds": rounds, "quick": quick, "tensors": count, "numel": numel, "memory_limit": limit}, "parts": {},
    }  # fmt: skip
    work = {
        "memory": lambda: memory_part(count, numel, rounds, limit),
        "file": lambda: file_part(count, numel, rounds, limit, folder),
    }
    for part in parts:
        document["parts"][part] = work[part]()
        gc.collect()
        show(table(part, document["parts"][part]))
    return document


def _cell(value) -> str:
    if isinstance(value, dict):
        return f"{value['median']:.4g} ({value['q1']:.4g}-{value['q3']:.4g})"
    return "-" if value is None else str(value)


def table(part: str, records: list[dict]) -> str:
    """A part as text: a block of lines for every record."""
    return "\n".join([part, *("\n".join(f"  {k}: {_cell(v)}" for k, v in r.items()) + "\n" for r in records)])


def main(args: argparse.Namespace) -> int:
    rounds, folder = args.rounds or (2 if args.quick else 9), args.folder or Path(tempfile.gettempdir())
    document = measure(args.part or PARTS, args.quick, rounds, folder, show=lambda text: print(text, flush=True))
    path = args.out or RESULTS
    if path.suffix != ".json":
        path = path / f"offload-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}-cpu.json"
    save(document, path)
    print(f"written: {path}")
    return 0
