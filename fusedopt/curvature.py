"""Rules that read the diagonal of the Hessian: Hutchinson's estimate of it, drawn between steps (AdaHessian, OASIS, SANIA)."""

from __future__ import annotations

import torch

from fusedopt.checks import check_positions, check_precision, describe
from fusedopt.distributed import is_dtensor
from fusedopt.optimizer import FusedOptimizer
from fusedopt.precision import philox_words
from fusedopt.projections.base import check_positive_int
from fusedopt.projections.seeds import mix
from fusedopt.states import undisturbed

PURPOSE = 0x4E55
NAME = "hessian"  # of the state, which rules return as they get it


@torch.no_grad()
def signs(p: torch.Tensor, seed: int, tensor_id: int, step, sample: int) -> torch.Tensor:
    """1 and -1 like p, as likely as each other: element i, row by row, has bit i % 128 of Philox counter i // 128.

    step: a number, or a tensor on p's device.
    """
    counter = torch.arange((p.numel() + 127) // 128, dtype=torch.int64, device=p.device)
    words = torch.stack(philox_words(mix(seed, PURPOSE, sample), step, tensor_id, counter, 0), 1)
    bits = words[:, :, None] >> torch.arange(32, device=p.device) & 1
    return (2 * bits.view(-1)[: p.numel()] - 1).to(p.dtype).view(p.shape)


class EstimatesHessian(FusedOptimizer):
    """Base of the classes whose rule reads the state `hessian`: fp32, shaped like the parameter, written by `estimate_hessian`."""

    _estimated: set[int] | None = None  # tensor ids that have an estimate; steps taken say so too

    @torch._disable_dynamo
    def estimate_hessian(self, loss: torch.Tensor, samples: int = 1) -> None:
        """Adds the gradients of a loss to .grad, as loss.backward() does, and estimates the diagonal of its Hessian: the mean
        of z * (H z) over random signs z.

        Call it in place of backward(), at every step or at every few: between estimates backward() does, and steps go on with
        the last one. Each sample costs about a backward pass, and all of them keep the graph of the gradients: about twice
        the memory of backward(). Signs follow from the group's seed, the step and the tensor, so a resumed run draws the same.

        Args:
            loss: one number, before any loss scale; every operation on its way needs a second derivative.
            samples: over how many draws to average.
        Raises:
            ValueError: samples is not positive; the loss is not one number or needs no gradient.
            RuntimeError: a parameter is a DTensor; states are offloaded; gradients are released in backward; an operation has
                no second derivative. Nothing is changed then. Of several processes each estimates its own loss: average
                gradients and estimates (`opt.state[p]["hessian"]`) before the step.
        """
        name = type(self).__name__
        check_positive_int(samples, "samples")
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"{name}.estimate_hessian: it wants the loss, a tensor of one element that needs a gradient"
            )
        if self.offloading is not None or self._release is not None:
            raise RuntimeError(
                f"{name}.estimate_hessian: states are offloaded, or gradients released in backward. Do neither."
            )
        owners = []
        for tensor_id, (p, group) in enumerate((p, g) for g in self.param_groups for p in g["params"]):
            if p.requires_grad:
                if is_dtensor(p):
                    what = describe(name, tensor_id, p)
                    raise RuntimeError(
                        f"{what} is a DTensor, whose gradients have no graph. Keep parameters whole (DDP)."
                    )
                check_precision(name, tensor_id, p, group)
                check_positions(name, tensor_id, p, self.rule_for(group), self.projection_for(p, group))
                owners.append((tensor_id, p, group))
        params = [p for _, p, _ in owners]
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        live = [i for i, g in enumerate(grads) if g is not None]
        curved = [i for i in live if grads[i].requires_grad]
        sums = {i: torch.zeros_like(params[i], dtype=self._wide(params[i])) for i in live}
        for sample in range(samples if curved else 0):
            z = {
                i: signs(params[i], owners[i][2]["seed"], owners[i][0], self._next_step(params[i]), sample)
                for i in live
            }
            products = torch.autograd.grad(
                [grads[i] for i in curved],
                [params[i] for i in live],
                [z[i].to(grads[i].dtype) for i in curved],
                retain_graph=sample + 1 < samples,
                allow_unused=True,
            )
            for i, product in zip(live, products, strict=True):
                if product is not None:
                    sums[i] += z[i] * product
        with torch.no_grad():
            for i in live:
                tensor_id, p, group = owners[i]
                g = grads[i].detach()
                if p.grad is None:
                    p.grad = torch.empty_like(p).copy_(g)
                else:
                    p.grad += g
                self.put_estimate(tensor_id, p, group, sums[i] / samples)

    @undisturbed
    @torch.no_grad()
    def put_estimate(self, tensor_id: int, p: torch.Tensor, group: dict, diagonal: torch.Tensor) -> None:
        """Writes an estimate of the Hessian's diagonal, shaped like p, into the state of parameter `tensor_id`."""
        entry = self.init_state(p, group, self.kept_rule(p, group), tensor_id)
        old = entry[NAME] if self._has_estimate(tensor_id, p) else None
        entry[NAME].copy_(self.joined(old, diagonal.to(entry[NAME].dtype), group))
        self._estimated = (self._estimated or set()) | {tensor_id}

    def joined(self, old: torch.Tensor | None, new: torch.Tensor, group: dict) -> torch.Tensor:
        """What is kept of the estimates so far and a new one; old: None at the first."""
        return new

    @staticmethod
    def _wide(p: torch.Tensor) -> torch.dtype:
        return torch.float64 if p.dtype == torch.float64 else torch.float32

    def _next_step(self, p: torch.Tensor):
        """The number of the step to come: a number, or a tensor where counts are on the device."""
        step = self.state[p].get("step", 0) if p in self.state else 0
        if isinstance(step, torch.Tensor) and step.device.type == "cpu":
            step = int(step)
        return step + 1

    def _has_estimate(self, tensor_id: int, p: torch.Tensor) -> bool:
        """Whether this optimizer has made one, or the one whose states it has loaded."""
        if tensor_id in (self._estimated or ()):
            return True
        entry = self.state.get(p)
        if not entry or NAME not in entry or float(entry["step"]) == 0 and not bool(entry[NAME].any()):
            return False
        self._estimated = (self._estimated or set()) | {tensor_id}
        return True

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._estimated = None

    def _step_tensors(self, params: list[torch.Tensor], grads: list[torch.Tensor | None]) -> None:
        missing = [i for i, g in enumerate(grads) if g is not None and not self._has_estimate(i, params[i])]
        if missing and (self.state or not self._moves_nothing(params, grads)):
            groups = [group for group in self.param_groups for _ in group["params"]]
            self._without_estimates([(i, params[i], groups[i]) for i in missing])
        super()._step_tensors(params, grads)

    def _run(self, plan, grads, scale=None, found=None, part: bool = False) -> None:
        missing = [s for s in plan.slots if part and not self._has_estimate(s.tensor_id, s.owner)]
        if missing:
            self._without_estimates([(s.tensor_id, s.owner, self.param_groups[s.group]) for s in missing])
        super()._run(plan, grads, scale, found, part)

    def _without_estimates(self, owners: list[tuple[int, torch.Tensor, dict]]) -> None:
        """Called with the parameters that would step without ever having had an estimate."""
        what = describe(type(self).__name__, *owners[0][:2])
        raise RuntimeError(
            f"{what} has no estimate of its Hessian's diagonal. Call estimate_hessian(loss) in place of loss.backward() before its "
            "first step."
        )
