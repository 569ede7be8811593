"""Steps of some of an optimizer's parameters at a time, bit for bit those of a whole step: gradient release, step_parameter.

A part has a plan of its own, which is kept, so that a part that comes again costs a look and its launches. Rows, tensor ids,
step counts and places among the projected parameters are those of the whole optimizer.
"""

from __future__ import annotations

import torch

from fusedopt.checks import describe
from fusedopt.distributed import is_dtensor
from fusedopt.measures import needs_all_gradients
from fusedopt.plan import Plan
from fusedopt.projections.base import places
from fusedopt.projections.steps import ScratchPool
from fusedopt.states import undisturbed
from fusedopt.transforms.base import check_parts, widened

MORE_PLANS = 64  # plans kept beyond two for each parameter


class ParameterIndex:
    """Where the parameters of an optimizer are: (group, index in the group, parameter) by tensor id, and back."""

    def __init__(self, groups: list[dict]):
        self.owners = [(i, k, p) for i, group in enumerate(groups) for k, p in enumerate(group["params"])]
        self.sizes = [len(group["params"]) for group in groups]
        self.ids = {p: tensor_id for tensor_id, (_, _, p) in enumerate(self.owners)}
        self._places: dict | None = None
        self._largest: dict | None = None

    def holds(self, groups: list[dict], p: torch.Tensor) -> int | None:
        """The tensor id of a parameter, or None where groups have changed since (a tool has replaced parameters) or lack it."""
        tensor_id = self.ids.get(p)
        if tensor_id is None or [len(group["params"]) for group in groups] != self.sizes:
            return None
        group, k, _ = self.owners[tensor_id]
        return tensor_id if groups[group]["params"][k] is p else None

    def places(self, opt) -> dict:
        """Those of every projected parameter; they do not change between the plans of one step."""
        if self._places is None:
            self._places = places(opt)
        return self._places

    def largest(self, opt) -> dict[torch.device, int]:
        """By device: elements of the largest projected parameter that is trained."""
        if self._largest is None:
            self._largest = {}
            for tensor_id in self.places(opt):
                p = self.owners[tensor_id][2]
                if p.requires_grad:
                    self._largest[p.device] = max(p.numel(), self._largest.get(p.device, 0))
        return self._largest

    def forget_places(self) -> None:
        """Called between steps: options of projections may change there."""
        self._places = self._largest = None


class PartPlan(Plan):
    """The launches of some parameters, given by tensor ids. clip: a coefficient, fp32 [1], by device; None: no clipping."""

    def __init__(
        self, opt, index: ParameterIndex, ids: tuple[int, ...], grads: list[torch.Tensor], pool: ScratchPool, clip
    ):
        self.index, self.ids, self.pool, self.clip = index, ids, pool, clip
        self.group_numbers = sorted({index.owners[i][0] for i in ids})
        super().__init__(opt, [index.owners[i][2] for i in ids], grads)
        if clip is not None:
            for device in self.devices:
                device.clip = clip[device.device]
                for bucket in (*device.buckets, *device.wholes):
                    for work in bucket.works.values():
                        work.clip = device.clip

    def _flags(self) -> tuple:
        groups = self.opt.param_groups
        return self.opt.flags([groups[i] for i in self.group_numbers])

    def _max_norm(self) -> float | None:
        return None if self.clip is None else 0.0

    def _entries(self) -> list[dict]:
        state = self.opt.state
        return [state[p] for p in self.params]

    def _places(self) -> dict:
        return self.index.places(self.opt)

    def _owners(self):
        return ((i, self.index.owners[i][0], self.index.owners[i][2]) for i in self.ids)

    def square_sums(self) -> list[torch.Tensor]:
        """The sum of squared gradients of each device at the last run, where there is clipping; 0-dim."""
        return [device.totals.sum() for device in self.devices]


