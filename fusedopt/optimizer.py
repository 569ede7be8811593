"""FusedOptimizer: the torch.optim.Optimizer around a Plan. Each rule's class adds its hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fusedopt import checkpoint, compiled, distributed, masters, starts
from fusedopt import states as st
from fusedopt.backends import select
from fusedopt.checks import check_formats, check_group, check_projection
from fusedopt.explain import PlanReport
from fusedopt.lost import LostUpdates
from fusedopt.measures import check_measured
from fusedopt.metrics import Recorded
from fusedopt.offloading import Offloading
from fusedopt.offloading.engine import Engine
from fusedopt.options import check_clip, check_lr, check_nonnegative
from fusedopt.parts import Parts, StepsParts
from fusedopt.plan import Plan
from fusedopt.precision import get_precision
from fusedopt.projections.base import Projection, configured, kept_tensors, places, sharded_likes, states_like
from fusedopt.projections.lowrank import LowRankGradients
from fusedopt.projections.quantized import UNPROJECTED
from fusedopt.rule import Rule
from fusedopt.sharded_states import LocalEntry
from fusedopt.transforms import base as transforms
from fusedopt.weights import Int8Weight

if TYPE_CHECKING:
    from fusedopt.release import ReleasedGradients


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class FusedOptimizer(StepsParts, Recorded, torch.optim.Optimizer):
    """Base of every optimizer class: one multi-tensor step over all parameter groups.

    Shared options (keyword only):
        state_format: how states are stored: a name of `list_formats()`, "8bit", "4bit", or a dict by state name. Per group.
        param_precision: how bf16 and fp16 parameters are kept: a name of `list_precisions()`. Per group.
        projection: step matrices in a low-rank subspace of their gradients, e.g. GaLore(rank=128). Per group.
        min_quantized_numel: tensors with fewer elements keep fp32 states under a blockwise format. Per group.
        seed: of the stochastic rounding. Per group.
        clip_grad_norm: clip the global gradient norm to this value inside the step; `grad_norm` holds the norm. A 1-element tensor
            is read at every step, also by a captured CUDA graph.
        gradient_transforms: maps of the gradients before the step, in order, e.g. [OrthoGrad()]; see fusedopt.transforms. Not of
            groups with transform_gradients=False.
        backend: "cuda", "triton", "cpu" or "reference"; None takes the best that can.
        amp_fused: take GradScaler's scale and found_inf into the step (no host synchronisation).
        maximize, capturable, differentiable, foreach, fused: as in torch.optim. foreach changes nothing;
            fused=False takes the pure-torch reference; capturable=True keeps all numbers on the device.

    Raises:
        ValueError: an option is out of range. TypeError: params is not an iterable of tensors or groups.
        RuntimeError (at the step): a parameter or gradient cannot be stepped; nothing has been changed then.
    """

    decay_mode = "coupled"
    needs_shapes = False  # whether the rule looks at a tensor's dimensions, beside trust ratios and projections
    torch_counts_steps = True  # whether the torch.optim class of the rule keeps a step in its state
    splits_models = False  # whether it takes a module and groups its parameters by itself
    steps_together = False  # whether some parameters step only together with others
    given: dict[str, torch.Tensor] = {}  # numbers that the rule is handed with this step (Measures.given)

    def __init__(
        self,
        params,
        defaults: dict[str, Any],
        *,
        state_format: str | dict[str, str] = "fp32",
        param_precision: str = "nearest",
        projection: Projection | None = None,
        min_quantized_numel: int = 4096,
        seed: int = 0,
        clip_grad_norm: float | torch.Tensor | None = None,
        gradient_transforms: Sequence[transforms.Transform] = (),
        backend: str | None = None,
        amp_fused: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ):
        check_lr(defaults["lr"], {"foreach": foreach, "capturable": capturable})
        check_nonnegative(defaults["weight_decay"], "weight_decay value")
        st.check_state_format(state_format)
        get_precision(param_precision)
        check_clip(clip_grad_norm)
        if backend is not None:
            select.get_backend(backend)
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        self.clip_grad_norm = clip_grad_norm
        self.gradient_transforms = transforms.check(type(self).__name__, gradient_transforms, differentiable)
        self.backend = backend
        self.amp_fused = amp_fused
        defaults = {
            **defaults,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "state_format": state_format,
            "param_precision": param_precision,
            "projection": projection,
            "min_quantized_numel": min_quantized_numel,
            "seed": seed,
        }
        self._widened = {}
        super().__init__(params, defaults)
        self._traced = compiled.Traced(self)

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group of parameters. Raises ValueError for a projection or a flag that the rule cannot have."""
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            check_group(self, group)
            check_measured(type(self).__name__, self.rule_for(group), group)
            self._check_projection(group)
            check_formats(type(self).__name__, self.rule_for(group), group)
        super().add_param_group(param_group)

    def _check_projection(self, group: dict) -> None:
        check_projection(type(self).__name__, self.rule_for(group), group)

    # What a rule's class says

    @classmethod
    def rule_for(cls, group: dict) -> Rule:
        """The rule that steps a group, chosen by its flags."""
        raise TypeError(f"{cls.__name__} does not say which rule steps a group: define rule_for(group)")

    def decay_mode_for(self, group: dict) -> str:
        """ "coupled", "decoupled", or "rule" where the rule itself decays."""
        decoupled = group.get("decoupled_weight_decay")
        return self.decay_mode if decoupled is None else "decoupled" if decoupled else "coupled"

    def projection_for(self, p: torch.Tensor, group: dict) -> Projection | None:
        """How a parameter's gradient is projected, or None."""
        projection = configured(p, group)
        return UNPROJECTED if projection is None and isinstance(p, Int8Weight) else projection

    def kept_rule(self, p: torch.Tensor, group: dict, entry: dict | None = None) -> Rule:
        """The rule whose states a parameter keeps: the class's, or what its projection makes of it. entry: its state dict,
        None for the optimizer's."""
        rule, projection = self.rule_for(group), self.projection_for(p, group)
        entry = self.state.get(p, {}) if entry is None else entry
        return rule if projection is None else projection.rule_in(rule, entry)

    def _take_turns(self, only: int | None = None) -> None:
        """Before a step: projections that step whole tensors in turn say which ones have states now. only: a tensor id."""
        if not any(group["projection"] is not None and group["projection"].turns for group in self.param_groups):
            return
        owners = [(p, group) for group in self.param_groups for p in group["params"]]
        for index, (projection, place) in places(self).items():
            p, group = owners[index]
            if projection.turns and p.requires_grad and only in (None, index):
                entry = self.state[p]
                projection.turn(entry, place, group["seed"], int(entry.get("step", 0)) + 1, self.rule_for(group))

    # Pickling, copying and loading

    _plan: Plan | None = None
    _traced: compiled.Traced | None = None  # what a compiled step reads of this optimizer
    _widened: dict  # gradients in fp32 that gradient_transforms keep between steps that a graph may capture
    _parts: Parts | None = None  # plans of some of the parameters: gradient release, step_parameter
    _release: ReleasedGradients | None = None
    _watchers: tuple = ()  # metrics and checks of numerics: see fusedopt.metrics
    gradient_transforms: tuple[transforms.Transform, ...] = ()
    offloading: Offloading | None = None  # how states are offloaded (fusedopt.offload)
    _offload: Engine | None = None
    _lost_updates: LostUpdates | None = None
    _low_rank: LowRankGradients | None = None  # gradients that projected_linear keeps in place of .grad

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return self.amp_fused or self._low_rank is not None or self._release is not None

    def __getstate__(self) -> dict:
        """All public attributes (torch keeps only defaults, state and param_groups); schedulers' patched `step` stays behind."""
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_") and k != "step"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._drop_plans()
        if self._traced is None:
            self._traced = compiled.Traced(self)
        self._traced.groups = self.param_groups
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _drop_plans(self) -> None:
        if self._offload is not None:
            self._offload.release()
        self._plan = self._parts = self._offload = None
        self._widened = {}

    @st.undisturbed
    def state_dict(self, format: str = "native") -> dict:
        """The state dict. format="torch": states decoded to fp32 under torch.optim's names, loadable by the torch class."""
        if format not in ("native", "torch"):
            raise ValueError(f"state_dict: unknown format {format!r}; it is 'native' or 'torch'")
        native = super().state_dict()
        for group in native["param_groups"]:
            if group.get("projection") is not None:
                group["projection"] = group["projection"].describe()
        if format == "torch":
            return checkpoint.to_torch(self, native)
        checkpoint.to_portable(self, native)
        return native

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict) -> None:
        """Loads a state dict of this class, or of its counterpart in torch.optim, bitsandbytes or torchao; dtypes are kept,
        not cast to the parameter's.

        Storage options (state_format, param_precision, min_quantized_numel) stay as this optimizer was given them; states
        in another format are converted. Raises ValueError where groups, rule or shapes do not fit; nothing is changed then.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            if result is not None:
                state_dict = result
        self.__setstate__(checkpoint.prepare(self, state_dict))
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    # Stepping

    def flags(self, groups: list[dict] | None = None) -> tuple:
        """Everything about the options (of some groups) that is code: a change means a new plan."""
        asked = select.requested(self.backend_for_step())
        clip = self.clip_grad_norm
        clip = id(clip) if isinstance(clip, torch.Tensor) else clip
        out: list = [
            asked,
            clip,
            self.gradient_transforms,
            None if self._low_rank is None else self._low_rank.signature(),
        ]
        for g in self.param_groups if groups is None else groups:
            formats = g["state_format"]
            out.append((
                self.rule_for(g).name, self.decay_mode_for(g), g["capturable"], g["param_precision"], g["min_quantized_numel"],
                tuple(formats.items()) if isinstance(formats, dict) else formats, len(g["params"]), g["projection"],
                g.get("transform_gradients", True),
            ))  # fmt: skip
        return tuple(out)

    def backend_for_step(self) -> str | None:
        reference = self.defaults["fused"] is False or self.defaults["differentiable"]
        return "reference" if self.backend is None and reference else self.backend

    def steps_on_device(self, p: torch.Tensor, group: dict) -> bool:
        """Whether a parameter's step count lives on its device (CUDA graphs; skipped steps without a host round trip)."""
        return bool(group["capturable"] or self.amp_fused and p.device.type != "cpu")

    def init_state(self, p: torch.Tensor, group: dict, rule: Rule, tensor_id: int | None = None) -> dict:
        """The state dict of a parameter, with what the rule needs and it does not have yet. tensor_id: its number among the
        optimizer's parameters, where it is a copy of one."""
        entry = self.state[p]
        if tensor_id is None and any(state.spread is not None for state in rule.states):
            tensor_id = next(i for i, q in enumerate(q for g in self.param_groups for q in g["params"]) if q is p)
        owner = p
        if "step" not in entry:
            entry["step"] = torch.zeros((), dtype=torch.float32)
        for name, value in rule.memory.items():
            if name not in entry:
                entry[name] = torch.full((), value, dtype=torch.float64, device=distributed.local(p).device)
        projection = self.projection_for(p, group)
        likes = states_like(p, projection, rule)
        formats = st.configured_formats(p, group, rule, likes)
        precision = masters.configured_precision(p, group)
        if distributed.is_dtensor(p):
            entry, p = LocalEntry(p, entry, sharded_likes(p, projection, rule)), distributed.local(p)
            likes = [distributed.local(like) for like in likes]
        for state, form, like in zip(rule.states, formats, likes, strict=True):
            if state.name not in entry:
                values = starts.begun(owner, like, entry, state, group, tensor_id, rule.states.index(state))
                if values is None:
                    st.allocate(like, entry, state, form)
                else:
                    st.store(like, entry, state, form, values)
        for name, (shape, dtype) in kept_tensors(owner, projection).items():
            if name not in entry:
                device = "cpu" if name in projection.on_host() else p.device
                entry[name] = torch.zeros(shape, dtype=dtype, device=device)
        masters.bind(p, entry, precision)
        transforms.allocate(self, p, group, entry)
        return entry

    def fp32_state_dict(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """model.state_dict() with every parameter of this optimizer in fp32: the weights that split24, split32, kahan and
        master keep beside 16-bit parameters, and the others widened. Buffers and foreign parameters are as they are.

        Raises ValueError where the model has no parameter of this optimizer.
        """
        return masters.fp32_state_dict(self, model)

    def load_fp32_state_dict(self, model: torch.nn.Module, state_dict: dict[str, torch.Tensor], strict: bool = True):
        """Loads fp32 weights into the model, and what 16 bits cannot hold into this optimizer: the reverse of
        `fp32_state_dict`, exact for split32 and master, to 24 bits for split24. Also tells the optimizer of weights that
        were changed by hand under param_precision="master".

        Returns what model.load_state_dict returns. Raises ValueError or RuntimeError where names or shapes do not fit.
        """
        return masters.load_fp32_state_dict(self, model, state_dict, strict)

    def _current_plan(self, params, grads) -> Plan:
        plan = self._plan
        if plan is None or not plan.still_valid(params, grads):
            with torch.no_grad():
                plan = self._plan = Plan(self, params, grads)
        return plan

    def step(self, closure: Callable[[], Any] | None = None):
        """Performs one step over all parameters that have a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._release is not None:
            self._opt_called = True
            self._release.finish()
        elif not torch.compiler.is_compiling():
            self._step_now()
        elif self._low_rank is None and not self.defaults["differentiable"]:
            compiled.traced_step(self._traced)
        else:
            self._step_eagerly()
        return loss

    # What torch's schedulers set when they replace `step` by a wrapper that notes the call, which torch.compile cannot trace.
    # The step notes it itself, so they leave it alone.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    @torch._disable_dynamo
    def _step_eagerly(self) -> None:
        self._step_now()

    def _step_now(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        self._step_tensors(params, self._gradients(params))

    @st.undisturbed
    def _step_tensors(self, params: list[torch.Tensor], grads: list[torch.Tensor | None]) -> None:
        """One step with these gradients of these parameters, which are all of the optimizer's."""
        self._accelerator_check()
        self._opt_called = True
        if all(g is None for g in grads):
            return
        scale = found = None
        if self._step_supports_amp_scaling:
            scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._low_rank is not None:
            found = self._low_rank.check_amp(scale, found)
        initialising = self.offloading is None and not self.state and self._moves_nothing(params, grads)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._take_turns()
            if self.offloading is not None:
                self._step_offloaded(params, grads, scale, found)
                return
            if self.gradient_transforms:
                grads, scale = transforms.widened(self, params, grads, scale), None
            plan = self._current_plan(params, grads)
            if initialising:
                return
            self._run(plan, [g for g in grads if g is not None], scale, found)
        if self._low_rank is not None:
            self._low_rank.clear()

    def _moves_nothing(self, params: list[torch.Tensor], grads: list[torch.Tensor | None]) -> bool:
        """Whether a first step has learning rate 0 and nothing but zero gradients. torch.distributed.checkpoint makes an
        optimizer's states with such a step; it is not counted, so that a checkpoint before the first update says step 0."""
        lrs = [group["lr"] for group in self.param_groups]
        if _capturing() or any(not isinstance(lr, torch.Tensor) and lr != 0 for lr in lrs):
            return False
        if any(float(lr) != 0 for lr in lrs):
            return False
        live = [(p, g) for p, g in zip(params, grads, strict=True) if isinstance(g, torch.Tensor)]
        home = live[0][1].device if live else "cpu"
        found = sum((g.count_nonzero().to(home) for _, g in live), torch.zeros((), dtype=torch.int64, device=home))
        return len(live) > 0 and not distributed.anywhere(found, [p for p, _ in live])

    def _step_offloaded(self, params, grads, scale, found) -> None:
        engine = self._engine()
        chunks = engine.prepare(params, grads)
        if self._lost_updates is None:
            self._lost_updates = LostUpdates(type(self).__name__)
        self._lost_updates.before(engine.slots, self.param_groups)
        engine.step(chunks, grads, scale, found)
        self._lost_updates.after(found)

    def _run(self, plan: Plan, grads: list[torch.Tensor], scale=None, found=None, part: bool = False) -> None:
        """Steps a plan, with everything that looks at steps. part: others of the same step follow."""
        if self._lost_updates is None:
            self._lost_updates = LostUpdates(type(self).__name__)
        lost = self._lost_updates
        applied = None
        if self.gradient_transforms:
            applied = transforms.Applied(self, plan, grads, found)
            found = applied.found
        for watcher in self._watchers:
            watcher.before(plan, grads, scale, found)
        lost.before(plan.slots, self.param_groups)
        plan.run(grads, scale, found)
        if applied is not None:
            applied.after()
        lost.after(found, part)
        for watcher in self._watchers:
            watcher.after(plan, found)
            if not part:
                watcher.finish()

    def _end_of_parts(self) -> None:
        """Called when all parts of a step have been run."""
        if self._lost_updates is not None:
            self._lost_updates.finish()
        for watcher in self._watchers:
            watcher.finish()

    def _engine(self) -> Engine:
        if self._offload is None:
            self._offload = Engine(self)
        return self._offload

    def _gradients(self, params: list[torch.Tensor]) -> list[torch.Tensor | None]:
        grads = [p.grad for p in params] if self._low_rank is None else self._low_rank.gradients(params)
        return distributed.local_gradients(type(self).__name__, params, grads)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim; also drops or zeroes the low-rank gradients of `projected_linear`."""
        if torch.compiler.is_compiling():
            compiled.traced_zero_grad(self._traced, set_to_none)
        else:
            super().zero_grad(set_to_none)
        if self._low_rank is not None:
            self._low_rank.zero(set_to_none)

    def refresh_projections(self) -> None:
        """Makes the next step refresh the subspace of every projected parameter, whatever its schedule says.

        For CUDA graphs: a captured step refreshes nothing, and replays do not count for the schedule. Run an ordinary step
        after this from time to time.
        """
        plans = [] if self._parts is None else self._parts.plans()
        for slot in (s for plan in [self._plan, *plans] if plan is not None for s in plan.slots):
            if slot.site is not None:
                slot.site.owed = True

    def _accelerator_check(self) -> None:
        names = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")  # torch's, new and old
        if check := next((getattr(self, name) for name in names if hasattr(self, name)), None):
            check()

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """Global gradient norm of the last step before clipping, fp32 [1] on the device; None without clip_grad_norm."""
        if self._release is not None:
            return self._release.norm
        source = self._plan if self.offloading is None else self._offload
        if source is None or self.clip_grad_norm is None:
            return None
        return None if (norm := source.grad_norm()) is None else norm.to(torch.float32, copy=True)

    @st.undisturbed
    def plan(self) -> PlanReport:
        """What a step would launch with the present gradients: `print(opt.plan().explain())`.

        Before the first backward pass, every parameter that requires a gradient counts as having one. States are
        allocated if they do not exist yet, as the step itself would.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        grads = self._gradients(params)
        stand_ins = [p.detach() if p.requires_grad else None for p in params]
        if self.offloading is not None:
            grads = stand_ins if all(g is None for g in grads) else grads
            return PlanReport(self, self._engine().plan(params, grads))
        if none := all(g is None for g in grads):
            grads = [distributed.local(p) if p is not None else None for p in stand_ins]
        if self.gradient_transforms:
            grads = transforms.widened(self, params, grads, None)
        with torch.no_grad():
            return PlanReport(self, Plan(self, params, grads) if none else self._current_plan(params, grads))
