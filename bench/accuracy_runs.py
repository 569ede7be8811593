"""What `bench accuracy` runs: one training of the demo's model with one optimizer, and the error of formats on its moments."""

from __future__ import annotations

import math
import os
import statistics
from dataclasses import dataclass, field, replace

import torch

import fusedopt
from fusedopt import masters
from fusedopt.cli.corpus import load
from fusedopt.cli.gpt import GPT
from fusedopt.cli.training import RECIPES, Setup, evaluate, schedule
from fusedopt.formats import Format, get_format, list_formats

DEMO = {"steps": 240}  # the demo's own size otherwise
SMALL = {"steps": 500, "batch": 8, "context": 48, "width": 96, "layers": 2}  # 0.27 M parameters
LONG = {**SMALL, "steps": 2000}
LOOKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 1500, 2000)


@dataclass(frozen=True)
class Config:
    """An AdamW to train with. package: fusedopt, torch, bitsandbytes or torchao; cls: the class of a rival."""

    name: str
    group: str  # formats, precisions or rivals
    package: str = "fusedopt"
    cls: str = ""
    dtype: str = "float32"
    options: dict = field(default_factory=dict)

    def optimizer(self, model: GPT) -> torch.optim.Optimizer:
        """With its peak learning rates."""
        decay = RECIPES["adamw"]["weight_decay"]
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return self.build(groups)

    def build(self, groups: list[dict]) -> torch.optim.Optimizer:
        options = {k: v for k, v in RECIPES["adamw"].items() if k != "weight_decay"} | self.options
        if self.package == "fusedopt":
            return fusedopt.AdamW(groups, **options)
        if self.package == "torch":
            return torch.optim.AdamW(groups, fused=True, **options)
        os.environ.setdefault(
            "TORCHDYNAMO_DISABLE", "1"
        )  # torchao would compile each shape; eager gives the same states
        module = __import__(f"{self.package}.optim", fromlist=[self.cls])
        return getattr(module, self.cls)(groups, **options)


FORMATS = [Config("fp32", "formats")]
FORMATS += [Config(n, "formats", options={"state_format": n}) for n in list_formats() if n != "fp32"]
PRECISIONS = [
    Config(f"bf16 {name}", "precisions", dtype="bfloat16", options={"param_precision": name})
    for name in fusedopt.list_precisions()
]
PRECISIONS += [
    Config(
        f"bf16 split24, {f}", "precisions", dtype="bfloat16", options={"param_precision": "split24", "state_format": f}
    )
    for f in ("8bit", "4bit")
]
RIVALS = [
    Config("torch AdamW", "rivals", "torch"),
    Config("bitsandbytes 8-bit", "rivals", "bitsandbytes", "AdamW8bit"),
    Config("torchao 8-bit", "rivals", "torchao", "AdamW8bit"),
    Config("torchao fp8", "rivals", "torchao", "AdamWFp8"),
    Config("torchao 4-bit", "rivals", "torchao", "AdamW4bit"),
]
BASE = FORMATS[0]


