"""Scalar rows: the numbers of each (group, step), computed once per step on the host, or on the device with capturable=True."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fusedopt.abi import SCALAR_HEAD, SCALAR_STRIDE, pack_scalar_row
from fusedopt.backends.base import RowNumbers
from fusedopt.rule import Rule


@dataclass(slots=True)
class Row:
    """One scalar row: a group at a step count. `view` is a 0-dim step tensor when the count lives on the device."""

    group: int
    rule: Rule
    decay_mode: str
    step: int
    view: torch.Tensor | None = None
    plain: bool = False  # of a launch over updates, which are neither unscaled nor negated
    uncertain: bool = False  # whether the device may have skipped steps that `step` counts
    site: Any = None  # counts steps for the rule in its own way (a projection that resets states)
    like: int | None = (
        None  # the row that this one is a copy of, for a tensor with numbers of its own (fusedopt.measures)
    )


def _host(value):
    return value.item() if isinstance(value, torch.Tensor) else value


def _numbers(row: Row, h: dict, step, lr) -> RowNumbers:
    rule, weight_decay = row.rule, h["weight_decay"]
    counted = step if row.site is None else row.site.rule_step(step)
    decay = 0.0
    if row.decay_mode == "decoupled":
        decay = lr * weight_decay if rule.decay is None else rule.decay(h, counted)
    return RowNumbers(
        lr=lr if rule.step_size is None else rule.step_size(h, counted),
        decay=decay,
        l2=weight_decay if row.decay_mode == "coupled" and not row.plain else 0.0,
        grad_sign=-1.0 if h["maximize"] and not row.plain else 1.0,
        seed=h["seed"],
        step=step,
        scalars=rule.scalars(h, counted),
    )


def host_numbers(row: Row, group: dict) -> RowNumbers:
    lr = _host(group["lr"])
    h = group
    if isinstance(group["lr"], torch.Tensor) or any(isinstance(b, torch.Tensor) for b in group.get("betas", ())):
        h = {**group, "lr": lr}
        if "betas" in group:
            h["betas"] = tuple(_host(b) for b in group["betas"])
    return _numbers(row, h, row.step, lr)


def device_numbers(row: Row, group: dict) -> RowNumbers:
    """The same with every number that can change between replays as a float64 tensor on the device."""
    device = row.view.device

    def on_device(x):
        return x.to(device=device, dtype=torch.float64).view(()) if isinstance(x, torch.Tensor) else x

    lr = on_device(group["lr"])
    h = {**group, "lr": lr}
    if "betas" in group:
        h["betas"] = tuple(on_device(b) for b in group["betas"])
    return _numbers(row, h, row.view.double(), lr)


class ScalarTable:
    """The fp32 table of a device, its host image, and the numbers in double precision."""

    def __init__(self, rows: list[Row], device: torch.device):
        self.rows = rows
        self.numbers: list[RowNumbers] = []
        self.image = bytearray(4 * SCALAR_STRIDE * len(rows))
        host = torch.frombuffer(self.image, dtype=torch.float32).view(len(rows), SCALAR_STRIDE)
        self.shared = device.type == "cpu"  # the table is the host image itself
        self.host = host
        self.table = host if self.shared else torch.zeros_like(host, device=device)
        self.written: list[list] = [[] for _ in rows]  # device rows: what each word was last set to
        pairs = [(i, row.like) for i, row in enumerate(rows) if row.like is not None and row.view is not None]
        self.copied = tuple(torch.tensor(side, device=device) for side in zip(*pairs, strict=True))

    def update(self, groups: list[dict], upload) -> None:
        """Recomputes every row. upload(destination, source): asynchronous copy of a host tensor."""
        self.numbers = []
        host_rows = False
        for index, row in enumerate(self.rows):
            group = groups[row.group]
            if row.like is not None:  # follows the row it copies
                numbers = self.numbers[row.like]
                if row.view is None:
                    size = 4 * SCALAR_STRIDE
                    source = self.image[row.like * size : (row.like + 1) * size]
                    self.image[index * size : (index + 1) * size] = source
                    host_rows = True
            elif row.view is not None:
                numbers = device_numbers(row, group)
                self._write_on_device(index, numbers)
            else:
                numbers = host_numbers(row, group)
                head = (numbers.lr, numbers.decay, numbers.l2, numbers.grad_sign)
                pack_scalar_row(self.image, index, head, numbers.seed, numbers.step, numbers.scalars)
                host_rows = True
            self.numbers.append(numbers)
        if self.copied:
            to, source = self.copied
            self.table.index_copy_(0, to, self.table.index_select(0, source))
        if host_rows and not self.shared:
            first = next(i for i, row in enumerate(self.rows) if row.view is None)  # host rows come last
            upload(self.table[first:], self.host[first:])

    def _write_on_device(self, index: int, numbers: RowNumbers) -> None:
        """Writes the words that changed: fills for host numbers, copies for device numbers; both can be captured."""
        line = self.table[index]
        words = line.view(torch.int32)
        low, high = numbers.seed & 0xFFFFFFFF, (numbers.seed >> 32) & 0xFFFFFFFF
        signed = [x - 2**32 if x >= 2**31 else x for x in (low, high)]
        values = [numbers.lr, numbers.decay, numbers.l2, numbers.grad_sign, *signed, numbers.step, 0]
        values += numbers.scalars
        known = self.written[index] or [None] * len(values)
        for i, (value, last) in enumerate(zip(values, known, strict=True)):
            target = words if 4 <= i < SCALAR_HEAD else line
            if isinstance(value, torch.Tensor):
                target[i].copy_(value)
            elif value != last:
                target[i].fill_(value)
        self.written[index] = [None if isinstance(v, torch.Tensor) else v for v in values]
