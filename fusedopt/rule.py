"""Rule: the declaration of one update rule, and the registry that a scan of fusedopt.rules fills.

A rule is the part of a step between "fp32 gradient and states" and "update direction u". It has three bodies, written
independently: the C++ functor (csrc/rules), the Triton device function and the pure-torch reference (fusedopt/rules).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class State:
    """A state tensor of a rule, shaped like the parameter.

    signed: the 8-bit map it takes: True for first moments, False for second moments (never negative).
    initial(h): what every element is at the start, from the group's hyperparameters; zero where there is none.
    spread(h): the standard deviation of the normal numbers that it starts as, which the group's seed determines.
    position(h): the share of the parameter that the state starts as. It is then a point beside the parameter, and stays wide.
    estimate: written between steps by the class (fusedopt.curvature); the rule reads it and returns it as it is. Stays wide.
    wide: kept in fp32 under every state_format: a sum or a point, whose increments a narrow format would round away.
    """

    name: str
    signed: bool = True
    initial: Callable[[Mapping[str, Any]], float] | None = None
    position: Callable[[Mapping[str, Any]], float] | None = None
    spread: Callable[[Mapping[str, Any]], float] | None = None
    estimate: bool = False
    wide: bool = False

    def __post_init__(self):
        if self.position is not None or self.estimate:
            object.__setattr__(self, "wide", True)


@dataclass(frozen=True)
class Measures:
    """Numbers that a rule takes of whole tensors (fusedopt.measures): computed on the device before a step, they stand in the
    tensor's own scalar row, where the rule's bodies read them like any scalar.

    names: scalars of the rule that are measured; what `scalars` gives for them stands there until then. "lr_factor" and
        "decay_factor" are none of the rule's: they multiply the learning rate and the decay of the tensor.
    memory: numbers that are kept from step to step in the state dict, and what they are at the start.
    scope: what is summed over: "tensor", "group" or "optimizer"; beyond a tensor there is one memory for all.
    start(memory, c) -> numbers: at the beginning of a step, for what the terms need of the memory.
    norms(memory, param_sq, grad_sq, c) -> (memory, numbers): from the squared norms of the parameter and of the gradient
        (unscaled and clipped, without decay).
    sums(memory, first, second, c) -> (memory, numbers): after `norms`, from the sums of the two terms.
    terms(g, p, *states, **scalars) -> (a, b), terms_triton(g, p, *states, c) and the C++ rule's `terms`: of each element, with
        g and p as `direction` gets them.
    largest: a probe takes the largest element of each term, over all of the scope, in place of their sums.
    given: numbers that the caller hands to the step ("loss"), which c then holds too.
    compares: whether numbers of a tensor depend on the others of its group, so that they are stepped together or not at all.
    last_step: the last step that needs the sums, where later ones do not (their probes are left out while counts are on the
        host; functions must not read the sums then).
    memory and numbers are dicts by name, of float64 tensors [tensors] (scope "tensor") or 0-dim; c holds the rule's scalars with
    numel, each a number or such a tensor: in `start` those of each group, else, beyond a tensor, those of the tensor with most
    steps. Arithmetic only: nothing may wait for the device.
    """

    names: tuple[str, ...]
    memory: Mapping[str, float] = field(default_factory=dict)
    scope: str = "tensor"
    start: Callable | None = None
    norms: Callable | None = None
    sums: Callable | None = None
    terms: Callable | None = None
    terms_triton: Any = None
    largest: bool = False
    given: tuple[str, ...] = ()
    compares: bool = False
    last_step: int | None = None


@dataclass(frozen=True)
class Rule:
    """One update rule. Flags (which rule) are code; numbers (`scalars`) are data, one row per group and step.

    scalars(h, step): the rule's numbers in the order of `scalar_names`, from the group's hyperparameters `h` and the
        step count (1 at the first step), in double precision. Written with arithmetic only, so that `step` may also be a
        float64 tensor on a device (capturable=True).
    reference(g, p, *states, **scalars) -> (u, *states): pure torch, any floating dtype.
    direction(g, p, *states, c) -> (u, *states): `@triton.jit`; c points at the rule's scalars in fp32.
    trust(param_sq, x_sq, **scalars) and trust_triton(param_sq, x_sq, c): the per-tensor scale from two squared norms.
    trust_on: what the trust ratio scales: None, "gradient" (after coupled decay) or "update".
    step_size(h, step): what multiplies u; the learning rate where there is none. decay(h, step): the share of the parameter
        that decoupled decay takes; lr * weight_decay where there is none. Both under the conditions of `scalars`.
    derived: numbers that the torch.optim class of the rule keeps in its state and that follow from h and the step count here.
    noise: its bodies (but not `terms`) take z ~ N(0, 1) of each element after p, drawn at each step from the seed.
    measures: numbers of whole tensors beside the trust ratio.
    heavy: kinds of states, "plain" (fp32) or "coded" (blockwise), with which the Triton step spills under the registers that its
        number of states allows (kernels/driver.py); it then gets more.
    internal: a building block of projections that no optimizer class steps by itself.
    parts: names of the rules that a site launches in its place (`compose`).
    """

    name: str
    states: tuple[State, ...]
    scalar_names: tuple[str, ...]
    scalars: Callable[[Mapping[str, Any], Any], tuple]
    reference: Callable
    direction: Any
    trust: Callable | None = None
    trust_triton: Any = None
    trust_on: str | None = None
    step_size: Callable[[Mapping[str, Any], Any], Any] | None = None
    decay: Callable[[Mapping[str, Any], Any], Any] | None = None
    derived: Mapping[str, Callable[[Mapping[str, Any], Any], Any]] = field(default_factory=dict)
    measures: Measures | None = None
    heavy: tuple[str, ...] = ()
    noise: bool = False
    internal: bool = False
    parts: tuple[str, ...] = ()

    @property
    def reduces(self) -> bool:
        """Whether a tensor's step depends on all of its elements."""
        return self.trust_on is not None or self.measures is not None

    @property
    def takes_norms(self) -> bool:
        """Whether a norm launch gives it |p|^2 and |g|^2 of each tensor."""
        return self.trust_on == "gradient" or self.measures is not None and self.measures.norms is not None

    @property
    def probes(self) -> bool:
        """Whether a probe launch sums something over each tensor."""
        return self.trust_on == "update" or self.measures is not None and self.measures.terms is not None

    @property
    def takes_largest(self) -> bool:
        """Whether its probe takes the largest of its terms, not their sums."""
        return self.measures is not None and self.measures.largest

    @property
    def memory(self) -> Mapping[str, float]:
        """The numbers kept for each tensor beside its states, and their first values."""
        return {} if self.measures is None else self.measures.memory

    @property
    def state_names(self) -> tuple[str, ...]:
        return tuple(state.name for state in self.states)

    @property
    def has_positions(self) -> bool:
        """Whether it steps points beside the parameter. Its direction then reads the parameter, which a projection lacks."""
        return any(state.position is not None for state in self.states)

    @property
    def reads_estimates(self) -> bool:
        """Whether it reads a state that is written for the whole parameter between steps, which a projection lacks."""
        return any(state.estimate for state in self.states)

    def named_scalars(self, h: Mapping[str, Any], step) -> dict[str, Any]:
        return dict(zip(self.scalar_names, self.scalars(h, step), strict=True))


