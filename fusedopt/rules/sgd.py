"""SGD with momentum, dampening and Nesterov's acceleration, in the form of torch.optim.SGD (lr outside the buffer)."""

from __future__ import annotations

from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_nesterov, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer

MOMENTUM_NAMES = ("momentum", "weight", "look_grad", "look_buffer")


def momentum_scalars(h, step):
    """b <- momentum b + weight g; u = look_grad g + look_buffer b. The first step takes b = g, without dampening."""
    first = 1 * (step <= 1)
    momentum, dampening = h["momentum"], h["dampening"]
    weight = 1 - dampening * (1 - first)
    look = (1.0, momentum) if h["nesterov"] else (0.0, 1.0)
    return (momentum * (1 - first), weight, *look)


def reference(g, p):
    return (g,)


def momentum_reference(g, p, b, *, momentum, weight, look_grad, look_buffer):
    b = b.mul(momentum).add(g * weight)
    u = b if look_grad == 0 else g * look_grad + b * look_buffer
    return u, b


@jit
def direction(g, p, c):
    return g


@jit
def momentum_direction(g, p, momentum_buffer, c):
    momentum_buffer = tl.load(c) * momentum_buffer + tl.load(c + 1) * g
    return tl.load(c + 2) * g + tl.load(c + 3) * momentum_buffer, momentum_buffer


SGD_PLAIN = register(Rule("sgd", (), (), lambda h, step: (), reference, direction))
SGD_MOMENTUM = register(
    Rule(
        "sgd_momentum",
        (State("momentum_buffer"),),
        MOMENTUM_NAMES,
        momentum_scalars,
        momentum_reference,
        momentum_direction,
    )
)


@register_optimizer("sgd")
class SGD(FusedOptimizer):
    """Stochastic gradient descent, as `torch.optim.SGD`.

    b = momentum * b + (1 - dampening) * g (b = g at the first step); p -= lr * (g + momentum * b if nesterov else b).

    For convolutional networks, and wherever one learning rate suits all tensors: with momentum half the state of Adam,
    without it none.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        momentum: 0 keeps no state.
        dampening: of the gradient that enters the buffer.
        weight_decay: L2 coefficient.
        nesterov: needs momentum > 0 and dampening 0.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: Polyak 1964; Sutskever et al., ICML 2013, equations 1 to 4, as torch.optim implements them.
    """

    decay_mode = "coupled"
    torch_counts_steps = False

    def __init__(self, params, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, **options):
        check_nonnegative(momentum, "momentum value")
        check_nesterov(nesterov, momentum, dampening)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return SGD_MOMENTUM if group["momentum"] else SGD_PLAIN
