"""Triton kernels of projected steps against torch's products of the same shape, with variants of their tiles.

`python -m bench.gpu_products --out FILE.json`. Each record: kernel, shape, rank, tiles, milliseconds, share of the copy
bandwidth that its bytes reach, and the ratio to torch (below 1: faster): "product" in its precisions against
torch.addmm_, which rounds to nearest; "sign" against two torch.mm and elementwise operations; int4 projections against
torch.mm of a dense projector; scaled updates and sums of squares against eager torch. The tiles in use are marked; the best
of the others is what fusedopt/backends/triton_matrix.py should have.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from bench import bandwidth, machine
from bench.gpu_timing import Clock, Repeated, interleaved, milliseconds, ratios, sets_for, synchronize, why
from bench.run import SCHEMA, quartiles, save
from fusedopt.abi import SCALAR_STRIDE, pack_scalar_row
from fusedopt.backends import triton_matrix
from fusedopt.backends.base import Int4Matrix, MatrixWork, RowNumbers
from fusedopt.backends.select import get_backend
from fusedopt.backends.triton_matrix import Tiles
from fusedopt.precision import get_precision
from fusedopt.weights import Int8Weight, row_blocks, update_rows

BF16, F32 = torch.bfloat16, torch.float32
LR, DECAY = 1e-4, 1e-6
BEYOND = 512 << 20  # bytes of a buffer of the bandwidth probe
SHAPES = ((4096, 4096, 1024), (4096, 4096, 128), (4096, 11008, 1024), (4096, 11008, 128))
PRODUCT_TILES = (
    Tiles(64, 64, 64, 4, 3), Tiles(64, 128, 64, 4, 3), Tiles(128, 64, 64, 4, 3), Tiles(128, 64, 64, 8, 3),
    Tiles(128, 128, 64, 8, 2), Tiles(128, 128, 64, 8, 3), Tiles(128, 128, 64, 8, 4), Tiles(128, 128, 32, 8, 4),
    Tiles(128, 128, 64, 4, 3), Tiles(64, 256, 64, 8, 3), Tiles(128, 256, 64, 8, 3), Tiles(256, 128, 64, 8, 3),
)  # fmt: skip
PROJECT_TILES = (
    Tiles(64, 64, 64, 4, 3), Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 3), Tiles(128, 64, 64, 4, 3),
    Tiles(128, 128, 64, 8, 3), Tiles(64, 64, 128, 4, 3),
)  # fmt: skip
SCALED_TILES = (
    {"BM": 8, "BN": 256},
    {"BM": 4, "BN": 512},
    {"BM": 16, "BN": 128},
    {"BM": 16, "BN": 256},
    {"BM": 2, "BN": 1024},
)


class Kernel(NamedTuple):
    """kind: product, project, scaled, sums or weights; default: whether only the tiles in use are measured."""

    kind: str
    precision: str = "nearest"
    residual: str | None = None
    packed: bool = False
    default: bool = False

    def __str__(self) -> str:
        words = [self.kind, self.precision if self.kind in ("product", "scaled") else "", self.residual or ""]
        return " ".join(w for w in (*words, "int4" if self.packed else "") if w)


KERNELS = (
    Kernel("product"), Kernel("product", "stochastic"), Kernel("product", "stochastic", "sign"),
    Kernel("product", "stochastic", packed=True), Kernel("project", packed=True), Kernel("product", "split24"),
    Kernel("scaled", "stochastic"), Kernel("sums"), Kernel("weights"), Kernel("product", "kahan", default=True),
    Kernel("product", "split32", default=True), Kernel("product", "master", default=True),
    Kernel("product", "nearest", "gradient", default=True),
)  # fmt: skip


def tiles_of(kernel: Kernel) -> tuple:
    """The variants to measure; () for kernels without tiles of their own."""
    if kernel.kind == "scaled":
        return SCALED_TILES
    if kernel.kind in ("sums", "weights"):
        return ()
    present = in_use(kernel)
    if kernel.default:
        return (present,)
    every = PROJECT_TILES if kernel.kind == "project" else PRODUCT_TILES
    return tuple(dict.fromkeys((present, *every)))


def in_use(kernel: Kernel):
    if kernel.kind == "scaled":
        return triton_matrix.SCALED_TILE
    if kernel.kind == "project":
        return triton_matrix.PROJECT_TILES["half"]
    return triton_matrix.TILES["half"][0 if kernel.residual is None else 1]


def with_tiles(kernel: Kernel, tiles):
    """A context in which the kernel is launched with these tiles."""
    if kernel.kind == "scaled":
        return mock.patch.object(triton_matrix, "SCALED_TILE", tiles)
    if kernel.kind == "project":
        return mock.patch.dict(triton_matrix.PROJECT_TILES, {"half": tiles})
    return mock.patch.dict(triton_matrix.TILES, {"half": (tiles,) * 3})


class Problem:
    """Tensors of one kernel at one shape, in several sets, and the calls that run it: ours and torch's."""

    def __init__(
        self, kernel: Kernel, shape: tuple[int, int, int], device: torch.device, backend: str, sets: int | None = None
    ):
        self.kernel, self.device, self.backend = kernel, device, get_backend(backend)
        self.rows, self.cols, self.rank = shape
        image = bytearray(4 * SCALAR_STRIDE)
        pack_scalar_row(image, 0, (LR, DECAY, 0.0, 1.0), 1, 1, ())
        self.scalars = torch.frombuffer(image, dtype=F32).to(device)
        self.numbers = RowNumbers(LR, DECAY, 0.0, 1.0, 1, 1, ())
        elements = self.rows * self.cols
        self.needs_grad = kernel.kind in ("project", "scaled", "sums") or kernel.residual is not None
        each = elements * 2 * (self.needs_grad + (kernel.kind not in ("project", "sums")))
        self.left, self.right = self._random(self.rows, self.rank), self._random(self.rank, self.cols)
        self.other = self._random(self.rank, self.cols)  # FRUGAL's projected gradient
        self.out = self._random(self.rank, self.cols)
        if kernel.packed:
            groups = -(-self.rows * self.rank // 256)
            codes = torch.randint(0, 256, (self.rows * self.rank // 2,), dtype=torch.uint8, device=device)
            zero = torch.full((groups,), 8, dtype=torch.uint8, device=device)
            self.packed = Int4Matrix(codes, torch.full((groups,), 0.01, device=device), zero, (self.rows, self.rank))
        self.row, self.col = (torch.rand(n, device=device) for n in (self.rows, self.cols))
        self.sets = [self._set() for _ in range(sets or sets_for(each, device))]

    def _random(self, *shape) -> torch.Tensor:
        return torch.randn(shape, device=self.device).mul_(0.02).to(BF16)

    def _set(self) -> dict:
        shape = (self.rows, self.cols)
        out = {"grad": self._random(*shape) if self.needs_grad else None}
        if self.kernel.kind == "weights":
            return out | {"p": Int8Weight.from_float(self._random(*shape)), "u": torch.randn(shape, device=self.device)}
        keeps = get_precision(self.kernel.precision)
        if self.kernel.kind in ("product", "scaled"):
            out["p"] = self._random(*shape)
            if keeps.companion:
                out["c"] = torch.zeros(shape, dtype=keeps.companion_dtype(BF16), device=self.device)
        return out

    def bytes(self) -> float:
        """That the kernel must move."""
        n, low = self.rows * self.cols, 2 * self.rank * self.cols
        basis = 2 * self.rows * self.rank if not self.kernel.packed else self.rows * self.rank * (0.5 + 5 / 256)
        read, written = get_precision(self.kernel.precision).traffic(BF16)
        grad = 2 * n if self.needs_grad else 0
        return {
            "product": n * (read + written) + grad + basis + low * (2 if self.kernel.residual else 1),
            "project": grad + basis + low,
            "scaled": n * (read + written) + grad,
            "sums": grad,
            "weights": n * (4 + 2 * (1 + 5 / 256)),
        }[self.kernel.kind]

    def _work(self, s: dict) -> MatrixWork:
        kernel = self.kernel
        work = MatrixWork(s["p"], s.get("c"), get_precision(kernel.precision), None, None, self.scalars, self.numbers, 1,
                          grad=s["grad"])  # fmt: skip
        if kernel.kind == "scaled":
            work.col_factor = self.col
            return work
        work.left, work.right = self.packed if kernel.packed else self.left, self.right
        if kernel.residual:
            work.residual, work.grad_left, work.grad_right = kernel.residual, work.left, self.other
        return work

    def ours(self) -> list[Callable]:
        """One call a set."""
        kind, backend = self.kernel.kind, self.backend
        if kind == "project":
            return [
                lambda s=s: self._took(backend.project_packed(s["grad"], self.packed, "left", self.out))
                for s in self.sets
            ]
        if kind == "sums":
            return [
                lambda s=s: self._took(backend.row_col_sums(s["grad"], self.row, self.col, None)) for s in self.sets
            ]
        if kind == "weights":
            return [lambda s=s: self._update(s, self.device.type == "cuda") for s in self.sets]
        works = [self._work(s) for s in self.sets]
        return [lambda w=w: self._took(backend.apply_matrix(w)) for w in works]

    @staticmethod
    def _took(taken: bool) -> None:
        if not taken:
            raise RuntimeError("the backend does not take this work")

    def _update(self, s: dict, triton: bool) -> None:
        for first, last in row_blocks(s["p"]):
            update_rows(s["p"], first, last, s["u"][first:last], self.numbers, self.scalars, 1, triton=triton)

    def theirs(self) -> list[Callable]:
        """The same result in torch's operations, rounded to nearest; of int8 weights decoded, stepped and encoded."""
        return [lambda s=s: self._eager(s) for s in self.sets]

    def _eager(self, s: dict) -> None:
        kind, p, g = self.kernel.kind, s.get("p"), s["grad"]
        if kind == "project":
            torch.mm(self.left.t(), g, out=self.out)
        elif kind == "sums":
            square = g.float().square()
            torch.sum(square, 1, out=self.row), torch.sum(square, 0, out=self.col)
        elif kind == "scaled":
            p.mul_(1 - DECAY).add_(g * self.col.to(BF16), alpha=-LR)
        elif kind == "weights":
            self._update(s, False)
        elif self.kernel.residual is None:
            p.addmm_(self.left, self.right, beta=1 - DECAY, alpha=-LR)
        else:
            rest = torch.addmm(g, self.left, self.other, alpha=-1)
            rest = rest.sign_() if self.kernel.residual == "sign" else rest
            p.addmm_(self.left, self.right, beta=1 - DECAY, alpha=-LR).add_(rest, alpha=-LR)


def _name(tiles) -> str:
    return (
        "default"
        if tiles is None
        else " ".join(f"{k}={v}" for k, v in (tiles if isinstance(tiles, dict) else tiles._asdict()).items())
    )


def precompile(job: tuple[Kernel, object]) -> None:
    """In a process of its own: leaves the compiled kernel in Triton's cache, from which the measurement takes it."""
    kernel, tiles = job
    try:
        problem = Problem(kernel, (256, 256, 64), torch.device("cuda"), "triton", sets=1)
        with with_tiles(kernel, tiles):
            problem.ours()[0]()
        synchronize(problem.device)
    except Exception as error:  # the measurement meets and records it
        print(f"{kernel} {_name(tiles)}: {why(error)}", flush=True)


def measure(kernel: Kernel, shape, device, backend: str, rounds: int, variants: int | None) -> list[dict]:
    """Records of a kernel at a shape: torch, and every variant of the tiles."""
    problem = Problem(kernel, shape, device, backend)
    probe = bandwidth.Probe(device, BEYOND if device.type == "cuda" else 1 << 16)
    runs: dict[str, Callable[[], float]] = {"copy": lambda: 1 / probe.copy()}
    failed, current = {}, _name(in_use(kernel)) if tiles_of(kernel) else _name(None)
    contenders = [("torch", None)] + [(_name(t), t) for t in (tiles_of(kernel) or (None,))[:variants]]
    for name, tiles in contenders:
        try:
            if name == "torch":
                runs[name] = Repeated(device, problem.theirs())
            elif tiles is None:
                runs[name] = Repeated(device, problem.ours())
            else:
                with with_tiles(kernel, tiles):
                    runs[name] = Repeated(device, problem.ours())
        except Exception as error:  # such as too much shared memory
            failed[name] = why(error)
    times = interleaved(runs, rounds)
    base = {"kernel": str(kernel), "shape": list(shape[:2]), "rank": shape[2]}
    records = [{**base, "tiles": name, "error": text} for name, text in failed.items()]
    for name, taken in times.items():
        if name == "copy":
            continue
        moved = quartiles([problem.bytes() / t * c for t, c in zip(taken, times["copy"], strict=True)])
        record = {**base, "tiles": name, "ms": milliseconds(taken), "share_of_copy": moved, "in_use": name == current}
        if "torch" in times:
            record["to_torch"] = ratios(taken, times["torch"])
        if kernel.kind == "product" or kernel.kind == "project":
            products = 2 if kernel.residual else 1
            record["tflops"] = products * 2e-12 * shape[0] * shape[1] * shape[2] / quartiles(taken)["median"]
        records.append(record)
    return records


def best(records: list[dict]) -> list[dict]:
    """Of each kernel and shape the fastest tiles, with what they gain over those in use."""
    out = []
    key = lambda r: (r["kernel"], r["shape"], r["rank"])  # noqa: E731
    timed = [r for r in records if "ms" in r and r["tiles"] != "torch"]
    for (kernel, shape, rank), group in itertools.groupby(sorted(timed, key=key), key):
        rows = list(group)
        top = min(rows, key=lambda r: r["ms"]["median"])
        used = next((r for r in rows if r["in_use"]), None)
        gain = None if used is None else used["ms"]["median"] / top["ms"]["median"]
        out.append({"kernel": kernel, "shape": shape, "rank": rank, "tiles": top["tiles"], "ms": top["ms"]["median"],
                    "to_torch": top.get("to_torch", {}).get("median"), "gain_over_tiles_in_use": gain})  # fmt: skip
    return out


def line(r: dict) -> str:
    what = f"{r['kernel']:32} {r['shape'][0]} x {r['shape'][1]} r {r['rank']:<5} {r['tiles']:52}"
    if "error" in r:
        return f"{what} {r['error']}"
    ratio = f"{r['to_torch']['median']:.2f} of torch" if "to_torch" in r else ""
    return f"{what} {r['ms']['median']:.4f} ms  {r['share_of_copy']['median']:.2f} of copy  {ratio}{' *' if r['in_use'] else ''}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_products", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--backend", help="triton on a GPU, reference on a CPU")
    parser.add_argument("--tiny", action="store_true", help="one small shape, two variants: to try the tool")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=80, help="no further case is begun after this time")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    device, clock = torch.device(args.device), Clock(args.seconds)
    backend = args.backend or ("triton" if device.type == "cuda" else "reference")
    torch.set_float32_matmul_precision("highest")
    document = {"schema": SCHEMA, "kind": "gpu_products", "machine": machine.stamp(device), "records": [], "best": [],
                "left_out": []}  # fmt: skip
    shapes, variants = (((32, 48, 8),), 2) if args.tiny else (SHAPES, None)
    if device.type == "cuda":
        jobs = [(kernel, tiles) for kernel in KERNELS for tiles in tiles_of(kernel)[:variants]]
        workers = min(12, os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(precompile, jobs))
    for shape in shapes:
        for kernel in KERNELS:
            if clock.over():
                document["left_out"].append(f"{kernel} {shape}")
                continue
            try:
                records = measure(kernel, shape, device, backend, args.rounds, variants)
            except Exception as error:
                records = [
                    {
                        "kernel": str(kernel),
                        "shape": list(shape[:2]),
                        "rank": shape[2],
                        "tiles": "-",
                        "error": why(error),
                    }
                ]
            document["records"] += records
            document["best"] = best(document["records"])
            save(document, args.out)
            print("\n".join(map(line, records)), flush=True)
    for left in document["left_out"]:
        print(f"no time for {left}")
    save(document, args.out)
    return int(not any("ms" in r and r["tiles"] != "torch" for r in document["records"]))


if __name__ == "__main__":
    sys.exit(main())
