"""Who takes part in `python -m bench conformance`: our optimizer classes, and every importable rival."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import fusedopt
from fusedopt.curvature import EstimatesHessian
from fusedopt.losses import TakesLoss
from fusedopt.rule import optimizers

LR, DECAY = 1e-2, 0.1


@dataclass(frozen=True)
class Subject:
    """An optimizer class with arguments that train the checks' small problems.

    cls: returns the class, or raises ImportError. options: arguments beside lr and weight_decay. adam: it takes `betas` as
    torch.optim.Adam does. torch_class: the torch.optim class of the same rule, for state dicts. quantized: its states are
    coarser than 16 bits. matrices: options of the group of matrices (low-rank projections). elementwise: it needs neither
    a tensor's shape nor its norm. joint: a tensor's step depends on the gradients of others; alone: not where those are zero
    (a mean over all elements counts them). momentum: there is one for OneCycleLR to cycle. still: a learning rate near zero
    leaves weights where they are. to_torch: arguments of state_dict for a dict that torch.optim takes. eager: without
    torch.compile, which would take minutes here.
    """

    name: str
    package: str
    cls: Callable[[], type]
    options: dict = field(default_factory=dict)
    adam: bool = False
    torch_class: type | None = None
    quantized: bool = False
    matrices: dict = field(default_factory=dict)
    elementwise: bool = True
    joint: bool = False
    alone: bool = True
    momentum: bool = True
    still: bool = True
    to_torch: dict = field(default_factory=dict)
    eager: bool = False
    lr: float = LR

    def groups(self, params):
        """Parameters as the class wants them; named parameters and groups are passed as they are."""
        params = params if isinstance(params, torch.Tensor) else list(params)
        plain = all(isinstance(p, torch.Tensor) for p in params)
        if not self.matrices or not plain:
            return params
        parts = [p for p in params if p.dim() == 2], [p for p in params if p.dim() != 2]
        groups = {"params": parts[0], **self.matrices}, {"params": parts[1]}
        return [group for group in groups if group["params"]]

    def make(self, params, **changes) -> torch.optim.Optimizer:
        return self.cls()(self.groups(params), **{"lr": self.lr, "weight_decay": DECAY, **self.options, **changes})


def _imported(module: str, name: str) -> Callable[[], type]:
    return lambda: getattr(importlib.import_module(module), name)


def _torch(label: str, **flags) -> Subject:
    return Subject(
        f"torch AdamW {label}", "torch", lambda: torch.optim.AdamW, flags, adam=True, torch_class=torch.optim.AdamW
    )


def rivals() -> list[Subject]:
    adamw = {"adam": True, "torch_class": torch.optim.AdamW}
    eight = {**adamw, "quantized": True}
    # optimi picks Triton wherever it is installed, and then cannot step CPU tensors: it is told not to
    bnb, ao, po = "bitsandbytes.optim", "torchao.optim", "pytorch_optimizer"
    return [
        _torch("loop", foreach=False),
        _torch("foreach", foreach=True),
        _torch("fused", fused=True),
        Subject("bitsandbytes AdamW", "bitsandbytes", _imported(bnb, "AdamW"), **adamw),
        Subject("bitsandbytes AdamW8bit", "bitsandbytes", _imported(bnb, "AdamW8bit"), **eight),
        Subject("torchao _AdamW", "torchao", _imported(ao, "_AdamW"), eager=True, **adamw),
        Subject("torchao AdamW8bit", "torchao", _imported(ao, "AdamW8bit"), eager=True, **eight),
        Subject("optimi AdamW", "torch-optimi", _imported("optimi", "AdamW"), {"triton": False}, **adamw),
        Subject("optimi StableAdamW", "torch-optimi", _imported("optimi", "StableAdamW"), {"triton": False}, adam=True,
                elementwise=False),
        Subject("pytorch_optimizer StableAdamW", po, _imported(po, "StableAdamW"), adam=True, elementwise=False),
        Subject("pytorch_optimizer Lion", po, _imported(po, "Lion"), lr=1e-3),
        Subject("lion-pytorch Lion", "lion-pytorch", _imported("lion_pytorch", "Lion"), lr=1e-3),
        Subject(
            "galore-torch GaLoreAdamW", "galore-torch", _imported("galore_torch", "GaLoreAdamW"), {"no_deprecation_warning": True},
            matrices={"rank": 4, "update_proj_gap": 50, "scale": 1.0, "proj_type": "std"}, adam=True, elementwise=False,
        ),
        Subject("HeavyBall ForeachAdamW", "heavyball", _imported("heavyball", "ForeachAdamW"), **adamw),
        Subject("flashoptim FlashAdamW", "flashoptim", _imported("flashoptim", "FlashAdamW"), **eight),
    ]  # fmt: skip


# What each class needs to train the checks' problems; a class that is missing here takes part with its defaults.
OURS = {
    "sgd": {"options": {"momentum": 0.9}, "torch_class": torch.optim.SGD},
    "adam": {"adam": True, "torch_class": torch.optim.Adam},
    "adamw": {"adam": True, "torch_class": torch.optim.AdamW},
    "lion": {"lr": 1e-3},
    "lars": {"lr": 0.3, "options": {"trust_coefficient": 0.05}, "elementwise": False},
    "lamb": {"options": {"clip_grad_norm": None}, "elementwise": False},
    "adafactor": {"lr": 0.02, "elementwise": False, "momentum": False},
    "microadam": {"elementwise": False},
    "adadelta": {"momentum": False},
    "adagrad": {"momentum": False},
    "innaprop": {"momentum": False},
    "adabound": {"still": False},  # final_lr is in proportion to the group's own first rate
    "madgrad": {"still": False},  # eps is added to the rate
    "novograd": {"elementwise": False},
    "sgd_sai": {"lr": 1e-3, "elementwise": False},
    "tvlars": {"lr": 0.3, "options": {"trust_coefficient": 0.05}, "elementwise": False},
    "mars_adamw": {"elementwise": False},
    "mars_lion": {"lr": 1e-3, "elementwise": False},
    "fadam": {"elementwise": False},
    "adaptive_braking": {"elementwise": False},
    "induced_metric": {"lr": 0.1, "elementwise": False, "joint": True},
    "prodigy": {"lr": 1.0, "options": {"d0": 1e-3}, "elementwise": False, "joint": True},
    "dadapt_adam": {"lr": 1.0, "options": {"d0": 1e-3}, "elementwise": False, "joint": True},
    "dadapt_sgd": {"lr": 1.0, "options": {"d0": 1e-2}, "elementwise": False, "joint": True},
    "dadapt_adagrad": {"lr": 1.0, "options": {"d0": 1e-2}, "elementwise": False, "joint": True},
    "adamp": {"adam": True, "elementwise": False},
    "sgdp": {"options": {"momentum": 0.9}, "elementwise": False},
    "ranger21": {"adam": True, "elementwise": False, "joint": True, "alone": False},
    "adog": {"lr": 1.0, "options": {"reps_rel": 1e-3}, "elementwise": False, "joint": True, "momentum": False},
    "gravity": {"lr": 0.1, "options": {"alpha": 0.0}, "elementwise": False, "momentum": False},
    "adahessian": {"adam": True},
    "oasis": {},
    "dasa": {"lr": 1.0, "elementwise": False, "joint": True, "momentum": False},
    "sania_hessian": {"lr": 0.1, "elementwise": False, "joint": True, "momentum": False},
    "aegd": {"lr": 0.1, "elementwise": False, "momentum": False},
    "sps": {"lr": 1.0, "options": {"max_rate": 0.1}, "elementwise": False, "joint": True, "momentum": False},
    "sania": {"lr": 1.0, "elementwise": False, "joint": True, "momentum": False},
    "upgd": {"options": {"sigma": 0.0}, "elementwise": False, "joint": True, "momentum": False},
    "adaptive_upgd": {"options": {"sigma": 0.0}, "elementwise": False, "joint": True},
    "swats": {"adam": True, "elementwise": False, "joint": True},
    "dog": {"lr": 1.0, "options": {"reps_rel": 1e-3}, "elementwise": False, "joint": True, "momentum": False},
    "trust_region": {"options": {"other_lr": None}},
    "lanton": {"options": {"other_lr": None}},
    "ldog": {"lr": 1.0, "options": {"reps_rel": 1e-3}, "elementwise": False, "momentum": False},
}


def ours() -> list[Subject]:
    """Every class of the registry, and AdamW in 8 bits with stochastic rounding and with a projection. Classes that read the
    loss or the Hessian get what stands for it."""
    found = []
    for name, cls in optimizers().items():
        cls = _with_stand_ins(cls)
        facts = {"to_torch": {"format": "torch"}, **OURS.get(name, {})}
        found.append(Subject(cls.__name__, "fusedopt", _constant(cls), **facts))
    adamw = {**OURS["adamw"], "to_torch": {"format": "torch"}}
    int8 = {"state_format": "int8", "param_precision": "stochastic"}
    galore = {"projection": fusedopt.GaLore(rank=4, update_every=50, scale=1.0, method="svd")}
    found.append(Subject("AdamW, int8 states", "fusedopt", _constant(fusedopt.AdamW), int8, quantized=True, **adamw))
    found.append(
        Subject("AdamW, GaLore", "fusedopt", _constant(fusedopt.AdamW), matrices=galore, adam=True, elementwise=False)
    )
    return found


def _with_stand_ins(cls: type) -> type:
    """A class with a loss and a Hessian of its own where its rule reads one, importable from here as pickle wants it."""
    stand_ins = {}
    if issubclass(cls, TakesLoss):
        stand_ins["_without_loss"] = lambda self: 1.0
    if issubclass(cls, EstimatesHessian):
        stand_ins["_without_estimates"] = _estimate_ones
    if not stand_ins:
        return cls
    return globals().setdefault(cls.__name__, type(cls.__name__, (cls,), {**stand_ins, "__module__": __name__}))


def _estimate_ones(opt, owners: list) -> None:
    for tensor_id, p, group in owners:
        opt.put_estimate(tensor_id, p, group, torch.ones_like(p))


def _constant(cls: type) -> Callable[[], type]:
    return lambda: cls


def all_subjects() -> dict[str, Subject]:
    return {subject.name: subject for subject in (*ours(), *rivals())}
