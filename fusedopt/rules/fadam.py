"""FAdam: Hwang, "FAdam: Adam is a natural gradient optimizer using diagonal empirical Fisher information" (arXiv 2405.12807)."""

from __future__ import annotations

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Measures, Rule, State, register, register_optimizer


def scalars(h, step):
    beta1, beta2 = h["betas"]
    fisher = beta2 * (1 - beta2 ** (step - 1)) / (1 - beta2**step)
    return (
        beta1,
        1 - beta1,
        fisher,
        1 - fisher,
        h["weight_decay"],
        h["eps"],
        h["clip"],
        h["eps"],
        h["clip"],
        h["clip"],
    )


def norms(memory, param_sq, grad_sq, c):
    return {}, {"floor": c["eps"] * (grad_sq / c["numel"]).sqrt().clamp(min=1.0)}


def sums(memory, natural_sq, decay_sq, c):
    def clipped(square):
        return c["clip"] / (square / c["numel"]).sqrt().clamp(min=1.0)

    return {}, {"clip_grad": clipped(natural_sq), "clip_decay": clipped(decay_sq)}


def terms(g, p, m, f, *, fisher, fisher_weight, floor, **_):
    scale = (f * fisher + g.square() * fisher_weight).sqrt() + floor
    return (g / scale).square(), (p / scale).square()


def reference(g, p, m, f, *, beta1, weight1, fisher, fisher_weight, weight_decay, floor, clip_grad, clip_decay, **_):
    f = f * fisher + g.square() * fisher_weight
    scale = f.sqrt() + floor
    m = m * beta1 + g / scale * (clip_grad * weight1)
    return m + p / scale * (clip_decay * weight_decay), m, f


@jit
def terms_triton(g, p, exp_avg, fisher_diag, c):
    inverse = 1.0 / (tl.sqrt(tl.load(c + 2) * fisher_diag + tl.load(c + 3) * g * g) + tl.load(c + 7))
    natural = g * inverse
    decay = p * inverse
    return natural * natural, decay * decay


@jit
def direction(g, p, exp_avg, fisher_diag, c):
    fisher_diag = tl.load(c + 2) * fisher_diag + tl.load(c + 3) * g * g
    scale = tl.sqrt(fisher_diag) + tl.load(c + 7)
    exp_avg = tl.load(c) * exp_avg + tl.load(c + 1) * tl.load(c + 8) * (g / scale)
    return exp_avg + tl.load(c + 4) * tl.load(c + 9) * (p / scale), exp_avg, fisher_diag


FADAM = register(
    Rule(
        "fadam",
        (State("exp_avg"), State("fisher_diag", signed=False)),
        (
            "beta1",
            "weight1",
            "fisher",
            "fisher_weight",
            "weight_decay",
            "eps",
            "clip",
            "floor",
            "clip_grad",
            "clip_decay",
        ),
        scalars,
        reference,
        direction,
        measures=Measures(
            ("floor", "clip_grad", "clip_decay"), norms=norms, sums=sums, terms=terms, terms_triton=terms_triton
        ),
    )
)


@register_optimizer("fadam")
class FAdam(FusedOptimizer):
    """FAdam: Adam as natural gradient descent. F = b F + (1 - b) g^2 with the debiased rate
    b = beta2 (1 - beta2^(t-1)) / (1 - beta2^t); s = sqrt(F) + eps max(1, rms(g)); cl(x) = clip x / max(1, rms(x));
    m = beta1 m + (1 - beta1) cl(g / s); p -= lr (m + weight_decay cl(p / s)), every rms over one tensor.

    The decay is divided by the Fisher information as the gradient is, and updates are clipped by their rms: speech and
    language models where AdamW's decay is hard to set. Moments are not debiased, so the first steps are small.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of m and of F.
        eps: floor of s, times the gradient's rms where that is above 1.
        weight_decay: coefficient of the natural decay above.
        clip: rms above which natural gradient and decay are scaled down; it also scales them below.
        **options: shared options, see `FusedOptimizer`. No projection and no differentiable=True.

    A step reads gradients and parameters three times, the states twice: for rms(g), for the two clips, and to step.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2405.12807, algorithm 1, with the published code's eps; the exponent of F is 1/2.
    """

    decay_mode = "rule"

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, clip=1.0, **options):
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        if not clip > 0:
            raise ValueError(f"Invalid clip value: {clip}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clip": clip}
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return FADAM
