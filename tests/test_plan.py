"""The plan: what shares a launch, when it is rebuilt, which backend it takes and why, and what explain() says."""

import logging
import math

import pytest
import torch
from configs import BACKENDS, CONFIGS, each_config, parameters, set_grads, train
from torch import nn

import fusedopt
from fusedopt import optimizer as optimizer_module
from fusedopt.abi import Phase
from fusedopt.backends import select
from fusedopt.factory import SUFFIXES, create
from fusedopt.formats import get_format, list_formats
from fusedopt.precision import get_precision, list_precisions
from fusedopt.rule import optimizers


class Spy:
    """A native backend that steps nothing and keeps what it was asked to launch."""

    name = "cpu"

    def __init__(self):
        self.phases: list[Phase] = []
        self.works = []

    def supports(self, key):
        return None

    def units(self, device):
        return 4

    def launch(self, work):
        self.phases.append(work.phase)
        self.works.append(work)


@pytest.fixture
def spy(monkeypatch):
    spy, real = Spy(), select.get_backend
    monkeypatch.setattr(select, "get_backend", lambda name: spy if name == "cpu" else real(name))
    return spy


def many_tensors(count=291, dtype=torch.bfloat16):
    """Shapes of a decoder: matrices and norms."""
    return [torch.nn.Parameter(torch.zeros((96, 64) if i % 3 else (64,), dtype=dtype)) for i in range(count)]


def two_groups(params):
    return [{"params": params[::2], "lr": 0.1, "weight_decay": 0.0}, {"params": params[1::2]}]


EXPECTED = {
    "lars": [Phase.NORM, Phase.FUSED],
    "lamb": [Phase.PROBE, Phase.APPLY],
    "adamw_cautious": [Phase.PROBE, Phase.FUSED],
}


@each_config()
@pytest.mark.parametrize("clip", [None, 1.0])
def test_launches_of_a_large_model(config, clip, spy):
    """291 tensors in two groups: one launch (two where the rule needs norms), and one more for clipping."""
    params = many_tensors()
    set_grads(params, 0)
    opt = config.make(two_groups(params), clip_grad_norm=clip)
    opt.step()
    expected = EXPECTED.get(config.name, EXPECTED.get(config.optimizer, [Phase.FUSED]))
    if clip and Phase.NORM not in expected:
        expected = [Phase.NORM, *expected]
    assert spy.phases == expected
    report = opt.plan()
    assert report.launches == len(expected) and len(report.buckets) == 1
    assert report.buckets[0]["tensors"] == 291 and report.buckets[0]["phases"] == [p.name.lower() for p in expected]
    own = opt.rule_for(opt.param_groups[0]).measures is not None  # numbers of whole tensors stand in rows of their own
    assert len(spy.works[0].numbers) == 2 + 291 * own, "one scalar row a group"


def test_what_splits_a_bucket(spy):
    params = [
        *many_tensors(4),
        *parameters((3,), dtype=torch.float16),
        *parameters((3,), dtype=torch.float32),
        nn.Parameter(torch.zeros(9, dtype=torch.bfloat16)[1:]),
    ]
    set_grads(params, 0)
    opt = fusedopt.AdamW(params, state_format="int8")
    opt.step()
    found = {(b["param_dtype"], tuple(b["formats"].values()), b["aligned"]): b["tensors"] for b in opt.plan().buckets}
    assert found == {
        ("bfloat16", ("fp32", "fp32"), True): 2,
        ("bfloat16", ("int8", "int8"), True): 2,
        ("float16", ("fp32", "fp32"), True): 1,
        ("float32", ("fp32", "fp32"), True): 1,
        ("bfloat16", ("fp32", "fp32"), False): 1,
    }


@each_config()
def test_bytes_per_step(config, spy):
    """Every stream once per read and write: the table of physical limits."""
    (p,) = params = [torch.nn.Parameter(torch.zeros(256 * 100, dtype=torch.bfloat16))]
    set_grads(params, 0)
    opt = config.make(params, state_format="int8", clip_grad_norm=None)
    declared = config.cls.rule_for(opt.param_groups[0]).states
    states = sum(4 / (1 + 4 / 256) if s.wide else 1 for s in declared)  # in states of int8
    state = 1 + 4 / 256
    per_element = {
        "lars": 6 + 4 + 2 * states * state,  # the norms read p and g once more
        "lamb": 6 + 4 + 3 * states * state,  # the probe reads everything once more
        "adamw_cautious": 6 + 4 + 3 * states * state,
    }
    per_element = per_element.get(config.name, per_element.get(config.optimizer, 6 + 2 * states * state))
    assert opt.plan().bytes == pytest.approx(p.numel() * per_element)


