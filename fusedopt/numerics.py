"""check_numerics: names the first tensor that is not finite any more, before an update spreads it."""

from __future__ import annotations

import torch

from fusedopt.checks import describe
from fusedopt.metrics import names_of, watched_offload
from fusedopt.norms import square_sums


class NonFiniteError(RuntimeError):
    """A NaN or an infinity in a gradient, a parameter or a state.

    Attributes: kind ("gradient", "parameter" or "state"), index and name of the parameter, state (its name, or None), step (the
    number of the step for that parameter, from 1), count (elements that are not finite), others (parameters that have the same
    kind of trouble in this step).
    """

    def __init__(
        self, message: str, kind: str, index: int, name: str, state: str | None, step: int, count: int, others: int
    ):
        super().__init__(message)
        self.kind, self.index, self.name, self.state = kind, index, name, state
        self.step, self.count, self.others = step, count, others

    def __reduce__(self):
        return type(self), (
            *self.args,
            self.kind,
            self.index,
            self.name,
            self.state,
            self.step,
            self.count,
            self.others,
        )


class NumericsCheck:
    """Looks at every step of an optimizer until remove(). Made by `check_numerics`."""

    def __init__(self, opt, model: torch.nn.Module | None):
        self._opt, self._model = opt, model
        self._order: dict[torch.Tensor, int] = {}  # in which gradients have come since the last step
        params = [p for group in opt.param_groups for p in group["params"]]
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in params if p.requires_grad]
        opt._watchers = (*opt._watchers, self)

    def _arrived(self, p: torch.Tensor) -> None:
        self._order.setdefault(p, len(self._order))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._opt._watchers = tuple(w for w in self._opt._watchers if w is not self)

    def __enter__(self) -> NumericsCheck:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()

    # Called around each run of a plan

    def before(self, plan, grads: list[torch.Tensor], scale, found) -> None:
        self._check(plan, self._weights(plan), "before")
        if found is None or not bool(found):  # GradScaler skips the step otherwise
            order = self._order
            slots = sorted(plan.slots, key=lambda s: (order.get(s.owner, len(order)), s.tensor_id))
            self._check(plan, [("gradient", None, s, grads[s.position]) for s in slots], "gradient")

    def after(self, plan, found) -> None:
        states = [(kind, name, s, t) for s in plan.slots for kind, name, t in self._states(s)]
        self._check(plan, states, "after")
        self._check(plan, self._weights(plan), "after")

    def finish(self) -> None:
        self._order = {}

    @staticmethod
    def _weights(plan) -> list[tuple]:
        return [("parameter", None, s, s.param.scale if s.quantized else s.param) for s in plan.slots]

    @staticmethod
    def _states(slot):
        """Codes hold no NaN: what was one lies at the block's largest value (fusedopt.formats)."""
        named = {
            s.name: slot.entry[s.name] for s, form in zip(slot.rule.states, slot.formats, strict=True) if not form.block
        }
        if slot.companion is not None:
            named[slot.precision.companion] = slot.companion
        return [("state", name, t) for name, t in named.items() if t.is_floating_point()]

    def _check(self, plan, tensors: list[tuple], when: str) -> None:
        """Raises for the first of the tensors with an element that is not finite."""
        suspects = []
        for which, sums in square_sums([t for *_, t in tensors]).values():
            finite = sums.isfinite().tolist()  # a square may overflow where its element does not
            suspects += [i for i, good in zip(which, finite, strict=True) if not good]
        bad = [i for i in sorted(suspects) if not tensors[i][3].detach().isfinite().all()]
        if bad:
            self._order = {}
            kind, state, slot, t = tensors[bad[0]]
            raise self._error(kind, state, slot, t, when, len({id(tensors[i][2]) for i in bad}) - 1)

    def _error(self, kind: str, state: str | None, slot, t: torch.Tensor, when: str, others: int) -> NonFiniteError:
        opt, values = self._opt, t.detach()
        name = names_of(opt, self._model)[slot.tensor_id]
        step = int(slot.entry["step"]) + (when != "after")
        nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
        what = describe(type(opt).__name__, slot.tensor_id, slot.param)
        what = what if name == str(slot.tensor_id) else f"{what}, {name!r}"
        thing = kind if state is None else f"state {state!r}"
        message = f"{what}: its {thing} has {nan} NaN and {infinite} infinite of {values.numel()} elements"
        if kind == "gradient":
            message += (
                f" before step {step}; nothing of this parameter has been changed. It is the first of them that the backward pass "
                "made: look at the loss and the layers after it, with torch.autograd.detect_anomaly; lower the learning rate, "
                "clip gradients, or train in bf16 instead of fp16."
            )
        elif when == "before":
            message += (
                f" before step {step}, and was not left so by the last one: it was loaded or changed outside of the optimizer. "
                "Load the last checkpoint whose weights are finite."
            )
        elif kind == "state":
            message += (
                f" after step {step}, though all gradients were finite: their squares overflow fp32 above 1.8e19. Clip gradients "
                "or lower the learning rate, and load the last checkpoint."
            )
        else:
            largest = torch.finfo(slot.param.dtype).max
            message += (
                f" after step {step}, though gradients and states are finite: the update overflows {slot.param.dtype}, whose "
                f"largest number is {largest:.3g}. Lower the learning rate, or keep this parameter in fp32."
            )
        if others:
            message += f" {others} more parameters have the same trouble."
        return NonFiniteError(message, kind, slot.tensor_id, name, state, step, nan + infinite, others)


def check_numerics(opt, model: torch.nn.Module | None = None) -> NumericsCheck:
    """Checks gradients, parameters and states of every step for NaN and infinity, until remove() or the end of a with statement.

    The first gradient of the backward pass that is not finite stops the step before it changes anything (of what is stepped
    together, under gradient release). A state or a parameter that overflows in a step is named right after it. Steps that
    GradScaler's found_inf skips are not looked at. For finding an error: it reads everything and waits for the device.

    Args:
        opt: an optimizer of fusedopt. model: names the parameters where the optimizer was not given named ones.
    Raises:
        TypeError: opt is no FusedOptimizer. ValueError: it is offloaded. NonFiniteError (at the
            step): what, which parameter and step, and what to do.
    """
    from fusedopt.optimizer import FusedOptimizer

    if not isinstance(opt, FusedOptimizer):
        raise TypeError(f"check_numerics: expected an optimizer of fusedopt, got {type(opt).__name__}")
    if opt.offloading is not None:
        raise watched_offload(opt, "check_numerics")
    return NumericsCheck(opt, model)
