"""Gradient release on the CPU: peak memory of a training step against an ordinary loop, and host time of its launches.

Parts, each a list of records in the result: `memory` (how far torch's CPU allocations rise in backward and step; released, they
must rise less by the gradients without the largest one), `time` (backward and step of many small tensors, which is all host time,
on one thread: interleaved rounds, ratios to an ordinary loop of the same round) and `single` (one optimizer for each parameter, as
torchtune builds them: construction and step, against torch.optim.AdamW).
"""

from __future__ import annotations

import argparse
import datetime
import gc
from pathlib import Path

import torch
from torch import nn

import fusedopt
from bench import machine
from bench.lowrank import allocated_peak, seconds, table
from bench.run import RESULTS, quartiles, save

SCHEMA = 1
PARTS = ("memory", "time", "single")
CPU = torch.device("cpu")
OPTIONS = {"lr": 1e-4, "weight_decay": 1e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; all by default")
    parser.add_argument("--rounds", type=int, help="of interleaved measurements: 15, with --quick 3")
    parser.add_argument("--quick", action="store_true", help="small models, few rounds: to try the tool")
    parser.add_argument("--out", type=Path, help="a .json file or a folder; bench/results by default")


# Models: a forward pass that takes a seed and returns the loss


class Stack(nn.Module):
    """Equal matrices: the gradients alive at once can be one of them."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(depth)])

    def forward(self, seed: int) -> torch.Tensor:
        x = torch.randn(16, self.layers[0].in_features, generator=torch.Generator().manual_seed(seed))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unsqueeze(0) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(0))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """A decoder whose embedding, tied to the output, is its largest tensor and gets its gradient last."""

    def __init__(self, width: int, depth: int, words: int):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def forward(self, seed: int) -> torch.Tensor:
        words = torch.randint(0, self.embed.num_embeddings, (16,), generator=torch.Generator().manual_seed(seed))
        x = self.embed(words)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.norm(x) @ self.embed.weight.t(), words.roll(1))


def train(model: nn.Module, opt: torch.optim.Optimizer, seed: int) -> None:
    model(seed).backward()
    opt.step()
    opt.zero_grad()


def memory(width: int, depth: int) -> list[dict]:
    """Peaks of the fourth step: plans and states are there, gradients are not. forward_bytes: what the forward pass leaves for
    the backward pass, which an ordinary loop no longer holds where its gradients are most, and a released one may."""
    models = {
        "decoder": lambda: Decoder(width // 2, depth // 2, 8 * width),
        "decoder, bf16 weights": lambda: Decoder(width // 2, depth // 2, 8 * width).bfloat16(),
        "equal matrices": lambda: Stack(width, depth),
    }
    records = []
    for name, make in models.items():
        peaks, weights, launches, forward = {}, {}, 0, 0
        for way in ("ordinary", "released"):
            torch.manual_seed(0)
            model = make()
            opt = fusedopt.AdamW(model.parameters(), state_format="int8", param_precision="stochastic", **OPTIONS)
            handle = fusedopt.release_gradients(model, opt) if way == "released" else None
            for seed in range(3):
                train(model, opt, seed)
            peaks[way] = allocated_peak(lambda model=model, opt=opt: train(model, opt, 3))[0]
            launches = handle.launches if handle else launches
            weights[way] = [p.detach().clone() for p in model.parameters()]
            forward = sum(t.numel() * t.element_size() for t in saved_tensors(model))
        sizes = [p.numel() * p.element_size() for p in weights["released"]]
        saved, wanted = peaks["ordinary"] - peaks["released"], sum(sizes) - max(sizes)
        same = all(map(torch.equal, weights["ordinary"], weights["released"]))
        records.append({
            "name": name, "tensors": len(sizes), "gradient_bytes": sum(sizes), "largest_bytes": max(sizes),
            "forward_bytes": forward, "ordinary_bytes": peaks["ordinary"], "released_bytes": peaks["released"],
            "saved_bytes": saved, "wanted_bytes": wanted, "enough": saved >= wanted, "launches": launches,
            "same_weights": same,
        })  # fmt: skip
        gc.collect()
    return records


def saved_tensors(model: nn.Module) -> list[torch.Tensor]:
    """What the backward pass of a model keeps, without its parameters, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        address = t.untyped_storage().data_ptr()
        if address not in own:
            found[address] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(0)
    return list(found.values())


def hooked(model: nn.Module, step) -> list:
    """step(parameter) from a hook of every parameter's own, and its gradient freed."""

    def hook(p: torch.Tensor) -> None:
        step(p)
        p.grad = None

    return [p.register_post_accumulate_grad_hook(hook) for p in model.parameters()]


class Nothing:
    """An optimizer that does nothing: the time of the backward pass alone."""

    def step(self) -> None:
        pass

    def zero_grad(self) -> None:
        pass


def _each_its_own(make):
    """One optimizer for each parameter, stepped in hooks: torch's tutorial on saving memory in the backward pass."""

    def build(model: nn.Module):
        own = {p: make([p]) for p in model.parameters()}
        hooked(model, lambda p: own[p].step())
        return Nothing()

    return build


def _released(**options):
    def build(model: nn.Module):
        opt = fusedopt.AdamW(model.parameters(), **OPTIONS)
        fusedopt.release_gradients(model, opt, **options)
        return opt

    return build


def _step_parameter(model: nn.Module):
    opt = fusedopt.AdamW(model.parameters(), **OPTIONS)
    hooked(model, opt.step_parameter)
    return opt


class _FreesAll:
    """Backward without a step that frees its gradients as all others do."""

    def __init__(self, model: nn.Module):
        self.model = model

    def step(self) -> None:
        pass

    def zero_grad(self) -> None:
        self.model.zero_grad()


WAYS = {
    "fusedopt, step()": lambda model: fusedopt.AdamW(model.parameters(), **OPTIONS),
    "torch fused, step()": lambda model: torch.optim.AdamW(model.parameters(), fused=True, **OPTIONS),
    "fusedopt released": _released(),
    "fusedopt released, 10 groups": None,  # needs the model's size
    "fusedopt released, no collecting": _released(collect=0),
    "fusedopt step_parameter": _step_parameter,
    "fusedopt, one for each": _each_its_own(lambda ps: fusedopt.AdamW(ps, **OPTIONS)),
    "torch fused, one for each": _each_its_own(lambda ps: torch.optim.AdamW(ps, fused=True, **OPTIONS)),
}


def times(width: int, depth: int, rounds: int) -> list[dict]:
    """Microseconds for each parameter, and the steps after which they stay so: plans are made in the first two."""
    runs, first = {}, {}
    for name, build in WAYS.items():
        torch.manual_seed(0)
        model = Stack(width, depth)
        if build is None:
            build = _released(collect=4 * width * width * -(-depth // 10))
        opt = build(model)
        runs[name] = (model, opt)
        first[name] = [seconds(lambda model=model, opt=opt, i=i: train(model, opt, i)) for i in range(4)]
    alone = Stack(width, depth)
    runs["backward alone"] = (alone, _FreesAll(alone))
    took = {name: [] for name in runs}
    for i in range(rounds + 2):
        for name, (model, opt) in runs.items():
            time = seconds(lambda model=model, opt=opt, i=i: train(model, opt, i))
            if i >= 2:
                took[name].append(time)
    records = []
    base = took["backward alone"]
    normal = took["fusedopt, step()"]
    for name, mine in took.items():
        over = quartiles([(a - b) / depth * 1e6 for a, b in zip(mine, base, strict=True)])
        records.append({
            "name": name, "tensors": depth, "microseconds_per_tensor": over,
            "ratio_to_ordinary": quartiles([a / b for a, b in zip(mine, normal, strict=True)]),
            "first_steps_microseconds_per_tensor": " ".join(f"{t / depth * 1e6:.0f}" for t in first.get(name, [])) or "-",
        })  # fmt: skip
    return records


def single(rounds: int, count: int) -> list[dict]:
    """Microseconds of one optimizer with one small tensor."""
    makers = {
        "torch AdamW": lambda p: torch.optim.AdamW([p], **OPTIONS),
        "torch AdamW fused": lambda p: torch.optim.AdamW([p], fused=True, **OPTIONS),
        "fusedopt AdamW": lambda p: fusedopt.AdamW([p], **OPTIONS),
        "fusedopt AdamW int8": lambda p: fusedopt.AdamW([p], state_format="int8", **OPTIONS),
    }
    params = [nn.Parameter(torch.randn(64, 64)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    built = {name: [] for name in makers}
    stepped = {name: [] for name in makers}
    for _ in range(rounds):
        for name, make in makers.items():
            opts: list = []
            built[name].append(seconds(lambda opts=opts, make=make: opts.extend(make(p) for p in params)) / count * 1e6)

            def step(opts=opts):
                for opt in opts:
                    opt.step()

            step()
            step()
            stepped[name].append(min(seconds(step) for _ in range(3)) / count * 1e6)
    base = "torch AdamW"
    return [
        {
            "name": name, "construction_microseconds": quartiles(built[name]), "step_microseconds": quartiles(stepped[name]),
            "construction_ratio": quartiles([a / b for a, b in zip(built[name], built[base], strict=True)]),
            "step_ratio": quartiles([a / b for a, b in zip(stepped[name], stepped[base], strict=True)]),
        }
        for name in makers
    ]  # fmt: skip


def on_one_thread(work):
    """Host time, without waiting for threads of a shared machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(threads)


def measure(parts, quick: bool, rounds: int, show=print) -> dict:
    """The JSON document. show(text) gets each part's table as it is done."""
    work = {
        "memory": lambda: memory(*((640, 4) if quick else (1024, 12))),
        "time": lambda: on_one_thread(lambda: times(16, 20 if quick else 200, rounds)),
        "single": lambda: on_one_thread(lambda: single(rounds, 10 if quick else 100)),
    }
    document = {
        "schema": SCHEMA, "kind": "release", "machine": machine.stamp(CPU), "settings": {"rounds": rounds, "quick": quick},
        "parts": {},
    }  # fmt: skip
    for part in parts:
        document["parts"][part] = work[part]()
        gc.collect()
        show(table(part, document["parts"][part]))
    return document


def main(args: argparse.Namespace) -> int:
    document = measure(
        args.part or PARTS,
        args.quick,
        args.rounds or (3 if args.quick else 15),
        lambda text: print(text + "\n", flush=True),
    )
    path = args.out or RESULTS
    if path.suffix != ".json":
        path = path / f"release-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}-cpu.json"
    save(document, path)
    print(f"written: {path}")
    return 0
