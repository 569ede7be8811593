"""Muon: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): momentum, made orthogonal."""

from __future__ import annotations

from fusedopt.kernels.language import jit, tl  # noqa: F401 - the interpreter looks for tl beside the functions
from fusedopt.matrices import MatrixOrAdam, orthogonal_options
from fusedopt.newton_schulz import QUINTIC
from fusedopt.noise_rates import noise_rates
from fusedopt.options import check_betas, check_fraction
from fusedopt.projections.orthogonal import Orthogonal
from fusedopt.rule import Rule, State, compose, register, register_optimizer
from fusedopt.rules.sgd import MOMENTUM_NAMES, momentum_direction, momentum_reference


def scalars(h, step):
    """b <- mu b + (1 - mu) g; u = (1 - mu) g + mu b, or b without nesterov."""
    mu = h["momentum"]
    return (mu, 1 - mu, *((1 - mu, mu) if h["nesterov"] else (0.0, 1.0)))


def difference_reference(g, p, previous):
    return g - previous, g.clone()


@jit
def difference_direction(g, p, previous_grad, c):
    return g - previous_grad, g


MUON = register(
    Rule(
        "muon",
        (State("momentum_buffer"),),
        MOMENTUM_NAMES,
        scalars,
        momentum_reference,
        momentum_direction,
        internal=True,
    )
)
# The change of a gradient since the last step (fusedopt.noise_rates)
DIFFERENCE = register(
    Rule(
        "difference",
        (State("previous_grad"),),
        (),
        lambda h, step: (),
        difference_reference,
        difference_direction,
        internal=True,
    )
)
NOISY_MUON = compose("muon_noise", MUON, DIFFERENCE)


@register_optimizer("muon")
class Muon(MatrixOrAdam):
    """Muon: b = mu b + (1 - mu) g; u = (1 - mu) g + mu b (b without nesterov); p -= lr (s U V^T + weight_decay p), where U V^T is
    u made orthogonal by a Newton-Schulz iteration and s depends on the shape; and AdamW for everything that is no hidden matrix.

    Hidden matrices of transformers and convolutional networks: fewer steps than AdamW to the same loss, with one state. Give it
    a model, or named parameters: embeddings, output heads and vectors are found by module and name and stepped by AdamW.

    Args:
        params: a module, (named) parameters, or groups of them. Of a group, "orthogonalize" says whether its tensors
            are stepped by Muon (True; each must have two dimensions or more) or AdamW (False); None decides tensor by tensor.
        lr: learning rate, a float or a 1-element tensor.
        weight_decay: decoupled.
        momentum: mu.
        nesterov: look ahead, as above.
        ns_coefficients: (a, b, c) of every Newton-Schulz step, or "polar_express" for those of arXiv 2505.16932.
        eps: of Muon's groups the least norm of u; of AdamW's groups adam_eps.
        ns_steps: iterations.
        adjust_lr_fn: s of a matrix [rows, cols]: None or "original", sqrt(max(1, rows / cols)); "match_rms_adamw",
            0.2 sqrt(max(rows, cols)), with which AdamW's learning rate and decay serve both; "rms_to_rms", sqrt(rows / cols);
            "none", 1.
        ns_dtype: of the matrix products, "bf16" (sums in fp32) or "fp32". Of fp64 parameters they are fp64.
        adam_lr: learning rate of AdamW's groups; None for lr. adam_betas, adam_eps: theirs.
        noise_rates: None, or (alpha, beta2) of learning rates by the noise of each matrix's gradient, as in `LANTON`.
        **options: shared options, see `FusedOptimizer`; state_format is that of the momentum and of AdamW's moments. No other
            projection or differentiable=True.

    A group of both kinds of tensors becomes two. Convolution weights (out, in, h, w) are matrices [out, in h w]. Of sharded
    matrices (DTensor) the direction is gathered, every process takes it through the iteration, and steps its shard.
    Matrices of one shape go through the iteration together, up to 2^26 elements of them (on the CPU one by one): that takes four
    times their size in ns_dtype. On GPUs with Triton the products are kernels that make one triangle of a symmetric result.

    Raises:
        ValueError: a hyperparameter is out of range, or a vector is to be made orthogonal.
    Source: arXiv 2502.16982, with both scalings of torch.optim.Muon; the method is Jordan et al.'s of 2024.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=True,
        ns_coefficients=QUINTIC,
        eps=1e-7,
        ns_steps=5,
        adjust_lr_fn=None,
        ns_dtype="bf16",
        adam_lr=None,
        adam_betas=(0.9, 0.95),
        adam_eps=1e-8,
        noise_rates=None,
        **options,
    ):
        check_betas(adam_betas, options)
        check_fraction(momentum, "momentum value")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
            "noise_rates": noise_rates,
            "betas": adam_betas,
        }
        super().__init__(params, defaults, {"lr": adam_lr, "eps": adam_eps}, **options)

    def matrix_projection(self, h):
        return Orthogonal(**orthogonal_options(h), noise=noise_rates(h["noise_rates"]))

    @classmethod
    def matrix_rule(cls, group) -> Rule:
        return MUON if group["noise_rates"] is None else NOISY_MUON
