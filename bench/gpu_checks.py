"""Checks of a device at run time: kernels a step really starts, no waiting for the device, replay from a CUDA graph.

`python -m bench.gpu_checks launches|graph --device cuda --out FILE.json`. On a CPU the same code counts the launches
that backends are asked for, and replays by stepping.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import torch

import fusedopt
from bench import cases, gates
from fusedopt.backends.select import get_backend

REPLAYS = 5
WARM_UP = 3


def kernels_of_step(opt, device: torch.device) -> list[str]:
    """Names of the kernels one step starts on the device (copies and fills are not kernels), by torch's profiler.

    On a CPU: the phases the backends are asked for. Raises RuntimeError where the profiler sees no device activity.
    """
    if device.type == "cpu":
        with contextlib.ExitStack() as stack:
            names = {bucket["backend"] for bucket in opt.plan().buckets}
            calls = [stack.enter_context(gates.counted(get_backend(name))) for name in names]
            opt.step()
        return [phase.name.lower() for part in calls for phase in part]
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        opt.step()
        torch.cuda.synchronize(device)
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if not on_device:
        raise RuntimeError("the profiler saw no device activity: CUPTI is missing or may not be used here")
    return [name for name in on_device if not name.startswith(("Memcpy", "Memset"))]


@contextlib.contextmanager
def no_synchronisation(device: torch.device):
    """Within the context torch raises where the host would wait for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class Replay:
    """A captured step of an optimizer (capturable=True, warmed up, gradients at fixed addresses): call it to step."""

    def __init__(self, opt, device: torch.device):
        self.opt, self.device = opt, device
        if device.type == "cuda":
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                opt.step()

    def __call__(self) -> None:
        if self.device.type == "cuda":
            self.graph.replay()
        else:
            self.opt.step()


def warm_up(opt, device: torch.device, steps: int = WARM_UP) -> None:
    """Eager steps, on a side stream as capture wants it."""
    if device.type != "cuda":
        for _ in range(steps):
            opt.step()
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(steps):
            opt.step()
    torch.cuda.current_stream(device).wait_stream(stream)


def able(device: torch.device) -> list[str]:
    """Backends that can step tensors of the device."""
    return [name for name, why in gates.available_backends(device).items() if why is None]


def optimizer(backend: str, rule: str, device, elements: int, dtype=torch.float32, **options):
    shapes = cases.select(["llama2_7b"])[0].shrunk(elements).shapes
    groups = gates.model(shapes, dtype, device)
    return fusedopt.create(rule, groups, lr=1e-3, backend=backend, **{**gates.OPTIONS.get(rule, {}), **options})


def launches(device: torch.device, elements: int) -> list[dict]:
    """Kernels per step of 291 tensors in two groups, per backend and rule, against the plan; and that nothing waits."""
    rows = []
    for backend in able(device):
        for rule, fused in gates.LAUNCHES.items():
            for clip in gates.CLIPS:
                row = {"what": f"{backend} {rule}{' clip' if clip else ''}", "expected": fused + (clip is not None)}
                try:
                    opt = optimizer(backend, rule, device, elements, clip_grad_norm=clip)
                    for _ in range(2):
                        opt.step()
                    with no_synchronisation(device):
                        opt.step()
                    names = kernels_of_step(opt, device)
                    row |= {"found": len(names), "kernels": names, "ok": len(names) == row["expected"]}
                except Exception as error:  # one backend's failure must not hide the others
                    row |= {"found": None, "error": f"{type(error).__name__}: {error}", "ok": False}
                rows.append(row)
    return rows


def graph(device: torch.device, elements: int) -> list[dict]:
    """Replayed against eager steps: equal bits, and microseconds of host time of both."""
    rows = []
    for backend in able(device):
        for rule in gates.LAUNCHES:
            row = {"what": f"{backend} {rule} int8, stochastic bf16, replayed"}
            try:
                pair = [
                    optimizer(backend, rule, device, elements, torch.bfloat16, capturable=True, state_format="int8",
                              param_precision="stochastic", min_quantized_numel=0)
                    for _ in range(2)
                ]  # fmt: skip
                row |= _replayed(*pair, device)
            except Exception as error:
                row |= {"error": f"{type(error).__name__}: {error}", "ok": False}
            rows.append(row)
    return rows


def _replayed(eager, captured, device: torch.device) -> dict:
    def timed(step) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(REPLAYS):
            step()
        return 1e6 * (time.perf_counter() - start) / REPLAYS

    warm_up(captured, device)
    replay = Replay(captured, device)
    replay_us = timed(replay)
    warm_up(eager, device)
    eager_us = timed(eager.step)
    ours = [p for group in captured.param_groups for p in group["params"]]
    theirs = [p for group in eager.param_groups for p in group["params"]]
    differing = sum(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    steps = {float(entry["step"]) for entry in captured.state.values()}
    good = differing == 0 and steps == {float(WARM_UP + REPLAYS)}
    return {"differing_tensors": differing, "steps": sorted(steps), "eager_host_us": eager_us,
            "replay_host_us": replay_us, "ok": good}  # fmt: skip


CHECKS = {"launches": launches, "graph": graph}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_checks", description=__doc__)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    rows = CHECKS[args.check](torch.device(args.device), args.elements)
    for row in rows:
        rest = {k: v for k, v in row.items() if k not in ("what", "ok")}
        print(f"{'ok  ' if row['ok'] else 'FAIL'} {row['what']}: {rest}")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
