"""Every rule's reference in float64 against an independent one: torch.optim, lion_pytorch, or the papers' equations."""

import itertools

import lion_pytorch
import pytest
import pytorch_optimizer
import torch
from harness import hyper
from oracles import elementwise, reductions
from oracles.adafactor import Adafactor as TensorAdafactor
from oracles.lamb import LAMB
from oracles.lars import LARS

import fusedopt
from fusedopt.conversion import Conversion, convert
from fusedopt.rule import get_rule, list_rules, optimizers
from fusedopt.rules import nadam

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


def lion(params, **options):
    return lion_pytorch.Lion(params, **options)


def either(plain, cautious):
    """The oracle of a class whose updates may be masked."""

    def make(params, **options):
        return (cautious if options.get("cautious") else plain)(params, **options)

    return make


CAUTIOUS = {"cautious": [True, "mean", "count"], "weight_decay": [0.0, 0.1], "maximize": [False, True]}


class adafactor:
    """The transcription of one tensor, over several."""

    def __init__(self, params, beta1=None, maximize=False, **options):
        self.params, self.sign = params, -1 if maximize else 1
        self.each = [TensorAdafactor(momentum=beta1, **options) for _ in params]

    @torch.no_grad()
    def step(self):
        for p, one in zip(self.params, self.each, strict=True):
            one.step(p, self.sign * p.grad)


ADAFACTOR_CASES = combine(
    beta1=[None, 0.9], weight_decay=[0.0, 0.1], scale_parameter=[False, True], maximize=[False, True]
)


BETAS = [(0.9, 0.99), (0.6, 0.7)]
DECAYS = {"weight_decay": [0.0, 0.1], "decoupled_weight_decay": [False, True]}


def package(name: str, **fixed):
    """A class of pytorch_optimizer with options under our names."""

    def make(params, maximize=False, decoupled_weight_decay=True, amsgrad=False, **options):
        names = {"beta3": None, "amsgrad": "ams_bound"}
        if "beta3" in options:
            options["betas"] = (*options["betas"], options.pop("beta3"))
        if amsgrad:
            options[names["amsgrad"]] = True
        extra = {"weight_decouple": decoupled_weight_decay, "maximize": maximize, "foreach": False, **fixed}
        return getattr(pytorch_optimizer, name)(params, **options, **extra)

    return make


