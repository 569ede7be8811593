"""What the checks share: their registry, ways to fail, small problems, and comparisons."""

from __future__ import annotations

import io
from collections.abc import Callable

import torch

from bench.conformance.subjects import Subject

SHAPES = ((64, 80), (7,), (5, 4))
# A check takes a Subject, returns None where it passes, and raises: Failed, NotMeant, or whatever the optimizer raised.
CHECKS: dict[str, Callable[[Subject], None]] = {}
BEYOND: set[str] = set()  # checks of what we ask of ourselves and torch.optim does not promise


class Failed(Exception):
    """The optimizer did something wrong."""


class NotMeant(Exception):
    """The check has no meaning for this rule."""


def check(title: str, beyond: bool = False):
    def add(function):
        CHECKS[title] = function
        if beyond:
            BEYOND.add(title)
        return function

    return add


def need(condition, reason: str) -> None:
    if not condition:
        raise Failed(reason)


def parameters(shapes=SHAPES, dtype=torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in shapes]


def set_grads(params, step: int) -> None:
    gen = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=gen))


def train(opt, params, first: int, last: int) -> None:
    for step in range(first, last):
        set_grads(params, step)
        opt.step()


def set_lr(opt, lr: float) -> None:
    """As torch's schedulers do it: a tensor is filled."""
    for group in opt.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def copies(params) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def values(params) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def distance(a, b) -> float:
    return max(
        float((x.detach().double() - y.detach().double()).abs().max()) for x, y in zip(a, b, strict=True) if x.numel()
    )


def need_same(a, b, what: str) -> None:
    if not same(a, b):
        raise Failed(f"{what}: parameters differ by up to {distance(a, b):.1e}")


def need_near(a, b, start, what: str, share: float) -> None:
    """The two ended within a share of the way that b went from the start."""
    way = max(float((y.detach().double() - s.double()).norm()) for y, s in zip(b, start, strict=True))
    off = max(float((x.detach().double() - y.detach().double()).norm()) for x, y in zip(a, b, strict=True))
    need(off <= share * way, f"{what}: off by {off / max(way, 1e-30):.0%} of the way")


def saved_and_loaded(thing, weights_only: bool = False):
    """Through torch.save, as a checkpoint goes: some states cannot be deep-copied."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def state_bytes_per_parameter(s: Subject) -> float:
    """Bytes of state for each element of a bf16 matrix of 256 x 1024."""
    (p,) = parameters(((256, 1024),), torch.bfloat16)
    opt = s.make([p])
    train(opt, [p], 0, 1)

    def size(value) -> int:
        if isinstance(value, torch.Tensor):
            if hasattr(value, "__tensor_flatten__"):
                return sum(size(getattr(value, name)) for name in value.__tensor_flatten__()[0])
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        if isinstance(value, (list, tuple)):
            return sum(map(size, value))
        return sum(map(size, vars(value).values())) if hasattr(value, "__dict__") else 0

    return sum(size(value) for value in opt.state[p].values()) / p.numel()