M, N, RANK = 32, 256, 8  # of a wide bf16 matrix: R is [8, 256], P [32, 8]
LOW, BASIS = 2 * RANK * N, 2 * RANK * M  # bytes in bf16
WEIGHTS, GRAD = 4 * M * N, 2 * M * N
FIRST = {"projection": GRAD + BASIS + LOW}
TRAFFIC = {
    "galore": (fusedopt.GaLore(RANK), {}, {**FIRST, "update": WEIGHTS + BASIS + LOW}),
    "split24": (
        fusedopt.GaLore(RANK),
        {"param_precision": "split24"},
        {**FIRST, "update": WEIGHTS + 2 * M * N + BASIS + LOW},
    ),
    "master": (
        fusedopt.GaLore(RANK),
        {"param_precision": "master"},
        {**FIRST, "update": (4 + 4 + 2) * M * N + BASIS + LOW},
    ),
    "packed": (
        fusedopt.QGaLore(RANK),
        {},
        {"projection": GRAD + RANK * M // 2 + 5 + LOW, "update": WEIGHTS + RANK * M // 2 + 5 + LOW},
    ),
    "sign": (fusedopt.Frugal(0.25), {}, {**FIRST, "update with residual": WEIGHTS + GRAD + BASIS + 2 * LOW}),
    "none": (fusedopt.Frugal(0.25, residual="none"), {}, {**FIRST, "update": WEIGHTS + BASIS + LOW}),
    "columns": (
        fusedopt.Frugal(0.25, method="columns"),
        {},
        {"selection": 2 * LOW, "update in pieces": WEIGHTS + GRAD + LOW},
    ),
    "dct": (fusedopt.DCT(RANK), {}, {"projection": GRAD + 2 * BASIS + LOW, "update": WEIGHTS + BASIS + LOW}),
    "apollo": (
        fusedopt.Apollo(RANK),
        {},
        {"projection": GRAD + 2 * BASIS + LOW, "norms": GRAD + 2 * LOW, "scaled update": WEIGHTS + GRAD},
    ),
    "subset_norm": (fusedopt.SubsetNorm(64), {}, {"step in pieces": WEIGHTS + 2 * GRAD + 8 * M * N + 8 * M * N // 64}),
}


@pytest.mark.parametrize("projection, options, expected", TRAFFIC.values(), ids=TRAFFIC)
def test_bytes_of_projected_steps(projection, options, expected):
    """The gradient once for the projection and the weights once each way, beside low-rank streams; fp32 states."""
    params = [nn.Parameter(torch.zeros(M, N, dtype=torch.bfloat16)) for _ in range(2)]
    set_grads(params, 0)
    opt = fusedopt.AdamW(params, projection=projection, **options)
    report = opt.plan()
    found = {o["name"]: (o["count"], o["elements"], o["bytes"]) for o in report.operations}
    assert found == {name: (2, 2 * M * N, 2 * moved) for name, moved in expected.items()}
    direction = 0 if projection.name == "subset_norm" else 2 * (LOW + LOW + 16 * RANK * N)
    assert report.bytes == direction + sum(moved for *_, moved in found.values())
    text = report.explain()
    name, moved = list(expected.items())[-1]
    assert f"{name}, one for each of 2 tensors, {2 * M * N} elements; {2 * moved / 1e6:.3f} MB" in text
    assert f"launches and {2 * len(expected)} operations of single tensors, {report.bytes / 1e6:.3f} MB" in text


def test_clipping_a_projected_step_reads_full_gradients():
    (p,) = params = [nn.Parameter(torch.zeros(M, N))]
    set_grads(params, 0)
    plain = fusedopt.AdamW(params, projection=fusedopt.GaLore(RANK)).plan()
    clipped = fusedopt.AdamW(params, projection=fusedopt.GaLore(RANK), clip_grad_norm=1.0).plan()
    assert clipped.bytes - plain.bytes == 4 * M * N
    assert [b["phases"] for b in clipped.buckets] == [["direction"], ["norm"]]


def test_bytes_of_early_projections_and_int8_weights():
    layer = nn.Linear(N, M, bias=False)
    opt = fusedopt.AdamW(layer.parameters(), projection=fusedopt.GaLore(RANK))
    fusedopt.projected_linear(layer, opt)
    layer(torch.ones(3, N)).sum().backward()
    assert [(o["name"], o["bytes"]) for o in opt.plan().operations] == [
        ("update", 8 * M * N + 4 * RANK * M + 4 * RANK * N)
    ]
    fusedopt.quantize_weights_(layer := nn.Linear(N, M, bias=False))
    opt = fusedopt.AdamW(layer.parameters())
    layer(torch.ones(3, N)).sum().backward()
    codes = M * N + 5 * M * N // 256
    assert [(o["name"], o["bytes"]) for o in opt.plan().operations] == [
        ("step in pieces", 2 * codes + (4 + 2 * 8) * M * N)
    ]


def test_bytes_of_factored_and_sparse_steps():
    (p,) = params = [nn.Parameter(torch.zeros(M, N, dtype=torch.bfloat16))]
    set_grads(params, 0)
    (operation,) = fusedopt.Adafactor(params).plan().operations
    assert operation["bytes"] == WEIGHTS + 2 * M * N + 3 * GRAD + 2 * 4 * (M + N)
    (operation,) = fusedopt.MicroAdam(params).plan().operations
    kept = math.ceil(0.01 * M * N)
    assert operation["bytes"] == WEIGHTS + GRAD + M * N + 2 * 2 * 2 + 4 * kept * (10 + 1)


# When the plan is rebuilt


@pytest.fixture
def builds(monkeypatch):
    """Counts constructions of Plan."""
    real, counted = optimizer_module.Plan, []

    def build(*args):
        counted.append(1)
        return real(*args)

    monkeypatch.setattr(optimizer_module, "Plan", build)
    return counted


@each_config()
def test_numbers_do_not_rebuild(config, builds):
    params = parameters((40, 13), (5,), ())
    opt = config.make(params)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    for step in range(6):
        set_grads(params, step)  # new gradient tensors each time
        group = opt.param_groups[0]
        group["weight_decay"] = 0.01 * step
        group["maximize"] = step % 2 == 0
        group["seed"] = step
        for key in ("betas", "eps", "momentum"):
            if key in group and group[key]:
                group[key] = (0.5, 0.1 * step) if key == "betas" else 0.1 + 0.1 * step
        opt.step()
        scheduler.step()
    assert len(builds) == 1


CHANGES = {
    "a gradient is missing": lambda opt, ps: setattr(ps[0], "grad", None),
    "another layout of a gradient": lambda opt, ps: setattr(ps[0], "grad", torch.zeros(5, 4).t()),
    "parameter moved": lambda opt, ps: setattr(ps[0], "data", ps[0].data.clone()),
    "parameter added": lambda opt, ps: opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]}),
    "capturable": lambda opt, ps: opt.param_groups[0].update(capturable=True),
    "param_precision": lambda opt, ps: opt.param_groups[0].update(param_precision="stochastic"),
    "clip_grad_norm": lambda opt, ps: setattr(opt, "clip_grad_norm", 0.123),
    "backend": lambda opt, ps: setattr(opt, "backend", "reference"),
    "state dict loaded": lambda opt, ps: opt.load_state_dict(opt.state_dict()),
    "step count replaced": lambda opt, ps: opt.state[ps[0]].update(step=torch.tensor(4.0)),
    "step count written": lambda opt, ps: opt.state[ps[0]]["step"].fill_(4.0),
    "state cleared": lambda opt, ps: opt.state.clear(),
}


