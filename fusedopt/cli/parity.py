"""Parity check: steps of every rule on a backend against the fp64 reference, in units of the error that is allowed."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import combinations

import torch

from fusedopt import states as st
from fusedopt.backends import select
from fusedopt.backends.base import BucketKey
from fusedopt.cli.feeding import give_curvature
from fusedopt.cli.feeding import step as take_step
from fusedopt.formats import list_formats
from fusedopt.masters import stored_precision, weights
from fusedopt.matrices import MatrixOptimizer
from fusedopt.memory import flat
from fusedopt.precision import list_precisions
from fusedopt.rule import optimizers

LR = 0.05
STEPS = 2  # from zero states, then from the states the first one left
SHAPES = ((16, 160), (515,), (33,))  # two chunks, a tail of a block, and a tensor that keeps fp32 states
SMALLEST = 256  # elements of a quantised tensor


HALF_STEP_SLACK = 1.1  # values near the middle of two codes may go either way


@dataclass(frozen=True)
class Case:
    """An optimizer class with the flags that select one of its rules."""

    optimizer: str
    flags: tuple[tuple[str, object], ...]
    rule: str

    @property
    def label(self) -> str:
        return " ".join([self.optimizer, *(f"{name}={value}" for name, value in self.flags)])

    def build(self, params, **options) -> torch.optim.Optimizer:
        """Without the class's own transforms: no part of a backend, and they round 16-bit weights once more."""
        opt = optimizers()[self.optimizer](
            params, lr=LR, weight_decay=0.1, min_quantized_numel=SMALLEST, **dict(self.flags), **options
        )
        opt.gradient_transforms = ()
        return opt


@dataclass(frozen=True)
class Outcome:
    """error: the largest as a share of its bound; reason: why it is not supported; failure: an exception."""

    case: Case
    params: str
    states: str
    error: float = 0.0
    reason: str | None = None
    failure: str | None = None

    @property
    def ok(self) -> bool:
        return self.failure is None and self.error <= 1.0


def cases() -> list[Case]:
    """Every rule of every optimizer class, found by turning the class's flags, one and two at a time."""
    found: dict[tuple[str, str], Case] = {}
    for name, cls in sorted(optimizers().items()):
        turns: list[dict] = []
        for option in inspect.signature(cls).parameters.values():
            if isinstance(option.default, bool):
                turns.append({option.name: not option.default})
            elif option.name == "momentum":
                turns.append({"momentum": 0.0 if option.default else 0.9})
        choices = ({}, *turns, *(a | b for a, b in combinations(turns, 2)))
        if issubclass(cls, MatrixOptimizer):  # matrices go through products of their own precision
            choices = cls.elementwise
        for flags in choices:
            try:
                opt = cls([torch.nn.Parameter(torch.zeros(1))], **flags)
            except ValueError:  # a flag that needs another one selects no rule of its own
                continue
            rule = opt.rule_for(opt.param_groups[0]).name
            found.setdefault((name, rule), Case(name, tuple(flags.items()), rule))
    return list(found.values())


def settings() -> list[tuple[torch.dtype, str, str]]:
    """Parameter dtypes, param_precisions and state formats that are checked."""
    formats = [(torch.float32, "nearest", name) for name in list_formats()]
    return [*formats, *((torch.bfloat16, name, "int8") for name in list_precisions())]


def check(case: Case, backend: str, device: torch.device, dtype: torch.dtype, precision: str, form: str) -> Outcome:
    """Steps one optimizer on a backend and compares weights and states after each step with the fp64 reference."""
    params, states = str(dtype).removeprefix("torch."), form
    if precision != "nearest":
        params += f" {precision}"
    try:
        tensors = _random(dtype, device, seed=0)
        opt = case.build(tensors, state_format=form, param_precision=precision, backend=backend)
        rule = opt.rule_for(opt.param_groups[0])
        key = BucketKey(device, backend, rule.name, dtype, dtype, (form,) * len(rule.states), precision, True)
        why = select.get_backend(backend).supports(key)
        if why is not None:
            return Outcome(case, params, states, reason=why)
        return Outcome(case, params, states, error=_compare(case, opt, rule, tensors))
    except Exception as error:  # a broken backend may fail in any way
        return Outcome(case, params, states, failure=f"{type(error).__name__}: {error}")


