"""One training run of the demo: the same model, seed and batches for every optimizer, with what it costs measured."""

from __future__ import annotations

import gc
import math
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

import fusedopt
from fusedopt.cli import UsageError
from fusedopt.cli.corpus import Corpus
from fusedopt.cli.feeding import backward
from fusedopt.cli.feeding import step as take_step
from fusedopt.cli.gpt import GPT
from fusedopt.cli.progress import progress
from fusedopt.factory import embedding_ids, leave_out, parse_name, projection_of
from fusedopt.projections.base import places
from fusedopt.rule import optimizers

# Learning rate and decoupled weight decay (of matrices) by rule: Lion takes a fifth of AdamW's rate and five times its
# decay, see its paper. Rules without an entry run with their class's defaults.
RECIPES = {
    "adam": {"lr": 1e-3, "betas": (0.9, 0.95)},
    "adamw": {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)},
    "lion": {"lr": 2e-4, "weight_decay": 0.5, "betas": (0.9, 0.99)},
    "lamb": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.98)},
    "sgd": {"lr": 0.2, "momentum": 0.9},
    "lars": {"lr": 5.0, "weight_decay": 1e-4, "momentum": 0.9},
    "muon": {"lr": 0.02, "weight_decay": 0.01, "adam_lr": 1e-3},
    "adafactor": {"lr": 1e-3, "weight_decay": 0.1, "relative_step": False, "scale_parameter": False},
}
# For the matrices of the blocks, which a projection takes: by how much their learning rate is larger than the rule's, which
# embeddings, head and norms keep, and options of the method itself, which --rank and --update-every leave alone. GaLore's
# rate is near its paper's 0.01; APOLLO's makes up for norms of rank 64 instead of 256; Subset-Norm's is the root of the 256
# elements of a subset of a 256 x 1024 matrix.
PROJECTED = {
    "galore": {"ratio": 8.0, "scale": 0.25},
    "qgalore": {"ratio": 8.0, "scale": 0.25},
    "dct": {"update_every": 1},
    "apollo": {"ratio": 2.0},
    "apollo_mini": {"ratio": 2.0, "rank": 1},
    "subset_norm": {"ratio": 16.0},
}
TORCH = "torch AdamW"
CHECKS = 6  # held-out measurements along the way


@dataclass
class Setup:
    """What all runs share."""

    corpus: Corpus
    device: torch.device
    steps: int
    batch: int = 24
    context: int = 64
    width: int = 256
    layers: int = 3
    heads: int = 4
    held_out_windows: int = 192
    seed: int = 0
    dtype: torch.dtype = torch.float32
    param_precision: str = "nearest"
    rank: int = 64
    update_every: int = 50

    def model(self) -> GPT:
        torch.manual_seed(self.seed)
        return GPT(self.width, self.layers, self.heads, self.context).to(self.device, self.dtype)


