"""Benchmark cases: the parameter shapes of real models, one large tensor, many tiny ones.

A case is named `NAME[@LAYERS][:DTYPE]`: `llama2_7b@4` has 4 of its 32 layers, `gpt2_124m:bf16` has bf16 parameters and
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """What an optimizer steps. Sizes are in elements."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    param_dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype = torch.float32

    @property
    def tensors(self) -> int:
        return len(self.shapes)

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def gradient_bytes(self) -> int:
        return self.elements * self.grad_dtype.itemsize

    @property
    def parameter_bytes(self) -> int:
        return self.elements * self.param_dtype.itemsize

    def shrunk(self, elements: int) -> Case:
        """The same number of tensors with every dimension scaled down until the whole has at most `elements`."""
        if self.elements <= elements:
            return self
        factor, shapes = 1.0, self.shapes
        while sum(map(math.prod, shapes)) > elements and factor > 1e-6:
            factor *= 0.8
            shapes = tuple(tuple(max(1, int(d * factor)) if d > 3 else d for d in shape) for shape in self.shapes)
        return replace(self, name=f"{self.name}<{elements}", shapes=shapes)


def one_large(layers: int) -> Shapes:
    return [(8192, 8192)]


def mixed(layers: int) -> Shapes:
    """Per layer 4 matrices and 12 vectors of at most 2112 elements: biases, norms, layer scales."""
    d = 528
    layer = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d), (3 * d,), (d,), (4 * d,), (d,)]
    return (layer + [(d,)] * 6 + [(66,)] * 2) * layers


def tiny(layers: int) -> Shapes:
    return [(64,)] * 1000


def gpt2(layers: int) -> Shapes:
    d = 768
    norm = [(d,), (d,)]
    layer = [*norm, (d, 3 * d), (3 * d,), (d, d), (d,), *norm, (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *layer * layers, *norm]


def bert_large(layers: int) -> Shapes:
    d = 1024
    norm = [(d,), (d,)]
    layer = [*[(d, d), (d,)] * 4, *norm, (4 * d, d), (4 * d,), (d, 4 * d), (d,), *norm]
    return [(30522, d), (512, d), (2, d), *norm, *layer * layers, (d, d), (d,)]


def vit_huge(layers: int) -> Shapes:
    d = 1280
    norm = [(d,), (d,)]
    layer = [*norm, (3 * d, d), (3 * d,), (d, d), (d,), *norm, (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(1, 1, d), (1, 257, d), (d, 3, 14, 14), (d,), *layer * layers, *norm, (1000, d), (1000,)]


def llama(vocabulary: int, hidden: int, key_value: int, d: int = 4096, tied: bool = False) -> Callable[[int], Shapes]:
    def shapes(layers: int) -> Shapes:
        attention = [(d, d), (key_value, d), (key_value, d), (d, d)]
        layer = [*attention, (hidden, d), (hidden, d), (d, hidden), (d,), (d,)]
        head = [] if tied else [(vocabulary, d)]
        return [(vocabulary, d), *layer * layers, (d,), *head]

    return shapes


# name: (shapes of a number of layers, layers)
MODELS: dict[str, tuple[Callable[[int], Shapes], int]] = {
    "one_large": (one_large, 1),
    "mixed_400": (mixed, 25),
    "tiny_1000": (tiny, 1),
    "gpt2_124m": (gpt2, 12),
    "bert_large": (bert_large, 24),
    "vit_h": (vit_huge, 32),
    "llama3_1b": (llama(128256, 8192, 512, 2048, tied=True), 16),
    "llama2_7b": (llama(32000, 11008, 4096), 32),
    "llama3_8b": (llama(128256, 14336, 1024), 32),
}
DEFAULT = (
    "one_large", "mixed_400", "tiny_1000", "gpt2_124m", "gpt2_124m:bf16", "bert_large", "llama3_1b:bf16",
)  # fmt: skip


def select(specs: list[str] | tuple[str, ...]) -> list[Case]:
    """Cases for specs `GLOB[@LAYERS][:DTYPE]`, in order, each once. Raises ValueError for one that matches none."""
    found: dict[str, Case] = {}
    for spec in specs:
        rest, _, dtype = spec.partition(":")
        pattern, _, layers = rest.partition("@")
        names = [name for name in MODELS if fnmatchcase(name, pattern)]
        if not names or dtype and dtype not in DTYPES or layers and not layers.isdigit():
            raise ValueError(
                f"no case matches {spec!r}: write NAME[@LAYERS][:DTYPE] with a name or glob of {', '.join(MODELS)} "
                f"and a dtype of {', '.join(DTYPES)}"
            )
        for name in names:
            build, depth = MODELS[name]
            full = name + (f"@{layers}" if layers else "") + (f":{dtype}" if dtype else "")
            element = DTYPES[dtype or "fp32"]
            found[full] = Case(full, tuple(build(int(layers or depth))), element, element)
    return list(found.values())
