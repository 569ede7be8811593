"""The optimizer configurations, formats and backends that the behavioural tests run over."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch

from fusedopt.backends.base import BucketKey
from fusedopt.backends.select import get_backend
from fusedopt.rule import optimizers


@dataclass(frozen=True)
class Config:
    """A class with hyperparameters that train the small problems of these tests, and its torch.optim counterpart."""

    name: str
    optimizer: str
    options: dict = field(default_factory=dict)
    torch_class: type | None = None

    @property
    def cls(self) -> type:
        return optimizers()[self.optimizer]

    def make(self, params, backend: str | None = None, **changes):
        return self.cls(params, **{**self.options, "backend": backend_argument(backend), **changes})

    def make_torch(self, params, **changes):
        return self.torch_class(params, **{**self.options, **changes})


CONFIGS = [
    Config("sgd", "sgd", {"lr": 0.02, "weight_decay": 0.01}, torch.optim.SGD),
    Config("sgd_momentum", "sgd", {"lr": 0.01, "momentum": 0.9, "dampening": 0.1}, torch.optim.SGD),
    Config(
        "sgd_nesterov", "sgd", {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, torch.optim.SGD
    ),
    Config("adam", "adam", {"lr": 0.02, "weight_decay": 0.1}, torch.optim.Adam),
    Config("adamw", "adamw", {"lr": 0.02, "weight_decay": 0.1}, torch.optim.AdamW),
    Config("adamw_amsgrad", "adamw", {"lr": 0.02, "amsgrad": True}, torch.optim.AdamW),
    Config("nadam", "nadam", {"lr": 0.02, "weight_decay": 0.1}, torch.optim.NAdam),
    Config("lion", "lion", {"lr": 0.01, "weight_decay": 0.1}),
    Config("innaprop", "innaprop", {"lr": 0.02, "weight_decay": 0.1}),
    Config("opt_amsgrad", "opt_amsgrad", {"lr": 0.02, "weight_decay": 0.1}),
    Config("madgrad", "madgrad", {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-20}),
    Config("schedulefree_sgd", "schedulefree_sgd", {"lr": 0.1, "weight_decay": 0.1, "warmup_steps": 3}),
    Config("schedulefree_adamw", "schedulefree_adamw", {"lr": 0.02, "weight_decay": 0.1}),
    Config("adamw_cautious", "adamw", {"lr": 0.02, "weight_decay": 0.1, "cautious": True}),
    Config("lars", "lars", {"lr": 0.3, "weight_decay": 0.01, "trust_coefficient": 0.05}),
    Config("lars_plain", "lars", {"lr": 0.3, "momentum": 0.0, "weight_decay": 0.01, "trust_coefficient": 0.05}),
    Config("lamb", "lamb", {"lr": 0.02, "weight_decay": 0.1}),
]
COMPRESSED = [  # their states are no tensors of the parameter's shape
    Config("adafactor", "adafactor", {"lr": 0.02, "weight_decay": 0.1}),
    Config("adafactor_momentum", "adafactor", {"lr": 0.02, "weight_decay": 0.1, "beta1": 0.9}),
    Config("microadam", "microadam", {"lr": 0.01, "density": 0.1}),
]
EVERY = [*CONFIGS, *COMPRESSED]
BY_NAME = {c.name: c for c in EVERY}
WITH_STATES = [c for c in CONFIGS if c.name not in ("sgd", "lars_plain")]
WITH_TORCH = [c for c in CONFIGS if c.torch_class]


def assert_resumes(build, shapes, before: int, steps: int) -> None:
    """Runs of build(params) that save and load a state dict after `before` of their steps end with the bits of straight ones."""
    straight, params = parameters(*shapes), parameters(*shapes)
    opt, other = build(straight), build(params)
    for step in range(steps):
        if step == before:
            saved = copy.deepcopy(other.state_dict())
            other = build(params)
            other.load_state_dict(saved)
        for ps, o in ((straight, opt), (params, other)):
            set_grads(ps, step)
            o.step()
    assert_same_bits([p.detach() for p in params], [p.detach() for p in straight])


def native_cpu() -> bool:
    """Whether the extension of the cpu backend is built."""
    key = BucketKey(torch.device("cpu"), "cpu", "sgd", torch.float32, torch.float32, (), "nearest", True)
    return get_backend("cpu").supports(key) is None


BACKENDS = ["reference", "cpu"] if native_cpu() else ["reference"]


def backend_argument(backend: str | None) -> str | None:
    """Native steps are chosen automatically: fp64 parameters may take the reference. test_plan checks the choice."""
    return None if backend == "cpu" else backend


def each_config(configs=CONFIGS):
    return pytest.mark.parametrize("config", configs, ids=lambda c: c.name)


each_backend = pytest.mark.parametrize("backend", BACKENDS)


def parameters(*shapes, dtype=torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in shapes]


def set_grads(params, step: int, scale: float = 1.0) -> None:
    """The same gradients for every optimizer at a step, in the dtype and layout of each parameter."""
    gen = torch.Generator().manual_seed(1000 + step)
    for p in params:
        values = torch.randn(p.shape, generator=gen) * scale
        p.grad = torch.empty_like(p).copy_(values)


def train(opt, params, first: int, last: int) -> None:
    for step in range(first, last):
        set_grads(params, step)
        opt.step()


def copies(params) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def tensors(opt, params) -> list[torch.Tensor]:
    """Copies of parameters and of every state, in a fixed order."""
    out = [p.detach().clone() for p in params]
    for p in params:
        out += [v.clone() for _, v in sorted(opt.state.get(p, {}).items())]
    return out


def assert_same_bits(got, want, what: str = "") -> None:
    assert len(got) == len(want), what
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, f"{what} tensor {i}"
        same = torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
        assert same, f"{what} tensor {i} differs"
