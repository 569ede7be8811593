"""release_gradients: parameters are stepped during the backward pass, as gradients arrive, and the gradients freed at once.

The idea of LOMO (arXiv 2306.09782) for every rule, and bit for bit the steps of an ordinary loop. Gradients are collected until the
next one would not fit beside them, so that a step takes few launches and no more memory than the largest gradient.
"""

from __future__ import annotations

import threading
import weakref

import torch

from fusedopt import accumulation
from fusedopt.checks import describe
from fusedopt.measures import needs_all_gradients
from fusedopt.optimizer import FusedOptimizer
from fusedopt.parts import Parts
from fusedopt.projections.base import check_choice, check_positive_int
from fusedopt.states import undisturbed
from fusedopt.transforms.base import check_none, check_parts, widened

COLLECT = 1 << 20  # bytes: below this, a launch of its own costs more time than the memory is worth
PREVIOUS_NORM = "previous_grad_norm"  # in param_groups[0], so that a resumed run clips as the one that saved


class ClipTensors(dict):
    """A clip coefficient, fp32 [1], for each device."""

    def __missing__(self, device: torch.device) -> torch.Tensor:
        self[device] = torch.ones(1, device=device)
        return self[device]


class ReleasedGradients:
    """What release_gradients has set up, until remove(); as a context manager it removes at the end.

    Attributes: limit, the bytes of gradients that are alive at once; launches, how many groups of tensors the last step was.
    """

    def __init__(self, model: torch.nn.Module, opt: FusedOptimizer, collect: int, clip: str | None,
                 micro_batches: int, in_states: bool):  # fmt: skip
        self._opt, self._collect, self._micro_batches, self._in_states = opt, collect, micro_batches, in_states
        self._lock = threading.RLock()  # autograd has a thread for each device
        self._clips = None if clip is None else ClipTensors()
        self._owner: dict[torch.Tensor, torch.nn.Module] = {}
        for module in model.modules():
            for p in module._parameters.values():
                self._owner.setdefault(p, module)
        self._names = {p: name for name, p in model.named_parameters()}
        self._hooks: dict[torch.Tensor, object] = {}
        self._after: dict[int, int] = {}  # by tensor id: whose gradient comes next in a backward pass
        self._norm: torch.Tensor | None = None
        self.launches = 0
        self._new_step()
        self._attach()

    def _new_step(self) -> None:
        self._arrived: dict[int, int] = {}  # gradients of each tensor since the last opt.step()
        self._pending: dict[int, None] = {}  # tensors to be stepped
        self._partial: dict[int, None] = {}  # tensors whose gradients are to be added to their states
        self._bytes = 0  # of both
        self._groups = 0  # of tensors, stepped so far
        self._running = 0  # backward passes
        self._task: int | None = None
        self._order: list[int] = []
        self._late = False  # whether this backward pass steps only at its end
        self._begun = False
        self._squares: list[torch.Tensor] = []
        self._streams: dict[torch.device, set] = {}  # that wrote what is pending
        self._used: dict[torch.device, set] = {}  # that have stepped something

    @property
    def _parts(self) -> Parts:
        if self._opt._parts is None:
            self._opt._parts = Parts(self._opt)
        return self._opt._parts

    @property
    def norm(self) -> torch.Tensor | None:
        """Global gradient norm of the last step before clipping, fp32 [1]; None without clip="previous"."""
        return None if self._norm is None else self._norm.to(torch.float32, copy=True).view(1)

    # Gradients arrive

    def _attach(self) -> None:
        """Gives every parameter of the optimizer a hook: tools replace parameters, and groups are added."""
        params = [p for group in self._opt.param_groups for p in group["params"]]
        if len(params) == len(self._hooks) and all(p in self._hooks for p in params):
            return
        me = weakref.ref(self)  # a parameter must not keep its optimizer alive

        def hook(p: torch.Tensor) -> None:
            handle = me()
            if handle is not None and handle._opt._release is handle:
                handle._arrive(p)

        for p in self._hooks.keys() - set(params):
            self._hooks.pop(p).remove()
        for p in params:
            if p not in self._hooks and p.requires_grad:
                self._hooks[p] = p.register_post_accumulate_grad_hook(hook)
        self._largest = max((p.numel() * p.element_size() for p in self._hooks), default=0)
        self.limit = max(self._largest, self._collect)
        self._after = {i: i - 1 for i in range(1, len(params))}  # before the first backward pass: the last layer first

    @undisturbed
    @torch.no_grad()
    def _arrive(self, p: torch.Tensor) -> None:
        """Autograd has accumulated the gradient of a parameter."""
        with self._lock:
            tensor_id = self._parts.id_of(p)
            if tensor_id in self._pending or tensor_id in self._partial:
                return  # of a backward pass that has failed: .grad is what it left and what this one adds
            count = self._arrived.get(tensor_id, 0)
            if count >= self._micro_batches:
                self._forget_pending()
                raise RuntimeError(self._again(tensor_id, p))
            task = torch._C._current_graph_task_id()
            if task != self._task:
                self._begin(task)
            self._arrived[tensor_id] = count + 1
            if self._order:
                self._after[self._order[-1]] = tensor_id
            self._order.append(tensor_id)
            last = count + 1 == self._micro_batches
            if not last and not self._in_states:
                return  # autograd adds the next one to it
            (self._pending if last else self._partial)[tensor_id] = None
            self._bytes += p.grad.numel() * p.grad.element_size()
            if p.is_cuda:
                self._streams.setdefault(p.device, set()).add(torch.cuda.current_stream(p.device))
            if not self._late and self._bytes + self._coming(tensor_id, p) > self.limit:
                self._flush()

    def _begin(self, task: int) -> None:
        """The first gradient of a backward pass. One inside another (reentrant checkpointing) is a pass of its own."""
        # A further pass before opt.step() may come to a tensor that has been stepped: it steps nothing before that is clear.
        self._late = self._groups > 0 and self._running == 0 and self._micro_batches == 1
        self._task, self._order, self._running = task, [], self._running + 1
        self._prepare()
        me = weakref.ref(self)

        def end() -> None:
            handle = me()
            if handle is not None:
                handle._end()

        torch.autograd.Variable._execution_engine.queue_callback(end)

    def _prepare(self) -> None:
        """Before anything of a step is done."""
        if self._begun:
            return
        self._begun = True
        self._opt._take_turns()
        self._parts.index.forget_places()
        if self._clips is not None:
            self._set_clip()

    @torch.no_grad()
    def _end(self) -> None:
        """A backward pass is over; its caller's streams are current."""
        with self._lock:
            if self._order:
                self._after.pop(self._order[-1], None)
            self._task, self._order, self._late, self._running = None, [], False, max(0, self._running - 1)
            self._flush()
            for device, streams in self._used.items():
                here = torch.cuda.current_stream(device)
                for stream in streams - {here}:
                    here.wait_stream(stream)
            self._used = {}

    def _together(self, p: torch.Tensor, q: torch.Tensor) -> bool:
        """Whether autograd makes two gradients at once: those of a module's weight and bias."""
        owner = self._owner.get(p)
        return owner is not None and self._owner.get(q) is owner and (p.dim() < 2 or q.dim() < 2)

    def _coming(self, tensor_id: int, p: torch.Tensor) -> int:
        """Bytes of the gradients that come next at once; 0 where they are there already."""
        owners, total, before = self._parts.index.owners, 0, p
        for _ in range(len(owners)):
            tensor_id = self._after.get(tensor_id)
            if tensor_id is None:
                break
            q = owners[tensor_id][2]
            together = self._together(before, q)
            if together and before is p:
                return 0
            if not together and before is not p or total > self.limit:
                break
            total, before = total + q.numel() * q.element_size(), q
        return total

    # and are used

    def _flush(self) -> None:
        """Steps what is pending and frees its gradients."""
        streams, self._streams = self._streams, {}
        for device, others in streams.items():
            here = torch.cuda.current_stream(device)
            self._used.setdefault(device, set()).add(here)
            for stream in others - {here}:
                here.wait_stream(stream)
        index = self._parts.index
        for ids, use in ((self._partial, self._accumulate), (self._pending, self._step)):
            found = tuple(sorted(i for i in ids if index.owners[i][2].grad is not None))
            if not found:
                continue
            params = [index.owners[i][2] for i in found]
            grads = [p.grad for p in params]
            for p, g in zip(params, grads, strict=True):
                if len(streams.get(p.device, ())) > 1:
                    g.record_stream(torch.cuda.current_stream(p.device))
            try:
                use(found, grads)
            except BaseException:
                self._forget_pending()
                raise
            for p in params:
                p.grad = None
        self._pending, self._partial, self._bytes = {}, {}, 0

    def _step(self, ids: tuple[int, ...], grads: list[torch.Tensor]) -> None:
        if self._opt.gradient_transforms:
            grads = widened(self._opt, [self._parts.index.owners[i][2] for i in ids], grads, None)
        plan = self._parts.plan(ids, grads, self._clips)
        if self._in_states:
            accumulation.count_from_second(plan)
        self._opt._run(plan, grads, part=True)
        self._groups += 1
        if self._clips is not None:
            self._squares += plan.square_sums()

    def _accumulate(self, ids: tuple[int, ...], grads: list[torch.Tensor]) -> None:
        accumulation.add_to_states(self._opt, [self._parts.index.owners[i] for i in ids], grads)

    def _forget_pending(self) -> None:
        """Leaves gradients that have not been used where they are."""
        for tensor_id in (*self._pending, *self._partial):
            self._arrived[tensor_id] -= 1
        self._pending, self._partial, self._bytes, self._task, self._order = {}, {}, 0, None, []

    def _again(self, tensor_id: int, p: torch.Tensor) -> str:
        name = self._names.get(p)
        what = describe(type(self._opt).__name__, tensor_id, p)
        what = what if name is None else f"{what}, {name!r},"
        if self._micro_batches > 1:
            return (
                f"{what} has a gradient from more than micro_batches={self._micro_batches} backward passes since the last "
                "opt.step(). Call opt.step() after that many."
            )
        return (
            f"{what} has been stepped in a backward pass already, and has another gradient before opt.step(). Call opt.step() "
            "after each backward pass; to accumulate gradients, use release_gradients(..., micro_batches=n). (Reentrant "
            "checkpointing runs a backward pass for each segment: a parameter used in several needs use_reentrant=False.)"
        )

    # A step ends

    @undisturbed
    @torch.no_grad()
    def finish(self) -> None:
        """What opt.step() does: steps parameters whose gradients no hook has seen, and opens the next step. Called by it."""
        opt = self._opt
        with self._lock:
            if getattr(opt, "found_inf", None) is not None or getattr(opt, "grad_scale", None) is not None:
                raise RuntimeError(
                    f"{type(opt).__name__}: a GradScaler steps this optimizer, but release_gradients has used its scaled "
                    "gradients already: overflow is known only after the backward pass. Use bf16 autocast without a GradScaler."
                )
            opt._accelerator_check()
            self._attach()
            self._flush()
            self._step_rest()
            if self._groups:
                opt._end_of_parts()
                if self._clips is not None:
                    self._keep_norm()
            self.launches = self._groups
            self._new_step()

    def _step_rest(self) -> None:
        """Parameters with a gradient that has not come through a hook, or not from all micro-batches."""
        owners, rest, unfinished = self._parts.index.owners, [], []
        for tensor_id, (_, _, p) in enumerate(owners):
            count = self._arrived.get(tensor_id, 0)
            if p.grad is None:
                if self._in_states and 0 < count < self._micro_batches:
                    unfinished.append(tensor_id)
            elif count >= self._micro_batches:
                raise RuntimeError(self._again(tensor_id, p))
            else:
                rest.append(tensor_id)
        if rest or unfinished:
            self._prepare()
        self._pending = dict.fromkeys(rest)
        self._flush()
        for tensor_id in unfinished:  # everything is in the states: a step with a gradient of zero takes it from there
            p = owners[tensor_id][2]
            p.grad = torch.zeros_like(p)
            self._pending[tensor_id] = None
            self._bytes += p.numel() * p.element_size()
            if self._bytes >= self.limit:
                self._flush()
        self._flush()

    def _set_clip(self) -> None:
        """The coefficient of this step, from the norm of the last one."""
        norm = self._opt.param_groups[0].get(PREVIOUS_NORM)
        for device in {p.device for p in self._hooks}:
            if norm is None:
                self._clips[device].fill_(1.0)
            else:
                norm = torch.as_tensor(norm, dtype=torch.float64)
                clip = (self._opt.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                self._clips[device].copy_(clip.view(1), non_blocking=True)

    def _keep_norm(self) -> None:
        home = self._squares[0].device
        self._norm = sum(s.to(home, torch.float64, non_blocking=True) for s in self._squares).sqrt()
        group = self._opt.param_groups[0]
        before = group.get(PREVIOUS_NORM)
        before = 0.0 if before is None else torch.as_tensor(before, dtype=torch.float64).to(home)
        group[PREVIOUS_NORM] = torch.where(self._norm.isfinite(), self._norm, before)

    # The handle

    def remove(self) -> None:
        """Makes the optimizer step in opt.step() again. Call it between steps."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}
        if self._opt._release is self:
            self._opt._release = self._opt._plan = self._opt._parts = None

    def __enter__(self) -> ReleasedGradients:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()


def _check_model(model: torch.nn.Module, opt: FusedOptimizer) -> None:
    """Raises ValueError for what reduces gradients after the backward pass's hooks have run."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise ValueError(
                f"release_gradients: {f'module {name!r} of the model' if name else 'the model'} is a {kind}, which reduces "
                "gradients over processes after they would have been used. Train one process, or step in opt.step()."
            )
    mine = [p for group in opt.param_groups for p in group["params"]]
    if not {id(p) for p in mine} & {id(p) for p in model.parameters()}:
        raise ValueError(
            f"release_gradients: the model has no parameter of this {type(opt).__name__}. Pass the module that it steps."
        )
    for i, p in enumerate(mine):
        if type(p.data).__name__ == "DTensor" or type(p).__name__ == "DTensor":
            raise ValueError(
                f"{describe(type(opt).__name__, i, p)} is a DTensor: its gradient is reduced over processes after the backward "
                "pass's hooks. Step in opt.step()."
            )