def available(config: Config) -> str | None:
    """Why a config cannot run here, or None."""
    if config.package in ("fusedopt", "torch"):
        return None
    try:
        getattr(__import__(f"{config.package}.optim", fromlist=[config.cls]), config.cls)
    except (ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _weights(model, opt) -> torch.Tensor:
    """All fp32 weights as one vector."""
    return torch.cat([masters.weights(p, opt.state.get(p, {})).view(-1) for p in model.parameters()])


def _state_bytes(opt) -> int:
    """Bytes of all states; torchao's are tensor subclasses around codes, scales and a table each."""

    def size(t: torch.Tensor) -> int:
        if hasattr(t, "__tensor_flatten__"):
            return sum(size(getattr(t, name)) for name in t.__tensor_flatten__()[0])
        return t.numel() * t.element_size()

    found = (t for entry in opt.state.values() for name, t in entry.items() if name != "step")
    return sum(size(t) for t in found if isinstance(t, torch.Tensor) and t.dim())


def train(config: Config, size: dict, seed: int, looks=(), on_step=None) -> dict:
    """One run. Returns held_out and train loss (nats per byte), bytes of state per parameter, and fp32 weights at `looks`."""
    torch.set_num_threads(1)
    steps, shape = size["steps"], {k: v for k, v in size.items() if k != "steps"}
    setup = Setup(load(None, shape.get("context", Setup.context)), torch.device("cpu"), steps, seed=seed, **shape)
    model = replace(setup, dtype=getattr(torch, config.dtype)).model()
    opt = config.optimizer(model)
    peaks = [float(group["lr"]) for group in opt.param_groups]
    batches = setup.corpus.windows(steps * setup.batch, setup.context, seed).split(setup.batch)
    losses, snapshots = [], {}
    if 0 in looks:
        snapshots[0] = _weights(model, opt)
    for step, windows in enumerate(batches):
        for group, peak in zip(opt.param_groups, peaks, strict=True):
            rate = peak * schedule(step, steps)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        loss = model.loss(windows)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        if step + 1 in looks:
            snapshots[step + 1] = _weights(model, opt)
        if on_step is not None:
            on_step(step + 1, model, opt)
    held = setup.corpus.windows(4 * setup.held_out_windows, setup.context, 12345, held_out=True)
    return {
        "held_out": evaluate(model, held, setup.batch),
        "train": statistics.fmean(losses[-max(1, steps // 20) :]),
        "state_bytes": _state_bytes(opt) / sum(p.numel() for p in model.parameters()),
        "weights": snapshots,
    }


# Errors of formats on real moments


def _kind(name: str, layers: int) -> str:
    if "norm" in name:
        return "norms"
    if name.startswith(("bytes", "positions")):
        return "embeddings"
    if name.startswith("head"):
        return "head"
    return "first block" if ".0." in name else "last block" if f".{layers - 1}." in name else "middle blocks"


def coders() -> dict:
    """name -> f(x, signed): what is left of a flat fp32 tensor after a format, ours and rivals' where they run."""

    def ours(form: Format):
        def code(x, signed):
            random16 = torch.randint(0, 65536, x.shape) if form.stochastic else None
            stored, scale = form.encode(x, signed, random16)
            return form.decode(stored, scale, signed, torch.float64, x.numel())

        return code

    found = {name: ours(get_format(name)) for name in list_formats() if name != "fp32"}
    for block in (32, 64, 128):
        found[f"int8c, block {block}"] = ours(replace(get_format("int8c"), block=block))
    try:
        import bitsandbytes.functional as bnb

        maps = {signed: bnb.create_dynamic_map(signed) for signed in (True, False)}

        def bnb8(x, signed):
            codes, state = bnb.quantize_blockwise(x, code=maps[signed], blocksize=256)
            return bnb.dequantize_blockwise(codes, state).double().view(-1)

        found["bitsandbytes 8-bit"] = bnb8
    except ImportError:
        pass
    try:
        from torchao.optim import quant_utils as ao

        linear = torch.linspace(0, 1, 17)[1:]

        def ao4(x, signed):
            n = x.numel() // 128 * 128  # it takes whole blocks only
            table = torch.tensor(ao.create_dynamic_map(True, 3, 4)) if signed else linear
            scaled, scale = ao.scale_tensor(x[:n], 128)
            codes = ao.quantize_4bit_with_qmap(scaled, table)
            values = (table[codes.long()].view(-1, 128) * scale[:, None]).view(-1)
            return torch.cat([values, x[n:]]).double()

        found["torchao 4-bit"] = ao4
    except ImportError:
        pass
    return found


def moment_errors(seed: int, steps: tuple[int, ...]) -> list[dict]:
    """Trains the demo's model with fp32 AdamW and codes its moments at `steps`: relative rms errors by kind of layer.

    update is m / (sqrt(v) + eps) with coded moments against the exact one; largest its maximum, exact about 1.
    """
    rows = []
    codes = coders()

    def look(step: int, model, opt) -> None:
        if step not in steps:
            return
        for name, p in model.named_parameters():
            m, v = (opt.state[p][k].view(-1).float() for k in ("exp_avg", "exp_avg_sq"))
            exact = m.double() / (v.double().sqrt() + 1e-8)
            for form, code in codes.items():
                dm, dv = code(m, True), code(v, False)
                update = dm / (dv.sqrt() + 1e-8)
                rows.append({
                    "step": step, "tensor": name, "kind": _kind(name, Setup.layers), "format": form,
                    "first": _relative(dm, m.double()), "second": _relative(dv.sqrt(), v.double().sqrt()),
                    "update": _relative(update, exact), "largest": update.abs().max().item(),
                })  # fmt: skip

    train(BASE, DEMO, seed, on_step=look)
    return rows


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    norm = want.norm().item()
    return (got - want).norm().item() / norm if norm > 0 else math.nan


SPREADS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def spread_errors() -> dict[str, dict[float, float]]:
    """The error of the update, relative rms, where the gradients of neighbours differ in scale: format -> spread -> error.

    An element's gradients are normal with a scale of its own, exp(spread * normal): 50 steps of Adam's moments.
    """
    torch.set_num_threads(1)
    codes = coders()
    out: dict[str, dict[float, float]] = {name: {} for name in codes}
    for spread in SPREADS:
        gen = torch.Generator().manual_seed(0)
        scale = torch.exp(spread * torch.randn(1 << 16, generator=gen))
        m, v = torch.zeros(2, 1 << 16)
        for _ in range(50):
            g = scale * torch.randn(1 << 16, generator=gen)
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        exact = m.double() / v.double().sqrt()
        for name, code in codes.items():
            second = code(v, False)
            second = torch.where(second > 0, second, torch.full_like(second, 1e-16))  # eps, where a format gives zero
            out[name][spread] = _relative(code(m, True) / second.sqrt(), exact)
    return out


def drift(config: Config, seed: int) -> dict:
    """The LONG run with its weights at LOOKS."""
    return train(config, LONG, seed, looks=(0, *LOOKS))