class Parts:
    """The plans of parts of one optimizer's parameters."""

    def __init__(self, opt):
        self.opt = opt
        self.index = ParameterIndex(opt.param_groups)
        self._plans: dict[tuple[int, ...], PartPlan] = {}
        self._pool = ScratchPool()
        self._round: set[int] = set()  # what step_parameter has stepped in this step

    def plans(self) -> list[PartPlan]:
        return list(self._plans.values())

    def id_of(self, p: torch.Tensor) -> int:
        """The tensor id of a parameter. Raises ValueError where it is not the optimizer's."""
        groups = self.opt.param_groups
        found = self.index.holds(groups, p)
        if found is None:
            self.index, self._plans = ParameterIndex(groups), {}
            found = self.index.holds(groups, p)
        if found is None:
            raise ValueError(
                f"{type(self.opt).__name__}: a tensor of shape {tuple(p.shape)} is none of its parameters. Pass one of "
                "param_groups."
            )
        return found

    def plan(self, ids: tuple[int, ...], grads: list[torch.Tensor], clip=None) -> PartPlan:
        """The plan of parameters that have these gradients."""
        plan = self._plans.get(ids)
        if plan is not None and plan.clip is clip and plan.still_valid(plan.params, grads):
            return plan
        if plan is None and len(self._plans) >= 2 * len(self.index.owners) + MORE_PLANS:
            del self._plans[next(iter(self._plans))]
        self._pool.largest = self.index.largest(self.opt)
        plan = self._plans[ids] = PartPlan(self.opt, self.index, ids, grads, self._pool, clip)
        return plan

    @undisturbed
    def step_parameter(self, p: torch.Tensor, i: int | None) -> None:
        opt = self.opt
        g = p.grad
        if g is None or not p.requires_grad:
            return
        tensor_id = self.id_of(p)
        if is_dtensor(p) or not opt.supports_fused_back_pass():
            self._refuse(tensor_id, p)
        if i is not None and self.index.owners[tensor_id][1] != i:
            raise ValueError(
                f"{describe(type(opt).__name__, tensor_id, p)} has index {self.index.owners[tensor_id][1]} in its group, not "
                f"{i}. Pass its index, or None."
            )
        with torch.no_grad():
            if tensor_id in self._round:  # a second time: a step is over
                self.end_round()
            opt._take_turns(tensor_id)
            grads = widened(opt, [p], [g], None) if opt.gradient_transforms else [g]
            opt._run(self.plan((tensor_id,), grads), grads, part=True)
            self._round.add(tensor_id)  # a refused one has no part in it

    def end_round(self) -> None:
        """Ends a step of step_parameter's."""
        if self._round:
            self._round.clear()
            self.opt._end_of_parts()

    def _refuse(self, tensor_id: int, p: torch.Tensor) -> None:
        opt, what = self.opt, describe(type(self.opt).__name__, tensor_id, p)
        if opt._release is not None:
            raise RuntimeError(
                f"{what} is stepped by release_gradients already. Call its handle's remove(), or drop the hook that calls "
                "step_parameter."
            )
        if opt.offloading is not None:
            raise RuntimeError(
                f"{what}: offloaded states are stepped in chunks, by step(). Do not offload, or call step()."
            )
        if is_dtensor(p):
            raise RuntimeError(
                f"{what} is a DTensor: all processes step together, after their gradients are reduced. Call step()."
            )
        if opt._low_rank is not None:
            raise RuntimeError(
                f"{what}: projected_linear steps at step() only. Call its handle's remove() before step_parameter."
            )
        if needs_all_gradients(opt):
            raise RuntimeError(
                f"{what}: {type(opt).__name__} needs all gradients, or the loss, before it steps. Call step()."
            )
        if opt.amp_fused:
            raise RuntimeError(
                f"{what}: with amp_fused=True overflow is known only after the backward pass. Use bf16 autocast, which needs no "
                "GradScaler, or a scaler that unscales each gradient before step_parameter, with amp_fused=False."
            )
        check_parts(opt, what, RuntimeError)
        raise RuntimeError(
            f"{what}: clip_grad_norm={opt.clip_grad_norm} needs the norm of all gradients, of which step_parameter sees one. "
            "Clip each gradient before the call, or use fusedopt.release_gradients(model, opt, clip='previous')."
        )


class StepsParts:
    """The methods of an optimizer that step one parameter at a time."""

    def step_parameter(self, p: torch.Tensor, group: dict | None = None, i: int | None = None) -> None:
        """Steps one parameter from its .grad, as step() does when its turn comes, and leaves .grad to the caller: for trainers
        that step in the backward pass from hooks of their own (OneTrainer's fused back pass). A step() after it steps only
        parameters that have a gradient.

        Args:
            p: a parameter of this optimizer. Nothing happens where it has no gradient or requires none.
            group, i: its group and its index there. Only hints: the numbers come from the group that p is in.

        Raises:
            ValueError: p is not this optimizer's. RuntimeError: clip_grad_norm, which needs all gradients; AMP's fused
            protocol; release_gradients; offload; a DTensor; or p or its gradient cannot be stepped. Nothing has been changed
            then.
        """
        if self._parts is None:
            self._parts = Parts(self)
        self._parts.step_parameter(p, i)

    def step_param(self, p: torch.Tensor, group: dict | None = None) -> None:
        """step_parameter under the name that kohya's sd-scripts calls."""
        self.step_parameter(p, group)

    def supports_fused_back_pass(self) -> bool:
        """Whether step_parameter can be used."""
        at_step = self.amp_fused or any(x is not None for x in (self._release, self._low_rank, self.offloading))
        whole = needs_all_gradients(self) or any(t.scope == "model" or t.after_step for t in self.gradient_transforms)
        return self.clip_grad_norm is None and not at_step and not whole
