"""Muon: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): momentum, made orthogonal."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from fusedopt.factory import embedding_ids
from fusedopt.newton_schulz import QUINTIC, schedule
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.projections.orthogonal import DTYPES, Orthogonal
from fusedopt.rule import Rule, State, register, register_optimizer
from fusedopt.rules.adam import ADAM
from fusedopt.rules.sgd import MOMENTUM_NAMES, momentum_direction, momentum_reference

# Names of modules that map to outputs, and parts of names of tables of embeddings
HEADS = re.compile(
    r"(^|\.)(lm_head|head|score|classifier|embed_out|output|output_projection|fc_out)\.(weight|linear\.weight)$"
)
TABLES = re.compile(r"(^|[._])(embed\w*|wte|wpe|tok_embeddings)([._]|$)")
ADJUST = (None, "original", "match_rms_adamw", "none")


def scalars(h, step):
    """b <- mu b + (1 - mu) g; u = (1 - mu) g + mu b, or b without nesterov."""
    mu = h["momentum"]
    return (mu, 1 - mu, *((1 - mu, mu) if h["nesterov"] else (0.0, 1.0)))


MUON = register(
    Rule(
        "muon",
        (State("momentum_buffer"),),
        MOMENTUM_NAMES,
        scalars,
        momentum_reference,
        momentum_direction,
        internal=True,
    )
)


def split_model(model: torch.nn.Module) -> list[dict]:
    """Groups of a model's parameters: its hidden matrices, and embeddings, output heads and vectors."""
    others = embedding_ids(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if getattr(head, "weight", None) is not None:
        others.add(id(head.weight))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    chosen = {id(p): id(p) not in others and is_hidden(name, p) for name, p in named}
    groups = [
        {"params": [(n, p) for n, p in named if chosen[id(p)] == hidden], "orthogonalize": hidden}
        for hidden in (True, False)
    ]
    return [group for group in groups if group["params"]]


def is_hidden(name: str | None, p: torch.Tensor) -> bool:
    """Whether a parameter is a matrix (or a stack of filters) that no name says to be an embedding or an output head."""
    if p.dim() < 2:
        return False
    return name is None or not (HEADS.search(name) or TABLES.search(name))


@register_optimizer("muon")
class Muon(FusedOptimizer):
    """Muon: b = mu b + (1 - mu) g; u = (1 - mu) g + mu b (b without nesterov); p -= lr (s U V^T + weight_decay p), where U V^T is
    u made orthogonal by a Newton-Schulz iteration and s depends on the shape; and AdamW for everything that is no hidden matrix.

    Hidden matrices of transformers and convolutional networks: fewer steps than AdamW to the same loss, with one state. Give it
    a model, or named parameters: embeddings, output heads and vectors are found by module and name and stepped by AdamW.

    Args:
        params: a module, (named) parameters, or groups of them. Of a group, "orthogonalize" says whether its tensors
            are stepped by Muon (True; each must have two dimensions or more) or AdamW (False); None decides tensor by tensor.
        lr: learning rate, a float or a 1-element tensor.
        weight_decay: decoupled.
        momentum: mu.
        nesterov: look ahead, as above.
        ns_coefficients: (a, b, c) of every Newton-Schulz step, or "polar_express" for those of arXiv 2505.16932.
        eps: of Muon's groups the least norm of u; of AdamW's groups adam_eps.
        ns_steps: iterations.
        adjust_lr_fn: s of a matrix [rows, cols]: None or "original", sqrt(max(1, rows / cols)); "match_rms_adamw",
            0.2 sqrt(max(rows, cols)), with which AdamW's learning rate and decay serve both; "none", 1.
        ns_dtype: of the matrix products, "bf16" (sums in fp32) or "fp32". Of fp64 parameters they are fp64.
        adam_lr: learning rate of AdamW's groups; None for lr. adam_betas, adam_eps: theirs.
        **options: shared options, see `FusedOptimizer`; state_format is that of the momentum and of AdamW's moments. No other
            projection, differentiable=True or DTensor.

    A group of both kinds of tensors becomes two. Convolution weights (out, in, h, w) are matrices [out, in h w].
    Matrices of one shape go through the iteration together, up to 2^26 elements of them (on the CPU one by one): that takes four
    times their size in ns_dtype.

    Raises:
        ValueError: a hyperparameter is out of range, or a vector is to be made orthogonal.
    Source: arXiv 2502.16982, with both scalings of torch.optim.Muon; the method is Jordan et al.'s of 2024.
    """

    decay_mode = "decoupled"
    splits_models = True

    def __init__(
        self,
        params,
        lr=1e-3,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=True,
        ns_coefficients=QUINTIC,
        eps=1e-7,
        ns_steps=5,
        adjust_lr_fn=None,
        ns_dtype="bf16",
        adam_lr=None,
        adam_betas=(0.9, 0.95),
        adam_eps=1e-8,
        **options,
    ):
        check_nonnegative(momentum, "momentum value")
        check_nonnegative(eps, "epsilon value")
        check_nonnegative(adam_eps, "adam_eps value")
        check_betas(adam_betas, options)
        if not momentum < 1.0:
            raise ValueError(f"Invalid momentum value: {momentum}")
        if adjust_lr_fn not in ADJUST:
            raise ValueError(
                f"Invalid adjust_lr_fn value: {adjust_lr_fn!r}; it is one of {', '.join(map(repr, ADJUST))}"
            )
        if ns_dtype not in DTYPES:
            raise ValueError(f"Invalid ns_dtype value: {ns_dtype!r}; it is 'bf16' or 'fp32'")
        if options.get("projection") is not None:
            raise ValueError("Muon: it steps the whole momentum of a matrix, so it takes no projection. Use AdamW.")
        schedule(ns_coefficients, ns_steps)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
            "betas": adam_betas,
            "orthogonalize": None,
        }
        self._adam = {"lr": lr if adam_lr is None else adam_lr, "eps": adam_eps}
        super().__init__(split_model(params) if isinstance(params, torch.nn.Module) else params, defaults, **options)

    def add_param_group(self, param_group: dict) -> None:
        """As in torch.optim; a group of matrices and others becomes two."""
        for group in self._split(param_group):
            super().add_param_group(group)

    def _split(self, given: dict) -> Iterable[dict]:
        params = given.get("params") if isinstance(given, dict) else None
        if params is None or isinstance(params, set):
            return [given]  # for torch's own message
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        wanted = given.get("orthogonalize", self.defaults["orthogonalize"])
        chosen = [is_hidden(*_named(p)) if wanted is None else bool(wanted) for p in params]
        for hidden, (name, p) in zip(chosen, map(_named, params), strict=True):
            if hidden and isinstance(p, torch.Tensor) and p.dim() < 2:
                raise ValueError(
                    f"Muon: parameter {name or ''} of shape {tuple(p.shape)} is no matrix: give it to a group without orthogonalize"
                )
        groups = []
        for hidden in dict.fromkeys(chosen or [True]):
            mine = [p for p, h in zip(params, chosen, strict=True) if h == hidden]
            group = {**given, "params": mine, "orthogonalize": hidden}
            if hidden:
                group["projection"] = self._orthogonal({**self.defaults, **given})
            else:
                group = {**self._adam, **group, "projection": None}
            groups.append(group)
        return groups

    @staticmethod
    def _orthogonal(h: dict) -> Orthogonal:
        adjust = "original" if h["adjust_lr_fn"] is None else h["adjust_lr_fn"]
        return Orthogonal(schedule(h["ns_coefficients"], h["ns_steps"]), h["eps"], adjust, h["ns_dtype"])

    @classmethod
    def rule_for(cls, group) -> Rule:
        return ADAM if group["orthogonalize"] is False else MUON


def _named(p) -> tuple[str | None, torch.Tensor]:
    return p if isinstance(p, tuple) else (None, p)
