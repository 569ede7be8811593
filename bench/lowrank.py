"""Low-rank optimizers on the CPU: step times against full-rank ones, refreshes against an SVD, state and extra memory.

Parts, each a list of records in the result: `step` (no refresh inside; interleaved rounds, ratios to torch fused AdamW of the
same round), `refresh` (new basis from a gradient with decaying spectrum), `stagger` (the longest step of a run against its
median), `state` (bytes against the formula of each system), `extra` (how far allocations rise in a step) and `linear` (peak
of allocations in a training step with projected_linear and without).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import math
import sys
import time
import types
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import fusedopt
from bench import machine
from bench.run import RESULTS, quartiles, save
from fusedopt.projections.lowrank import random_matrix, sketch_basis
from fusedopt.projections.subspace import energy, random_basis, refresh_basis, svd_basis

SCHEMA = 1
PARTS = ("step", "refresh", "stagger", "state", "extra", "linear")
CPU = torch.device("cpu")
OPTIONS = {"lr": 1e-4, "weight_decay": 1e-2}
OVERSAMPLE = 8  # columns of the range finder beside the rank's
NEVER = 10**9  # steps between refreshes where none shall fall into the measurement
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; all by default")
    parser.add_argument("--rounds", type=int, help="of interleaved measurements: 9, with --quick 3")
    parser.add_argument("--rank", type=int, help="128, with --quick 8")
    parser.add_argument("--quick", action="store_true", help="small matrices, few rounds: to try the tool")
    parser.add_argument("--out", type=Path, help="a .json file or a folder; bench/results by default")


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def allocated_peak(work, apart=lambda size: False) -> tuple[int, int]:
    """By how many bytes torch's CPU allocations rise during work(), all of them and those of which apart(bytes) is false.
    (The kernel's peak of resident memory is not there under every container.)"""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now, peaks = [0, 0], [0, 0]
    for event in sorted(events, key=lambda e: e.start_ns()):
        for i in range(1 + (not apart(abs(event.nbytes())))):
            now[i] += event.nbytes()
            peaks[i] = max(peaks[i], now[i])
    return peaks[0], peaks[1]


def decaying(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """A gradient whose leading part has rank min(shape) / 4 with a decaying spectrum, and 1 % noise."""
    gen = torch.Generator().manual_seed(seed)
    inner = max(2, min(shape) // 4)
    spectrum = torch.arange(1, inner + 1).float().rsqrt()
    left = torch.randn(shape[0], inner, generator=gen) * spectrum
    low = left @ torch.randn(inner, shape[1], generator=gen)
    return (low / low.norm() + 0.01 * torch.randn(shape, generator=gen) / math.sqrt(math.prod(shape))).to(dtype)


# Steps between refreshes


def _galore_torch():
    """The class of galore-torch, whose only use of transformers is a version check. Raises ImportError."""
    if "transformers" not in sys.modules:
        try:
            importlib.import_module("transformers")
        except ImportError:
            check = types.ModuleType("transformers.utils.versions")
            check.require_version = lambda requirement: None
            stand_in = {"transformers": types.ModuleType("transformers"), check.__name__: check,
                        "transformers.utils": types.ModuleType("transformers.utils")}  # fmt: skip
            sys.modules.update(stand_in)
            try:
                return importlib.import_module("galore_torch")
            finally:
                for name in stand_in:
                    del sys.modules[name]
    return importlib.import_module("galore_torch")


def galore_torch(p: torch.nn.Parameter, rank: int) -> torch.optim.Optimizer:
    """GaLoreAdamW with a basis in place, so that no SVD is timed."""
    package = _galore_torch()
    group = {"params": [p], "rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
    opt = package.GaLoreAdamW([group], no_deprecation_warning=True, **OPTIONS)
    projector = importlib.import_module("galore_torch.galore_projector").GaLoreProjector(
        rank, False, NEVER, 0.25, "std"
    )
    left = p.shape[0] < p.shape[1]
    keys = {"seed": 0, "tensor_id": 0, "step": 1}
    projector.ortho_matrix = random_basis(tuple(p.shape), rank, "left" if left else "right", **keys).to(p.dtype)
    opt.state[p].update(step=1, projector=projector)
    return opt


def galore(form: str = "fp32", precision: str = "nearest"):
    def make(p, rank):
        projection = fusedopt.GaLore(rank=rank, update_every=NEVER)
        return fusedopt.AdamW([p], projection=projection, state_format=form, param_precision=precision, **OPTIONS)

    return make


class Products:
    """What no step can do without: the products down to the rank and back, by torch.mm, and nothing else."""

    def __init__(self, p: torch.nn.Parameter, rank: int):
        left = p.shape[0] < p.shape[1]
        self.p, self.basis = p, torch.randn(rank, min(p.shape)).to(p.dtype)
        self.basis = self.basis.t().contiguous() if left else self.basis
        self.out, self.left = torch.empty_like(p), left

    def step(self) -> None:
        g, basis = self.p.grad, self.basis
        if self.left:
            torch.mm(basis, basis.t() @ g, out=self.out)
        else:
            torch.mm(g @ basis.t(), basis, out=self.out)


MEDIUM = ", medium"  # with torch.set_float32_matmul_precision("medium"): factors of products in bf16
CONTENDERS = {
    "torch/adamw/fused": lambda p, rank: torch.optim.AdamW([p], fused=True, **OPTIONS),
    "fusedopt/adamw": lambda p, rank: fusedopt.AdamW([p], **OPTIONS),
    "fusedopt/galore_adamw": galore(),
    "fusedopt/galore_adamw8bit": galore("int8"),
    "fusedopt/galore_adamw+sr": galore(precision="stochastic"),
    "galore-torch/galore_adamw": galore_torch,
    "torch.mm, the products alone": Products,
}
CONTENDERS |= {name + MEDIUM: CONTENDERS[name] for name in list(CONTENDERS) if "galore" in name or "products" in name}


def suits(name: str, dtype: torch.dtype) -> bool:
    """Whether a contender says something about a dtype: bf16 has the rounding, fp32 the choice of precision."""
    return not (name.endswith("+sr") if dtype == torch.float32 else name.endswith(MEDIUM)) and "+sr," not in name


def timed(name: str, work) -> float:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if name.endswith(MEDIUM) else "highest")
    try:
        return seconds(work)
    finally:
        torch.set_float32_matmul_precision(before)


def step_times(shapes, rank: int, rounds: int) -> list[dict]:
    records = []
    for shape in shapes:
        for dtype, dtype_name in NAMES.items():
            grads = [torch.randn(shape).mul_(1e-3).to(dtype) for _ in range(2)]
            runs, skipped = {}, {}
            for name, make in CONTENDERS.items():
                if not suits(name, dtype):
                    continue
                p = torch.nn.Parameter(torch.randn(shape).mul_(0.02).to(dtype))
                try:
                    opt = make(p, rank)
                except ImportError as error:
                    skipped[name] = str(error)
                    continue
                for g in grads:
                    p.grad = g
                    timed(name, opt.step)
                runs[name] = (p, opt, [])
            gc.collect()
            for index in range(rounds):
                names = list(runs)
                for name in names[index % len(names) :] + names[: index % len(names)]:
                    p, opt, times = runs[name]
                    p.grad = grads[index % 2]
                    times.append(timed(name, opt.step))
            base = runs["torch/adamw/fused"][2]
            for name, (_, _, times) in runs.items():
                records.append({
                    "shape": list(shape), "dtype": dtype_name, "rank": rank, "name": name,
                    "ms": quartiles([1e3 * t for t in times]),
                    "to_torch_fused": quartiles([t / b for t, b in zip(times, base, strict=True)]),
                })  # fmt: skip
            records += [
                {"shape": list(shape), "dtype": dtype_name, "name": n, "skipped": w} for n, w in skipped.items()
            ]
    return records


# Refreshes


def refresh_ways(g: torch.Tensor, rank: int, side: str) -> dict:
    """By name: a function that gives a new basis of a gradient."""
    keys = {"rank": rank, "side": side, "seed": 0, "tensor_id": 0}
    before = 0.5 * (g + decaying(tuple(g.shape), g.dtype, seed=1))
    old = refresh_basis(before, step=1, **keys)[0]
    width = min(4 * rank, *g.shape)
    omega = random_matrix(tuple(g.shape), width, side, "cpu", seed=0, tensor_id=0, step=2)
    sketch = g.float() @ omega.t() if side == "left" else omega.t() @ g.float()
    return {
        "randomised, first": lambda: refresh_basis(g, step=2, **keys)[0],
        "randomised, warm start": lambda: refresh_basis(g, old=old, step=2, **keys)[0],
        "of a sketch (projected_linear)": lambda: sketch_basis(sketch, rank, side, old),
        "random": lambda: random_basis(tuple(g.shape), step=2, **keys),
    }


def refresh_times(shapes, rank: int, rounds: int) -> list[dict]:
    """A new basis from a gradient and a basis of another one. The full SVD is run once, in fp32: bf16 is converted first."""
    records = []
    for shape in shapes:
        side = "right" if shape[0] >= shape[1] else "left"
        exact = decaying(shape)
        start = time.perf_counter()
        basis = svd_basis(exact, rank, side)
        svd = time.perf_counter() - start
        best = energy(exact, basis, side).item()
        times = {("fp32", "full SVD"): [svd]}
        shares = {("fp32", "full SVD"): 1.0}
        for dtype, dtype_name in NAMES.items():
            g = exact.to(dtype)
            ways = refresh_ways(g, rank, side)
            for _ in range(rounds):
                for name, work in ways.items():
                    times.setdefault((dtype_name, name), []).append(seconds(work))
            shares |= {(dtype_name, name): energy(exact, work(), side).item() / best for name, work in ways.items()}
        for (dtype_name, name), taken in times.items():
            ms = quartiles([1e3 * t for t in taken])
            records.append({
                "shape": list(shape), "dtype": dtype_name, "rank": rank, "name": name, "ms": ms,
                "svd_over_this": 1e3 * svd / ms["median"], "share_of_best_energy": shares[dtype_name, name],
            })  # fmt: skip
    return records


# Staggered refreshes


def stagger_times(size: int, layers: int, rank: int, periods: int) -> list[dict]:
    """Longest and median step of a model of equal matrices, refreshed every `layers` steps; the first step is left out."""
    grads = [decaying((size, size), seed=i) for i in range(4)]
    runs = {}
    for stagger in (True, False):
        for method in ("randomized", "svd"):
            params = [torch.nn.Parameter(torch.randn(size, size).mul_(0.02)) for _ in range(layers)]
            projection = fusedopt.GaLore(rank=rank, update_every=layers, stagger=stagger, method=method)
            opt = fusedopt.AdamW(params, projection=projection, **OPTIONS)
            runs[f"{method}, {'staggered' if stagger else 'all at once'}"] = (params, opt, [])
    for index in range(periods * layers + 1):
        for params, opt, times in runs.values():
            for i, p in enumerate(params):
                p.grad = grads[(i + index) % 4]
            times.append(seconds(opt.step))
    records = []
    for name, (_, _, times) in runs.items():
        ms = [1e3 * t for t in times[1:]]
        middle = quartiles(ms)
        top = sorted(ms)[-2 * periods :]  # one late step of a busy machine does not decide
        records.append({
            "name": name, "layers": layers, "size": size, "rank": rank, "update_every": layers, "ms": middle,
            "longest_ms": max(ms), "longest_over_median": max(ms) / middle["median"],
            "typical_longest_over_median": top[len(top) // 2] / middle["median"],
        })  # fmt: skip
    return records


# Memory


def formulas(m: int, n: int, rank: int, width: int) -> dict[str, tuple[dict, float]]:
    """By name: options and bytes of state of one m x n matrix with fp32 moments; width: bytes of a projector's number.

    s and l are the shorter and the longer side: moments are r x l, projectors r x s.
    """
    s, l = sorted((m, n))  # noqa: E741
    quarter = s // 4
    groups = rank * s / 256
    return {
        "adamw": ({}, 8 * m * n),
        "galore_adamw": ({"rank": rank}, 8 * rank * l + width * rank * s),
        "galore_adamw8bit": ({"rank": rank}, 2 * rank * l * (1 + 4 / 256) + width * rank * s),
        "qgalore_adamw": (
            {"rank": rank, "queue": 5},
            8 * rank * l + rank * s / 2 + 5 * groups + width * s + 4 * 5 + 2 * 8,
        ),
        "dct_adamw": ({"rank": rank}, 8 * rank * l + 4 * rank),
        "frugal_adamw": ({"density": 0.25}, 8 * quarter * l + width * quarter * s),
        "apollo_adamw": ({"rank": rank}, 8 * rank * l + 4),
        "apollo_mini_adamw": ({}, 8 * l + 4),
    }


def _one_matrix(name: str, shape, dtype: torch.dtype, **options):
    p = torch.nn.Parameter(torch.randn(shape).mul_(0.02).to(dtype))
    opt = fusedopt.create(name, [p], min_quantized_numel=0, **OPTIONS, **options)
    p.grad = decaying(shape, dtype)
    opt.step()
    return p, opt


def state_bytes(shape, rank: int) -> list[dict]:
    records = []
    for dtype, dtype_name in NAMES.items():
        for name, (options, wanted) in formulas(*shape, rank, dtype.itemsize).items():
            _, opt = _one_matrix(name, shape, dtype, **options)
            found = fusedopt.state_bytes(opt)
            records.append({
                "name": name, "shape": list(shape), "dtype": dtype_name, "options": options, "bytes": found,
                "formula": wanted, "bytes_over_formula": found / wanted, "share_of_adamw": found / (8 * math.prod(shape)),
            })  # fmt: skip
    return records


def extra_memory(shape, rank: int) -> list[dict]:
    """How far allocations rise during a step, as a share of the parameter, with the low-rank buffers (rank numbers, or rank and
    a few, for each row or column, in 1 to 8 bytes) and without. Buffers that stay are made in the first step."""
    records = []

    def low_rank(size: int) -> bool:
        numbers = [size / (side * width) for side in shape for width in (1, 2, 4, 8)]
        return any(n.is_integer() and rank <= n <= rank + OVERSAMPLE for n in numbers)

    names = {"galore_adamw": {"update_every": 3}, "galore_adamw8bit": {"update_every": 3}}
    for dtype, dtype_name in NAMES.items():
        for name, options in names.items():
            p, opt = _one_matrix(name, shape, dtype, rank=rank, **options)
            found = {}
            for what in ("between refreshes", "between refreshes", "refresh"):
                found[what] = allocated_peak(opt.step, apart=low_rank)
            size = p.numel() * p.element_size()
            for what, (extra, beyond) in found.items():
                records.append({
                    "name": name, "what": what, "shape": list(shape), "dtype": dtype_name, "rank": rank,
                    "bytes": extra, "share_of_parameter": extra / size, "beyond_low_rank_bytes": beyond,
                    "beyond_low_rank_share": beyond / size,
                })  # fmt: skip
    return records


def linear_memory(size: int, layers: int, rank: int, tokens: int) -> list[dict]:
    """Gradient bytes and peak memory of forward, backward and step of a stack of Linear layers, between refreshes."""
    records = []
    for way in ("full gradients", "projected_linear"):
        model = torch.nn.Sequential(*[torch.nn.Linear(size, size, bias=False) for _ in range(layers)])
        opt = fusedopt.AdamW(model.parameters(), projection=fusedopt.GaLore(rank=rank, update_every=NEVER), **OPTIONS)
        handle = fusedopt.projected_linear(model, opt) if way == "projected_linear" else None
        data, alive, peaks = torch.randn(tokens, size), [], []

        def train(model=model, opt=opt, handle=handle, data=data, alive=alive):
            model(data).square().mean().backward()
            ordinary = [p.grad for p in model.parameters() if p.grad is not None]
            alive.append(sum(g.numel() * g.element_size() for g in ordinary) + (handle.bytes() if handle else 0))
            opt.step()
            opt.zero_grad()

        for _ in range(3):  # the first one makes the states, and refreshes
            peaks.append(allocated_peak(train)[0])
        predicted = layers * 4 * size * (rank if handle else size)
        records.append({
            "name": way, "layers": layers, "size": size, "rank": rank, "tokens": tokens, "gradient_bytes": alive[-1],
            "predicted_gradient_bytes": predicted, "peak_bytes": peaks[-1],
            "activation_bytes": 4 * tokens * size * (layers + 1),
        })  # fmt: skip
        del model, opt, handle
    return records


# The command


def measure(parts, quick: bool, rounds: int, rank: int, show=print) -> dict:
    """The JSON document. show(text) gets each part's table as it is done."""
    shapes = [(48, 64), (64, 64)] if quick else [(1024, 4096), (4096, 4096)]
    largest = shapes[-1]
    work = {
        "step": lambda: step_times(shapes, rank, rounds),
        "refresh": lambda: refresh_times(shapes, rank, max(3, rounds // 3)),
        "stagger": lambda: stagger_times(64 if quick else 384, 6 if quick else 24, min(rank, 64), 2 if quick else 3),
        "state": lambda: state_bytes(shapes[0], rank),
        "extra": lambda: extra_memory(largest, rank),
        "linear": lambda: linear_memory(64 if quick else 2048, 3 if quick else 8, min(rank, 128), 16 if quick else 256),
    }
    document = {
        "schema": SCHEMA, "kind": "lowrank", "machine": machine.stamp(CPU),
        "settings": {"rounds": rounds, "rank": rank, "quick": quick}, "parts": {},
    }  # fmt: skip
    for part in parts:
        document["parts"][part] = work[part]()
        gc.collect()
        show(table(part, document["parts"][part]))
    return document


def _cell(key: str, value) -> str:
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.3f} ({value['q1']:.3f}-{value['q3']:.3f})"
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items()) or "-"
    if isinstance(value, list):
        return " x ".join(map(str, value))
    if key.endswith("bytes") or key == "formula":
        return "-" if value is None else f"{value / 1e6:.3f} MB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(part: str, records: list[dict]) -> str:
    """A part as text: a column for every key."""
    rows = [r for r in records if "skipped" not in r]
    lines = [part]
    if rows:
        keys = list(rows[0])
        cells = [keys, *([_cell(key, r[key]) for key in keys] for r in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(keys))]
        lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines += [f"  skipped {r['name']}: {r['skipped']}" for r in records if "skipped" in r]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    rounds, rank = args.rounds or (3 if args.quick else 9), args.rank or (8 if args.quick else 128)
    document = measure(args.part or PARTS, args.quick, rounds, rank, show=lambda text: print(text + "\n", flush=True))
    path = args.out or RESULTS
    if path.suffix != ".json":
        path = path / f"lowrank-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}-cpu.json"
    save(document, path)
    print(f"written: {path}")
    return 0
