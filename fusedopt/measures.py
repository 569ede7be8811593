"""Measured: numbers of whole tensors that a rule's step depends on (NovoGrad's v, Prodigy's d), computed without a host sync.

A tensor whose rule has measures (fusedopt.rule.Measures) has a scalar row of its own, a copy of its group's. Sums over the
tensor come from launches that exist for trust ratios: a norm launch, or a probe, which here sums the rule's own two terms. A
few operations on vectors with one element a tensor make numbers of them, which are written into the rows: the kernels read
them like any scalar, and know nothing of all this.
"""

from __future__ import annotations

import torch

from fusedopt.backends.base import RowNumbers
from fusedopt.rule import Rule
from fusedopt.sharded_states import LocalEntry

FACTORS = {"lr_factor": 0, "decay_factor": 1}  # words of the row's head that they multiply
SCALARS = 8  # the first word of the rule's own


def check_measured(name: str, rule: Rule, group: dict) -> None:
    """Raises ValueError for options of a group that numbers of whole tensors rule out."""
    if rule.measures is None:
        return
    if group["differentiable"]:
        raise ValueError(
            f"{name}: differentiable=True needs a graph through the numbers that it takes of whole tensors, which are computed "
            "without one. Use an elementwise rule (AdamW, SGD)."
        )
    if group["projection"] is not None:
        raise ValueError(f"{name}: its step needs sums over the full gradient, so it takes no projection. Use AdamW.")


def check_devices(name: str, devices: dict) -> None:
    """Raises RuntimeError where a rule sums over tensors of several devices. devices: slots by device."""
    if len(devices) < 2:
        return
    for slots in devices.values():
        for slot in slots:
            if slot.rule.measures is not None and slot.rule.measures.scope != "tensor":
                raise RuntimeError(
                    f"{name} sums over all parameters of the {slot.rule.measures.scope}, which lie on several devices "
                    f"({', '.join(map(str, devices))}). Put them on one device, or use one optimizer for each."
                )


def needs_all_gradients(opt) -> bool:
    """Whether a step of some parameters would need sums over others, or numbers that are given when all gradients are there."""
    rules = [opt.rule_for(group) for group in opt.param_groups]
    measures = [rule.measures for rule in rules if rule.measures is not None]
    projections = [p for group in opt.param_groups if (p := group["projection"]) is not None]
    compared = opt.steps_together or any(p.compares for p in projections)
    return compared or any(m.scope != "tensor" or m.given or m.compares for m in measures)


def choose(condition, a, b):
    """a where a condition holds, else b. The condition is a number on the host, or a tensor where counts are on the device."""
    if isinstance(condition, torch.Tensor):
        return torch.where(condition.bool(), a, b)
    return a if condition else b


def after(step, first: int):
    """1 where a step comes after another, else 0, in double precision."""
    return (step > first).double() if isinstance(step, torch.Tensor) else float(step > first)


def _stored(entry) -> dict:
    """The dict in the optimizer's state behind a slot's entry."""
    return entry.stored if isinstance(entry, LocalEntry) else entry


class _Set:
    """Tensors that share a rule, a group and a step count: their scalars are the same but for what is measured."""

    def __init__(self, slots: list, device: torch.device):
        self.slots, self.rule, self.group = slots, slots[0].rule, slots[0].group
        self.ids = torch.tensor([s.tensor_id for s in slots], device=device)
        self.rows = [s.row for s in slots]
        self.rows_index = torch.tensor(self.rows, device=device)
        self.numel = torch.tensor([max(1, s.owner.numel()) for s in slots], dtype=torch.float64, device=device)

    def scalars(self, table) -> dict:
        """The rule's scalars of this step by name."""
        return dict(zip(self.rule.scalar_names, table.numbers[self.rows[0]].scalars, strict=True))


