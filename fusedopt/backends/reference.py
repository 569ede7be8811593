"""The reference backend: the whole pipeline in pure torch, one tensor at a time, on any device and floating dtype.

It defines the numbers the other backends are tested against (`dtype=torch.float64` gives the oracle).
"""

from __future__ import annotations

import torch

from fusedopt.abi import Phase
from fusedopt.backends.base import BucketKey, Item, MatrixKernels, MatrixWork, Work
from fusedopt.backends.reference_matrix import apply_matrix
from fusedopt.formats import Format
from fusedopt.memory import flat
from fusedopt.precision import gaussian16, philox16


def _as(value, like: torch.Tensor):
    """A host number as it is; a number on a device in the dtype of `like`."""
    return value.to(device=like.device, dtype=like.dtype) if isinstance(value, torch.Tensor) else value


class ReferenceBackend(MatrixKernels):
    name = "reference"

    def __init__(self, dtype: torch.dtype | None = None):
        """dtype: of the arithmetic; None takes fp64 where a tensor is fp64, fp32 elsewhere."""
        self.dtype = dtype

    def reason(self) -> str | None:
        return None

    def supports(self, key: BucketKey) -> str | None:
        return None

    def units(self, device: torch.device) -> int:
        return 1

    def launch(self, work: Work) -> None:
        if work.found_inf is not None and work.phase != Phase.NORM and bool(work.found_inf):
            return
        if work.phase == Phase.NORM:
            return self._norm(work)
        for item in work.items:
            self._step(work, item)

    def _dtype(self, item: Item) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        double = torch.float64 in (item.param.dtype, item.grad.dtype)
        return torch.float64 if double else torch.float32

    def _norm(self, work: Work) -> None:
        total = torch.zeros((), dtype=work.totals.dtype, device=work.totals.device)
        keep = torch.is_grad_enabled()
        for item in work.items:
            pair = torch.stack(
                [flat(t).to(self._dtype(item), copy=keep).square().sum() for t in (item.param, item.grad)]
            )
            if work.sums is not None:
                work.sums[item.tensor_id] = pair
            total += pair[1]
        work.totals[work.total_index] = total
        if work.total_index == work.total_count - 1:
            norm = work.totals.sum().sqrt()
            if work.grad_scale is not None:
                norm = norm / work.grad_scale.view(())
            work.norm.copy_(norm)
            if work.max_norm > 0:
                work.clip.copy_((work.max_norm / (norm + 1e-6)).clamp(max=1.0))

    def _step(self, work: Work, item: Item) -> None:
        rule, row = work.rule, work.numbers[item.scalar_row]
        dtype = self._dtype(item)
        keep = torch.is_grad_enabled()  # differentiable=True: the graph keeps what the stores below overwrite
        n = item.param.numel()
        companion = None if item.companion is None else flat(item.companion)
        g = flat(item.grad).to(dtype)
        only_direction = work.phase == Phase.DIRECTION
        p = torch.zeros_like(g) if only_direction else work.precision.load(flat(item.param), companion, dtype)
        p = p.clone() if keep else p
        scalars = row.scalars[
            : len(rule.scalar_names)
        ]  # a site launches rules over the rows of others whose first these are
        named = {k: _as(v, p) for k, v in zip(rule.scalar_names, scalars, strict=True)}
        states = []
        for stored, scale, form, state in zip(item.states, item.scales, work.formats, rule.states, strict=True):
            x = form.decode(flat(stored), scale, state.signed, dtype, n)
            states.append(x.clone() if keep else x)

        mul = row.grad_sign
        if work.grad_scale is not None:
            mul = mul / work.grad_scale.view(()).to(dtype)
        if work.clip is not None:
            mul = mul * work.clip.view(()).to(dtype)
        g = g * mul if only_direction else g * mul + row.l2 * p
        if rule.trust_on == "gradient":
            param_sq, grad_sq = work.sums[item.tensor_id].to(dtype, copy=True).unbind()
            g = g * rule.trust(param_sq, grad_sq * (mul * mul), **named)

        if work.phase == Phase.PROBE and rule.measures is not None:
            join = torch.amax if rule.takes_largest else torch.sum
            work.sums[item.tensor_id] = torch.stack([join(x) for x in rule.measures.terms(g, p, *states, **named)])
            return
        noise = ()
        if rule.noise:
            first = 8 * item.first_octet
            noise = (gaussian16(row.seed, row.step, item.tensor_id, n, p.device, first).to(dtype),)
        u, *states = rule.reference(g, p, *noise, *states, **named)

        if work.phase == Phase.PROBE:
            work.sums[item.tensor_id] = torch.stack([p.square().sum(), u.square().sum()])
            return
        lr = _as(row.lr, p)
        if work.phase == Phase.APPLY:
            param_sq, update_sq = work.sums[item.tensor_id].to(dtype, copy=True).unbind()
            lr = lr * rule.trust(param_sq, update_sq, **named)
        p = u if only_direction else p - (lr * u + _as(row.decay, p) * p)

        def random16(stream: int):
            return philox16(row.seed, row.step, item.tensor_id, n, p.device, stream, 8 * item.first_octet)

        precision = work.precision
        if item.param.dtype in precision.dtypes and precision.name != "nearest":
            p, kept = precision.store(p.float(), item.param.dtype, random16(0) if precision.random else None)
            if companion is not None:
                companion.copy_(kept)
        flat(item.param).copy_(p)
        for i, (x, stored, scale, form, state) in enumerate(
            zip(states, item.states, item.scales, work.formats, rule.states, strict=True)
        ):
            if form.block or form.stochastic:
                x, new_scale = form.encode(x, state.signed, random16(1 + i) if form.stochastic else None)
            flat(stored).copy_(x)
            if scale is not None:
                scale.copy_(new_scale)

    def apply_matrix(self, work: MatrixWork) -> bool:
        return apply_matrix(work, self.dtype)

    def quantize(self, x: torch.Tensor, form: Format, signed: bool, codes: torch.Tensor, scale: torch.Tensor) -> None:
        stored, largest = form.encode(x, signed)
        codes.copy_(stored)
        scale.copy_(largest)

    def dequantize(
        self, codes: torch.Tensor, scale: torch.Tensor, form: Format, signed: bool, out: torch.Tensor
    ) -> None:
        out.copy_(form.decode(codes, scale, signed, torch.float32, out.numel()))
