"""Newton-Schulz iterations of whole batches: our Triton kernels, in variants of their tiles, against torch's products.

`python -m bench.gpu_newton_schulz --out FILE.json`. Each record: shape of the batch, tiles, milliseconds of five iterations,
tflops of the plain form's multiplications, and the ratio to torch (below 1: faster). The tiles in use are marked; the best of the
others is what fusedopt/backends/triton_newton_schulz.py should have, or torch where it is faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from bench import machine
from bench.gpu_timing import Clock, Repeated, interleaved, milliseconds, ratios, why
from bench.run import SCHEMA, quartiles, save
from fusedopt import newton_schulz
from fusedopt.backends import triton_newton_schulz
from fusedopt.backends.select import get_backend
from fusedopt.backends.triton_matrix import TILES, Tiles

STEPS = 5
# Of GPT-2 124M (a batch of all layers) and Llama 7B
SHAPES = ((12, 768, 768), (12, 2304, 768), (12, 3072, 768), (4, 4096, 4096), (1, 4096, 11008))
VARIANTS = (
    Tiles(128, 128, 64, 8, 3), Tiles(128, 128, 64, 8, 4), Tiles(128, 128, 64, 4, 3), Tiles(128, 128, 32, 8, 4),
    Tiles(64, 64, 64, 4, 4), Tiles(256, 128, 64, 8, 3), Tiles(128, 256, 64, 8, 3),
)  # fmt: skip


def flops(shape: tuple[int, int, int]) -> float:
    """Of the plain form: X X^T, A A and P X in full."""
    count, rows, cols = shape
    small, large = min(rows, cols), max(rows, cols)
    return STEPS * count * 2.0 * (2 * small * small * large + small**3)


def subjects(x: torch.Tensor, backend: str) -> dict[str, tuple[Tiles | None, Callable[[], object]]]:
    coefficients = newton_schulz.schedule(newton_schulz.QUINTIC, STEPS)
    kernels = get_backend(backend)

    def ours() -> None:
        if not kernels.newton_schulz(x, coefficients):
            raise RuntimeError(f"backend {backend!r} does not take this work")

    found = {"torch": (None, lambda: newton_schulz._iterate(x, coefficients, torch.baddbmm))}
    for tiles in VARIANTS:
        found[" ".join(f"{k}={v}" for k, v in tiles._asdict().items())] = (tiles, ours)
    return found


def measure(
    shape: tuple[int, int, int], device: torch.device, backend: str, rounds: int, variants: int | None
) -> list[dict]:
    x = torch.randn(shape, device=device)
    x = (x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)).bfloat16()
    runs, records = {}, []
    for name, (tiles, call) in list(subjects(x, backend).items())[: None if variants is None else variants + 1]:
        chosen = tiles or TILES["half"][0]
        try:
            with mock.patch.object(triton_newton_schulz, "tiles_for", lambda *sides, t=chosen: t):
                runs[name] = Repeated(device, [call])
        except Exception as error:  # such as too much shared memory
            records.append({"shape": list(shape), "tiles": name, "error": why(error)})
    times = interleaved(runs, rounds)
    current = list(subjects(x, backend))[1]
    for name, taken in times.items():
        records.append({
            "shape": list(shape), "tiles": name, "ms": milliseconds(taken), "in_use": name == current,
            "to_torch": ratios(taken, times["torch"]), "plain_tflops": 1e-12 * flops(shape) / quartiles(taken)["median"],
        })  # fmt: skip
    return records


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_newton_schulz", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small shape, one variant, interpreted: to try the tool")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=40, help="no further shape is begun after this time")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    device, clock = torch.device(args.device), Clock(args.seconds)
    document = {"schema": SCHEMA, "kind": "gpu_newton_schulz", "machine": machine.stamp(device), "records": []}
    for shape in ((2, 24, 40),) if args.tiny else SHAPES:
        if clock.over():
            print(f"no time for {shape}")
            continue
        records = measure(shape, device, "triton", args.rounds, 1 if args.tiny else None)
        document["records"] += records
        save(document, args.out)
        for r in records:
            what = f"{r['shape']} {r['tiles']:40}"
            mark = " *" if r.get("in_use") else ""
            print(
                f"{what} {r['error']}"
                if "error" in r
                else f"{what} {r['ms']['median']:.3f} ms  {r['to_torch']['median']:.2f} of torch{mark}"
            )
    return int(not any("ms" in r and r["tiles"] != "torch" for r in document["records"]))


if __name__ == "__main__":
    sys.exit(main())
