"""EGN: Korbit, Adeoye, Bemporad and Zanon, "Exact Gauss-Newton Optimization for Training Deep Neural Networks" (arXiv 2405.14402):
Gauss-Newton steps of a mini-batch, by a system as large as its outputs (Duncan and Guttman's identity)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.func import functional_call, grad, hessian, jacrev, vmap

from fusedopt.checks import describe
from fusedopt.distributed import is_dtensor
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_fraction
from fusedopt.projections.base import check_positive_int
from fusedopt.rule import Rule
from fusedopt.rules.sgd import SGD_MOMENTUM, SGD_PLAIN
from fusedopt.weights import Int8Weight

CHUNK = 1 << 22  # elements of the Jacobian that are in double precision at a time
ARMIJO, SHRINK, TRIALS = 1e-4, 0.5, 10
BOUNDS = 1e-10, 1e10  # of an adaptive damping


def averaged_scalars(h, step):
    """b <- (1 - w) b + w d with w = (1 - beta) / (1 - beta^t) is the average of all d that Adam would call debiased."""
    weight = (1 - h["momentum"]) / (1 - h["momentum"] ** step)
    return (1 - weight, weight, 0.0, 1.0)


AVERAGED = replace(SGD_MOMENTUM, scalars=averaged_scalars)  # the same bodies, with other numbers


def cross_entropy(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs[None], target[None])


def half_square(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 0.5 * (outputs - target).square().sum()


LOSSES = {"cross_entropy": cross_entropy, "mse": half_square}


class EGN(FusedOptimizer):
    """Exact Gauss-Newton: d = -(J^T Q J / b + damping I)^-1 J^T r / b, p += lr d, with J the Jacobian of the outputs of all b
    samples, r and Q the first and second derivatives of their losses by the outputs (Q in blocks of a sample; s - y and
    diag(s) - s s^T with s the softmax for cross-entropy, f - y and I for "mse"). Where the parameters outnumber the outputs
    of the batch, d = -J^T (Q J J^T + b damping I)^-1 r: the same by a system of the outputs. Nothing is approximated.

    For regression and few classes, where a step that takes many gradients' time is worth it. J takes outputs x parameters x 4
    bytes: 1.3 GB for 32 samples of 10 classes and a million parameters. It is made by one backward pass per output of a
    sample; the system is solved in double precision.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor; 1 is Newton's step.
        damping: positive; groups may differ in it.
        momentum: beta of a debiased average of d, which is stepped along in its place.
        weight_decay: decoupled.
        loss: "cross_entropy" (targets as of torch.nn.functional.cross_entropy), "mse" (half the squared error of a sample,
            summed over its outputs), or a function of one sample's outputs and target, convex in the outputs, of torch
            operations with two derivatives. The loss of a batch is the mean over samples.
        line_search: start at lr and halve it, up to 10 times, until the loss has fallen by 1e-4 of what its slope promises; a step
            that never does leaves the parameters. One evaluation of the batch each.
        adaptive_damping: halve the damping where the loss has fallen by more than 3/4 of what the quadratic model promises, double
            it where by less than 1/4. One evaluation of the batch, shared with line_search. Kept in the groups.
        chunk: samples whose Jacobian is made at a time.
        **options: shared options, see `FusedOptimizer`. gradient_transforms and clip_grad_norm see -d.

    Raises:
        ValueError: a hyperparameter is out of range; something cannot be had together. For those of a step see there.
    Source: arXiv 2405.14402; line search and damping as algorithms 3.1 and 4.1 of Nocedal and Wright, Numerical Optimization.
    """

    decay_mode = "decoupled"
    torch_counts_steps = False

    def __init__(
        self,
        params,
        lr=1.0,
        damping=1e-3,
        momentum=0.0,
        weight_decay=0.0,
        loss: str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = "cross_entropy",
        line_search=False,
        adaptive_damping=False,
        chunk=16,
        **options,
    ):
        if not callable(loss) and loss not in LOSSES:
            raise ValueError(f"Invalid loss: {loss!r}; it is one of {', '.join(LOSSES)}, or a function of one sample")
        for name in ("amp_fused", "capturable", "maximize", "differentiable"):
            if options.get(name):
                raise ValueError(f"EGN: {name}=True is not for a step that makes its own gradients and minimises")
        check_positive_int(chunk, "chunk")
        self.loss, self.chunk = loss, chunk
        self.line_search, self.adaptive_damping = line_search, adaptive_damping
        defaults = {"lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    def add_param_group(self, param_group: dict) -> None:
        """As in torch.optim. Raises ValueError for damping or momentum out of range, and for momentum beside what judges steps."""
        group = {**self.defaults, **param_group}
        if not group["damping"] > 0:
            raise ValueError(f"Invalid damping: {group['damping']}; it must be positive")
        check_fraction(group["momentum"], "momentum value")
        if group["momentum"] and (self.line_search or self.adaptive_damping):
            raise ValueError("EGN: line_search and adaptive_damping judge steps along d, and momentum goes elsewhere")
        super().add_param_group(param_group)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return AVERAGED if group["momentum"] else SGD_PLAIN

    @torch._disable_dynamo
    def step(  # type: ignore[override]  # no closure has what it needs
        self, model: torch.nn.Module | None = None, inputs=None, targets: torch.Tensor | None = None, closure=None
    ):
        """Performs one step, without backward(): .grad is neither read nor written.

        Args:
            model: has all parameters of this optimizer that require gradients; its others are constants. It must treat samples
                apart, and be of operations that torch.func.vmap takes (torch.nn's LSTM and GRU are not). In training mode each
                sample draws its own dropout. Autocast is off in the step.
            inputs: [b, ...], or a tuple of such tensors for several arguments; outputs are one tensor [b, ...].
            targets: [b, ...].
            closure: refused; as None it is what tools give that make states by a step of nothing.

        Returns the loss before the step. Parameters that do not touch the outputs do not move, but for weight decay.

        Raises:
            ValueError: an argument is missing or does not fit; batch normalisation in training mode, or dropout where steps are
                judged by their losses. RuntimeError: a DTensor or an int8 weight; torch.func takes no Jacobian of the model; d is
                not finite. Nothing is changed then.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        if not isinstance(model, torch.nn.Module) or closure is not None:
            if model is closure is None and not self.state and self._moves_nothing(params, self._gradients(params)):
                return self._step_eagerly()  # torch.distributed.checkpoint makes states so
            raise ValueError(
                "EGN.step(model, inputs, targets) needs all three: it differentiates the outputs, and no closure has their Jacobian"
            )
        owners = self._owners(model, params)
        self._check_model(model)
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        loss = LOSSES[self.loss] if isinstance(self.loss, str) else self.loss
        sizes = {len(x) if isinstance(x, torch.Tensor) and x.dim() else None for x in (*inputs, targets)}
        if targets is None or len(sizes) != 1 or not isinstance(next(iter(sizes)), int) or 0 in sizes:
            raise ValueError(f"EGN.step: inputs and targets must be tensors of as many samples, not of {sizes}")
        with torch.no_grad(), torch.autocast(owners[0][1].device.type, enabled=False):
            batch = _Batch(model, owners, inputs, targets, loss)
            batch.differentiate(self.chunk)
            directions, factor = batch.solve(), 1.0
            if self.line_search or self.adaptive_damping:
                factor, gain = batch.judge(directions, TRIALS if self.line_search else 0)
            by_id = dict(zip(map(id, batch.params), directions, strict=True))
            if factor:
                self._step_tensors(params, [by_id[id(p)].mul_(-factor) if id(p) in by_id else None for p in params])
        self._opt_called = True
        if self.adaptive_damping:
            for group in self.param_groups:
                change = 0.5 if gain > 0.75 else 1.0 if gain >= 0.25 else 2.0
                group["damping"] = min(max(group["damping"] * change, BOUNDS[0]), BOUNDS[1])
        return batch.first

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def step_parameter(self, p, group=None, i=None) -> None:
        """Raises RuntimeError: a step takes the Jacobian of all parameters."""
        raise RuntimeError("EGN: no parameter steps alone, since a step takes the Jacobian of all. Use step().")

    def supports_fused_back_pass(self) -> bool:
        return False

    def _owners(self, model: torch.nn.Module, params: list) -> list[tuple[str, torch.Tensor, dict]]:
        """Name in the model, parameter and group of each that requires a gradient."""
        if self._release is not None or self.offloading is not None or self._low_rank is not None:
            raise RuntimeError("EGN: neither gradient release nor offload nor projected_linear goes with its steps.")
        names = {id(p): name for name, p in model.named_parameters()}
        groups = [group for group in self.param_groups for _ in group["params"]]
        owners = []
        for index, (p, group) in enumerate(zip(params, groups, strict=True)):
            what = describe("EGN", index, p, names.get(id(p)))
            if is_dtensor(p) or isinstance(p, Int8Weight):
                kind = "a DTensor" if is_dtensor(p) else "an int8 weight"
                raise RuntimeError(f"{what} is {kind}, of which torch.func takes no Jacobian. Use whole tensors.")
            if not p.requires_grad:
                continue
            if id(p) not in names:
                raise ValueError(f"{what} is no parameter of the model that step was given. Give it the one it is of.")
            owners.append((names[id(p)], p, group))
        if not owners:
            raise ValueError("EGN.step: no parameter requires a gradient")
        return owners

    def _check_model(self, model: torch.nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.training:
                raise ValueError(
                    f"EGN.step: {name!r} is batch normalisation in training mode, which mixes samples. Call model.eval(), or "
                    "use GroupNorm."
                )
            random = isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.training and module.p > 0
            if random and (self.line_search or self.adaptive_damping):
                raise ValueError(
                    f"EGN.step: {name!r} is dropout in training mode, so that losses before and after a step are of different "
                    "models. Call model.eval(), or do without line_search and adaptive_damping."
                )


@dataclass
class _Batch:
    """One step's mini-batch. Flat: [b c] outputs, samples in order; columns of J: the parameters', in order."""

    model: torch.nn.Module
    owners: list[tuple[str, torch.Tensor, dict]]
    inputs: tuple[torch.Tensor, ...]
    targets: torch.Tensor
    loss: Callable
    J: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.params = [p for _, p, _ in self.owners]
        self.values = {name: p.detach() for name, p, _ in self.owners}
        mine = {id(p) for p in self.params}
        self.fixed = {name: p.detach() for name, p in self.model.named_parameters() if id(p) not in mine}
        self.fixed.update(self.model.named_buffers())
        self.size = len(self.targets)

    def outputs(self, values: dict, inputs: tuple) -> torch.Tensor:
        out = functional_call(self.model, {**values, **self.fixed}, inputs)
        if not isinstance(out, torch.Tensor):
            raise ValueError(
                f"EGN.step: the model returns a {type(out).__name__}. Wrap it, so that it returns one tensor."
            )
        return out

    def losses(self, outputs: torch.Tensor) -> torch.Tensor:
        """fp64 [b]."""
        targets = self.targets.double() if self.targets.is_floating_point() else self.targets
        return vmap(self.loss)(outputs.double(), targets)

    def differentiate(self, chunk: int) -> None:
        """J, r and Q, and the loss."""

        def one(values, inputs):
            out = self.outputs(values, tuple(x[None] for x in inputs))
            return out.reshape(-1), out[0]

        every = vmap(jacrev(one, has_aux=True), in_dims=(None, 0), randomness="different")
        wide = torch.float64 if any(p.dtype == torch.float64 for p in self.params) else torch.float32
        found, J = [], None
        for first in range(0, self.size, chunk):
            try:
                jacobians, out = every(self.values, tuple(x[first : first + chunk] for x in self.inputs))
            except RuntimeError as error:
                raise RuntimeError(
                    f"EGN.step: torch.func takes no Jacobian of {type(self.model).__name__}: {error}. Replace what it cannot "
                    "vectorise."
                ) from error
            found.append(out)
            width = out[0].numel()
            if J is None:
                n = sum(p.numel() for p in self.params)
                J = self.J = torch.empty(self.size * width, n, dtype=wide, device=out.device)
            rows = J[first * width : (first + len(out)) * width]
            column = 0
            for name, p, _ in self.owners:
                rows[:, column : column + p.numel()].copy_(jacobians[name].reshape(len(rows), p.numel()))
                column += p.numel()
        out = torch.cat(found).double()
        targets = self.targets.double() if self.targets.is_floating_point() else self.targets
        self.first = self.losses(out).mean()
        self.r = vmap(grad(self.loss))(out, targets).reshape(-1)
        self.Q = vmap(hessian(self.loss))(out, targets).reshape(self.size, out[0].numel(), out[0].numel())

    def weighted(self, x: torch.Tensor) -> torch.Tensor:
        """Q x for x of [b c, k]."""
        return torch.bmm(self.Q, x.reshape(self.size, -1, x.shape[1])).reshape(x.shape)

    def columns(self):
        """Parts of J in fp64, with the numbers of their columns."""
        width = max(CHUNK // len(self.J), 1)
        for first in range(0, self.J.shape[1], width):
            part = self.J[:, first : first + width]
            yield slice(first, first + part.shape[1]), part.double()

    def spread(self, option: str) -> torch.Tensor:
        """fp64 [n]: an option of the group of each column."""
        each = [torch.full((p.numel(),), float(group[option]), dtype=torch.float64) for _, p, group in self.owners]
        return torch.cat(each).to(self.J.device)

    def solve(self) -> list[torch.Tensor]:
        """d by parameter, in the dtype of J."""
        outputs, n = self.J.shape
        damping = self.spread("damping")
        d = torch.empty(n, dtype=torch.float64, device=self.J.device)
        if n <= outputs:
            J = self.J.double()
            system = J.T @ self.weighted(J) / self.size + torch.diag(damping)
            d = -torch.linalg.solve_ex(system, J.T @ self.r / self.size)[0]
        else:
            products = torch.zeros(outputs, outputs, dtype=torch.float64, device=self.J.device)
            for at, part in self.columns():
                products += (part / damping[at]) @ part.T
            system = self.weighted(products) + self.size * torch.eye(outputs, dtype=torch.float64, device=d.device)
            y = torch.linalg.solve_ex(system, self.r)[0]
            for at, part in self.columns():
                d[at] = -(part.T @ y) / damping[at]
        if not bool(torch.isfinite(d).all()):
            raise RuntimeError(
                f"EGN: the direction is not finite, of a loss of {float(self.first)}. Nothing has been changed. Look at inputs and "
                "weights, or use a larger damping."
            )
        pieces = d.to(self.J.dtype).split([p.numel() for p in self.params])
        return [piece.view(p.shape).to(p.device) for piece, p in zip(pieces, self.params, strict=True)]

    def judge(self, directions: list[torch.Tensor], trials: int) -> tuple[float, float]:
        """The factor of lr that the line search takes (1 without one), and by how much of what the quadratic model promises the
        loss then falls."""
        steps = [d * float(group["lr"]) for d, (_, _, group) in zip(directions, self.owners, strict=True)]
        flat = torch.cat([s.reshape(-1).to(self.J.device, torch.float64) for s in steps])
        moved = sum(part @ flat[at] for at, part in self.columns())
        slope = float(self.r @ moved) / self.size
        curvature = float(moved @ self.weighted(moved[:, None])[:, 0]) / self.size
        before, factor = float(self.first), 1.0
        for _ in range(trials + 1):
            point = {name: (p + factor * s).to(p.dtype) for (name, p, _), s in zip(self.owners, steps, strict=True)}
            fall = before - float(self.losses(self.outputs(point, self.inputs)).mean())
            if not trials or fall >= -ARMIJO * factor * slope:
                return factor, fall / max(-(factor * slope + factor**2 / 2 * curvature), 1e-300)
            factor *= SHRINK
        return 0.0, 0.0
