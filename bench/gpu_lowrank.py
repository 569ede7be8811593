"""Steps and refreshes of projected and factored optimizers on a GPU, against torch's fused AdamW and eager GaLore.

`python -m bench.gpu_lowrank steps|refresh --out FILE.json`. Steps: between refreshes, on equal matrices and on four layers of
Llama 2 7B; milliseconds by CUDA events over eager steps, the host's time to enqueue one, milliseconds replayed from a CUDA
graph where that is asked for, and two shares of the copy bandwidth of the same round: of the physical limit (DESIGN section
5: each full-size stream once, low-rank states and the update's factor once each way) and of what the plan moves.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import fusedopt
from bench import bandwidth, cases, machine
from bench.gpu_timing import Clock, interleaved, milliseconds, ratios, synchronize, why
from bench.run import SCHEMA, quartiles, save
from fusedopt.formats import get_format
from fusedopt.projections.dct import select_columns
from fusedopt.projections.subspace import random_basis, refresh_basis, svd_basis

F32, BF16 = torch.float32, torch.bfloat16
NEVER = 10**9
OPTIONS = {"lr": 1e-4, "weight_decay": 1e-2}
BASE = "torch/adamw/fused"
STEPS = 3  # eager steps between two events
PROBE = 512 << 20


class EagerGaLore(torch.optim.Optimizer):
    """GaLore-AdamW of matrices as plain torch operations: mm, Adam in place, mm, add; vectors by Adam. Bases are random."""

    def __init__(self, params, rank: int, lr: float, weight_decay: float, scale: float = 0.25):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.scale, self.count = scale, 0
        for p in self.param_groups[0]["params"]:
            state, shape = self.state[p], tuple(p.shape)
            if p.dim() == 2 and min(shape) > rank:
                state["left"] = shape[0] < shape[1]
                size = (shape[0], rank) if state["left"] else (rank, shape[1])
                state["basis"] = torch.randn(size, device=p.device).mul_(max(size) ** -0.5).to(p.dtype)
                shape = (rank, shape[1]) if state["left"] else (shape[0], rank)
            state["m"], state["v"] = (torch.zeros(shape, dtype=p.dtype, device=p.device) for _ in range(2))

    @torch.no_grad()
    def step(self):
        self.count += 1
        lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        size = lr * math.sqrt(1 - 0.999**self.count) / (1 - 0.9**self.count)
        for p in self.param_groups[0]["params"]:
            state, u = self.state[p], p.grad
            basis = state.get("basis")
            if basis is not None:
                u = basis.t() @ u if state["left"] else u @ basis.t()
            state["m"].mul_(0.9).add_(u, alpha=0.1)
            state["v"].mul_(0.999).addcmul_(u, u, value=0.001)
            u = state["m"] / state["v"].sqrt().add_(1e-8)
            if basis is not None:
                u = (basis @ u if state["left"] else u @ basis) * self.scale
            p.add_(u, alpha=-size)
            p.add_(p, alpha=-lr * decay)


class Contender(NamedTuple):
    """make(params, rank) -> optimizer. limit: (name of the count, bytes of a state's element). graph: also replayed."""

    make: Callable
    limit: tuple[str, float]
    graph: bool = False


def adamw(projection: Callable | None = None, form: str = "fp32", precision: str = "nearest", limit: str = "galore", graph=False,
          backend: str | None = None):  # fmt: skip
    def make(params, rank):
        chosen = None if projection is None else projection(rank)
        return fusedopt.AdamW(params, projection=chosen, state_format=form, param_precision=precision, capturable=graph,
                              backend=backend, **OPTIONS)  # fmt: skip

    return Contender(make, (limit if projection else "full", get_format(form).bytes_per_element), graph)


def galore(rank):
    return fusedopt.GaLore(rank, NEVER, method="random")


def frugal(method: str) -> Callable:
    """Of the rank of the others in a matrix whose smaller side is 4096."""
    return lambda rank: fusedopt.Frugal(rank / 4096, NEVER, method=method)


def contenders(dtype: torch.dtype) -> dict[str, Contender]:
    """Bases are random: what is timed does not depend on them, and they are made quickly."""
    out = {
        BASE: Contender(lambda ps, r: torch.optim.AdamW(ps, fused=True, **OPTIONS), ("full", dtype.itemsize)),
        "torch/galore/eager": Contender(lambda ps, r: EagerGaLore(ps, r, **OPTIONS), ("galore", dtype.itemsize)),
        "fusedopt/adamw": adamw(),
        "fusedopt/galore": adamw(galore),
        "fusedopt/galore+graph": adamw(galore, graph=True),
        "fusedopt/galore/int8": adamw(galore, "int8"),
    }
    if dtype == F32:
        return out
    return out | {
        "fusedopt/adamw/int8+sr": adamw(None, "int8", "stochastic"),
        "fusedopt/galore/bf16": adamw(galore, "bf16"),
        "fusedopt/galore+sr": adamw(galore, precision="stochastic"),
        "fusedopt/galore/int8+sr": adamw(galore, "int8", "stochastic"),
        "fusedopt/galore/int8+sr+graph": adamw(galore, "int8", "stochastic", graph=True),
        "fusedopt/galore+split24": adamw(galore, precision="split24"),
        "fusedopt/frugal+sr": adamw(frugal("random"), precision="stochastic", limit="frugal"),
        "fusedopt/frugal/columns": adamw(frugal("columns"), limit="columns"),
        "fusedopt/dct": adamw(lambda r: fusedopt.DCT(r, NEVER), precision="stochastic"),
        "fusedopt/dct/every_step": adamw(lambda r: fusedopt.DCT(r), precision="stochastic"),
        "fusedopt/apollo": adamw(lambda r: fusedopt.Apollo(min(r, 256)), precision="stochastic", limit="apollo"),
        "fusedopt/apollo_mini": adamw(lambda r: fusedopt.ApolloMini(), precision="stochastic", limit="apollo_mini"),
        "fusedopt/qgalore/int8": adamw(lambda r: fusedopt.QGaLore(r, NEVER, method="random"), "int8"),
        "fusedopt/qgalore/int8+int8_weights": Contender(int8_weights, ("galore_int8", get_format("int8").bytes_per_element)),
        "fusedopt/adafactor": Contender(lambda ps, r: fusedopt.Adafactor(ps, lr=1e-4, relative_step=False,
                                        scale_parameter=False, param_precision="stochastic"), ("adafactor", 0.0)),
        "fusedopt/microadam": Contender(lambda ps, r: fusedopt.MicroAdam(ps, lr=1e-4, param_precision="stochastic"),
                                        ("microadam", 0.0)),
    }  # fmt: skip


def int8_weights(params, rank):
    """Q-GaLore's whole method: the matrices become int8 weights."""
    made = []
    for p in params:
        q = p
        if p.dim() == 2:
            q = torch.nn.Parameter(fusedopt.weights.Int8Weight.from_float(p.detach()))
            q.grad = p.grad
        made.append(q)
    projection = fusedopt.QGaLore(rank, NEVER, method="random")
    return fusedopt.AdamW(made, projection=projection, state_format="int8", **OPTIONS)


def limit_bytes(kind: str, width: float, shapes, dtype: torch.dtype, rank: int) -> float:
    """Physical limit of a step, bytes; width: of a state's element. Vectors are stepped in full."""
    p, total = dtype.itemsize, 0.0
    for shape in shapes:
        n = math.prod(shape)
        if len(shape) < 2 or kind == "full":
            total += n * (3 * p + 4 * width)
            continue
        low = {"apollo": min(rank, 256), "apollo_mini": 1}.get(kind, rank) * max(shape)
        low_rank = low * (4 * width + 2 * p)  # two states each way, U written and read
        total += {
            "galore": 3 * p * n + low_rank,
            "galore_int8": (p + 2 * (1 + 5 / 256)) * n + low_rank,
            "frugal": 4 * p * n + low_rank,
            "columns": 3 * p * n + low_rank,
            "apollo": 4 * p * n + low_rank,
            "apollo_mini": 4 * p * n + low_rank,
            "adafactor": 5 * p * n,  # the gradient three times, with update clipping
            "microadam": (3 * p + 1.44) * n,
        }[kind]
    return total


def shapes_of(name: str, tiny: bool) -> list[tuple[int, ...]]:
    square, wide = ((48, 48), (32, 96)) if tiny else ((4096, 4096), (4096, 11008))
    if name == "llama2_7b, 4 layers":
        (case,) = cases.select(["llama2_7b@4"])
        case = case.shrunk(60000) if tiny else case
        return list(case.shapes[1:-2])  # without embeddings
    return [square] * 6 if name == "4096 x 4096, 6" else [wide] * 3


CASES = (
    ("llama2_7b, 4 layers", BF16, 1024), ("4096 x 4096, 6", BF16, 1024), ("4096 x 11008, 3", BF16, 1024),
    ("4096 x 4096, 6", BF16, 128), ("4096 x 4096, 6", F32, 1024), ("4096 x 11008, 3", BF16, 128),
    ("llama2_7b, 4 layers", F32, 1024),
)  # fmt: skip


class Run:
    """An optimizer with its own parameters; gradients are shared. Calling it steps and gives seconds a step."""

    def __init__(self, contender: Contender, shapes, grads, dtype, rank: int, device: torch.device):
        self.device, self.host, self.graph = device, [], None
        self.params = [torch.nn.Parameter(torch.full(s, 0.02, dtype=dtype, device=device)) for s in shapes]
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        self.opt = contender.make(self.params, rank)
        for _ in range(3):
            self.opt.step()
        synchronize(device)
        self.planned = self.opt.plan().bytes if isinstance(self.opt, fusedopt.optimizer.FusedOptimizer) else None
        if contender.graph and device.type == "cuda":
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.opt.step()

    def _steps(self) -> None:
        step = self.opt.step if self.graph is None else self.graph.replay
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        self.host.append((time.perf_counter() - start) / STEPS)

    def __call__(self) -> float:
        synchronize(self.device)
        return bandwidth.seconds(self.device, self._steps) / STEPS


def measure_steps(case, device: torch.device, rounds: int, tiny: bool, only: list[str] | None) -> list[dict]:
    name, dtype, rank = case
    shapes, rank = shapes_of(name, tiny), 8 if tiny else rank
    gen = torch.Generator(device).manual_seed(0)
    grads = [torch.randn(s, generator=gen, device=device).mul_(1e-3).to(dtype) for s in shapes]
    base = {
        "case": name,
        "dtype": "bf16" if dtype == BF16 else "fp32",
        "rank": rank,
        "elements": sum(map(math.prod, shapes)),
    }
    probe, runs, records = bandwidth.Probe(device, PROBE if device.type == "cuda" else 1 << 16), {}, []
    chosen = {n: c for n, c in contenders(dtype).items() if only is None or n in only or n == BASE}
    for contender_name, contender in chosen.items():
        try:
            runs[contender_name] = Run(contender, shapes, grads, dtype, rank, device)
        except Exception as error:
            records.append({**base, "name": contender_name, "error": why(error)})
    times = interleaved({"copy": lambda: 1 / probe.copy(), **runs}, rounds)
    for contender_name, run in runs.items():
        taken = times[contender_name]
        limit = limit_bytes(*chosen[contender_name].limit, shapes, dtype, rank)
        record = {
            **base, "name": contender_name, "ms": milliseconds(taken), "host_ms": milliseconds(run.host[1:]),
            "replayed": run.graph is not None, "to_torch_fused": ratios(taken, times[BASE]),
            "limit_bytes_per_parameter": limit / base["elements"],
            "share_of_limit": quartiles([limit / t * c for t, c in zip(taken, times["copy"], strict=True)]),
        }  # fmt: skip
        if "torch/galore/eager" in times:
            record["to_eager_galore"] = ratios(taken, times["torch/galore/eager"])
        if run.planned is not None:
            moved = [run.planned / t * c for t, c in zip(taken, times["copy"], strict=True)]
            record |= {"planned_bytes_per_parameter": run.planned / base["elements"], "share_of_plan": quartiles(moved)}
        records.append(record)
    return records


def steps(device, rounds: int, tiny: bool, clock: Clock, document: dict, keep: Callable) -> None:
    for case in CASES[:: 3 if tiny else 1]:
        label = f"{case[0]}, {str(case[1])[6:]}, rank {case[2]}"
        if clock.over():
            document["left_out"].append(label)
            continue
        try:
            records = measure_steps(case, device, rounds, tiny, None)
        except Exception as error:
            records = [{"case": case[0], "name": "all", "error": why(error)}]
        keep(records)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


# Refreshes


def decaying(shape, dtype, device, seed: int) -> torch.Tensor:
    """A gradient whose singular values fall like i^-1/2, and noise."""
    gen = torch.Generator(device).manual_seed(seed)
    inner = max(2, min(shape) // 4)
    left = torch.randn(shape[0], inner, generator=gen, device=device)
    left *= torch.arange(1, inner + 1, device=device).rsqrt()
    low = left @ torch.randn(inner, shape[1], generator=gen, device=device)
    return (low / low.norm() + 1e-2 * torch.randn(shape, generator=gen, device=device) / math.prod(shape) ** 0.5).to(
        dtype
    )


def refresh(device, rounds: int, tiny: bool, clock: Clock, document: dict, keep: Callable) -> None:
    """A new basis on the host's clock, for the small eigenproblem waits for the device. The SVD once, in fp32."""
    shapes = [(48, 64)] if tiny else [(4096, 4096), (4096, 11008)]
    for shape in shapes:
        for rank in (8,) if tiny else (128, 1024):
            records = []
            for dtype in (BF16, F32):
                if clock.over():
                    document["left_out"].append(f"{shape}, rank {rank}, {dtype}")
                    continue
                g, before = decaying(shape, dtype, device, 1), decaying(shape, dtype, device, 2)
                keys = {"rank": rank, "side": "left", "seed": 0, "tensor_id": 0}
                old = refresh_basis(before, step=1, **keys)[0]
                ways = {
                    "randomised, first": lambda g=g, keys=keys: refresh_basis(g, step=2, **keys),
                    "randomised, warm start": lambda g=g, keys=keys, old=old: refresh_basis(g, old=old, step=2, **keys),
                    "random": lambda shape=shape, keys=keys: random_basis(shape, step=2, device=device, **keys),
                    "dct columns": lambda g=g, rank=rank: select_columns(g, None, rank, "left"),
                }

                def timed(work):
                    synchronize(device)
                    start = time.perf_counter()
                    work()
                    synchronize(device)
                    return time.perf_counter() - start

                runs = {name: lambda work=work: timed(work) for name, work in ways.items()}
                base = {"shape": list(shape), "rank": rank, "dtype": str(dtype)[6:]}
                for name, taken in interleaved(runs, rounds).items():
                    records.append({**base, "name": name, "ms": milliseconds(taken)})
                if dtype == F32 and rank == (8 if tiny else 128) and not clock.over():
                    records.append(
                        {**base, "name": "full SVD", "ms": milliseconds([timed(lambda g=g: svd_basis(g, 1, "left"))])}
                    )
            keep(records)


def line(r: dict) -> str:
    where = f"{r.get('case') or ' x '.join(map(str, r['shape']))} {r.get('dtype', '')} r {r.get('rank', '')}"
    text = f"{where:36} {r['name']:36}"
    if "error" in r:
        return f"{text} {r['error']}"
    text += f" {r['ms']['median']:9.3f} ms"
    if "host_ms" not in r:
        return text
    text += f"  host {r['host_ms']['median']:.3f} ms  {r['to_torch_fused']['median']:.2f} of torch fused"
    text += f"  {r['to_eager_galore']['median']:.2f} of eager" if "to_eager_galore" in r else ""
    return f"{text}  {r['share_of_limit']['median']:.2f} of limit ({r['limit_bytes_per_parameter']:.1f} B/p)"


PARTS = {"steps": steps, "refresh": refresh}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_lowrank", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small matrices: to try the tool")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=75, help="no further case is begun after this time")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    device, clock = torch.device(args.device), Clock(args.seconds)
    document = {"schema": SCHEMA, "kind": f"gpu_lowrank_{args.part}", "machine": machine.stamp(device), "records": [],
                "left_out": []}  # fmt: skip

    def keep(records: list[dict]) -> None:
        document["records"] += records
        save(document, args.out)
        print("\n".join(map(line, records)), flush=True)

    PARTS[args.part](device, args.rounds, args.tiny, clock, document, keep)
    for left in document["left_out"]:
        print(f"no time for {left}")
    save(document, args.out)
    return int(not any("ms" in r for r in document["records"]))


if __name__ == "__main__":
    sys.exit(main())
