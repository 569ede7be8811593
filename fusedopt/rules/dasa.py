"""DASA: OASIS with its adaptive rate, Jahani et al., "Doubly Adaptive Scaled Algorithm for Machine Learning Using Second-Order
Information" (arXiv 2109.05198), algorithm 1."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusedopt.curvature import EstimatesHessian
from fusedopt.kernels.language import jit, tl
from fusedopt.rule import Measures, Rule, State, register, register_optimizer
from fusedopt.rules.adahessian import smoothed


def scalars(h, step):
    return h["truncation"], h["initial_rate"]


def sums(memory, moved, changed, c):
    """The rate of this step; after the first, at most what the local curvature says, and not far above the last one's."""
    fresh = memory["rate"] == 0
    last = torch.where(fresh, c["initial_rate"], memory["rate"])
    growth = (1 + torch.where(memory["rate_ratio"] == 0, torch.inf, memory["rate_ratio"])).sqrt() * last
    local = torch.where(changed > 0, (moved / torch.where(changed > 0, changed, 1.0)).sqrt() / 2, torch.inf)
    rate = torch.minimum(growth, local)
    usable = ~fresh & rate.isfinite() & (rate > 0)
    rate = torch.where(usable, rate, last)
    ratio = torch.where(fresh, memory["rate_ratio"], rate / last)
    return {"rate": rate, "rate_ratio": ratio}, {"lr_factor": rate, "decay_factor": rate}


def terms(g, p, last_param, last_grad, hessian, *, least, **_):
    d = hessian.abs().clamp(min=least)
    return d * (p - last_param).square(), (g - last_grad).square() / d


def reference(g, p, last_param, last_grad, hessian, *, least, **_):
    return g / hessian.abs().clamp(min=least), p.clone(), g.clone(), hessian.clone()


@jit
def terms_triton(g, p, last_param, last_grad, hessian, c):
    d = tl.maximum(tl.abs(hessian), tl.load(c))
    moved, changed = p - last_param, g - last_grad
    return d * moved * moved, changed * changed / d


@jit
def direction(g, p, last_param, last_grad, hessian, c):
    return g / tl.maximum(tl.abs(hessian), tl.load(c)), p, g, hessian


DASA_RULE = register(
    Rule(
        "dasa",
        (
            State("last_param", position=lambda h: 1.0),
            State("last_grad", wide=True),
            State("hessian", estimate=True),
        ),
        ("least", "initial_rate"),
        scalars,
        reference,
        direction,
        measures=Measures(
            ("lr_factor", "decay_factor"),
            {"rate": 0.0, "rate_ratio": 0.0},
            scope="optimizer",
            sums=sums,
            terms=terms,
            terms_triton=terms_triton,
        ),
    )
)


@register_optimizer("dasa")
class DASA(EstimatesHessian):
    """OASIS that finds its learning rate: with D = max(|smoothed Hessian diagonal|, truncation), |x|_D^2 = sum D x^2 and
    |x|*_D^2 = sum x^2 / D over all tensors, s and y the last changes of p and g, and q = e / e_last (infinite at first):
    e = min(sqrt(1 + q_last) e_last, |s|_D / (2 |y|*_D)); p -= lr e g / D. `estimate_hessian(loss)` takes the place of
    loss.backward() and smooths: diagonal = beta2 diagonal + (1 - beta2) new.

    For curvature without a learning rate to tune. y compares the gradients of two steps on the same samples: with full
    batches as they come; with mini-batches call `last_gradients(closure)` before each forward pass, else y is noise and the
    rate falls to nothing. `OASIS` has a fixed rate and momentum. Three states in fp32.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: multiplies e, a float or a 1-element tensor; leave it at 1.
        initial_rate: e of the first step.
        beta2: decay rate of the diagonal, per estimate.
        truncation: the least divisor.
        weight_decay: L2 coefficient; the decayed gradient is compared and stepped.
        **options: shared options, see `FusedOptimizer`; seed draws the estimates. No projection, offload, gradient release or
            differentiable=True; whole parameters (no DTensor), all on one device.

    e and e / e_last are `rate` and `rate_ratio` in the state of every parameter, the same 0-dim float64 tensors. Where neither
    parameters nor gradients changed, e stays.

    Raises:
        ValueError: a hyperparameter is out of range. RuntimeError at the step: a parameter never had an estimate.
    Source: arXiv 2109.05198, algorithm 1 with its adaptive rate.
    """

    def __init__(
        self, params, lr=1.0, initial_rate=1e-3, beta2=0.999, truncation=0.01, weight_decay=0.0, **options
    ):  # fmt: skip
        if not initial_rate > 0:
            raise ValueError(f"Invalid initial_rate value: {initial_rate}; it must be positive")
        if not 0.0 <= beta2 < 1.0:
            raise ValueError(f"Invalid beta2 value: {beta2}")
        if not truncation > 0:
            raise ValueError(f"Invalid truncation value: {truncation}; it is the least divisor, so it must be positive")
        defaults = {
            "lr": lr,
            "initial_rate": initial_rate,
            "beta2": beta2,
            "truncation": truncation,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return DASA_RULE

    def joined(self, old, new, group):
        return smoothed(old, new, group["beta2"])

    @torch._disable_dynamo
    def last_gradients(self, closure: Callable[[], torch.Tensor]) -> None:
        """For mini-batches: takes the gradients of this step's batch at the parameters of before the last step, which the step
        compares with those at the present ones. Before the first step it does nothing.

        Args:
            closure: the loss of this step's batch. It is called once, and gradients in .grad stay as they are.
        Raises:
            RuntimeError: states are offloaded, or clip_grad_norm is set, which would scale one of the two gradients only.
        """
        if self.offloading is not None or self.clip_grad_norm is not None:
            raise RuntimeError("DASA.last_gradients: gradients of two steps are compared. Neither clip nor offload.")
        owners = [(p, group) for group in self.param_groups for p in group["params"] if p.requires_grad]
        owners = [(p, group) for p, group in owners if float(self.state.get(p, {}).get("step", 0)) > 0]
        if not owners:
            return
        params, entries = [p for p, _ in owners], [self.state[p] for p, _ in owners]
        kept = [p.detach().clone() for p in params]
        try:
            with torch.no_grad():
                torch._foreach_copy_(params, [entry["last_param"] for entry in entries])
            with torch.enable_grad():
                grads = torch.autograd.grad(closure(), params, allow_unused=True)
        finally:
            with torch.no_grad():
                torch._foreach_copy_(params, kept)
        for (_, group), entry, g in zip(owners, entries, grads, strict=True):
            if g is not None:
                g = g.to(entry["last_grad"].dtype) * (-1 if group["maximize"] else 1)
                entry["last_grad"].copy_(g + group["weight_decay"] * entry["last_param"])
