"""projected_linear(model, opt): Linear layers that project their weight's gradient before it is formed (GaLore, arXiv 2403.03507).

The backward pass of y = x W^T + b accumulates R = P^T dY^T X or dY^T X P^T in a low-rank buffer of the optimizer; the
[out, in] gradient never exists and weight.grad stays None. See fusedopt/projections/lowrank.py.
"""

from __future__ import annotations

import copyreg

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fusedopt.optimizer import FusedOptimizer
from fusedopt.projections.base import check_positive_int
from fusedopt.projections.lowrank import REFRESHES, LowRankGradient, LowRankGradients
from fusedopt.transforms.base import check_none


def _destination(node) -> str | None:
    """Where the running backward pass takes a leaf's gradient: "grad", None (inputs=), or "result" of torch.autograd.grad."""
    try:
        return "grad" if torch._C._will_engine_execute_node(node) else None
    except RuntimeError:  # autograd.grad, which does not say whether it is asked for this leaf
        return "result"


class _Function(torch.autograd.Function):
    """F.linear whose backward hands dY and X to the weight's LowRankGradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, source, cast):
        ctx.save_for_backward(x, weight)
        ctx.source, ctx.bias_dtype = source, None if bias is None else bias.dtype
        if not cast:
            return functional.linear(x, weight, bias)
        # autocast's cache of weights must not keep one that was cast without gradient
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        with torch.autocast(dy.device.type, enabled=False):
            if to_x:
                dx = torch.matmul(dy, weight.to(dy.dtype))
            flat, inputs = dy.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
            if to_bias:
                db = flat.sum(0).to(ctx.bias_dtype)
            into = _destination(ctx.next_functions[1][0]) if to_weight else None
            if into == "result" or into == "grad" and not ctx.source.add(flat, inputs):
                dw = torch.mm(flat.t(), inputs).to(weight.dtype)
        return dx, dw, db, None, None


@torch._disable_dynamo
def _linear(x, weight, bias, source: LowRankGradient):
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return _Function.apply(x.to(torch.get_autocast_dtype(kind)) if cast else x, weight, bias, source, cast)


class ProjectedLinear(torch.nn.Linear):
    """What projected_linear makes of a torch.nn.Linear, in place. Copies and pickles of it are plain Linear layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        source = self.__dict__["_low_rank"]
        weight = self.weight
        if weight is not source.param or not weight.requires_grad or not torch.is_grad_enabled():
            return super().forward(x)
        return _linear(x, weight, self.bias, source)

    def __reduce_ex__(self, protocol):
        state = {k: v for k, v in self.__dict__.items() if k != "_low_rank"}
        return copyreg._reconstructor, (torch.nn.Linear, object, None), state


class ProjectedLinears:
    """The layers that a call of projected_linear has changed, until remove().

    Attributes: names, of those layers; skipped, the other layers of the model with a projected weight, and why.
    """

    def __init__(self, opt: FusedOptimizer, gradients: LowRankGradients, modules: dict, skipped: dict[str, str]):
        self._opt, self._gradients, self._modules = opt, gradients, modules
        self.names, self.skipped = list(modules), skipped

    def bytes(self) -> int:
        """Bytes of the buffers that are alive in place of gradients."""
        return self._gradients.bytes()

    def remove(self) -> None:
        """Makes the layers plain again. What has been accumulated since the last step is lost."""
        for module in self._modules.values():
            if type(module) is ProjectedLinear and module.__dict__["_low_rank"].owner is self._gradients:
                del module.__dict__["_low_rank"]
                module.__class__ = torch.nn.Linear
        if self._opt._low_rank is self._gradients:
            self._opt._low_rank = self._opt._plan = None


def _why_not(module: torch.nn.Linear, owners: list, projection) -> str | None:
    """Why a Linear's weight keeps its full gradient, or None. owners: the modules that have this weight."""
    weight = module.weight
    if type(module) is ProjectedLinear:
        return "another optimizer projects it"
    if type(module) is not torch.nn.Linear:
        return f"it is a {type(module).__name__}, whose forward may be another"
    if type(weight) is not torch.nn.Parameter:
        return f"its weight is a {type(weight).__name__}; only plain parameters of one process are projected early"
    if not weight.is_contiguous():
        return "its weight is not contiguous"
    # a class that inherits GaLore may need the rest of the gradient, so each says for itself
    if not type(projection).__dict__.get("low_rank_gradient", False):
        return f"{type(projection).__name__} needs the full gradient"
    other = next((m for m in owners if type(m) is not torch.nn.Linear), None)
    if other is not None:
        return f"its weight is also that of a {type(other).__name__}"
    hooked = next((m for m in owners if m.__dict__.get("forward") is not None), None)
    return None if hooked is None else "its forward has been replaced"