@each_config()
@pytest.mark.parametrize("change", CHANGES)
def test_other_changes_rebuild_once(config, change, builds):
    params = parameters((4, 5), (3,))
    opt = config.make(params)
    train(opt, params, 0, 2)
    assert len(builds) == 1
    set_grads(params, 2)
    CHANGES[change](opt, params)
    opt.step()
    assert len(builds) == 2
    opt.step()
    assert len(builds) == 2


def test_explaining_does_not_rebuild(builds):
    params = parameters((4, 5), (3,))
    opt = fusedopt.AdamW(params)
    train(opt, params, 0, 1)
    opt.plan().explain()
    opt.step()
    assert len(builds) == 1


# Choice of the backend


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native CPU module is not installed")
@each_config()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", list_formats())
@pytest.mark.parametrize("precision", list_precisions())
def test_cpu_tensors_take_the_native_backend(config, dtype, form, precision):
    if dtype not in (torch.float32, *get_precision(precision).dtypes):
        pytest.skip(f"{precision} does not keep {dtype} parameters")
    params = parameters((5000,), (7,), dtype=dtype)
    set_grads(params, 0)
    report = config.make(params, state_format=form, param_precision=precision).plan()
    assert {b["backend"] for b in report.buckets} == {"cpu"} and report.launches >= 1