def release_gradients(
    model: torch.nn.Module, opt: FusedOptimizer, *, collect: int = COLLECT, clip: str | None = None,
    micro_batches: int = 1, accumulate_in: str = "states",
) -> ReleasedGradients:  # fmt: skip
    """Steps every parameter of `opt` during the backward pass, as soon as its gradient is complete, and frees the gradient.

    The results are those of backward(), opt.step(), opt.zero_grad(), bit for bit. Keep calling opt.step() after each backward
    pass: it ends the step, runs hooks and closures, and steps parameters whose .grad was set by hand. zero_grad() may stay.
    State dicts are those of any run. Learning rates are read during the backward pass.

    Args:
        model: the module that is trained; says which gradients autograd makes at once, and names parameters in errors.
        collect: bytes of gradients that may be collected where the largest gradient is smaller than that: more memory, fewer
            launches. Gradients alive at once stay below max(collect, the largest gradient), those of one module's own
            parameters counted as one.
        clip: "previous" clips with the global norm of the previous step, as this step's is not known in time: the coefficient
            is min(1, opt.clip_grad_norm / that norm), and the first step is not clipped. A spike is thus not clipped itself, but
            the step after it. The norm is kept in opt.param_groups[0]["previous_grad_norm"]; opt.grad_norm is this step's.
        micro_batches: backward passes for each opt.step(), over which gradients are added up; divide the loss by it.
            Where opt.step() comes after fewer, what has come is used.
        accumulate_in: where they are added up. "states": in the optimizer's states, gradients are freed at once, for
            SGD with momentum (without dampening and Nesterov), m <- momentum m + sum of g_i, that of the whole batch up to
            rounding, and for AdamW and Adam without L2 decay as AdamA (arXiv 2305.19982), m <- beta1 m + (1 - beta1) sum of g_i and
            v <- beta2 v + (1 - beta2) sum of g_i^2, not (sum of g_i)^2: another second moment than that of the whole batch. fp32
            states only. "gradients": in .grad, exact for every rule; gradients are freed in the last pass only.

    Returns a handle with remove(), usable in a with statement. Copies and pickles of the optimizer step in step().

    Raises:
        TypeError: opt is no FusedOptimizer. ValueError: opt.clip_grad_norm without clip="previous" or the other way round;
        amp_fused=True; differentiable=True; projected_linear; offload; DistributedDataParallel and sharded parameters; states that
        gradients cannot be added to; an option out of range.
        RuntimeError, during a backward pass: a parameter that was stepped has a further gradient before opt.step(); of this pass
        nothing has been applied then. At opt.step(): a GradScaler is in use.
    """
    if not isinstance(opt, FusedOptimizer):
        raise TypeError(f"release_gradients: expected an optimizer of fusedopt, got {type(opt).__name__}")
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"release_gradients: expected a torch.nn.Module, got {type(model).__name__}")
    name = type(opt).__name__
    check_positive_int(micro_batches, "micro_batches")
    check_choice(accumulate_in, "accumulate_in", ("states", "gradients"))
    check_choice(clip, "clip", ("previous", None))
    if not isinstance(collect, int) or collect < 0:
        raise ValueError(f"Invalid collect: {collect!r}; it is a number of bytes, 0 or more")
    if opt._release is not None:
        raise ValueError(f"release_gradients: this {name} already has one; call its handle's remove() first")
    if opt.clip_grad_norm is not None and clip is None:
        raise ValueError(
            f"release_gradients: clip_grad_norm={opt.clip_grad_norm} of this {name} needs the norm of all gradients before the "
            "first of them is used. Pass clip='previous' to clip with the previous step's norm, or create it without."
        )
    if clip is not None and opt.clip_grad_norm is None:
        raise ValueError(f"release_gradients: clip={clip!r} needs a {name} with clip_grad_norm=, which it has not")
    if opt.amp_fused:
        raise ValueError(
            f"release_gradients: this {name} has amp_fused=True, but overflow is known only after the backward pass, when its "
            "gradients have been used. Use bf16 autocast, which needs no GradScaler."
        )
    if opt.defaults["differentiable"] or any(g["differentiable"] for g in opt.param_groups):
        raise ValueError("release_gradients: differentiable=True needs gradients that stay. Step in opt.step().")
    check_parts(opt, "release_gradients")
    if opt.offloading is not None:
        raise ValueError(
            f"release_gradients: the states of this {name} are offloaded and stepped in chunks. Use one of both: released "
            "gradients save gradient memory, state_format='int8' state memory without offload."
        )
    if needs_all_gradients(opt):
        raise ValueError(
            f"release_gradients: {name} needs all gradients, or the loss, before it steps the first parameter. Use opt.step(), or "
            "a rule that looks at one tensor at a time."
        )
    if opt._low_rank is not None:
        raise ValueError(
            "release_gradients: projected_linear keeps low-rank gradients for opt.step(). Call its handle's remove() first."
        )
    _check_model(model, opt)
    in_states = accumulate_in == "states" and micro_batches > 1
    if in_states:
        check_none(opt, "release_gradients", "it adds gradients to the states as they come")
        if clip is not None:
            raise ValueError(
                "release_gradients: gradients that are added to the states are not clipped. Use accumulate_in='gradients'."
            )
        accumulation.check(opt)
    opt._plan = opt._parts = None
    opt._release = ReleasedGradients(model, opt, collect, clip, micro_batches, in_states)
    return opt._release
