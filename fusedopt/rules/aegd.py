"""AEGD: Liu and Tian, "AEGD: Adaptive Gradient Descent with Energy" (arXiv 2010.05109), algorithm 1, and with momentum."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.losses import TakesLoss, sign_of
from fusedopt.measures import after
from fusedopt.options import check_fraction
from fusedopt.rule import Measures, Rule, State, register, register_optimizer

NAMES = ("rate", "shift", "sign", "first", "weight_decay", "root", "inverse")


def scalars(h, step):
    inside = 0.0 if h["decoupled_weight_decay"] else h["weight_decay"]
    return 2 * h["lr"], h["shift"], sign_of(h), 1 - after(step, 1), inside, 1.0, 0.5


def momentum_scalars(h, step):
    return (*scalars(h, step), h["momentum"])


def start(memory, c):
    root = (c["sign"] * c["loss"] + c["shift"]).sqrt()
    return {"root": root, "inverse": 0.5 / root}


def decayed(g, p, r, rate, first, weight_decay, root, inverse):
    """q and the new r"""
    q = g * inverse + weight_decay * p
    return q, (r * (1 - first) + root * first) / (1 + rate * q.square())


def reference(g, p, r, *, rate, first, weight_decay, root, inverse, **_):
    q, r = decayed(g, p, r, rate, first, weight_decay, root, inverse)
    return 2 * r * q, r


def momentum_reference(g, p, r, m, *, rate, first, weight_decay, root, inverse, momentum, **_):
    q, r = decayed(g, p, r, rate, first, weight_decay, root, inverse)
    m = m * momentum + q
    return 2 * r * m, r, m


@jit
def direction(g, p, energy, c):
    q = g * tl.load(c + 6) + tl.load(c + 4) * p
    energy = tl.where(tl.load(c + 3) != 0.0, tl.load(c + 5), energy) / (1.0 + tl.load(c) * (q * q))
    return 2.0 * energy * q, energy


@jit
def momentum_direction(g, p, energy, momentum_buffer, c):
    q = g * tl.load(c + 6) + tl.load(c + 4) * p
    energy = tl.where(tl.load(c + 3) != 0.0, tl.load(c + 5), energy) / (1.0 + tl.load(c) * (q * q))
    momentum_buffer = tl.load(c + 7) * momentum_buffer + q
    return 2.0 * energy * momentum_buffer, energy, momentum_buffer


MEASURES = Measures(("root", "inverse"), start=start, given=("loss",))
ENERGY = State("energy", signed=False, wide=True)
AEGD_RULE = register(Rule("aegd", (ENERGY,), NAMES, scalars, reference, direction, measures=MEASURES, heavy=("plain",)))
MOMENTUM = register(
    Rule(
        "aegd_momentum",
        (ENERGY, State("momentum_buffer")),
        (*NAMES, "momentum"),
        momentum_scalars,
        momentum_reference,
        momentum_direction,
        measures=MEASURES,
    )
)


@register_optimizer("aegd")
class AEGD(TakesLoss):
    """AEGD, gradient descent with energy: every weight has an energy r that can only fall, and bounds its steps. With the loss L,
    w = sqrt(L + shift) and r = w before the first step: q = g / (2 w); r = r / (1 + 2 lr q^2); p -= 2 lr r q.
    With momentum q in the last is m = momentum m + q.

    Stable at any lr, which decides how fast steps shrink, not whether they diverge: for small models whose rate nobody wants to
    tune. One or two states; the step wants the loss: step(closure), or step(loss=loss) after backward().

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor.
        shift: added to the loss, so that L + shift is positive throughout.
        momentum: decay rate of m; 0 for none.
        weight_decay: times p, added to q.
        decoupled_weight_decay: True takes lr weight_decay p from the parameter instead (AEGDW).
        **options: shared options, see `FusedOptimizer`. No projection, offload, gradient release or differentiable=True.
            With maximize=True L stands for minus the loss.

    r is `energy`, in fp32 under every state_format. A loss on a GPU is not waited for: L + shift below 0 makes all weights NaN.

    Raises:
        ValueError: a hyperparameter is out of range. At the step: no loss is given, or one on the CPU is -shift or less.
    Source: arXiv 2010.05109, algorithm 1; with momentum in the form of a heavy ball.
    """

    decay_mode = "rule"

    def __init__(
        self,
        params,
        lr=0.1,
        shift=1.0,
        momentum=0.0,
        weight_decay=0.0,
        decoupled_weight_decay=False,
        **options,
    ):
        check_fraction(momentum, "momentum value")
        defaults = {
            "lr": lr,
            "shift": shift,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return MOMENTUM if group["momentum"] else AEGD_RULE

    def decay_mode_for(self, group) -> str:
        return "decoupled" if group["decoupled_weight_decay"] else "rule"

    def check_loss(self, loss: torch.Tensor) -> None:
        for group in self.param_groups if loss.device.type == "cpu" else ():
            if sign_of(group) * float(loss) + group["shift"] <= 0:
                raise ValueError(
                    f"AEGD.step: the loss {float(loss):g} (maximize={group['maximize']}) and shift {group['shift']:g} leave "
                    "nothing to take the root of. Choose a larger shift."
                )
