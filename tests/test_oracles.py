"""Every rule's reference in float64 against an independent one: torch.optim, lion_pytorch, or the papers' equations."""

import pytest
import torch
from harness import hyper
from oracle_cases import (
    CASES,
    LAMB_CASES,
    LARS_CASES,
    ORACLES,
    STEPS,
    make_params,
    ours,
    package,
    relative_error,
    set_grads,
)
from oracles.lamb import LAMB
from oracles.lars import LARS

import fusedopt
from fusedopt.conversion import Conversion, convert
from fusedopt.rule import get_rule, list_rules, optimizers
from fusedopt.rules import nadam


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
    "adamp": {"lr": 0.01, "weight_decay": 0.1, "delta": 1.0, "nesterov": True},
    "sgdp": {"lr": 0.001, "momentum": 0.9, "weight_decay": 0.1, "delta": 1.0},
    "fed_adam": {"lr": 0.01},
    "fed_yogi": {"lr": 0.01},
    "fed_adagrad": {"lr": 0.05, "beta1": 0.9},  # at 0.01 weights move so little that their own rounding is 1e-5 of it
    "rmsprop_tf": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1},
    "adahessian": {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.1},
    "oasis": {"lr": 0.003, "truncation": 0.1, "weight_decay": 0.1},
    # the rule alone; with its components: test_ranger21
    "ranger21": {
        "lr": 0.01,
        "weight_decay": 0.1,
        "clip": None,
        "centralize": False,
        "normalize": False,
        "stable_decay": False,
        "norm_loss": None,
        "lookahead": None,
    },
}


def long_cases() -> dict[str, tuple[str, dict]]:
    """By rule: a class and its options; those of LONG, then the first case with decay of every other rule. Rules with numbers of
    whole tensors: test_measures."""
    found = {}
    cases = [(name, options) for name, (_, cases) in ORACLES.items() for options in cases]
    cases.sort(key=lambda case: not case[1].get("weight_decay"))
    for name, options in (*LONG.items(), *cases):
        opt = optimizers()[name]([torch.nn.Parameter(torch.zeros(1))], **ours(name, options))
        rule = opt.rule_for(opt.param_groups[0])
        if rule.measures is None and not rule.internal and not opt.needs_shapes and not options.get("maximize"):
            found.setdefault(rule.name, (name, options))
    return found


LONG_CASES = long_cases()


def test_every_rule_takes_two_hundred_steps():
    assert {name for name in list_rules() if get_rule(name).measures is None} <= LONG_CASES.keys()


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("rule", LONG_CASES)
def test_two_hundred_steps_in_fp32(rule, capturable):
    """Native steps of fp32 parameters, with step counts on the host and on the device, against the oracle in fp64."""
    name, options = LONG_CASES[rule]
    theirs = make_params()
    mine = [torch.nn.Parameter(p.detach().float()) for p in theirs]
    opt = optimizers()[name](mine, **ours(name, options), capturable=capturable)
    other = ORACLES[name][0](theirs, **options)
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


@pytest.mark.parametrize("name", ["lars", "lamb", "adamp", "rmsprop_tf"])
def test_transcription_matches_timm(name):
    """The transcriptions themselves, against an implementation written by others."""
    timm = pytest.importorskip(f"timm.optim.{name}", exc_type=ImportError)
    if name == "lars":
        names = {"trust_coefficient": "trust_coeff"}
        cases = [o for o in LARS_CASES if not o.get("maximize")]
        pairs = [(LARS, timm.Lars, o, {names.get(k, k): v for k, v in o.items()}) for o in cases]
    elif name != "lamb":
        cls = timm.AdamP if name == "adamp" else timm.RMSpropTF
        transcription, cases = ORACLES[name]
        pairs = [(transcription, cls, o, o) for o in cases if not o.get("maximize")]
    else:
        pairs = []
        for o in LAMB_CASES:
            if o.get("maximize") or o.get("clip_eps"):
                continue
            kept = {k: v for k, v in o.items() if k != "max_norm"}
            pairs.append((LAMB, timm.Lamb, o, {**kept, "max_grad_norm": o["max_norm"]}))
        pairs.append((LAMB, timm.Lamb, {"lr": 0.02}, {"lr": 0.02, "max_grad_norm": 1.0}))
    for transcription, cls, options, theirs in pairs:
        a, b = make_params(), make_params()
        one, two = transcription(a, **options), cls(b, **theirs)
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
    args = [torch.rand(9) + 0.5 for _ in range(2 + declared.noise + len(declared.states))]
    before = [a.clone() for a in args]
    declared.reference(*args, **declared.named_scalars(h, 3))
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