def backends_of(opt):
    return {b["backend"] for b in opt.plan().buckets}


def test_order_of_requests(spy, monkeypatch):
    """backend= beats use_backend beats FUSEDOPT_BACKEND beats the automatic choice; fused=False means the reference."""
    params = parameters((3,))
    set_grads(params, 0)
    automatic, named = fusedopt.SGD(params), fusedopt.SGD(params, backend="cpu")
    assert backends_of(automatic) == {"cpu"}
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")
    assert backends_of(automatic) == {"reference"} and backends_of(named) == {"cpu"}
    with fusedopt.use_backend("cpu"):
        assert backends_of(automatic) == {"cpu"}
        with fusedopt.use_backend("reference"):
            assert backends_of(automatic) == {"reference"} and backends_of(named) == {"cpu"}
        assert backends_of(automatic) == {"cpu"}
    monkeypatch.delenv("FUSEDOPT_BACKEND")
    assert backends_of(automatic) == {"cpu"}
    assert backends_of(fusedopt.SGD(params, fused=False)) == {"reference"}
    assert backends_of(fusedopt.SGD(params, fused=False, backend="cpu")) == {"cpu"}


def test_unknown_backends_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'tpu'; known backends"), fusedopt.use_backend("tpu"):
        pass
    params = parameters((3,))
    set_grads(params, 0)
    monkeypatch.setenv("FUSEDOPT_BACKEND", "tpu")
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        fusedopt.SGD(params).step()


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_forced_backend_gives_its_reason(how, monkeypatch):
    params = parameters((3, 2), dtype=torch.float64)
    set_grads(params, 0)
    opt = fusedopt.Lion(params, backend="cpu" if how == "argument" else None)
    if how == "environment":
        monkeypatch.setenv("FUSEDOPT_BACKEND", "cpu")
    message = r"Lion: backend 'cpu' cannot step parameter 0 \(shape \(3, 2\), torch.float64, device cpu\): .+"
    with pytest.raises(RuntimeError, match=message):
        if how == "context":
            with fusedopt.use_backend("cpu"):
                opt.step()
        else:
            opt.step()
    if how != "argument":
        monkeypatch.delenv("FUSEDOPT_BACKEND", raising=False)
        opt.step()  # automatic choice takes the reference


def test_fallback_is_told_once_and_explained(caplog, monkeypatch):
    class Missing(Spy):
        def supports(self, key):
            return "no compiler was found"

    real = select.get_backend
    monkeypatch.setattr(select, "get_backend", lambda name: Missing() if name == "cpu" else real(name))
    monkeypatch.setattr(select, "_told", set())
    params = parameters((3,))
    set_grads(params, 0)
    with caplog.at_level(logging.WARNING, logger="fusedopt"):
        for _ in range(2):
            opt = fusedopt.Lion(params)
            opt.step()
    assert [r.message for r in caplog.records] == ["lion: using the pure-torch reference: cpu: no compiler was found"]
    assert "not cpu: no compiler was found" in opt.plan().explain()


# explain()


def test_explain_text(spy):
    big, small = torch.zeros(100, 64, dtype=torch.bfloat16), torch.zeros(10)
    params = [nn.Parameter(big), nn.Parameter(small), nn.Parameter(torch.zeros(8, 6)[:, ::2])]
    params[0].grad = torch.zeros(64, 100, dtype=torch.bfloat16).t()
    params[1].grad, params[2].grad = torch.zeros(10), torch.zeros(8, 3)
    opt = fusedopt.AdamW(params, state_format="int8", param_precision="stochastic", clip_grad_norm=1.0)
    text = opt.plan().explain()
    assert text == str(opt.plan())
    for part in (
        "AdamW: 4 launches,",
        "cpu cpu: adam, p bfloat16 (stochastic), g bfloat16, exp_avg int8, exp_avg_sq int8; 1 tensors, 6400 elements",
        "p float32 (nearest), g float32, exp_avg fp32, exp_avg_sq fp32; 2 tensors, 34 elements; phases norm+fused",
        "parameter 0 (100, 64): gradient copied to the parameter's strides (64, 1) each step",
        "parameter 1 (10,): fp32 states, fewer than min_quantized_numel=4096 elements",
        "parameter 2 (8, 3): a view with gaps, stepped through a dense copy",
    ):
        assert part in text, f"{part!r} is not in:\n{text}"