class NAdam(torch.optim.NAdam):
    """torch keeps the product of mu in the default dtype."""

    def step(self):
        torch.set_default_dtype(torch.float64)
        try:
            super().step()
        finally:
            torch.set_default_dtype(torch.float32)


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
    "adaptive_braking": (
        reductions.AdaptiveBraking,
        combine(lr=[0.05], momentum=[0.9, 0.5], rho=[0.7, 2.0], weight_decay=[0.0, 0.1], maximize=[False, True]),
    ),
    "induced_metric": (
        reductions.InducedMetric,
        combine(
            lr=[0.1], momentum=[0.9, 0.5], xi=[0.1, 1e-3], beta=[0.8, 0.3], weight_decay=[0.0, 0.1], rms=[False, True]
        )
        + [{"lr": 0.1, "rms": True, "alpha": 0.7, "eps": 1e-2, "maximize": True}],
    ),
    "swats": (
        reductions.SWATS,
        combine(lr=[0.02], betas=BETAS, eps=[1e-3], switch_tolerance=[1e-2, 1e-9], per_tensor=[False, True], **DECAYS),
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


@pytest.mark.parametrize("name, oracle, options", CASES)
def test_reference_matches_oracle(name, oracle, options):
    mine, theirs = make_params(), make_params()
    start = [p.detach().clone() for p in mine]
    opt = optimizers()[name](mine, backend="reference", **ours(name, options))
    other = oracle(theirs, **options)
    for step in range(STEPS):
        set_grads(mine, step)
        set_grads(theirs, step)
        opt.step()
        other.step()
    for i, (a, b, p0) in enumerate(zip(mine, theirs, start, strict=True)):
        moved = (b.detach() - p0).abs().max()
        assert moved > 0, "the oracle did not move"
        assert relative_error(a.detach() - p0, b.detach() - p0) <= 1e-9, f"tensor {i}"


@pytest.mark.parametrize(
    "name, oracle, options",
    [c for c in CASES if c.values[0] in ("adam", "adamw", "sgd") and not c.values[2].get("cautious")],
)
def test_states_match_torch(name, oracle, options):
    mine, theirs = make_params(), make_params()
    opt, other = optimizers()[name](mine, backend="reference", **options), oracle(theirs, **options)
    for step in range(STEPS):
        set_grads(mine, step)
        set_grads(theirs, step)
        opt.step()
        other.step()
    for a, b in zip(mine, theirs, strict=True):
        for key, value in other.state[b].items():
            if value is None:
                continue
            mine_value = opt.state[a][key]
            torch.testing.assert_close(mine_value.double(), value.double(), rtol=1e-9, atol=1e-12, msg=key)


LONG = {
    "nadam": {"lr": 0.01, "weight_decay": 0.1},
    "madgrad": {"lr": 0.01},
    "innaprop": {"lr": 0.01, "weight_decay": 0.1},
    "opt_amsgrad": {"lr": 0.01},
    "schedulefree_sgd": {"lr": 0.3, "warmup_steps": 20},
    "schedulefree_adamw": {"lr": 0.01, "weight_decay": 0.1, "warmup_steps": 20},
    "laprop": {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-8},
    "adamw": {"lr": 0.01, "weight_decay": 0.1, "cautious": True},
}


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("name", LONG)
def test_two_hundred_steps_in_fp32(name, capturable):
    """Native steps of fp32 parameters, with step counts on the host and on the device, against the oracle in fp64."""
    theirs = make_params()
    mine = [torch.nn.Parameter(p.detach().float()) for p in theirs]
    opt = optimizers()[name](mine, **LONG[name], capturable=capturable)
    other = ORACLES[name][0](theirs, **LONG[name])
    with torch.no_grad():
        for p, q in zip(theirs, mine, strict=True):
            p.copy_(q)
    start = [p.detach().clone() for p in theirs]
    gen = torch.Generator().manual_seed(5)
    for _ in range(200):
        for p, q in zip(theirs, mine, strict=True):
            q.grad = torch.randn(p.shape, generator=gen) + 0.5
            p.grad = q.grad.double()
        opt.step()
        other.step()
    for p, q, p0 in zip(theirs, mine, start, strict=True):
        assert relative_error(q.detach().double() - p0, p.detach() - p0) <= 1e-5


def test_every_rule_has_an_oracle():
    """Fails for a registered rule or class that no case above steps."""
    stepped = set()
    for name, (_, cases) in ORACLES.items():
        cls = optimizers()[name]
        for options in cases:
            opt = cls([torch.nn.Parameter(torch.zeros(1))], **ours(name, options))
            stepped.add(cls.rule_for(opt.param_groups[0]).name)
    assert set(list_rules()) <= stepped, "add a case to ORACLES for each rule"
    assert set(optimizers()) - {"microadam"} == set(ORACLES), "add each optimizer class to ORACLES"


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_transcription_matches_timm(name):
    """The transcriptions themselves, against an implementation written by others."""
    timm = pytest.importorskip(f"timm.optim.{name}", exc_type=ImportError)
    if name == "lars":
        names = {"trust_coefficient": "trust_coeff"}
        cases = [o for o in LARS_CASES if not o.get("maximize")]
        pairs = [(LARS, timm.Lars, o, {names.get(k, k): v for k, v in o.items()}) for o in cases]
    else:
        pairs = []
        for o in LAMB_CASES:
            if o.get("maximize") or o.get("clip_eps"):
                continue
            kept = {k: v for k, v in o.items() if k != "max_norm"}
            pairs.append((LAMB, timm.Lamb, o, {**kept, "max_grad_norm": o["max_norm"]}))
        pairs.append((LAMB, timm.Lamb, {"lr": 0.02}, {"lr": 0.02, "max_grad_norm": 1.0}))
    for transcription, package, options, theirs in pairs:
        a, b = make_params(), make_params()
        one, two = transcription(a, **options), package(b, **theirs)
        for step in range(STEPS):
            set_grads(a, step)
            set_grads(b, step)
            one.step()
            two.step()
        for x, y in zip(a, b, strict=True):
            assert relative_error(x.detach(), y.detach()) <= 1e-9, options


@pytest.mark.parametrize(
    "name, form, theirs",
    [("AdamW", "mean", "timm"), ("Lion", "mean", "timm"), ("Lion", "count", "pytorch_optimizer")],
)
def test_cautious_matches_packages(name, form, theirs):
    """timm takes the mean for every rule, pytorch_optimizer the count."""
    common = {"lr": 0.02, "weight_decay": 0.1}
    a, b = make_params(), make_params()
    if theirs == "timm":
        module = pytest.importorskip(f"timm.optim.{name.lower()}", exc_type=ImportError)
        two = getattr(module, "AdamWLegacy" if name == "AdamW" else name)(b, caution=True, **common)
    else:
        two = package(name)(b, cautious=True, **common)
    one = getattr(fusedopt, name)(a, cautious=form, **common)
    for step in range(STEPS):
        set_grads(a, step)
        set_grads(b, step)
        one.step()
        two.step()
    for x, y in zip(a, b, strict=True):
        assert relative_error(x.detach(), y.detach()) <= 1e-6


def test_cautious_lets_nothing_against_the_gradient_pass():
    p = torch.nn.Parameter(torch.zeros(4))
    opt = fusedopt.AdamW([p], lr=0.1, weight_decay=0.0, cautious=True)
    for g in ([1.0, 1.0, 1.0, 0.0], [1.0, -1e-3, 1.0, 0.0]):
        before = p.detach().clone()
        p.grad = torch.tensor(g)
        opt.step()
    assert (p.detach() == before).tolist() == [False, True, False, True]
    assert (before - p.detach())[0] == pytest.approx(0.1 * 4 / 2, rel=1e-5)  # two of four elements move
    with pytest.raises(ValueError, match="cautious value: 'half'; it is False, True, 'mean' or 'count'"):
        fusedopt.Lion([p], cautious="half")
    with pytest.raises(ValueError, match="AdamW: .* takes no projection"):
        fusedopt.AdamW([p], cautious=True, projection=fusedopt.GaLore(rank=4))


SCHEDULE_FREE = [("schedulefree_sgd", "ScheduleFreeSGD"), ("schedulefree_adamw", "ScheduleFreeAdamW")]


@pytest.mark.parametrize("name, theirs", SCHEDULE_FREE)
def test_schedule_free_matches_package(name, theirs):
    """Both points of the parameter, in training and in evaluation; the package adds 1e-15 to v, and rounds it in its square."""
    mine, others = make_params(), make_params()
    options = {"lr": 0.02, "weight_decay": 0.1, "warmup_steps": 4}
    opt, other = optimizers()[name](mine, backend="reference", **options), package(theirs)(others, **options)
    for step in range(12):
        if step in (3, 11):
            for o in (opt, other):
                o.eval()
            for a, b in zip(mine, others, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
            for o in (opt, other):
                o.train()
        set_grads(mine, step)
        set_grads(others, step)
        opt.step()
        other.step()
    for a, b in zip(mine, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["schedulefree_sgd", "schedulefree_adamw"])
def test_schedule_free_evaluates_at_the_average(name):
    mine, theirs = make_params(), make_params()
    options = {"lr": 0.02, "weight_decay": 0.1, "warmup_steps": 3}
    opt, other = optimizers()[name](mine, backend="reference", **options), ORACLES[name][0](theirs, **options)
    for step in range(STEPS):
        set_grads(mine, step)
        set_grads(theirs, step)
        opt.step()
        other.step()
    opt.eval()
    for a, state in zip(mine, other.states, strict=True):
        assert relative_error(a.detach(), state["x"]) <= 1e-12
    set_grads(mine, 0)
    with pytest.raises(RuntimeError, match=r"optimizer.train\(\) before"):
        opt.step()


@pytest.mark.parametrize("name, theirs", [("ademamix", "AdEMAMix"), ("exadam", "EXAdam"), ("novograd", "NovoGrad")])
def test_transcription_matches_package(name, theirs):
    """Where both exist: without schedules and averaging, which the package has in another form or not at all."""
    options = {"alpha": 5.0, "betas": (0.9, 0.99, 0.999)} if name == "ademamix" else {}
    a, b = make_params(), make_params()
    one = ORACLES[name][0](a, lr=0.02, weight_decay=0.1, **options)
    two = package(theirs, weight_decouple=name != "novograd")(b, lr=0.02, weight_decay=0.1, **options)
    for step in range(STEPS):
        set_grads(a, step)
        set_grads(b, step)
        one.step()
        two.step()
    for x, y in zip(a, b, strict=True):
        assert relative_error(x.detach(), y.detach()) <= 1e-9


@pytest.mark.parametrize("momentum_decay", [0.0, 1e-6, 4e-3, 0.5, 50.0])
@pytest.mark.parametrize("on_device", [False, True])
def test_nadam_product_in_closed_form(momentum_decay, on_device):
    h = {"betas": (0.999, 0.99), "momentum_decay": momentum_decay}
    product = 1.0
    for step in range(1, 2001):
        product *= 0.999 * (1 - 0.5 * 0.96 ** (step * momentum_decay))
        if step in (1, 2, 10, 300, 2000):
            count = torch.tensor(float(step), dtype=torch.float64) if on_device else step
            assert float(nadam.mu_product(h, count)) == pytest.approx(product, rel=1e-11, abs=1e-300)


def test_nadam_product_goes_to_torch_and_is_read_over():
    """mu_product is computed for torch's state dict, also by convert, and those of torch load without it."""
    mine, theirs = make_params(), make_params()
    opt, other = fusedopt.NAdam(mine, backend="reference"), torch.optim.NAdam(theirs)
    for step in range(5):
        set_grads(mine, step)
        set_grads(theirs, step)
        opt.step()
        other.step()
    exported = opt.state_dict(format="torch")
    converted = Conversion(opt.state_dict(), "fp32", to="torch").result()
    for index, entry in other.state_dict()["state"].items():
        for made in (exported, converted):
            assert made["state"][index].keys() == entry.keys()
            torch.testing.assert_close(made["state"][index]["mu_product"], entry["mu_product"], rtol=1e-6, atol=0)
    native = convert(other.state_dict(), "int8", min_quantized_numel=0)
    assert "mu_product" not in native["state"][0]
    opt.load_state_dict(native)
    other.load_state_dict(exported)


def test_lion_sign_of_zero_is_zero():
    """lion_pytorch takes sign_, for which sign(0) = 0: a parameter without gradient signal does not move."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = fusedopt.Lion([p], lr=0.1, backend="reference")
    p.grad = torch.tensor([0.0, -1e-300, 2.0], dtype=torch.float64)
    opt.step()
    assert p.tolist() == [1.0, 1.1, 0.9]


@pytest.mark.parametrize("rule", list_rules())
def test_reference_keeps_its_arguments(rule):
    """A reference body returns new tensors; drivers that probe (LAMB) call it twice with the same states."""
    declared = get_rule(rule)
    h = hyper(rule)
    args = [torch.rand(9) + 0.5 for _ in range(2 + len(declared.states))]
    before = [a.clone() for a in args]
    declared.reference(*args, **declared.named_scalars(h, 3))
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