def projected_linear(
    model: torch.nn.Module, opt: FusedOptimizer, *, refresh: str = "sketch", sketch_width: int = 4
) -> ProjectedLinears:
    """Lets every Linear of a model whose weight `opt` projects with GaLore project its gradient during the backward pass.

    Gradients of these weights are [rank, in] or [out, rank] from the start: weight.grad stays None, and memory for gradients
    falls by the share of the rank. They accumulate over backward passes until opt.step(), which uses and drops them, or
    opt.zero_grad(). Biases have ordinary gradients. Between refreshes a step is that of the full gradient.

    Args:
        refresh: how a subspace is refreshed. "sketch": the step at which a refresh is due projects with the old basis and
            accumulates a random sketch of the gradient beside it (at most sketch_width * rank wide), whose leading singular
            vectors are the basis from the next step on; step 1 projects with a random basis. No [out, in] matrix exists at
            any time. "full": that step accumulates the full gradient of the layers that are due, inside the optimizer, and
            every step is that of the full gradient; with staggered refreshes few layers are due at once, except at step 1.
            GaLore(method="random") needs neither.
        sketch_width: width of a sketch in ranks; 4 keeps 83 % of the best subspace's energy where singular values fall like
            i^-1/2, and 98 % where they fall like 1/i.

    Returns a handle with `names`, `skipped` (a dict of reasons), `bytes()` and `remove()`. Only layers of the exact class
    torch.nn.Linear are changed. Copies and pickles of the model and the optimizer are ordinary ones: call this again on them.

    model.zero_grad(), torch.nn.utils.clip_grad_norm_ and scaler.unscale_ do not see these gradients: opt.zero_grad() does.
    GradScaler's step unscales inside the step, with amp_fused or without; some parameter must have an ordinary gradient.
    torch.autograd.grad returns full gradients and accumulates nothing.

    Raises:
        TypeError: opt is no FusedOptimizer. ValueError: clip_grad_norm, which needs full gradients; no Linear to change.
    """
    if not isinstance(opt, FusedOptimizer):
        raise TypeError(f"projected_linear: expected an optimizer of fusedopt, got {type(opt).__name__}")
    if refresh not in REFRESHES:
        raise ValueError(f"projected_linear: refresh={refresh!r}; it is one of {', '.join(REFRESHES)}")
    check_positive_int(sketch_width, "sketch_width")
    if opt.clip_grad_norm is not None:
        raise ValueError(
            "projected_linear: clip_grad_norm needs the norm of full gradients, which are never formed. Create the optimizer "
            "without clip_grad_norm."
        )
    check_none(opt, "projected_linear", "it keeps projected gradients instead of full ones")
    if opt._release is not None:
        raise ValueError("projected_linear: release_gradients steps this optimizer. Call its handle's remove() first.")
    if opt._low_rank is not None:
        raise ValueError(
            f"projected_linear: this {type(opt).__name__} already has one; call its handle's remove() first"
        )
    projections = {p: opt.projection_for(p, group) for group in opt.param_groups for p in group["params"]}
    owners: dict[torch.Tensor, list] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(p, []).append(module)
    modules, skipped = {}, {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, torch.nn.Linear) else None
        if weight is None or projections.get(weight) is None:
            continue
        reason = _why_not(module, owners[weight], projections[weight])
        if reason is None:
            modules[name] = module
        else:
            skipped[name] = reason
    if not modules:
        reasons = (
            "; ".join(f"{name}: {why}" for name, why in skipped.items()) or "no weight of a Linear is projected by it"
        )
        raise ValueError(f"projected_linear: no layer to change for this {type(opt).__name__}: {reasons}")
    gradients = LowRankGradients(opt, list(dict.fromkeys(m.weight for m in modules.values())), refresh, sketch_width)
    for module in modules.values():
        module.__class__ = ProjectedLinear
        module.__dict__["_low_rank"] = gradients.sources[module.weight]
    opt._low_rank, opt._plan = gradients, None
    return ProjectedLinears(opt, gradients, modules, skipped)
