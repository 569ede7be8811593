"""NovoGrad: Ginsburg et al., "Stochastic Gradient Methods with Layer-wise Adaptive Moments ..." (arXiv 1905.11286), algorithm 1."""

from __future__ import annotations

from fusedopt.kernels.language import jit, tl
from fusedopt.measures import after
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer


def scalars(h, step):
    beta1, beta2 = h["betas"]
    kept = beta2 * after(step, 1)  # the first step takes the norm as it is
    return beta1, 1 - beta1 if h["grad_averaging"] else 1.0, h["weight_decay"], kept, h["eps"], 1.0


def norms(memory, param_sq, grad_sq, c):
    v = c["kept"] * memory["grad_norm_sq"] + (1 - c["kept"]) * grad_sq
    return {"grad_norm_sq": v}, {"inverse": 1 / (v.sqrt() + c["eps"])}


def reference(g, p, m, *, beta1, weight, weight_decay, inverse, **_):
    m = m * beta1 + (g * inverse + p * weight_decay) * weight
    return m, m


@jit
def direction(g, p, exp_avg, c):
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * (g * tl.load(c + 5) + tl.load(c + 2) * p)
    return exp_avg, exp_avg


NOVOGRAD = register(
    Rule(
        "novograd",
        (State("exp_avg"),),
        ("beta1", "weight", "weight_decay", "kept", "eps", "inverse"),
        scalars,
        reference,
        direction,
        measures=Measures(("inverse",), {"grad_norm_sq": 0.0}, norms=norms),
    )
)


@register_optimizer("novograd")
class NovoGrad(FusedOptimizer):
    """NovoGrad: v = beta2 v + (1 - beta2) |g|^2, one number a tensor (|g|^2 itself at the first step);
    m = beta1 m + g / (sqrt(v) + eps) + weight_decay p; p -= lr m.

    Half of Adam's states, and no tuning of betas to speak of: for large batches and long warm-ups, as in speech models.
    The updates are as long as a normalised gradient: take SGD's learning rates, divided by the tensors' norms, not Adam's.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of m and v.
        eps: added to sqrt(v).
        weight_decay: enters m, as above; not scaled by |g|.
        grad_averaging: multiply what enters m by 1 - beta1.
        **options: shared options, see `FusedOptimizer`. No projection and no differentiable=True.

    Each tensor's v is `grad_norm_sq` in its state: 0-dim, float64, on its device. The norms are one more read of parameters
    and gradients, shared with clip_grad_norm.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 1905.11286, algorithm 1; no bias correction, as in NVIDIA's published code.
    """

    decay_mode = "rule"

    def __init__(
        self, params, lr=1e-3, betas=(0.95, 0.98), eps=1e-8, weight_decay=0.0, grad_averaging=False, **options
    ):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_averaging": grad_averaging,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return NOVOGRAD
