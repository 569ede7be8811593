"""LoRA adapters: the pairs of factors in a model, learning rates for them (LoRA+, arXiv 2402.12354), and LoRA-One's start
(arXiv 2502.01235). An adapter adds W = s B A to a weight, with A [r, n], B [m, r]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fusedopt.options import check_nonnegative

NAMES = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(frozen=True, eq=False)
class LoraPair:
    """One adapter: its product scale * B @ A is what is added to a weight.

    name: of its module, with the adapter's name where there are several. A: [r, n]. B: [m, r]. scale: s.
    transposed: whether the weight is [n, m], as that of an embedding is. embedding: whether it is an embedding's.
    """

    name: str
    A: torch.Tensor
    B: torch.Tensor
    scale: float = 1.0
    transposed: bool = False
    embedding: bool = False

    def __post_init__(self):
        a, b, what = tuple(self.A.shape), tuple(self.B.shape), f"LoRA pair {self.name!r}"
        if len(a) != 2 or len(b) != 2:
            raise ValueError(
                f"{what}: factors of shapes {a} and {b} are no matrices: the adapter of a convolution, whose product is no matrix "
                "product. Leave it out with filter=, and it is stepped like any other parameter."
            )
        if a[0] != b[1]:
            advice = "They look transposed: " if a[1] == b[0] else ""
            raise ValueError(f"{what}: A of shape {a} and B of shape {b} do not fit. {advice}A is [r, n], B is [m, r].")
        if self.A is self.B or not 0 < abs(self.scale) < float("inf"):
            raise ValueError(f"{what}: invalid scale {self.scale}, or A and B are one tensor")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the product."""
        return self.B.shape[0], self.A.shape[1]