class _Scope:
    """What is summed together: the tensors of one set, or those of all sets of a rule in a group or an optimizer."""

    def __init__(self, sets: list[_Set], opt, device: torch.device):
        self.sets, self.measures = sets, sets[0].rule.measures
        self.shared = self.measures.scope != "tensor"
        rule = sets[0].rule
        if not self.shared:
            entries = [_stored(slot.entry) for slot in sets[0].slots]
            self.memory = {
                name: torch.stack([entry[name].to(device, torch.float64) for entry in entries]) for name in rule.memory
            }
            for name, values in self.memory.items():
                for entry, value in zip(entries, values.unbind(), strict=True):
                    entry[name] = value
            return
        groups = opt.param_groups if self.measures.scope == "optimizer" else [opt.param_groups[sets[0].group]]
        entries = [opt.state[p] for group in groups for p in group["params"] if p in opt.state]
        entries = [entry for entry in entries if rule.memory.keys() <= entry.keys()]
        self.memory = {}
        if rule.memory:  # one for all, which only those know that have been stepped
            oldest = max(entries, key=lambda entry: float(entry["step"]))
            for name in rule.memory:
                self.memory[name] = oldest[name].to(device, torch.float64, copy=True)
                for entry in entries:
                    entry[name] = self.memory[name]

    def begin(self, scalars, given: dict) -> None:
        """Writes what the rule's `start` makes of the memory."""
        for one in self.sets:
            self._write(one, self.measures.start(self.memory, one.scalars(scalars) | given), scalars)

    def take(self, function, sums: torch.Tensor, scalars, given: dict, gradient_factor, found_inf) -> None:
        """Calls a rule's `norms` or `sums` and writes what it returns into the rows of the tensors."""
        first, second, numel = [], [], []
        for one in self.sets:
            pairs = sums.index_select(0, one.ids).double()
            first.append(pairs[:, 0])
            second.append(pairs[:, 1] if gradient_factor is None else pairs[:, 1] * gradient_factor)
            numel.append(one.numel)
        leader = max(self.sets, key=lambda one: scalars.rows[one.rows[0]].step)
        if self.shared:
            sides = [torch.cat(side) for side in (first, second, numel)]
            join = torch.amax if function is self.measures.sums and self.measures.largest else torch.sum
            sides = [*(join(side) for side in sides[:2]), sides[2].sum()]
        else:
            sides = [first[0], second[0], numel[0]]
        memory, measured = function(self.memory, *sides[:2], {**leader.scalars(scalars), **given, "numel": sides[2]})
        for name, new in memory.items():
            old = self.memory[name]
            old.copy_(new if found_inf is None else torch.where(found_inf, old, new))
        for one in self.sets:
            self._write(one, measured, scalars)

    def _write(self, one: _Set, measured: dict, scalars) -> None:
        names = list(one.rule.scalar_names)
        table, count = scalars.table, len(one.slots)
        columns = {name: value.expand(count) for name, value in measured.items()}
        for name, values in columns.items():
            if name in FACTORS:
                word = FACTORS[name]
                values = table[:, word].index_select(0, one.rows_index).double() * values
            else:
                word = SCALARS + names.index(name)
            table[:, word].index_copy_(0, one.rows_index, values.to(torch.float32))
        each = {name: values.unbind() for name, values in columns.items()}
        for i, row in enumerate(one.rows):
            scalars.numbers[row] = _replaced(scalars.numbers[row], names, {name: v[i] for name, v in each.items()})


def _replaced(numbers: RowNumbers, names: list[str], measured: dict) -> RowNumbers:
    """A row's numbers in double precision with what was measured of its tensor."""
    values = list(numbers.scalars)
    changes = {}
    for name, value in measured.items():
        if name in FACTORS:
            field = "lr" if name == "lr_factor" else "decay"
            changes[field] = getattr(numbers, field) * value
        else:
            values[names.index(name)] = value
    return numbers._replace(scalars=tuple(values), **changes)


class Measured:
    """The tensors of a device whose rules have measures, their memory, and the two moments of a step that measure."""

    def __init__(self, slots: list, scalars, sums: torch.Tensor, opt):
        """scalars: the device's ScalarTable. sums: [tensor ids, 2], where norm launches and probes put theirs."""
        self.scalars, self.sums, self.opt = scalars, sums, opt
        device = sums.device
        for slot in slots:
            if slot.rule.takes_largest and not slot.param.numel():  # no launch writes these
                sums[slot.tensor_id] = -torch.inf
        found: dict[tuple, list] = {}
        for slot in slots:
            found.setdefault((slot.rule.name, scalars.rows[slot.row].like), []).append(slot)
        scopes: dict[tuple, list[_Set]] = {}
        for i, mine in enumerate(found.values()):
            one = _Set(mine, device)
            place = {"tensor": ("tensor", i), "group": ("group", one.rule.name, one.group)}
            scopes.setdefault(place.get(one.rule.measures.scope, ("optimizer", one.rule.name)), []).append(one)
        self.scopes = [_Scope(sets, opt, device) for sets in scopes.values()]
        self.square_factor, self.skipped = None, None

    def begin(self, grad_scale, found_inf, clip) -> None:
        """Takes what the prologue divides and multiplies gradients by (fp32 [1] or None) in this step, and given numbers."""
        self.grad_scale, self.clip = grad_scale, clip
        self.given = {name: x.to(self.sums.device, torch.float64) for name, x in self.opt.given.items()}
        self.skipped = None if found_inf is None else found_inf.view(()) != 0

    def take_norms(self) -> None:
        """After the norm launches and the clip coefficient."""
        factor = torch.ones((), dtype=torch.float64, device=self.sums.device)
        if self.grad_scale is not None:
            factor = factor / self.grad_scale.double().view(())
        if self.clip is not None:
            factor = factor * self.clip.double().view(())
        for scope in self.scopes:
            if scope.measures.start is not None:
                scope.begin(self.scalars, self.given)
            if scope.measures.norms is not None:
                scope.take(scope.measures.norms, self.sums, self.scalars, self.given, factor.square(), self.skipped)

    def take_sums(self) -> None:
        """After the probes."""
        for scope in self.scopes:
            if scope.measures.sums is not None:
                scope.take(scope.measures.sums, self.sums, self.scalars, self.given, None, self.skipped)
