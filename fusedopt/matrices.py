"""Optimizers that step hidden matrices by one rule and everything else by another: which parameter is which."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from fusedopt.factory import embedding_ids
from fusedopt.newton_schulz import schedule
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_nonnegative
from fusedopt.projections.orthogonal import ADJUST, DTYPES, Orthogonal
from fusedopt.rule import Rule
from fusedopt.rules.adam import ADAM

# Names of modules that map to outputs, and parts of names of tables of embeddings
HEADS = re.compile(
    r"(^|\.)(lm_head|head|score|classifier|embed_out|output|output_projection|fc_out)\.(weight|linear\.weight)$"
)
TABLES = re.compile(r"(^|[._])(embed\w*|wte|wpe|tok_embeddings)([._]|$)")
HIDDEN, OUTER, VECTOR = "hidden", "outer", "vector"


def place_of(name: str | None, p: torch.Tensor) -> str:
    """HIDDEN: a matrix (or a stack of filters) that no name says to be an embedding or an output head. OUTER: one of these."""
    if p.dim() < 2:
        return VECTOR
    return HIDDEN if name is None or not (HEADS.search(name) or TABLES.search(name)) else OUTER


def places_of(model: torch.nn.Module) -> list[tuple[str, torch.Tensor, str]]:
    """(name, parameter, place) of a model's trainable parameters; embeddings are also found by their modules."""
    outer = embedding_ids(model)
    head = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    if head is not None:
        outer.add(id(head))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [(n, p, OUTER if id(p) in outer and p.dim() > 1 else place_of(n, p)) for n, p in named]


class MatrixOptimizer(FusedOptimizer):
    """Base of optimizers whose groups are of one kind of tensor each. `kind` names the key of groups that says which;
    a group that does not say it is divided by `kind_of`."""

    decay_mode = "decoupled"
    splits_models = True
    kind: str
    elementwise: ClassVar[
        tuple[dict, ...]
    ] = ()  # options with which rules of the class's own step all tensors, matrices too

    def __init__(self, params, defaults: dict, **options):
        super().__init__(
            self._groups_of(params) if isinstance(params, torch.nn.Module) else params, defaults, **options
        )

    def kind_of(self, place: str) -> Any:
        """What a group of parameters of a place has under `kind`."""
        raise TypeError(f"{type(self).__name__} does not say the kinds of its groups")

    def orthogonal(self, kind: Any, h: Mapping[str, Any]) -> Orthogonal | None:
        """The projection of a group of a kind, or None. Raises ValueError for hyperparameters out of range."""
        raise TypeError(f"{type(self).__name__} does not say how matrices are stepped")

    def defaults_of(self, kind: Any) -> dict:
        """Defaults of groups of a kind that are not those of the class."""
        return {}

    def _groups_of(self, model: torch.nn.Module) -> list[dict]:
        groups: dict[Any, list] = {}
        for name, p, place in places_of(model):
            groups.setdefault(self.kind_of(place), []).append((name, p))
        order = [self.kind_of(place) for place in (HIDDEN, OUTER, VECTOR)]
        return [{"params": groups[k], self.kind: k} for k in sorted(groups, key=order.index)]

    def add_param_group(self, param_group: dict) -> None:
        """As in torch.optim; a group of several kinds of tensors becomes as many."""
        for group in self._split(param_group):
            super().add_param_group(group)

    def _split(self, given: dict) -> Iterable[dict]:
        params = given.get("params") if isinstance(given, dict) else None
        if params is None or isinstance(params, set):
            return [given]  # for torch's own message
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        wanted = given.get(self.kind, self.defaults[self.kind])
        chosen = [self.kind_of(place_of(*_named(p))) if wanted is None else wanted for p in params]
        groups = []
        for kind in dict.fromkeys(chosen or [self.kind_of(HIDDEN)]):
            mine = [p for p, k in zip(params, chosen, strict=True) if k == kind]
            group = {**self.defaults_of(kind), **given, "params": mine, self.kind: kind}
            group["projection"] = self.orthogonal(kind, {**self.defaults, **group})
            if group["projection"] is not None:
                self._check_matrices(mine)
            groups.append(group)
        return groups

    def _check_matrices(self, params: list) -> None:
        for i, (name, p) in enumerate(map(_named, params)):
            if isinstance(p, torch.Tensor) and p.dim() < 2:
                raise ValueError(
                    f"{type(self).__name__}: parameter {i if name is None else repr(name)} of its group, of shape "
                    f"{tuple(p.shape)}, is no matrix: give it to a group of another {self.kind!r}"
                )


class MatrixOrAdam(MatrixOptimizer):
    """Hidden matrices along orthogonal factors, everything else by AdamW: groups with orthogonalize True and False."""

    kind = "orthogonalize"

    def __init__(self, params, defaults: dict, adam: dict, **options):
        """adam: lr (None: that of the class), betas, eps and weight_decay (None: that of the class) of AdamW's groups."""
        if options.get("projection") is not None:
            raise ValueError(
                f"{type(self).__name__}: it steps the whole momentum of a matrix, so it takes no projection. Use AdamW."
            )
        check_nonnegative(adam["eps"], "adam_eps value")
        self._adam = {**adam, "lr": defaults["lr"] if adam["lr"] is None else adam["lr"]}
        if adam.get("weight_decay") is None:
            self._adam.pop("weight_decay", None)
        self.orthogonal(True, defaults)
        super().__init__(params, {**defaults, "orthogonalize": None}, **options)

    def kind_of(self, place):
        return place == HIDDEN

    def defaults_of(self, kind):
        return {} if kind else self._adam

    def orthogonal(self, kind, h):
        return self.matrix_projection(h) if kind else None

    def matrix_projection(self, h: Mapping[str, Any]) -> Orthogonal:
        """How a group of hidden matrices is stepped. Raises ValueError for hyperparameters out of range."""
        return Orthogonal(**orthogonal_options(h))

    @classmethod
    def matrix_rule(cls, group) -> Rule:
        """The rule of a group of hidden matrices."""
        raise TypeError(f"{cls.__name__} does not say which rule steps matrices")

    @classmethod
    def rule_for(cls, group) -> Rule:
        return ADAM if group["orthogonalize"] is False else cls.matrix_rule(group)


def orthogonal_options(h: Mapping[str, Any]) -> dict:
    """Arguments of Orthogonal from ns_coefficients, ns_steps, eps, adjust_lr_fn and ns_dtype. Raises ValueError."""
    if h["adjust_lr_fn"] not in (None, *ADJUST):
        known = ", ".join(map(repr, (None, *ADJUST)))
        raise ValueError(f"Invalid adjust_lr_fn value: {h['adjust_lr_fn']!r}; it is one of {known}")
    if h["ns_dtype"] not in DTYPES:
        raise ValueError(f"Invalid ns_dtype value: {h['ns_dtype']!r}; it is 'bf16' or 'fp32'")
    check_nonnegative(h["eps"], "epsilon value")
    return {
        "coefficients": schedule(h["ns_coefficients"], h["ns_steps"]),
        "eps": h["eps"],
        "adjust": "original" if h["adjust_lr_fn"] is None else h["adjust_lr_fn"],
        "dtype": h["ns_dtype"],
    }


def _named(p) -> tuple[str | None, torch.Tensor]:
    return p if isinstance(p, tuple) else (None, p)
