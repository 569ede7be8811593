"""RMSprop: Tieleman and Hinton (Coursera lecture 6.5, 2012), centred after Graves (arXiv 1308.0850), as torch.optim.RMSprop."""

from __future__ import annotations

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

NAMES = ("alpha", "weight", "eps", "eps_inside", "momentum", "entering")


def scalars(h, step):
    """eps stands beside the root or in it; b <- momentum b + entering times the ratio."""
    eps = (0.0, h["eps"]) if h["eps_inside"] else (h["eps"], 0.0)
    return h["alpha"], 1 - h["alpha"], *eps, h["momentum"], h["lr"] if h["lr_in_momentum"] else 1.0


def buffer_step_size(h, step):
    return 1.0 if h["lr_in_momentum"] else h["lr"]


def reference(g, p, v, *, alpha, weight, eps, eps_inside, **_):
    v = v * alpha + g.square() * weight
    return g / ((v + eps_inside).sqrt() + eps), v


def reference_momentum(g, p, v, b, *, momentum, entering, **rest):
    u, v = reference(g, p, v, **rest)
    b = b * momentum + u * entering
    return b, v, b


def reference_centered(g, p, v, a, *, alpha, weight, eps, eps_inside, **_):
    v, a = v * alpha + g.square() * weight, a * alpha + g * weight
    return g / (((v - a.square()).clamp(min=0) + eps_inside).sqrt() + eps), v, a


def reference_centered_momentum(g, p, v, a, b, *, momentum, entering, **rest):
    u, v, a = reference_centered(g, p, v, a, **rest)
    b = b * momentum + u * entering
    return b, v, a, b


@jit
def mean_square(g, square_avg, c):
    return tl.load(c) * square_avg + tl.load(c + 1) * g * g


@jit
def over_root(g, variance, c):
    return g / (tl.sqrt(variance + tl.load(c + 3)) + tl.load(c + 2))


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
    momentum_buffer = tl.load(c + 4) * momentum_buffer + tl.load(c + 5) * over_root(g, square_avg, c)
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
    momentum_buffer = tl.load(c + 4) * momentum_buffer + tl.load(c + 5) * u
    return momentum_buffer, square_avg, grad_avg, momentum_buffer


SQUARE = State("square_avg", signed=False, initial=lambda h: h["initial_square_avg"])
MEAN, BUFFER = State("grad_avg"), State("momentum_buffer")


def _rule(name: str, states: tuple[State, ...], reference, direction, **more) -> Rule:
    size = buffer_step_size if BUFFER in states else None
    return register(Rule(name, states, NAMES, scalars, reference, direction, step_size=size, **more))


PLAIN = _rule("rmsprop", (SQUARE,), reference, direction, heavy=("plain",))
MOMENTUM = _rule("rmsprop_momentum", (SQUARE, BUFFER), reference_momentum, direction_momentum)
CENTERED = _rule("rmsprop_centered", (SQUARE, MEAN), reference_centered, direction_centered, heavy=("coded",))
CENTERED_MOMENTUM = _rule(
    "rmsprop_centered_momentum", (SQUARE, MEAN, BUFFER), reference_centered_momentum, direction_centered_momentum
)


@register_optimizer("rmsprop")
class RMSprop(FusedOptimizer):
    """RMSprop, as `torch.optim.RMSprop`: p -= lr * b, b = momentum b + g / (sqrt(v) + eps), v the moving mean of g^2, less
    the square of that of g where centered. A variance that rounding makes negative counts as zero.

    For recurrent networks and reinforcement learning; Adam without bias correction and with momentum outside the ratio. As
    TensorFlow has it: `RMSpropTF`.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        alpha: decay rate of the means.
        eps: added to the denominator.
        weight_decay: L2 coefficient.
        momentum: of the buffer b; without it b is the ratio itself.
        centered: divide by the estimated standard deviation.
        eps_inside: add eps to v, under the root, instead.
        initial_square_avg: of v, at first.
        lr_in_momentum: b = momentum b + lr g / (...); p -= b. A change of lr then acts as fast as the buffer forgets.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: Tieleman and Hinton, lecture 6.5 (2012); centred: arXiv 1308.0850, equations 38 to 45.
    """

    def __init__(self, params, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False, *,
                 eps_inside=False, initial_square_avg=0.0, lr_in_momentum=False, **options):  # fmt: skip
        check_nonnegative(eps, "epsilon value")
        check_nonnegative(momentum, "momentum value")
        check_nonnegative(alpha, "alpha value")
        check_nonnegative(initial_square_avg, "initial_square_avg value")
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "eps_inside": eps_inside,
            "initial_square_avg": initial_square_avg,
            "lr_in_momentum": lr_in_momentum,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        if group["centered"]:
            return CENTERED_MOMENTUM if group["momentum"] > 0 else CENTERED
        return MOMENTUM if group["momentum"] > 0 else PLAIN


@register_optimizer("rmsprop_tf")
class RMSpropTF(RMSprop):
    """RMSprop as TensorFlow has it, with v = 1 at first and eps under the root: b = momentum b + lr g / sqrt(v + eps); p -= b.

    For networks whose published recipes were tuned in TensorFlow (EfficientNet, MobileNet): the first steps are short, as v
    starts at 1, where `RMSprop`'s are long.

    Args:
        params: parameters, named parameters, or groups of them.
        lr, alpha, eps, weight_decay, momentum, centered, lr_in_momentum: as in `RMSprop`.
        **options: eps_inside and initial_square_avg, as in `RMSprop`, and shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: Tieleman and Hinton, lecture 6.5 (2012), as tf.train.RMSPropOptimizer implements it.
    """

    def __init__(self, params, lr=1e-2, alpha=0.9, eps=1e-10, weight_decay=0.0, momentum=0.0, centered=False, *,
                 lr_in_momentum=True, **options):  # fmt: skip
        options = {"eps_inside": True, "initial_square_avg": 1.0, **options}
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, lr_in_momentum=lr_in_momentum, **options
        )