@dataclass
class Run:
    """What one optimizer did. Losses in nats per byte; held_out holds (step, loss) pairs; times in seconds."""

    name: str
    label: str
    parameters: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    state_bytes: int = 0
    step_time: float = 0.0
    iteration_time: float = 0.0
    memory: int = 0

    @property
    def train_loss(self) -> float:
        """Mean over the last twentieth of the batches: one batch says little."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 20) :])


def label_of(name: str) -> str:
    base, form = parse_name(name)
    projection = projection_of(name)
    words = [projection.__name__] if projection else []
    return " ".join([*words, optimizers()[base].__name__, form or "fp32"])


def build_optimizer(
    name: str, model: GPT, setup: Setup, ratio: float | None = None, **options
) -> torch.optim.Optimizer:
    """The optimizer with its peak learning rates. Norms are not decayed; embeddings and head are not projected.

    ratio: learning rate of the blocks' matrices over that of the others, None: the recipe's. Their decay is divided by it, so
    that it takes the same share of a weight away in a step. options: of the projection or the class, instead of the recipe's.
    Raises UsageError where the optimizer refuses the options, or the projection every matrix.
    """
    recipe: dict = dict(RECIPES.get("adamw" if name == TORCH else parse_name(name)[0], {}))
    decay = recipe.pop("weight_decay", 0.0)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    splits = name != TORCH and optimizers()[parse_name(name)[0]].splits_models
    apart = {"orthogonalize": False} if splits else {"projection": None}
    groups = leave_out(matrices, embedding_ids(model) | {id(model.head.weight)}, apart)
    groups = [{**group, "weight_decay": decay} for group in groups]
    groups.append({"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0})
    own: dict = {}
    opt: torch.optim.Optimizer
    try:
        if name == TORCH:
            opt = torch.optim.AdamW(groups, **recipe, **options)
        else:
            if projection := projection_of(name):
                own = {"rank": setup.rank, "update_every": setup.update_every, **PROJECTED.get(projection.name, {})}
                ratio = own.pop("ratio", 1.0) if ratio is None else ratio
                own = {key: value for key, value in own.items() if key in projection.__dataclass_fields__}
            opt = fusedopt.create(name, groups, param_precision=setup.param_precision, **{**recipe, **own, **options})
            if projection and not places(opt):
                raise UsageError(
                    f"{name}: no matrix of the model is large enough to be projected; try a smaller --rank"
                )
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None
    blocks = opt.param_groups[0]
    ratio = 1.0 if ratio is None else ratio
    blocks["lr"], blocks["weight_decay"] = blocks["lr"] * ratio, blocks["weight_decay"] / ratio
    return opt


def schedule(step: int, steps: int) -> float:
    """Share of the peak rate at a step (from 0): linear warmup over a tenth, then a cosine down to a tenth."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def evaluate(model: GPT, windows: torch.Tensor, batch: int) -> float:
    return sum(model.loss(part).item() * len(part) for part in windows.split(batch)) / len(windows)


@contextmanager
def averaged(opt: torch.optim.Optimizer):
    """The weights to evaluate at: those of schedule-free optimizers are an average beside the ones that are trained."""
    if not hasattr(opt, "eval"):
        yield
        return
    opt.eval()
    try:
        yield
    finally:
        opt.train()


@contextmanager
def deterministic():
    """Deterministic algorithms where there are any, so that runs differ by their optimizer only."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def train(name: str, setup: Setup) -> Run:
    """Trains the model of a Setup with one optimizer. name: TORCH, or what `fusedopt.create` takes."""
    run = Run(name, TORCH if name == TORCH else label_of(name))
    gpu = setup.device.type == "cuda"
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setup.device)
    wait = (lambda: torch.cuda.synchronize(setup.device)) if gpu else (lambda: None)
    model = setup.model()
    run.parameters = sum(p.numel() for p in model.parameters())
    opt = build_optimizer(name, model, setup)
    peaks = [group["lr"] for group in opt.param_groups]
    batches = setup.corpus.windows(setup.steps * setup.batch, setup.context, setup.seed).split(setup.batch)
    held_out = setup.corpus.windows(setup.held_out_windows, setup.context, setup.seed + 1, held_out=True)
    held_out = held_out.to(setup.device)
    every = max(1, setup.steps // CHECKS)
    step_times, iteration_times = [], []
    bar = progress(setup.steps, f"{run.label:<12}")
    with deterministic():
        for step, windows in enumerate(batches):
            begin = time.perf_counter()
            for group, peak in zip(opt.param_groups, peaks, strict=True):
                group["lr"] = peak * schedule(step, setup.steps)
            windows = windows.to(setup.device)
            loss = backward(opt, partial(model.loss, windows))
            wait()
            before = time.perf_counter()
            take_step(opt, loss)
            wait()
            step_times.append(time.perf_counter() - before)
            opt.zero_grad()
            run.losses.append(loss.item())
            iteration_times.append(time.perf_counter() - begin)
            bar.set_postfix_str(f"loss {run.losses[-1]:.3f}", refresh=False)
            bar.update(1)
            if (step + 1) % every == 0 and step + 1 + every // 2 < setup.steps:
                with averaged(opt):
                    run.held_out.append((step + 1, evaluate(model, held_out, setup.batch)))
        with averaged(opt):
            run.held_out.append((setup.steps, evaluate(model, held_out, setup.batch)))
    bar.close()
    run.state_bytes = fusedopt.state_bytes(opt)
    run.step_time, run.iteration_time = statistics.median(step_times), statistics.median(iteration_times)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    run.memory = torch.cuda.max_memory_allocated(setup.device) if gpu else 2 * weights + run.state_bytes
    return run