def lora_pairs(
    model: nn.Module, adapters: Sequence[str] | None = None, filter: Callable[[str], bool] | None = None
) -> list[LoraPair]:
    """The LoRA pairs of a model, in the order of its modules.

    Found are PEFT's layers (lora_A and lora_B by adapter, also those of embeddings) and any module with the attributes lora_A and
    lora_B, or lora_down and lora_up, that are parameters or nn.Linear layers. s is PEFT's scaling[adapter]; else the module's
    `scaling`, or alpha / r of its `alpha` or `lora_alpha`, or 1; as it is now, so call it again where that changes. peft is not
    needed.

    Args:
        model: a module.
        adapters: names of PEFT adapters; all by default. Pairs without gradients are left alone by whatever steps them.
        filter: of a module's name: whether its pairs are taken.
    Raises:
        TypeError: model is no module. ValueError: there is no pair; a pair does not fit, is of a convolution, or shares a factor
        with another, so that its gradient is a sum over both.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"lora_pairs: expected a torch.nn.Module, got {type(model).__name__}")
    found: list[LoraPair] = []
    for name, module in model.named_modules():
        if filter is None or filter(name):
            own = {
                **vars(module),
                **module._parameters,
                **module._modules,
            }  # wrappers answer hasattr for what they wrap
            for a, b in NAMES:
                if own.get(a) is not None and own.get(b) is not None:
                    found += _pairs_of(name, module, own[a], own[b], (a, b), adapters)
    if not found:
        raise ValueError(
            "lora_pairs: no pairs of LoRA factors found. Put adapters in first, e.g. with peft.get_peft_model."
        )
    owner: dict[int, str] = {}
    for pair in found:
        for x in (pair.A, pair.B):
            if id(x) in owner:
                raise ValueError(
                    f"lora_pairs: {owner[id(x)]!r} and {pair.name!r} share a factor, whose gradient is a sum over both. Leave them "
                    "out with filter=."
                )
            owner[id(x)] = pair.name
    return found


def _pairs_of(name: str, module: nn.Module, first, second, attributes, adapters) -> Iterator[LoraPair]:
    a, b = attributes
    found: list[tuple]
    if isinstance(first, (nn.ModuleDict, nn.ParameterDict)):
        chosen = [x for x in first if x in second and (adapters is None or x in adapters)]
        found = [(x, name if len(first) == 1 else f"{name}.{x}", first[x], second[x]) for x in chosen]
    else:
        found = [(None, name, first, second)]
    for adapter, own, x, y in found:
        if hasattr(module, "lora_E") or getattr(module, "num_experts", 1) > 1:
            kind = "of AdaLoRA" if hasattr(module, "lora_E") else "of several experts"
            raise ValueError(
                f"LoRA pair {own!r}: an adapter {kind} is no product of its two factors. Leave it out with filter=, and it is "
                "stepped like any other parameter."
            )
        x, y = _factor(own, a, x), _factor(own, b, y)
        embedding = "embedding" in a
        transposed = embedding or bool(getattr(module, "fan_in_fan_out", False))
        yield LoraPair(own, x, y, _scale(module, adapter, x.shape[0]), transposed, embedding)


def _factor(name: str, attribute: str, x) -> torch.Tensor:
    weight = getattr(x, "weight", None) if isinstance(x, nn.Module) else x
    if not isinstance(weight, torch.Tensor):
        raise ValueError(
            f"LoRA pair {name!r}: {attribute} is a {type(x).__name__}. It must be a parameter or a module with a weight; leave "
            "the module out with filter=."
        )
    return weight


def _scale(module: nn.Module, adapter: str | None, rank: int) -> float:
    scaling = getattr(module, "scaling", None)
    if isinstance(scaling, dict):
        scaling = scaling.get(adapter)
    if scaling is not None and not callable(scaling):
        return float(scaling)
    for name in ("alpha", "lora_alpha"):
        alpha = getattr(module, name, None)
        if isinstance(alpha, dict):
            alpha = alpha.get(adapter)
        if alpha is not None and not callable(alpha):
            return float(alpha) / rank
    return 1.0


def as_pairs(model_or_pairs) -> tuple[LoraPair, ...]:
    """The pairs of a module, or those that are given. Raises TypeError or ValueError for anything else."""
    if isinstance(model_or_pairs, nn.Module):
        return tuple(lora_pairs(model_or_pairs))
    pairs = tuple(model_or_pairs)
    for pair in pairs:
        if not isinstance(pair, LoraPair):
            raise TypeError(
                f"expected a module or LoraPairs, got a {type(pair).__name__}: see fusedopt.lora_pairs(model)"
            )
    if not pairs:
        raise ValueError("there are no LoRA pairs: see fusedopt.lora_pairs(model)")
    return pairs


def lora_plus_groups(
    model_or_pairs: nn.Module | Iterable[LoraPair],
    lr: float,
    ratio: float = 16.0,
    *,
    other_lr: float | None = None,
    embedding_lr: float | None = None,
    weight_decay: float | None = None,
) -> list[dict]:
    """LoRA+: parameter groups for any optimizer, with learning rate lr for factors A and ratio * lr for factors B.

    When to use it: always worth a try with LoRA, above all on hard tasks and wide models; lr is then half of LoRA's or so, and
    ratio 2 to 64.

    Args:
        model_or_pairs: a model, of which all trainable parameters are grouped, with their names; or pairs, which alone are.
        lr: of factors A. ratio: how many times larger that of factors B is.
        other_lr: of all that are no factors (heads, norms, biases); lr by default.
        embedding_lr: of both factors of embeddings' adapters; like other pairs by default (1e-6 in the authors' code).
        weight_decay: put into the groups, 0 for vectors; by default the optimizer's own for all.
    Raises:
        ValueError: a rate is negative, ratio is not positive, or nothing is trainable. TypeError: neither a model nor pairs.
    Source: arXiv 2402.12354, section 4.
    """
    for what, value in (("learning rate", lr), ("other_lr", other_lr), ("embedding_lr", embedding_lr)):
        check_nonnegative(value or 0.0, what)
    if not ratio > 0:
        raise ValueError(f"Invalid ratio value: {ratio}; it must be positive")
    pairs = as_pairs(model_or_pairs)
    role: dict[int, str] = {}
    for pair in pairs:
        own = pair.embedding and embedding_lr is not None
        role |= {id(pair.A): "embedding" if own else "A", id(pair.B): "embedding" if own else "B"}
    whole = isinstance(model_or_pairs, nn.Module)
    named: list[tuple[str | None, torch.Tensor]]
    if isinstance(model_or_pairs, nn.Module):
        named = [(n, p) for n, p in model_or_pairs.named_parameters() if p.requires_grad]
    else:
        named = [(None, p) for pair in pairs for p in (pair.A, pair.B) if p.requires_grad]
    rates = {"A": lr, "B": ratio * lr, "embedding": embedding_lr, "other": lr if other_lr is None else other_lr}
    groups: dict[tuple, dict] = {}
    for name, p in named:
        kind, decayed = role.get(id(p), "other"), p.dim() > 1 or weight_decay is None
        group = groups.setdefault((kind, decayed), {"params": [], "lr": rates[kind]})
        group["params"].append((name, p) if whole else p)
        if weight_decay is not None:
            group["weight_decay"] = weight_decay if decayed else 0.0
    if not groups:
        raise ValueError("lora_plus_groups: no parameter requires a gradient")
    return list(groups.values())


@torch.no_grad()
def lora_one_init_(pairs: Sequence[LoraPair], gradients: Sequence[torch.Tensor], gamma: float = 128.0) -> None:
    """LoRA-One's start: with U S V^T of the r largest singular values of -G and D = sqrt(S / (S_1 gamma)), B = U D, A = D V^T. The
    adapted weight begins as W + s B A: one step down the best approximation of rank r of its gradient.

    When to use it: before the first step of fine-tuning with the `LoRAOne` transform; it takes one full gradient of each weight.

    Args:
        pairs: of `lora_pairs`. gradients: of each the gradient [m, n] of the loss by its weight, in order;
            [n, m] where a pair is transposed.
        gamma: how small the start is.
    Raises:
        ValueError: shapes do not fit, a gradient is zero or not finite, or gamma is not positive. No factor is changed then.
    Source: arXiv 2502.01235, algorithm 1, with the singular values relative to the largest one as in its code. Small or nearly full
    ranks take the exact SVD, others torch.svd_lowrank with 4 r vectors and a fixed seed.
    """
    if not gamma > 0:
        raise ValueError(f"Invalid gamma value: {gamma}; it must be positive")
    if len(pairs) != len(gradients):
        raise ValueError(f"lora_one_init_: {len(pairs)} pairs, but {len(gradients)} gradients")
    starts = []
    for pair, given in zip(pairs, gradients, strict=True):
        g = given.detach().t() if pair.transposed else given.detach()
        if tuple(g.shape) != pair.shape:
            raise ValueError(f"lora_one_init_: the gradient of {pair.name!r} is {tuple(g.shape)}, not {pair.shape}")
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        if not bool(g.isfinite().all() & g.any()):
            raise ValueError(f"lora_one_init_: the gradient of {pair.name!r} is zero or not finite")
        if pair.rank > min(pair.shape):
            raise ValueError(f"lora_one_init_: {pair.name!r} has rank {pair.rank}, its weight only {min(pair.shape)}")
        width = 4 * pair.rank
        if width >= min(g.shape):
            u, s, vh = torch.linalg.svd(-g, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[g.device] if g.is_cuda else []):
                torch.manual_seed(0)
                u, s, v = torch.svd_lowrank(-g, q=width, niter=4)
            vh = v.t()
        root = (s[: pair.rank] / (s[0] * gamma)).sqrt()
        starts.append((pair, root[:, None] * vh[: pair.rank], u[:, : pair.rank] * root))
    for pair, a, b in starts:
        pair.A.copy_(a)
        pair.B.copy_(b)