def _random(dtype: torch.dtype, device, seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]


def _compare(case: Case, opt, rule, params: list[torch.nn.Parameter]) -> float:
    """Each step against the exact one from the same weights and states. Where that one is sensitive (a gradient that weight
    decay nearly cancels), what an ulp of the gradient changes in it is allowed too."""
    exact, nudged = ([torch.nn.Parameter(p.detach().cpu().double()) for p in params] for _ in range(2))
    oracles = [(case.build(each, backend="reference"), each) for each in (exact, nudged)]
    for o, each in ((opt, params), *oracles):
        for p in each:
            p.grad = torch.zeros_like(p)
        o.plan()  # makes the states, whose first values a format may round
        give_curvature(o)
    worst = 0.0
    for step in range(STEPS):
        grads = _random(params[0].dtype, params[0].device, seed=step + 1)
        for (oracle, each), change in zip(oracles, (1.0, 1 + 2.0**-23), strict=True):
            for p, q, g in zip(params, each, grads, strict=True):
                p.grad = g.detach()
                q.grad = p.grad.cpu().double() * change
                q.data.copy_(weights(p, opt.state[p]))
                for state in rule.states:
                    oracle.state[q][state.name].copy_(st.decode(p, opt.state[p], state))
        before = [q.detach().clone() for q in exact]
        for o in (opt, *(oracle for oracle, _ in oracles)):
            take_step(o)
        states = [oracle.state for oracle, _ in oracles]
        for p, q, n, old in zip(params, exact, nudged, before, strict=True):
            # LARS takes the norm of the parameter as it is stored, half a bf16 ulp from the weights the oracle has.
            trust = 2.0**-9 if rule.trust_on == "gradient" and stored_precision(p, opt.state[p]).companion else 0.0
            moved = (q.detach() - old).abs()
            allowed = 2e-5 * moved.clamp(min=LR) + (n.detach() - q.detach()).abs()
            worst = max(worst, _weight_share(p, opt.state[p], q.detach(), allowed, trust * moved))
            for state, form in zip(rule.states, st.configured_formats(p, opt.param_groups[0], rule), strict=True):
                got, want, other = st.decode(p, opt.state[p], state), states[0][q][state.name], states[1][n][state.name]
                bound = _state_bound(form, state, want) + trust * want.abs().max() + (other - want).abs()
                worst = max(worst, _share(got, want, bound))
    return worst


def _weight_share(p: torch.Tensor, entry: dict, want: torch.Tensor, allowed: torch.Tensor, wide: torch.Tensor) -> float:
    """The error of a parameter, or of the weights it and its companion stand for. wide: allowed for those in addition."""
    precision = stored_precision(p, entry)
    if not precision.companion:
        return _share(p.detach(), want, allowed)
    cut = 2.0**-15 * want.abs() if precision.random else 0.0  # one step of the low bits
    return _share(weights(p, entry), want, allowed + cut + wide)


def _state_bound(form, state, want: torch.Tensor) -> torch.Tensor:
    """What a state may be off: its format's error, and what cancelling fp32 sums lose of the largest values."""
    relative, absolute = form.error_bound(state.signed)
    largest = want.abs().max()
    lost = 4.8e-7 * (torch.full_like(want, largest) if state.signed else (want * largest).sqrt())
    if form.block:
        values = flat(want).abs()
        padded = torch.nn.functional.pad(values, (0, -values.numel() % form.block)).view(-1, form.block)
        scale = padded.amax(1).repeat_interleave(form.block)[: values.numel()]
        lost = lost + (HALF_STEP_SLACK * absolute * scale).view(want.shape)
    return lost + HALF_STEP_SLACK * relative * want.abs()


def _share(got: torch.Tensor, want: torch.Tensor, allowed) -> float:
    """Largest |got - want| over (allowed + 4 ulp of fp32, or 1 ulp of a 16-bit dtype); infinite for NaN."""
    got = got.cpu()
    ulp = 2.0 ** torch.floor(torch.log2(want.abs().clamp(min=1e-30))) * torch.finfo(got.dtype).eps
    bound = allowed + (4 if got.dtype == torch.float32 else 1) * ulp
    ratio = ((got.double() - want).abs() / bound).max().item()
    return ratio if ratio == ratio else float("inf")
