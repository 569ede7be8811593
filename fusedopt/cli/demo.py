"""Trains a byte-level GPT on the source of Python's standard library, once per optimizer, and compares.

The first run is torch.optim.AdamW; every run has the same initial weights and the same batches. Prints the losses, the
bytes of optimizer state per parameter, step times and memory, and draws the loss curves:

  python -m fusedopt demo
  python -m fusedopt demo --text my_notes/ --optim adamw8bit,lamb --steps 500
  python -m fusedopt demo --optim galore_adamw8bit,apollo_adamw --rank 32
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict

import torch

from fusedopt.cli import DTYPES, UsageError, dtype_name, split_names, write_json
from fusedopt.cli.corpus import load
from fusedopt.cli.table import render
from fusedopt.cli.training import TORCH, Run, Setup, build_optimizer, train
from fusedopt.precision import get_precision, list_precisions

DEFAULT_OPTIMIZERS = ["adamw", "adamw8bit", "lion8bit"]
INSTALL = "pip install 'fusedopt[demo]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--optim",
        action="append",
        metavar="NAMES",
        help=f"optimizers to compare, repeatable or a comma list (default: {','.join(DEFAULT_OPTIMIZERS)})",
    )
    parser.add_argument("--text", metavar="PATH", help="a file or a folder of text to train on")
    parser.add_argument("--steps", type=_positive, default=240, metavar="N", help="steps of each run (240)")
    parser.add_argument("--out", default="fusedopt-demo.png", metavar="PNG", help="the picture (fusedopt-demo.png)")
    parser.add_argument("--no-plot", action="store_true", help="no picture")
    parser.add_argument("--json", metavar="PATH", help="write all numbers to a file ('-': standard output)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is a GPU)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (fp32)")
    parser.add_argument(
        "--param-precision",
        choices=list_precisions(),
        help="how fusedopt rounds 16-bit weights (default: stochastic for 16-bit weights)",
    )
    model = parser.add_argument_group("model, batch and projections")
    for name, value, text in (
        ("width", Setup.width, "model width"),
        ("layers", Setup.layers, "layers"),
        ("heads", Setup.heads, "attention heads"),
        ("context", Setup.context, "bytes of context"),
        ("batch", Setup.batch, "windows in a batch"),
        ("rank", Setup.rank, "rank of projections such as galore_"),
        ("update-every", Setup.update_every, "steps between their refreshes"),
    ):
        model.add_argument(f"--{name}", type=_positive, default=value, metavar="N", help=f"{text} ({value})")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def choose_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def run(args: argparse.Namespace) -> int:
    names = [TORCH, *(split_names(args.optim) or DEFAULT_OPTIMIZERS)]
    if args.width % args.heads:
        raise UsageError(f"--width {args.width} is not a multiple of --heads {args.heads}")
    device = choose_device(args.device)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    if not args.no_plot:
        folder = os.path.dirname(args.out) or "."
        if not os.path.isdir(folder):
            raise UsageError(f"--out {args.out}: there is no folder {folder}")
    dtype = DTYPES[args.dtype]
    precision = args.param_precision or ("nearest" if dtype == torch.float32 else "stochastic")
    try:
        get_precision(precision).for_dtype(dtype)
    except ValueError as error:
        raise UsageError(f"--param-precision {precision} --dtype {args.dtype}: {error}") from None
    keys = ("steps", "batch", "context", "width", "layers", "heads", "seed", "rank", "update_every")
    shape = {key: getattr(args, key) for key in keys}
    setup = Setup(load(args.text, args.context), device, dtype=dtype, param_precision=precision, **shape)
    _check(names, setup)
    quiet = args.json == "-"
    if not quiet:
        print(_heading(setup), flush=True)
    begin = time.perf_counter()
    runs = [train(name, setup) for name in names]
    seconds = time.perf_counter() - begin
    if args.json:
        about = {**shape, "device": str(device), "dtype": args.dtype, "param_precision": precision,
                 "text": setup.corpus.name, "torch": torch.__version__, "seconds": seconds}  # fmt: skip
        write_json(args.json, {"setup": about, "runs": [{**asdict(r), "train_loss": r.train_loss} for r in runs]})
    if not quiet:
        print(f"\n{report(runs, device)}\n\n{len(runs)} runs in {seconds:.0f} s")
    if not args.no_plot:
        message = _draw(runs, setup, args.out)
        if not quiet:
            print(message)
    return 0


def _check(names: list[str], setup: Setup) -> None:
    """Builds every optimizer, so that what is refused is said before the first run."""
    model = setup.model()
    for name in names:
        build_optimizer(name, model, setup)


def _heading(setup: Setup) -> str:
    parameters = sum(p.numel() for p in setup.model().parameters())
    where = f"CPU, {torch.get_num_threads()} threads"
    if setup.device.type == "cuda":
        where = torch.cuda.get_device_name(setup.device)
    train_size, held_size = (t.numel() / 1e6 for t in (setup.corpus.train, setup.corpus.held_out))
    return (
        f"Next-byte prediction: GPT with {parameters / 1e6:.2f} M {dtype_name(setup.dtype)} parameters on {where}\n"
        f"Text: {setup.corpus.name}, {train_size:.1f} MB to train, {held_size:.1f} MB held out\n"
        f"Each run: the same weights and batches, {setup.steps} steps of {setup.batch} x {setup.context} bytes\n"
    )


def report(runs: list[Run], device: torch.device) -> str:
    """The table: losses, state, time and memory of every run, with held-out loss and state relative to the first."""
    rows = []
    first = runs[0]
    for run in runs:
        held, first_held = run.held_out[-1][1], first.held_out[-1][1]
        rows.append([
            run.label, f"{run.train_loss:.4f}", f"{held:.4f}", f"{100 * (held / first_held - 1):+.2f} %",
            f"{run.state_bytes / run.parameters:.2f}", f"{100 * run.state_bytes / first.state_bytes:.1f} %",
            f"{1e3 * run.step_time:.2f}", f"{1e3 * run.iteration_time:.0f}", f"{run.memory / 2**20:.1f}",
        ])  # fmt: skip
    headers = ["optimizer", "train loss", "held-out", "vs torch", "state B/param", "of torch", "step ms",
               "iteration ms", "peak MiB"]  # fmt: skip
    memory = (
        "peak of the GPU's allocator"
        if device.type == "cuda"
        else "weights, gradients and states, without activations, which are the same in every run"
    )
    return (
        f"{render(headers, rows)}\n\n"
        "Losses in nats per byte: mean of the last twentieth of the batches, and on the same held-out windows.\n"
        f"Times are medians; step is optimizer.step() alone. Peak memory: {memory}."
    )


def _draw(runs: list[Run], setup: Setup, path: str) -> str:
    try:
        from fusedopt.cli.curves import plot

        title = f"byte-level GPT, {runs[0].parameters / 1e6:.2f} M parameters, {setup.device.type}"
        plot(runs, title, path)
    except ImportError:
        return f"No picture: matplotlib is not installed ({INSTALL})."
    except OSError as error:
        raise UsageError(f"--out {path}: {error.strerror or error}") from None
    return f"Loss curves: {path}"
