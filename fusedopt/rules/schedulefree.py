"""Schedule-free SGD and AdamW: Defazio et al., "The Road Less Scheduled" (arXiv 2405.15682), algorithm 1."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch

from fusedopt import masters
from fusedopt.distributed import local
from fusedopt.kernels.language import jit, tl
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.rule import Rule, State, register, register_optimizer
from fusedopt.sharded_states import entry_of

SGD_NAMES = ("lr", "back", "average", "weight_decay")
ADAMW_NAMES = (*SGD_NAMES, "beta2", "weight2", "debias2_sqrt", "eps")


@lru_cache
def _warm_weights(steps: int, power: float) -> tuple[float, ...]:
    """Sums of (k / steps)^power over the first 0, 1, ... steps."""
    return (0.0, *accumulate((k / steps) ** power for k in range(1, steps + 1)))


def averaging(h, step):
    """(warm-up factor of the learning rate, share of the new z in the average x). Iterates weigh as the learning rate to
    weight_lr_power; but for the warm-up it counts as constant, so that the share follows from the step count."""
    warm, power = h["warmup_steps"], h["weight_lr_power"]
    if isinstance(step, torch.Tensor):
        factor = (step / warm).clamp(max=1.0) if warm else torch.ones_like(step)
        k = torch.arange(1, warm + 1, dtype=torch.float64, device=step.device)
        total = ((k / max(warm, 1)) ** power * (k <= step)).sum() + (step - warm).clamp(min=0)
    else:
        factor = min(step / warm, 1.0) if warm else 1.0
        total = _warm_weights(warm, power)[min(step, warm)] + max(step - warm, 0)
    return factor, factor**power / total


def interpolation(h):
    """The share of x in y."""
    return h["betas"][0] if "betas" in h else h["momentum"]


def sgd_scalars(h, step):
    factor, average = averaging(h, step)
    lr = h["lr"] * factor
    return lr, lr * (1 - interpolation(h) * (1 - average)), average, h["weight_decay"]


def adamw_scalars(h, step):
    beta2 = h["betas"][1]
    return *sgd_scalars(h, step), beta2, 1 - beta2, (1 - beta2**step) ** -0.5, h["eps"]


def reference_sgd(g, p, z, *, lr, back, average, weight_decay):
    d = g + weight_decay * p
    after = p + average * (z - p) - back * d
    return p - after, z - lr * d


def reference_adamw(g, p, v, z, *, lr, back, average, weight_decay, beta2, weight2, debias2_sqrt, eps):
    v = beta2 * v + weight2 * g.square()
    u, z = reference_sgd(
        g / (v.sqrt() * debias2_sqrt + eps), p, z, lr=lr, back=back, average=average, weight_decay=weight_decay
    )
    return u, v, z


@jit
def direction_sgd(g, p, z, c):
    d = g + tl.load(c + 3) * p
    u = tl.load(c + 2) * (p - z) + tl.load(c + 1) * d
    return u, z - tl.load(c) * d


@jit
def direction_adamw(g, p, exp_avg_sq, z, c):
    exp_avg_sq = tl.load(c + 4) * exp_avg_sq + tl.load(c + 5) * g * g
    u, z = direction_sgd(g / (tl.sqrt(exp_avg_sq) * tl.load(c + 6) + tl.load(c + 7)), p, z, c)
    return u, exp_avg_sq, z


Z = State("z", position=lambda h: 1.0)
PLAIN = register(
    Rule(
        "schedulefree_sgd",
        (Z,),
        SGD_NAMES,
        sgd_scalars,
        reference_sgd,
        direction_sgd,
        step_size=lambda h, step: 1.0,
    )
)
ADAPTIVE = register(
    Rule(
        "schedulefree_adamw",
        (State("exp_avg_sq", signed=False), Z),
        ADAMW_NAMES,
        adamw_scalars,
        reference_adamw,
        direction_adamw,
        step_size=lambda h, step: 1.0,
    )
)


class ScheduleFree(FusedOptimizer):
    """The two points a parameter is held at: y while training, the average x for evaluation and saving."""

    decay_mode = "rule"

    def train(self) -> None:
        """Puts the parameters to y, where gradients are taken. Call it with model.train(); new optimizers are there."""
        self._move_to(training=True)

    def eval(self) -> None:
        """Puts the parameters to their average x, the point to evaluate and to keep. Call it with model.eval().

        Both ways are computed in fp32, through the companions of param_precision; a 16-bit parameter without one is rounded
        each time. A step raises RuntimeError until `train` is called.
        """
        self._move_to(training=False)

    @torch.no_grad()
    def _move_to(self, training: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] == training:
                continue
            beta = float(interpolation(group))
            for p in group["params"]:
                if "z" in self.state.get(p, {}):
                    self._move(p, group, 1 - beta if training else 1 - 1 / beta)
            group["train_mode"] = training

    def _move(self, p: torch.Tensor, group: dict, share: float) -> None:
        """p <- p + share (z - p), where z and companions may be offloaded."""
        precision, entry, mine = masters.configured_precision(p, group), entry_of(p, self.state[p]), local(p)
        names = [name for name in ("z", precision.companion) if name]
        here = {name: entry[name].to(mine.device) for name in names}
        exact = masters.weights(mine, here)
        exact += share * (here["z"] - exact)  # not lerp_, whose last bit depends on where in a vector an element lies
        if mine.dtype not in precision.dtypes:
            mine.copy_(exact)
            return
        masters.set_weights(mine, here, precision, exact)
        if precision.companion:
            entry[precision.companion].copy_(here[precision.companion])

    def _take_turns(self, only: int | None = None) -> None:
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}: its parameters are at the average, not where gradients are taken. Call "
                "optimizer.train() before the forward pass of a training step."
            )
        super()._take_turns(only)


def _check(interpolation, what: str, warmup_steps: int, weight_lr_power: float) -> None:
    if not 0 < interpolation < 1:
        raise ValueError(f"Invalid {what}: {interpolation}; it must be strictly between 0 and 1")
    if warmup_steps != int(warmup_steps) or warmup_steps < 0:
        raise ValueError(f"Invalid warmup_steps value: {warmup_steps}; it must be a whole number, 0 for none")
    check_nonnegative(weight_lr_power, "weight_lr_power value")


@register_optimizer("schedulefree_sgd")
class ScheduleFreeSGD(ScheduleFree):
    """Schedule-free SGD: z = z - lr (g + weight_decay y), x = (1 - c_t) x + c_t z, y = (1 - momentum) z + momentum x, with
    c_t the weight of step t over that of all so far. Gradients are taken at y, the parameter; x is the result.

    In place of SGD with a schedule, where the length of the run is not known: x is as good as after a decay at every step.

    Call opt.eval() before evaluating or saving the model and opt.train() before training on. z starts as the parameter and
    stays in fp32 under every state_format; there is no projection. Beyond the built-in warm-up give it no schedule: the
    shares c_t are those of a constant lr. (One that only falls after the warm-up has the same shares.)

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor; larger than that of SGD with a schedule.
        momentum: share of x in y.
        weight_decay: at y, added to the gradient.
        warmup_steps: over which the learning rate grows to lr.
        weight_lr_power: iterates weigh as their learning rate to this power.
        **options: shared options, see `FusedOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range. RuntimeError: a step after eval() without train().
    Source: arXiv 2405.15682, equations 3 to 5, weighted as in algorithm 1.
    """

    def __init__(self, params, lr=1.0, momentum=0.9, weight_decay=0.0, warmup_steps=0, weight_lr_power=2.0, **options):
        _check(momentum, "momentum value", warmup_steps, weight_lr_power)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "warmup_steps": int(warmup_steps)}
        super().__init__(params, {**defaults, "weight_lr_power": weight_lr_power, "train_mode": True}, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return PLAIN


@register_optimizer("schedulefree_adamw")
class ScheduleFreeAdamW(ScheduleFree):
    """Schedule-free AdamW: `ScheduleFreeSGD` on d = g / (sqrt(v / (1 - beta2^t)) + eps) in place of g.

    In place of AdamW with a schedule, with the same memory: z instead of the first moment. Begin with AdamW's learning rate.

    Args:
        betas: share of x in y, and decay rate of the second moment v.
        eps: added to the denominator.
        params, lr, weight_decay, warmup_steps, weight_lr_power, **options: as in `ScheduleFreeSGD`.

    Raises:
        ValueError: a hyperparameter is out of range. RuntimeError: a step after eval() without train().
    Source: arXiv 2405.15682, algorithm 1, with Adam's bias correction, as the authors' code now has it, in place of a
        learning rate times sqrt(1 - beta2^t).
    """

    def __init__(self, params, lr=2.5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, warmup_steps=0,
                 weight_lr_power=2.0, **options):  # fmt: skip
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        _check(betas[0], "beta parameter at index 0", warmup_steps, weight_lr_power)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"warmup_steps": int(warmup_steps), "weight_lr_power": weight_lr_power, "train_mode": True}
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return ADAPTIVE
