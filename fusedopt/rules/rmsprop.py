"""RMSprop: Tieleman and Hinton (Coursera lecture 6.5, 2012), centred after Graves (arXiv 1308.0850), as torch.optim.RMSprop."""

from __future__ import annotations

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("alpha", "weight", "eps", "momentum")


def scalars(h, step):
    return h["alpha"], 1 - h["alpha"], h["eps"], h["momentum"]


def reference(g, p, v, *, alpha, weight, eps, momentum):
    v = v * alpha + g.square() * weight
    return g / (v.sqrt() + eps), v


def reference_momentum(g, p, v, b, *, momentum, **rest):
    u, v = reference(g, p, v, momentum=momentum, **rest)
    b = b * momentum + u
    return b, v, b


def reference_centered(g, p, v, a, *, alpha, weight, eps, momentum):
    v, a = v * alpha + g.square() * weight, a * alpha + g * weight
    return g / ((v - a.square()).clamp(min=0).sqrt() + eps), v, a


def reference_centered_momentum(g, p, v, a, b, *, momentum, **rest):
    u, v, a = reference_centered(g, p, v, a, momentum=momentum, **rest)
    b = b * momentum + u
    return b, v, a, b


@jit
def mean_square(g, square_avg, c):
    return tl.load(c) * square_avg + tl.load(c + 1) * g * g


@jit
def over_root(g, variance, c):
    return g / (tl.sqrt(variance) + tl.load(c + 2))


@jit
def variance(square_avg, grad_avg):
    return tl.maximum(square_avg - grad_avg * grad_avg, 0.0, propagate_nan=tl.PropagateNan.ALL)


@jit
def direction(g, p, square_avg, c):
    square_avg = mean_square(g, square_avg, c)
    return over_root(g, square_avg, c), square_avg


@jit
def direction_momentum(g, p, square_avg, momentum_buffer, c):
    square_avg = mean_square(g, square_avg, c)
    momentum_buffer = tl.load(c + 3) * momentum_buffer + over_root(g, square_avg, c)
    return momentum_buffer, square_avg, momentum_buffer


@jit
def direction_centered(g, p, square_avg, grad_avg, c):
    square_avg = mean_square(g, square_avg, c)
    grad_avg = tl.load(c) * grad_avg + tl.load(c + 1) * g
    return over_root(g, variance(square_avg, grad_avg), c), square_avg, grad_avg


@jit
def direction_centered_momentum(g, p, square_avg, grad_avg, momentum_buffer, c):
    square_avg = mean_square(g, square_avg, c)
    grad_avg = tl.load(c) * grad_avg + tl.load(c + 1) * g
    u = over_root(g, variance(square_avg, grad_avg), c)
    momentum_buffer = tl.load(c + 3) * momentum_buffer + u
    return momentum_buffer, square_avg, grad_avg, momentum_buffer


SQUARE, MEAN, BUFFER = State("square_avg", signed=False), State("grad_avg"), State("momentum_buffer")
PLAIN = register(Rule("rmsprop", (SQUARE,), NAMES, scalars, reference, direction, heavy=("plain",)))
MOMENTUM = register(Rule("rmsprop_momentum", (SQUARE, BUFFER), NAMES, scalars, reference_momentum, direction_momentum))
CENTERED = register(
    Rule("rmsprop_centered", (SQUARE, MEAN), NAMES, scalars, reference_centered, direction_centered, heavy=("coded",))
)
CENTERED_MOMENTUM = register(
    Rule(
        "rmsprop_centered_momentum",
        (SQUARE, MEAN, BUFFER),
        NAMES,
        scalars,
        reference_centered_momentum,
        direction_centered_momentum,
    )
)


@register_optimizer("rmsprop")
class RMSprop(FusedOptimizer):
    """RMSprop, as `torch.optim.RMSprop`: p -= lr * b, b = momentum b + g / (sqrt(v) + eps), v the moving mean of g^2, less
    the square of that of g where centered. A variance that rounding makes negative counts as zero.

    For recurrent networks and reinforcement learning; Adam without bias correction and with momentum outside the ratio.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        alpha: decay rate of the means.
        eps: added to the denominator.
        weight_decay: L2 coefficient.
        momentum: of the buffer b; without it b is the ratio itself.
        centered: divide by the estimated standard deviation.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: Tieleman and Hinton, lecture 6.5 (2012); centred: arXiv 1308.0850, equations 38 to 45.
    """

    def __init__(
        self, params, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False, **options
    ):
        check_nonnegative(eps, "epsilon value")
        check_nonnegative(momentum, "momentum value")
        check_nonnegative(alpha, "alpha value")
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        if group["centered"]:
            return CENTERED_MOMENTUM if group["momentum"] > 0 else CENTERED
        return MOMENTUM if group["momentum"] > 0 else PLAIN
