"""Builds Work by hand for one rule and one bucket, runs any backend on it and compares with the fp64 reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fusedopt import abi
from fusedopt.abi import GRAIN_SIZE, Column, Phase
from fusedopt.backends.base import BucketKey, Item, RowNumbers, Work
from fusedopt.backends.reference import ReferenceBackend
from fusedopt.formats import get_format
from fusedopt.memory import flat
from fusedopt.precision import get_precision, philox16
from fusedopt.projections import Frugal
from fusedopt.rule import _rules, get_rule

RULES = tuple(_rules)  # internal ones too
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# One dict serves every rule: each picks what it knows.
HYPER = {
    "betas": (0.9, 0.99),
    "eps": 1e-6,
    "weight_decay": 0.1,
    "momentum": 0.9,
    "dampening": 0.1,
    "nesterov": False,
    "trust_coefficient": 0.02,
    "trust_clip": False,
    "always_adapt": False,
    "bias_correction": True,
    "grad_averaging": True,
    "projection": Frugal(residual_scale=0.3),  # of the stateless rule
    "lr": 0.05,
    "lr_decay": 0.1,
    "initial_accumulator_value": 0.0,
    "rho": 0.9,
    "alpha": 0.95,
    "rectify": False,
    "initial_accumulator": 0.0,
    "dynamic_step": False,
    "final_lr": 0.1,
    "base_lr": 0.05,
    "gamma": 0.1,
    "beta3": 0.99,
    "clip_exponent": 0.25,
    "beta3_warmup": None,
    "alpha_warmup": None,
    "momentum_decay": 0.3,
    "beta": 0.9,
    "sigma": 0.99,
    "warmup_steps": 5,
    "cautious": "count",
    "centered_after": 5,
    "weight_lr_power": 2.0,
    "decay_rate": 0.1,
    "delay": 1,
    "gamma_min": 0.1,
    "clip": 1.0,
    "safeguard_warmup": False,
    "d0": 0.01,
    "d_coef": 1.0,
    "growth_rate": 1.5,
    "reps_rel": 1e-3,
    "xi": 0.1,
    "switch_tolerance": 1e-3,
    "eps_inside": False,
    "initial_square_avg": 0.0,
    "lr_in_momentum": False,
    "tau": 1e-3,
    "accumulate": False,
    "coefficient": 1.0,
    "pnm": 0.9,
    "amsgrad": True,
    "softplus": 50.0,
    "beta_utility": 0.9,
    "protecting": True,
    "shift": 1.0,
    "decoupled_weight_decay": False,
    "maximize": False,
    "lower_bound": 0.0,
    "scale": 0.5,
    "max_rate": 1.0,
    "preconditioner": "adam",
    "beta2": 0.99,
    "sqrt": True,
    "truncation": 0.05,
    "initial_rate": 0.1,
    "sign_stabilised": False,
    "debias": True,
    "ball": "rms",
    "noise_rates": (0.3, 0.8),
    "fixed_decay": False,
}
# States drawn independently may be out of a run's reach; these bring them back.
REACHABLE = {
    "adabelief": lambda s: s["exp_avg_var"].add_(1e-4),  # (g - m)^2 takes its share of the rounding of g
    "adamax": lambda s: s["exp_inf"].add_(s["exp_avg"].abs()),
    "rmsprop_centered": lambda s: s["square_avg"].add_(2 * s["grad_avg"].square()),
    "laprop_centered": lambda s: s["exp_avg_sq"].add_(2 * s["grad_avg"].square() + 0.1 * s["grad_avg"].square().max()),
    "rmsprop_centered_momentum": lambda s: s["square_avg"].add_(2 * s["grad_avg"].square()),
}
# States that hold quotients as the direction does: they err as it does.
RATIOS = {
    ("rmsprop_momentum", "momentum_buffer"),
    ("rmsprop_centered_momentum", "momentum_buffer"),
    ("adopt", "exp_avg"),
    ("opt_amsgrad", "anchor"),
    ("fadam", "exp_avg"),
    ("laprop", "exp_avg"),
    ("laprop_amsgrad", "exp_avg"),
    ("laprop_centered", "exp_avg"),
}
TERMS = {"exadam": 2}  # quotients that a direction is the sum of, where they are more than one
DECAY = {"adam": "decoupled", "adam_lazy": "decoupled", "lion": "decoupled", "lamb": "rule"}


@dataclass
class Problem:
    """A bucket with two scalar rows: params, grads, states in their format, and the tables of one launch."""

    work: Work
    params: list[torch.Tensor]

    def phases(self, clip: bool = False) -> tuple[Phase, ...]:
        rule = self.work.rule
        first = (Phase.NORM,) if clip or rule.takes_norms else ()
        last = (Phase.APPLY if rule.trust_on == "update" else Phase.FUSED,)
        return first + ((Phase.PROBE, *last) if rule.probes else last)

    def run(self, backend, clip: bool = False, phases=None) -> None:
        for phase in phases or self.phases(clip):
            backend.launch(replace(self.work, phase=phase, cache={}))


OWN = {
    "ademamix": {"betas": (0.9, 0.99, 0.999), "alpha": 5.0},
    "sania_hessian": {"eps": 0.05},  # its quotients too are as large as it lets them
    "fadam": {"clip": 0.01},  # it divides quotients by their rms, which in these problems is 100 and more
}  # where the names above mean something else


def hyper(rule: str = "", **changes) -> dict:
    return {**HYPER, **OWN.get(rule, {}), **changes}


def numbers(rule, h: dict, step: int, maximize: bool = False, seed: int = 0x1234567890ABCDEF) -> RowNumbers:
    mode, decay = DECAY.get(rule.name, "coupled"), h["weight_decay"]
    return RowNumbers(
        lr=h["lr"],
        decay=h["lr"] * decay if mode == "decoupled" else 0.0,
        l2=decay if mode == "coupled" else 0.0,
        grad_sign=-1.0 if maximize else 1.0,
        seed=seed,
        step=step,
        scalars=rule.scalars(h, step),
    )


def guarded(values: torch.Tensor, offset: int = 0, guard: int = 64) -> torch.Tensor:
    """A view of `values` inside a larger buffer of a recognisable pattern; offset (elements) breaks the alignment."""
    buffer = torch.full((values.numel() + 2 * guard + offset,), 77, dtype=values.dtype)
    view = buffer[guard + offset : guard + offset + values.numel()]
    view.copy_(values)
    return view


def guards_untouched(view: torch.Tensor) -> bool:
    base = view._base
    start = view.storage_offset()
    return bool((base[:start] == 77).all() and (base[start + view.numel() :] == 77).all())


def make_problem(
    rule: str,
    numels=(300, 1, 2048, 5000),
    *,
    param_dtype=torch.float32,
    grad_dtype=torch.float32,
    formats="fp32",
    precision="nearest",
    chunk: int = GRAIN_SIZE,
    step: int = 3,
    offset: int = 0,
    max_norm: float = 0.0,
    grad_scale: float | None = None,
    found_inf: float | None = None,
    maximize: bool = False,
    seed: int = 0,
    hyper_changes: dict | None = None,
    grad_values=None,
) -> Problem:
    """formats: one name for all states or a tuple. offset: elements by which every tensor is misaligned."""
    gen = torch.Generator().manual_seed(seed)
    declared = get_rule(rule)
    names = (formats,) * len(declared.states) if isinstance(formats, str) else formats
    forms = tuple(get_format(n) for n in names)
    keeps = get_precision(precision).for_dtype(param_dtype)
    precision = keeps.name
    h = hyper(rule, **(hyper_changes or {}))
    rows = [numbers(declared, h, step, maximize), numbers(declared, {**h, "lr": h["lr"] / 2}, step + 4, maximize)]
    scale_value = grad_scale or 1.0
    items = []
    for i, n in enumerate(numels):
        p = torch.randn(n, generator=gen)
        g = torch.randn(n, generator=gen) * torch.rand(n, generator=gen) ** 4
        if grad_values is not None:
            g = grad_values(g, i)
        states, scales = [], []
        values = {}
        for state in declared.states:
            x = torch.randn(n, generator=gen) * torch.rand(n, generator=gen) ** 6 * 0.1
            values[state.name] = x if state.signed else x.square() + 1e-6
        if rule in REACHABLE:
            REACHABLE[rule](values)
        for form, state in zip(forms, declared.states, strict=True):
            codes, scale = form.encode(values[state.name], state.signed)
            states.append(guarded(codes, offset))
            scales.append(None if scale is None else guarded(scale))
        stored, companion = p.to(param_dtype), None
        if keeps.companion:
            random16 = philox16(9, 9, i, n) if keeps.random else None
            stored, companion = keeps.store(p, param_dtype, random16)
            companion = guarded(companion, offset)
        items.append(
            Item(
                guarded(stored, offset),
                guarded((g * scale_value).to(grad_dtype), offset),
                tuple(states),
                tuple(scales),
                3 * i + 1,
                i % 2,
                companion,
                5 * i + 2**33 * (i > 1),  # the second word of a Philox counter counts too
            )
        )
    grains = [-(-n // GRAIN_SIZE) for n in numels]
    table = torch.zeros(Column.COUNT, len(items), dtype=torch.int64)
    first = 0
    for i, item in enumerate(items):
        table[Column.GRAD, i], table[Column.PARAM, i] = item.grad.data_ptr(), item.param.data_ptr()
        for k, (state, scale) in enumerate(zip(item.states, item.scales, strict=True)):
            table[Column.STATE + k, i] = state.data_ptr()
            table[Column.SCALE + k, i] = 0 if scale is None else scale.data_ptr()
        table[Column.NUMEL, i] = item.param.numel()
        table[Column.META, i] = item.tensor_id << 32 | item.scalar_row
        table[Column.GRAIN, i] = first
        table[Column.COMPANION, i] = 0 if item.companion is None else item.companion.data_ptr()
        table[Column.FIRST_OCTET, i] = item.first_octet
        first += grains[i]
    scalars = bytearray(4 * abi.SCALAR_STRIDE * len(rows))
    for i, row in enumerate(rows):
        abi.pack_scalar_row(scalars, i, (row.lr, row.decay, row.l2, row.grad_sign), row.seed, row.step, row.scalars)
    aligned = all(
        t.data_ptr() % 16 == 0 for it in items for t in (it.param, it.grad, *it.states, it.companion) if t is not None
    )
    key = BucketKey(torch.device("cpu"), "", rule, param_dtype, grad_dtype, tuple(names), precision, aligned)
    norms = max_norm > 0 or declared.takes_norms
    work = Work(
        key,
        declared,
        forms,
        keeps,
        items,
        table,
        abi.chunk_table(numels, chunk),
        torch.frombuffer(scalars, dtype=torch.float32).view(len(rows), abi.SCALAR_STRIDE),
        rows,
        chunk,
        sum(grains),
        grad_scale=None if grad_scale is None else torch.tensor([grad_scale]),
        found_inf=None if found_inf is None else torch.tensor([found_inf]),
        clip=torch.zeros(1) if max_norm > 0 else None,
        partials=torch.zeros(sum(grains), 2),
        sums=torch.zeros(3 * len(items) + 2, 2) if declared.reduces or norms else None,
        totals=torch.zeros(1),
        norm=torch.zeros(1),
        counters=torch.zeros(len(items) + 1, dtype=torch.int32),
        max_norm=max_norm,
    )
    return Problem(work, [it.param for it in items])


def clone(problem: Problem) -> Problem:
    """An independent copy for the oracle, which reads `items` and not the addresses in the table."""

    def copy(t):
        return None if t is None else t.clone()

    items = [
        Item(
            copy(it.param),
            copy(it.grad),
            tuple(map(copy, it.states)),
            tuple(map(copy, it.scales)),
            *it[4:6],
            copy(it.companion),
            it.first_octet,
        )
        for it in problem.work.items
    ]
    buffers = {n: copy(getattr(problem.work, n)) for n in ("clip", "sums", "totals", "norm")}
    buffers = {n: t if t is None else t.double() for n, t in buffers.items()}
    return Problem(replace(problem.work, items=items, cache={}, **buffers), [it.param for it in items])


def oracle(problem: Problem, clip: bool = False) -> Problem:
    """The same bucket stepped by the reference in fp64."""
    exact = clone(problem)
    exact.run(ReferenceBackend(torch.float64), clip)
    return exact


def ulp(x: torch.Tensor) -> torch.Tensor:
    """Unit in the last place of each element, as fp64."""
    info = torch.finfo(x.dtype)
    magnitude = x.double().abs().clamp(min=info.tiny)
    return 2.0 ** torch.floor(torch.log2(magnitude)) * info.eps


def assert_close(problem: Problem, exact: Problem, lr: float = HYPER["lr"]) -> None:
    """Every tensor after a step against the oracle.

    fp32 values: 4 ulp, plus what cancelling sums may lose: 4 ulp of the largest element of a first moment, its share
    2 g dg in a second moment, and 2e-5 lr in the parameter for each quotient of the two (which may be 100), 2e-5 in a
    state that sums such quotients. 16-bit values: the neighbouring value where fp32 rounding crossed a tie, in at most
    1 % of the elements. Codes: one step of the map, in at most 1 %.
    """
    rule, forms = exact.work.rule, exact.work.formats
    largest = [
        max(float(it.states[k].double().abs().max()) for it in exact.work.items if it.param.numel())
        if not form.block
        else 0.0
        for k, form in enumerate(forms)
    ]
    for got, want in zip(problem.work.items, exact.work.items, strict=True):
        if not got.param.numel():
            continue
        _close_weights(problem.work.precision, got, want, 2e-5 * lr * TERMS.get(rule.name, 1))
        for k, (form, state, a, b, sa, sb) in enumerate(
            zip(forms, rule.states, got.states, want.states, got.scales, want.scales, strict=True)
        ):
            if form.block:
                torch.testing.assert_close(sa, sb, rtol=1e-5, atol=0)
                difference = code_numbers(form, state.signed, a) - code_numbers(form, state.signed, b)
                difference = difference.abs()
                assert difference.max() <= 1, f"{state.name}: codes differ by {difference.max()}"
                assert (difference > 0).sum() <= max(1, 0.01 * a.numel()), (
                    f"{state.name}: {(difference > 0).sum()} codes differ"
                )
            else:
                atol = 4.8e-7 * (largest[k] if state.signed else (b.double() * largest[k]).sqrt())
                _close(a, b, atol + 2e-5 * ((rule.name, state.name) in RATIOS), state.name)


def code_numbers(form, signed: bool, codes: torch.Tensor) -> torch.Tensor:
    """Codes as numbers that count the values of their map in order."""
    codes = codes.long()
    if form.bits == 4:
        return torch.stack([codes >> 4, codes & 15], 1).view(-1)
    if not signed or form.name == "int8":
        return codes
    if form.name == "int8c":
        return codes - 256 * (codes > 127)
    return torch.where(codes > 127, 128 - codes, codes)  # fp8: sign and magnitude


def _close_weights(precision, got, want, atol: float) -> None:
    """Where there is a companion, the weights it stands for: fp32 to fp32 accuracy, 24 bits or two bf16 to 2^-15."""
    if got.companion is None:
        return _close(got.param, want.param, atol, "param")
    a, b = (precision.load(flat(it.param), flat(it.companion), torch.float32) for it in (got, want))
    if precision.name in ("master", "split32"):
        _close(a, b, atol, "weight")
    else:  # where fp32 rounding crossed a tie, one step of the low bits
        error, step = (a.double() - b.double()).abs(), 2.0**-15 * b.double().abs()
        if got.param.dtype == torch.float16:
            step = step / 2**3 + 2.0**-24
        assert (error <= step + atol).all(), f"weight: error {error.max():.3g}"
        differ = int((error > atol + 4 * ulp(b.float())).sum())
        assert differ <= max(1, 0.02 * a.numel()), f"weight: {differ} values differ"
    if precision.name == "master":
        assert torch.equal(got.param.view(torch.int16), got.companion.to(got.param.dtype).view(torch.int16))


def _close(got: torch.Tensor, want: torch.Tensor, atol, what: str) -> None:
    error = (got.double() - want.double()).abs()
    if got.dtype == torch.float32:
        bound = 4 * ulp(want) + atol
        worst = (error - bound).argmax()
        assert (error <= bound).all(), f"{what}: error {error[worst]:.3g} against a bound of {bound[worst]:.3g}"
        return
    off = error > 0
    assert (error <= 1.01 * ulp(want) + atol).all(), (
        f"{what}: differs by more than one {got.dtype} value: {error.max():.3g}"
    )
    assert off.sum() <= max(1, 0.01 * got.numel()), f"{what}: {int(off.sum())} of {got.numel()} values differ"


def snapshot(problem: Problem) -> list[torch.Tensor]:
    """Copies of everything a step may write, for bitwise comparison."""
    out = []
    for item in problem.work.items:
        out += [flat(t).clone() for t in (item.param, item.companion, *item.states, *item.scales) if t is not None]
    return out


def assert_bitwise(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), "results differ in at least one bit"


def assert_guards(problem: Problem) -> None:
    for item in problem.work.items:
        for t in (item.param, item.grad, item.companion, *item.states, *item.scales):
            assert t is None or guards_untouched(t), "memory next to a tensor was written"
