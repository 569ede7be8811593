"""The frozen registry of providers: every optimizer the benchmarks can step, ours per backend and the rivals.

A provider that cannot run on the present machine answers with the reason, which the results keep. Names are
`package/rule/variant`; those of this package are `fusedopt-BACKEND/RULE/STATES`, with `+sr` for stochastic rounding and
`+kahan`, `+split24`, ... for the other ways to keep 16-bit parameters.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

import fusedopt
from bench.cases import Case
from fusedopt.backends.base import BucketKey
from fusedopt.backends.select import get_backend
from fusedopt.formats import get_format, list_formats
from fusedopt.precision import get_precision, list_precisions

SMALL = 4096  # elements below which 8-bit optimizers keep fp32 states: ours, bitsandbytes and torchao alike
INT8 = 1 + 4 / 256
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Provider:
    """An optimizer to measure.

    make(params) -> optimizer. states: number of state tensors. width: bytes per element of a state, or None for the
    parameter's own. module: what must be importable. backend: ours, by name. temporary: bytes that a step allocates for
    its duration per element of the largest tensor, or with `together` of all (for the memory guard; the benchmark measures
    the true figure).
    """

    name: str
    rule: str
    make: Callable
    states: int
    width: float | None = 4.0
    module: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALVES)
    default: bool = True
    backend: str | None = None
    formats: tuple[str, ...] = ()
    precision: str = "nearest"
    temporary: float = 0.0
    together: bool = False

    def state_bytes(self, case: Case) -> float:
        """Bytes of all states of a case."""
        width = case.param_dtype.itemsize if self.width is None else self.width
        if width < 2:
            small = sum(n for n in map(math.prod, case.shapes) if n < SMALL)
            return self.states * (4 * small + width * (case.elements - small))
        return self.states * width * case.elements

    def temporary_bytes(self, case: Case) -> float:
        return self.temporary * (case.elements if self.together else max(map(math.prod, case.shapes)))

    def step_bytes(self, case: Case, optimizer) -> float:
        """Bytes a step must move: ours from the plan, others' as a read of p, g and states and a write of p and states.

        LAMB adds the smaller of reading p and the states again, or storing the update and reading it and p.
        """
        if self.backend is not None:
            return optimizer.plan().bytes
        p, s = case.parameter_bytes, self.state_bytes(case)
        extra = min(3 * p, p + s) if self.rule == "lamb" else 0
        return 2 * p + case.gradient_bytes + 2 * s + extra

    def why_not(self, case: Case, device: torch.device) -> str | None:
        """None, or why this provider cannot step the case on the device."""
        if device.type not in self.devices:
            return f"not for {device.type} tensors"
        if case.param_dtype not in self.dtypes:
            return f"not for {str(case.param_dtype).removeprefix('torch.')} parameters"
        if self.module is not None:
            try:
                importlib.import_module(self.module)
            except Exception as error:  # rivals fail to import in many ways; all of them are a reason to skip
                text = (str(error).splitlines() or [""])[0]
                return f"cannot import {self.module}: {type(error).__name__}: {text}"
        if self.backend is not None:
            return backend_why_not(self.backend, self.rule, self.formats, self.precision, case, device)
        return None


def backend_why_not(backend, rule, formats, precision, case: Case, device: torch.device) -> str | None:
    """None, or why one of our backends cannot step the case."""
    rule = {"adamw": "adam", "sgd": "sgd_momentum"}.get(rule, rule)
    key = BucketKey(device, backend, rule, case.param_dtype, case.grad_dtype, formats, precision, True)
    try:
        return get_backend(backend).supports(key)
    except ImportError as error:
        return f"backend {backend!r} is not there: {error}"


OPTIONS = {"lr": 1e-4, "weight_decay": 1e-2}


def _fusedopt(backend: str, rule: str, form: str, precision: str = "nearest", default: bool = True) -> Provider:
    states = {"adamw": 2, "lamb": 2, "lion": 1, "sgd": 1}[rule]
    keeps = get_precision(precision)
    width = get_format(form).bytes_per_element
    if keeps.companion:
        width += (keeps.storage or torch.bfloat16).itemsize / states  # counted with the states
    more = {"sgd": {"momentum": 0.9}, "lamb": {"clip_grad_norm": None}}.get(rule, {})
    options = {**OPTIONS, **more, "state_format": form, "param_precision": precision, "backend": backend}
    suffix = {"nearest": "", "stochastic": "+sr"}.get(precision, f"+{precision}")
    name = f"fusedopt-{backend}/{rule}/{form}{suffix}"
    return Provider(
        name, rule, lambda params: fusedopt.create(rule, params, **options), states, width,
        devices={"cpu": ("cpu",), "reference": ("cpu", "cuda")}.get(backend, ("cuda",)),
        dtypes=(torch.float32, *HALVES) if precision == "nearest" else keeps.dtypes, default=default,
        backend=backend, formats=(form,) * states, precision=precision,
        temporary=40.0 if backend == "reference" else 0.0,
    )  # fmt: skip


def _ours() -> list[Provider]:
    out = []
    for backend in ("cpu", "cuda", "triton", "reference"):
        default = backend != "reference"
        out += [_fusedopt(backend, "adamw", form, default=default) for form in list_formats()]
        out += [_fusedopt(backend, "adamw", form, "stochastic", default) for form in ("fp32", "int8")]
        kept = [name for name in list_precisions() if get_precision(name).companion]
        out += [_fusedopt(backend, "adamw", form, name, default) for name in kept for form in ("fp32", "int8")]
        out += [_fusedopt(backend, "lion", form, default=default) for form in ("fp32", "int8", "int4")]
        out += [_fusedopt(backend, rule, "fp32", default=default) for rule in ("sgd", "lamb")]
    return out


def _rival(name: str, module: str, attribute: str, states: int, width: float | None, more=None, **fields) -> Provider:
    """A class of another package, looked up when it is made."""
    options = {**OPTIONS, **(more or {})}

    def make(params):
        return getattr(importlib.import_module(module), attribute)(params, **options)

    return Provider(name, name.split("/")[1], make, states, width, module=module, **fields)


def _compiled(params):
    optimizer = torch.optim.AdamW(params, foreach=True, **OPTIONS)
    optimizer.step = torch.compile(optimizer.step)
    return optimizer


def _rivals() -> list[Provider]:
    adamw, fused, foreach = "AdamW", {"fused": True}, {"foreach": True}
    whole, two, many = {"temporary": 4.0, "together": True}, {"temporary": 8.0}, {"temporary": 28.0}
    four = {"temporary": 16.0}
    cpu, cuda = {"devices": ("cpu",)}, {"devices": ("cuda",)}
    return [
        _rival("torch/adamw/fused", "torch.optim", adamw, 2, None, fused),
        _rival("torch/adamw/foreach", "torch.optim", adamw, 2, None, foreach, **whole),
        _rival("torch/adamw/loop", "torch.optim", adamw, 2, None, {"foreach": False}, **two),
        Provider("torch/adamw/compile", "adamw", _compiled, 2, None, default=False, **two),
        _rival("torch/sgd/fused", "torch.optim", "SGD", 1, None, {"momentum": 0.9, **fused}),
        _rival("torch/sgd/foreach", "torch.optim", "SGD", 1, None, {"momentum": 0.9, **foreach}, **whole),
        _rival("bitsandbytes/adamw/fp32", "bitsandbytes.optim", "AdamW32bit", 2, 4.0, **many),
        _rival("bitsandbytes/adamw/int8", "bitsandbytes.optim", "AdamW8bit", 2, INT8, **many),
        _rival("bitsandbytes/lion/int8", "bitsandbytes.optim", "Lion8bit", 1, INT8, **many),
        _rival("torchao/adamw/int8", "torchao.optim", "AdamW8bit", 2, INT8, **many),
        _rival("torchao/adamw/int4", "torchao.optim", "AdamW4bit", 2, 0.5 + 4 / 128, **many),
        _rival("torchao/adamw/fp8", "torchao.optim", "AdamWFp8", 2, INT8, **many),
        _rival("optimi/adamw/default", "optimi", adamw, 2, None, **two),
        _rival("optimi/lion/default", "optimi", "Lion", 1, None, **two),
        _rival("flashoptim/adamw/int8", "flashoptim", "FlashAdamW", 1, 3.125, dtypes=HALVES, **cuda),
        _rival("apex/adamw/fused", "apex.optimizers", "FusedAdam", 2, 4.0, **cuda),
        _rival("lion_pytorch/lion/loop", "lion_pytorch", "Lion", 1, None, **two),
        _rival("lion_pytorch/lion/triton", "lion_pytorch", "Lion", 1, None, {"use_triton": True}, **cuda, **two),
        _rival("pytorch_optimizer/lion/foreach", "pytorch_optimizer", "Lion", 1, None, foreach, **four),
        _rival("pytorch_optimizer/lamb/loop", "pytorch_optimizer", "Lamb", 2, None, {"max_grad_norm": 0.0}, **four),
        _rival("heavyball/adamw/compile", "heavyball", adamw, 2, None, default=False, **two),
        _rival("deepspeed/adamw/cpu", "deepspeed.ops.adam", "DeepSpeedCPUAdam", 2, 4.0, **cpu),
        _rival("deepspeed/lion/cpu", "deepspeed.ops.lion", "DeepSpeedCPULion", 1, 4.0, **cpu),
    ]


PROVIDERS: dict[str, Provider] = {p.name: p for p in (*_ours(), *_rivals())}


def baseline(rule: str) -> str:
    """What the times of a rule are held against: torch's fused optimizer of that rule, or its AdamW."""
    return f"torch/{rule}/fused" if f"torch/{rule}/fused" in PROVIDERS else "torch/adamw/fused"


def select(globs: list[str] | None, device: torch.device) -> list[Provider]:
    """Providers whose names match, or all default ones for the device; baselines come first and always.

    Raises ValueError for a glob that matches none.
    """
    if not globs:
        chosen = [p for p in PROVIDERS.values() if p.default and device.type in p.devices]
    else:
        chosen = []
        for glob in globs:
            found = [p for p in PROVIDERS.values() if fnmatchcase(p.name, glob)]
            if not found:
                raise ValueError(f"no provider matches {glob!r}; they are: {', '.join(PROVIDERS)}")
            chosen += found
    first = [PROVIDERS[name] for name in dict.fromkeys(baseline(p.rule) for p in chosen)]
    return list(dict.fromkeys([*first, *chosen]))
