"""The oracle of every rule and the options it is compared under; parameters, gradients and errors of the comparisons."""

import itertools

import pytest
import torch
from oracles import composed, elementwise, informed, orthogonal, reductions
from oracles.installed import AdaHessian, NAdam, adafactor, either, gravity, lion, package
from oracles.lamb import LAMB
from oracles.lars import LARS

STEPS = 14
SHAPES = ((7, 5), (5,), (3, 4, 2, 2), ())


def combine(**options):
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


ADAM = combine(lr=[0.02], betas=[(0.8, 0.95)], eps=[1e-8, 1e-3], weight_decay=[0.0, 0.1], amsgrad=[False, True],
               maximize=[False, True])  # fmt: skip
SGD = [
    o
    for o in combine(lr=[0.05], momentum=[0.0, 0.9], dampening=[0.0, 0.3], nesterov=[False, True],
                     weight_decay=[0.0, 0.1], maximize=[False, True])
    if not o["nesterov"] or (o["momentum"] and not o["dampening"])
]  # fmt: skip
LION = combine(lr=[0.01], betas=[(0.9, 0.99), (0.6, 0.7)], weight_decay=[0.0, 0.1])
LARS_CASES = [
    {"lr": 0.5, "trust_coefficient": 0.1, **o}
    for o in combine(momentum=[0.0, 0.9], weight_decay=[0.0, 0.1], trust_clip=[False, True], always_adapt=[False, True])
] + [
    {"lr": 0.5, "trust_coefficient": 0.1, "momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3},
    {"lr": 0.5, "trust_coefficient": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    {"lr": 0.5, "trust_coefficient": 0.1, "momentum": 0.9, "weight_decay": 0.1, "eps": 0.1, "maximize": True},
]
LAMB_CASES = [
    {"lr": 0.02, "max_norm": None, **o}
    for o in combine(weight_decay=[0.0, 0.1], bias_correction=[True, False], grad_averaging=[True, False],
                     trust_clip=[False, True], always_adapt=[False, True])
] + [
    {"lr": 0.02, "max_norm": 1.0, "clip_eps": 1e-6},
    {"lr": 0.02, "max_norm": 1e4, "maximize": True, "betas": (0.5, 0.7), "eps": 1e-2},
]  # fmt: skip


CAUTIOUS = {"cautious": [True, "mean", "count"], "weight_decay": [0.0, 0.1], "maximize": [False, True]}


ADAFACTOR_CASES = combine(
    beta1=[None, 0.9], weight_decay=[0.0, 0.1], scale_parameter=[False, True], maximize=[False, True]
)


BETAS = [(0.9, 0.99), (0.6, 0.7)]
DECAYS = {"weight_decay": [0.0, 0.1], "decoupled_weight_decay": [False, True]}


ADAPTIVE = {"lr": [0.02], "betas": BETAS}

# optimizer class -> (oracle, cases)
ORACLES = {
    "adam": (
        either(torch.optim.Adam, elementwise.CautiousAdam),
        ADAM + combine(lr=[0.02], betas=[(0.8, 0.95)], amsgrad=[False, True], **CAUTIOUS),
    ),
    "adamw": (
        either(torch.optim.AdamW, elementwise.CautiousAdamW),
        ADAM + combine(lr=[0.02], betas=[(0.8, 0.95)], amsgrad=[False, True], **CAUTIOUS),
    ),
    "sgd": (torch.optim.SGD, SGD),
    "lion": (either(lion, elementwise.CautiousLion), LION + combine(lr=[0.01], betas=[(0.6, 0.7)], **CAUTIOUS)),
    "lars": (LARS, LARS_CASES),
    "lamb": (LAMB, LAMB_CASES),
    "adafactor": (adafactor, ADAFACTOR_CASES),
    "adagrad": (
        torch.optim.Adagrad,
        combine(
            lr=[0.05],
            lr_decay=[0.0, 0.2],
            initial_accumulator_value=[0.0, 0.3],
            weight_decay=[0.0, 0.1],
            maximize=[False, True],
        ),
    ),
    "adadelta": (
        torch.optim.Adadelta,
        combine(lr=[1.0, 0.3], rho=[0.9, 0.6], eps=[1e-6, 1e-2], weight_decay=[0.0, 0.1], maximize=[False, True]),
    ),
    "rmsprop": (
        torch.optim.RMSprop,
        combine(
            lr=[0.02],
            alpha=[0.9, 0.6],
            eps=[1e-8, 1e-3],
            momentum=[0.0, 0.8],
            centered=[False, True],
            weight_decay=[0.0, 0.1],
        )
        + [{"lr": 0.02, "maximize": True}],
    ),
    "adamax": (
        torch.optim.Adamax,
        combine(**ADAPTIVE, eps=[1e-8, 1e-2], weight_decay=[0.0, 0.1], maximize=[False, True]),
    ),
    "radam": (torch.optim.RAdam, combine(**ADAPTIVE, eps=[1e-8, 1e-3], **DECAYS) + [{"lr": 0.02, "maximize": True}]),
    "nadam": (
        NAdam,
        combine(**ADAPTIVE, eps=[1e-8, 1e-3], momentum_decay=[4e-3, 0.7, 0.0], **DECAYS)
        + [{"lr": 0.02, "maximize": True}],
    ),
    "adabelief": (
        package("AdaBelief"),
        combine(**ADAPTIVE, eps=[1e-16, 1e-6], rectify=[False, True], amsgrad=[False, True], **DECAYS)
        + [{"lr": 0.02, "maximize": True, "rectify": True}],
    ),
    "adamod": (package("AdaMod"), combine(**ADAPTIVE, beta3=[0.9, 0.5], eps=[1e-8, 1e-3], weight_decay=[0.0, 0.1])),
    "yogi": (package("Yogi"), combine(**ADAPTIVE, eps=[1e-3], initial_accumulator=[1e-6, 0.1], **DECAYS)),
    "ademamix": (
        elementwise.AdEMAMix,
        combine(
            lr=[0.02],
            betas=[(0.9, 0.99, 0.999), (0.5, 0.6, 0.95)],
            alpha=[2.0, 5.0],
            weight_decay=[0.0, 0.1],
            beta3_warmup=[None, 9],
            alpha_warmup=[None, 7],
        ),
    ),
    "exadam": (
        elementwise.EXAdam,
        combine(**ADAPTIVE, eps=[1e-8, 1e-3], weight_decay=[0.0, 0.1], dynamic_step=[False, True]),
    ),
    "adabound": (
        elementwise.AdaBound,
        combine(**ADAPTIVE, gamma=[1e-3, 0.3], amsbound=[False, True], base_lr=[None, 0.1], **DECAYS),
    ),
    "diffgrad": (elementwise.DiffGrad, combine(**ADAPTIVE, eps=[1e-8, 1e-2], **DECAYS)),
    "adopt": (elementwise.ADOPT, combine(**ADAPTIVE, eps=[1e-6, 0.1], clip_exponent=[0.25, 0.5, None], **DECAYS)),
    "grams": (
        elementwise.Grams,
        combine(**ADAPTIVE, eps=[1e-6, 1e-2], weight_decay=[0.0, 0.1], maximize=[False, True]),
    ),
    "madgrad": (
        package("MADGRAD"),
        combine(lr=[0.02], momentum=[0.9, 0.0], eps=[1e-6, 0.0], **DECAYS) + [{"lr": 0.02, "maximize": True}],
    ),
    "innaprop": (
        elementwise.INNAprop,
        combine(lr=[0.02, 0.3], alpha=[0.1, 2.0], beta=[0.9, 2.0], sigma=[0.99, 0.6], weight_decay=[0.0, 0.1])
        + [{"lr": 0.02, "weight_decay": 0.1, "maximize": True}],
    ),
    "opt_amsgrad": (
        elementwise.OptAMSGrad,
        combine(**ADAPTIVE, eps=[1e-8, 1e-2], weight_decay=[0.0, 0.1], maximize=[False, True]),
    ),
    "laprop": (
        elementwise.LaProp,
        combine(**ADAPTIVE, eps=[1e-15, 1e-2], weight_decay=[0.0, 0.1], amsgrad=[False, True], maximize=[False, True])
        + combine(**ADAPTIVE, eps=[1e-3], centered=[True], centered_after=[0, 6]),
    ),
    "schedulefree_sgd": (
        elementwise.ScheduleFree,
        combine(lr=[0.3], momentum=[0.9, 0.5], weight_decay=[0.0, 0.1], warmup_steps=[0, 5], weight_lr_power=[2.0, 1.0])
        + [{"lr": 0.3, "maximize": True}],
    ),
    "schedulefree_adamw": (
        elementwise.ScheduleFreeAdamW,
        combine(**ADAPTIVE, eps=[1e-8, 1e-2], weight_decay=[0.0, 0.1], warmup_steps=[0, 5])
        + [{"lr": 0.02, "maximize": True}],
    ),
    "novograd": (
        reductions.NovoGrad,
        combine(**ADAPTIVE, eps=[1e-8, 0.1], weight_decay=[0.0, 0.1], grad_averaging=[False, True]),
    ),
    "sgd_sai": (reductions.SGDSaI, combine(lr=[0.02], momentum=[0.9, 0.5], eps=[1e-8, 0.1], weight_decay=[0.0, 0.1])),
    "tvlars": (
        reductions.TVLARS,
        combine(
            lr=[0.5],
            trust_coefficient=[0.1],
            weight_decay=[0.0, 0.1],
            delay=[0, 4],
            gamma_min=[0.0, 0.2],
            decay_rate=[0.3],
        ),
    ),
    "mars_adamw": (
        reductions.MARSAdamW,
        combine(
            lr=[0.02],
            betas=BETAS,
            gamma=[0.025, 0.3],
            eps=[1e-8, 1e-3],
            weight_decay=[0.0, 0.1],
            maximize=[False, True],
        ),
    ),
    "mars_lion": (
        reductions.MARSLion,
        combine(
            lr=[0.02],
            betas=[(0.9, 0.99), (0.95, 0.9)],
            gamma=[0.025, 0.3],
            weight_decay=[0.0, 0.1],
            maximize=[False, True],
        ),
    ),
    "fadam": (
        reductions.FAdam,
        combine(**ADAPTIVE, eps=[1e-8, 1e-2], weight_decay=[0.0, 0.1], clip=[1.0, 0.3]),
    ),
    "prodigy": (
        reductions.Prodigy,
        combine(
            lr=[1.0, 0.5], betas=[(0.9, 0.99), (0.6, 0.8)], d0=[1e-2, 1e-6], bias_correction=[False, True], **DECAYS
        )
        + [
            {"lr": 0.7, "d0": 1e-3, "beta3": 0.8, "safeguard_warmup": True, "maximize": True},
            {"d0": 1e-3, "lr": 1.0, "growth_rate": 1.05, "d_coef": 2.0, "eps": 1e-2},
        ],
    ),
    "dadapt_adam": (
        reductions.DAdaptAdam,
        combine(
            lr=[1.0, 0.5], betas=[(0.9, 0.99), (0.6, 0.8)], d0=[1e-2, 1e-6], bias_correction=[False, True], **DECAYS
        )
        + [{"d0": 1e-3, "lr": 1.0, "growth_rate": 1.05, "eps": 1e-2, "maximize": True}],
    ),
    "dog": (
        reductions.DoG,
        combine(lr=[1.0, 0.5], reps_rel=[1e-2, 1e-6], eps=[1e-8, 1.0], weight_decay=[0.0, 0.1], maximize=[False, True]),
    ),
    "ldog": (
        reductions.LDoG,
        combine(lr=[1.0, 0.5], reps_rel=[1e-2, 1e-6], eps=[1e-8, 1.0], weight_decay=[0.0, 0.1], maximize=[False, True]),
    ),
    **orthogonal.CASES,
    "adam_cm": (
        reductions.AdamCM,
        combine(
            lr=[0.02],
            betas=[(0.8, 0.95)],
            eps=[1e-8, 1e-2],
            weight_decay=[0.0, 0.1],
            capacity=[5, 2],
            decay=[0.7, 1.0],
            maximize=[False, True],
        ),
    ),
    "adaptive_braking": (
        reductions.AdaptiveBraking,
        combine(lr=[0.05], momentum=[0.9, 0.5], rho=[0.7, 2.0], weight_decay=[0.0, 0.1], maximize=[False, True]),
    ),
    "induced_metric": (
        reductions.InducedMetric,
        combine(
            lr=[0.1], momentum=[0.9, 0.5], xi=[0.1, 1e-3], beta=[0.8, 0.3], weight_decay=[0.0, 0.1], rms=[False, True]
        )
        + [{"lr": 0.1, "rms": True, "alpha": 0.7, "eps": 1e-2, "maximize": True}]
        + combine(lr=[0.1], momentum=[0.9, 0.5], xi=[0.1, 1e-3], beta=[0.8], weight_decay=[0.0, 0.1], log=[True])
        + [{"lr": 0.1, "log": True, "maximize": True}],
    ),
    "swats": (
        reductions.SWATS,
        combine(lr=[0.02], betas=BETAS, eps=[1e-3], switch_tolerance=[1e-2, 1e-9], per_tensor=[False, True], **DECAYS),
    ),
    "rmsprop_tf": (
        elementwise.RMSpropTF,
        combine(
            lr=[0.02],
            alpha=[0.9, 0.6],
            eps=[1e-10, 1e-3],
            momentum=[0.0, 0.8],
            centered=[False, True],
            weight_decay=[0.0, 0.1],
            lr_in_momentum=[True, False],
        ),
    ),
    "adamp": (
        composed.AdamP,
        combine(lr=[0.02], betas=BETAS, delta=[0.1, 3.0, 30.0], weight_decay=[0.0, 0.1], nesterov=[False, True])
        + [{"lr": 0.02, "delta": 3.0, "wd_ratio": 0.0, "weight_decay": 0.1, "eps": 1e-2, "maximize": True}],
    ),
    "sgdp": (
        composed.SGDP,
        combine(
            lr=[0.005], momentum=[0.9, 0.0], delta=[0.1, 3.0, 30.0], weight_decay=[0.0, 0.1], maximize=[False, True]
        )
        + combine(lr=[0.005], momentum=[0.9], delta=[3.0], weight_decay=[0.1], dampening=[0.3], wd_ratio=[1.0, 0.5])
        + [{"lr": 0.005, "momentum": 0.9, "delta": 3.0, "weight_decay": 0.1, "nesterov": True}],
    ),
    "fed_adam": (
        elementwise.FedAdam,
        combine(**ADAPTIVE, tau=[1e-3, 0.1], weight_decay=[0.0, 0.1], maximize=[False, True]),
    ),
    "fed_yogi": (
        elementwise.FedYogi,
        combine(**ADAPTIVE, tau=[1e-3, 0.1], weight_decay=[0.0, 0.1], maximize=[False, True]),
    ),
    "fed_adagrad": (
        elementwise.FedAdagrad,
        combine(lr=[0.02], beta1=[0.0, 0.9], tau=[1e-3, 0.1], weight_decay=[0.0, 0.1], maximize=[False, True]),
    ),
    "dadapt_sgd": (
        reductions.DAdaptSGD,
        combine(lr=[1.0, 0.5], momentum=[0.9, 0.0], d0=[0.1, 1e-2], weight_decay=[0.0, 0.1], maximize=[False, True])
        + [{"d0": 1e-2, "lr": 1.0, "growth_rate": 1.05}],
    ),
    "dadapt_adagrad": (
        reductions.DAdaptAdaGrad,
        combine(lr=[1.0, 0.5], momentum=[0.9, 0.0], d0=[0.1, 1e-2], weight_decay=[0.0, 0.1], maximize=[False, True])
        + [{"d0": 1e-3, "lr": 1.0, "growth_rate": 1.05, "eps": 1e-2, "initial_accumulator_value": 0.0}],
    ),
    "adog": (
        reductions.ADoG,
        combine(
            lr=[1.0, 0.5],
            reps_rel=[1e-2, 1e-3],
            eps=[1e-8, 1.0],
            coefficient=[1.0, 0.3],
            weight_decay=[0.0, 0.1],
            maximize=[False, True],
        ),
    ),
    "adahessian": (
        AdaHessian,
        combine(
            **ADAPTIVE,
            eps=[1e-4, 1e-2],
            spatial_averaging=[False, True],
            weight_decay=[0.0, 0.1],
            maximize=[False, True],
        ),
    ),
    "ranger21": (
        composed.Ranger21,
        combine(lr=[0.02], betas=BETAS, weight_decay=[0.0, 0.1], norm_loss=[1e-4, 0.1], maximize=[False, True])
        + [
            {"lr": 0.02, "weight_decay": 0.1, **one}
            for one in (
                {"pnm": None},
                {"pnm": 0.3},
                {"amsgrad": False},
                {"softplus": None},
                {"softplus": 2.0, "eps": 1e-2},
                {"clip": None},
                {"centralize": False},
                {"normalize": False},
                {"stable_decay": False},
                {"norm_loss": None},
                {"lookahead": None},
                {"lookahead": 2, "lookahead_alpha": 0.8},
            )
        ],
    ),
    "oasis": (
        informed.OASIS,
        combine(**ADAPTIVE, truncation=[0.01, 0.7], weight_decay=[0.0, 0.1], maximize=[False, True]),
    ),
    "dasa": (
        informed.DASA,
        combine(
            lr=[1.0, 0.5],
            initial_rate=[0.01, 0.2],
            truncation=[0.01, 0.7],
            weight_decay=[0.0, 0.1],
            maximize=[False, True],
        ),
    ),
    "sania_hessian": (
        informed.SANIAHessian,
        combine(lr=[1.0, 0.5], eps=[0.1, 2.0], lower_bound=[0.0, 0.3], weight_decay=[0.0, 0.1])
        + [{"lr": 1.0, "maximize": True, "lower_bound": -10.0}],
    ),
    "aegd": (
        informed.AEGD,
        combine(
            lr=[0.1, 0.01],
            shift=[1.0, 20.0],
            momentum=[0.0, 0.9],
            weight_decay=[0.0, 0.1],
            decoupled_weight_decay=[False, True],
        )
        + [
            {"lr": 0.1, "shift": 50.0, "decoupled_weight_decay": False, "maximize": True, "momentum": m}
            for m in (0.0, 0.5)
        ],
    ),
    "sps": (
        informed.SPS,
        combine(lr=[1.0, 0.5], scale=[0.5, 0.2], max_rate=[1.0, 1e-4], lower_bound=[0.0, 0.1], weight_decay=[0.0, 0.1])
        + [{"lr": 1.0, "maximize": True, "lower_bound": -10.0}],
    ),
    "sania": (
        informed.SANIA,
        combine(
            lr=[1.0, 0.5],
            preconditioner=["adam", "adagrad"],
            eps=[0.1, 2.0],
            sqrt=[False, True],
            beta2=[0.99],
            lower_bound=[0.0, 0.3],
            weight_decay=[0.0, 0.1],
        )
        + [{"lr": 1.0, "maximize": True, "lower_bound": -10.0}],
    ),
    "gravity": (
        gravity,
        combine(lr=[0.1, 0.02], beta=[0.9, 0.5], alpha=[0.0], maximize=[False, True])
        + [{"lr": 0.1, "alpha": 0.0, "weight_decay": 0.1}],
    ),
    "upgd": (
        informed.UPGD,
        combine(
            lr=[0.05],
            beta_utility=[0.9, 0.0],
            sigma=[0.0],
            protecting=[True, False],
            weight_decay=[0.0, 0.1],
            maximize=[False, True],
        ),
    ),
    "adaptive_upgd": (
        informed.AdaptiveUPGD,
        combine(
            **ADAPTIVE,
            eps=[1e-5],
            beta_utility=[0.9, 0.0],
            sigma=[0.0],
            weight_decay=[0.0, 0.1],
            maximize=[False, True],
        ),
    ),
    "adamomentum": (elementwise.AdaMomentum, combine(**ADAPTIVE, eps=[1e-8, 1e-2], weight_decay=[0.0, 0.1])),
}
CASES = [
    pytest.param(name, oracle, options, id=f"{name}-{i}")
    for name, (oracle, cases) in ORACLES.items()
    for i, options in enumerate(cases)
]


def ours(name: str, options: dict) -> dict:
    """An oracle's options under this package's names."""
    if name != "lamb":
        return options
    renamed = {k: v for k, v in options.items() if k not in ("max_norm", "clip_eps")}
    return {**renamed, "clip_grad_norm": options["max_norm"]}


def make_params() -> list[torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(s, generator=gen, dtype=torch.float64)) for s in SHAPES]
    params.append(torch.nn.Parameter(torch.zeros(6, dtype=torch.float64)))  # a zero norm at the first step
    return params


def set_grads(params, step: int) -> None:
    """Gradients that depend on the parameters, so that errors feed back; one tensor's gradient vanishes at step 4."""
    gen = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        noise = torch.randn(p.shape, generator=gen, dtype=torch.float64)
        p.grad = (0.3 * p.detach() + noise) * (10.0 ** (i - 2))
        if step == 4 and i == 1:
            p.grad.zero_()


def relative_error(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())