def test_long_lists_of_notes_are_cut(spy):
    params = [nn.Parameter(torch.zeros(3)) for _ in range(25)]
    set_grads(params, 0)
    text = fusedopt.AdamW(params, state_format="int8").plan().explain()
    assert text.count("fewer than min_quantized_numel") == 20 and "... and 5 more" in text


def test_plan_without_gradients():
    assert "fusedopt" not in fusedopt.AdamW(parameters((3,))).plan().explain()


# Formats by size


@pytest.mark.parametrize(
    "minimum, dtypes", [(4096, (torch.uint8, torch.float32)), (1, (torch.uint8,) * 2), (10**6, (torch.float32,) * 2)]
)
def test_small_tensors_keep_fp32(minimum, dtypes):
    params = parameters((64, 64), (64, 63))
    opt = fusedopt.Lion(params, state_format="int8", min_quantized_numel=minimum)
    train(opt, params, 0, 1)
    assert tuple(opt.state[p]["exp_avg"].dtype for p in params) == dtypes


def test_state_bytes():
    params = parameters((64, 64))
    opt = fusedopt.AdamW(params, state_format="int8")
    train(opt, params, 0, 1)
    assert fusedopt.state_bytes(opt) == 2 * (4096 + 4096 // 256 * 4)


def test_host_step_counts_differ_by_parameter(spy):
    """Parameters with different counts have scalar rows of their own in one launch."""
    params = parameters((3,), (4,), (5,))
    opt = fusedopt.AdamW(params)
    for step, missing in enumerate([(), (0,), (0, 1), ()]):
        set_grads(params, step)
        for i in missing:
            params[i].grad = None
        opt.step()
    assert [int(opt.state[p]["step"]) for p in params] == [2, 3, 4]
    assert sorted(n.step for n in spy.works[-1].numbers) == [2, 3, 4] and len(spy.phases) == 4


# create()


@pytest.mark.parametrize("name", sorted(optimizers()))
@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_create_names(name, suffix):
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    opt = create((name + suffix).upper() if suffix == "8bit" else name + suffix, model, lr=0.25)
    assert type(opt) is optimizers()[name] and opt.param_groups[0]["lr"] == 0.25
    assert opt.param_groups[0]["state_format"] == get_format(SUFFIXES[suffix] or "fp32").name
    assert len(opt.param_groups[0]["params"]) == 1, "frozen parameters stay out"


def test_create_takes_parameters_and_groups():
    p = nn.Parameter(torch.zeros(2))
    assert create("adamw8bit", [p], state_format="int8").param_groups[0]["params"] == [p]
    assert len(create("sgd", [{"params": [p]}, {"params": []}]).param_groups) == 2


def test_create_errors():
    p = nn.Parameter(torch.zeros(2))
    for name in ("adamz", "adamw16bit", "8bit", "adamw8bit8bit", ""):
        with pytest.raises(ValueError, match=f"unknown optimizer '{name}'; names are .*adam, .*adamw, .*suffix 8bit"):
            create(name, [p])
    with pytest.raises(ValueError, match="'adamw8bit' means state_format='int8', but state_format='bf16' is given"):
        create("adamw8bit", [p], state_format="bf16")


def test_every_kind_of_rule_is_that_of_a_configuration():
    """Every class is stepped by the cells, against its oracle and by the conformance checks; here each kind of rule is."""

    def kinds(opt) -> set:
        rule = opt.rule_for(opt.param_groups[0])
        measured = rule.measures is not None and rule.measures.scope
        return {("states", len(rule.states) > 0), ("trust", rule.trust_on), ("points", rule.has_positions), measured}

    covered = set().union(*(kinds(c.make([torch.nn.Parameter(torch.zeros(1))])) for c in CONFIGS))
    # Those step each tensor by itself, in pieces and not in buckets: tests/test_factored.py, test_microadam_steps.py. Numbers
    # that tensors share: tests/test_measures.py.
    for name in set(optimizers()) - {"adafactor", "microadam"}:
        assert kinds(optimizers()[name]([torch.zeros(1)])) <= covered | {"group", "optimizer"}, name