def compose(name: str, *parts: Rule, **changes) -> Rule:
    """A rule that a projection's site steps in several launches, one for each part: their states, the first one's scalars, and no
    bodies of its own. changes: other fields of Rule."""
    states = tuple(state for part in parts for state in part.states)
    names = tuple(part.name for part in parts)

    def no_body(*_, **__):
        raise TypeError(f"rule {name!r} is stepped in parts: {', '.join(names)}")

    return replace(
        parts[0], name=name, states=states, reference=no_body, direction=None, internal=True, parts=names, **changes
    )


_rules: dict[str, Rule] = {}
_optimizers: dict[str, Any] = {}  # classes, each with arguments of its own


def register(rule: Rule) -> Rule:
    if rule.name in _rules:
        raise ValueError(f"rule {rule.name!r} is registered twice")
    _rules[rule.name] = rule
    return rule


def register_optimizer(name: str):
    """Class decorator: makes an optimizer class known to `fusedopt.create` under `name`."""

    def add(cls):
        _optimizers[name] = cls
        return cls

    return add


def scan() -> None:
    """Imports every module of fusedopt.rules; each registers its rules and classes."""
    from fusedopt import rules

    for module in sorted(info.name for info in pkgutil.iter_modules(rules.__path__)):
        importlib.import_module(f"{rules.__name__}.{module}")


def get_rule(name: str) -> Rule:
    return _rules[name]


def list_rules() -> list[str]:
    """Names of the registered update rules (variants such as "adam_amsgrad" count as rules)."""
    return sorted(name for name, rule in _rules.items() if not rule.internal)


def known_states() -> set[str]:
    """Names of the states that any rule keeps."""
    return {state.name for rule in _rules.values() for state in rule.states}


def optimizers() -> dict[str, Any]:
    """Optimizer classes by the name that `fusedopt.create` takes."""
    return dict(_optimizers)
