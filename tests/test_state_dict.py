"""State dicts: bit-exact resume, kept dtypes, torch.optim's dicts in and out, conversion between formats, refusals."""

import io
from copy import deepcopy

import pytest
import torch
from configs import (
    BY_NAME,
    EVERY,
    WITH_STATES,
    WITH_TORCH,
    assert_same_bits,
    copies,
    each_backend,
    each_config,
    parameters,
    set_grads,
    tensors,
    train,
)

import fusedopt
from fusedopt import states
from fusedopt.formats import get_format

SHAPES = ((40, 130), (7,), (), (0,))
FORMS = pytest.mark.parametrize("form", ["fp32", "bf16", "int8"])


def saved_and_loaded(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_backend
@each_config(EVERY)
@FORMS
@pytest.mark.parametrize(
    "dtype, precision",
    [(torch.float32, "nearest"), (torch.bfloat16, "nearest"), (torch.bfloat16, "stochastic"),
     (torch.float16, "stochastic")],
    ids=["fp32", "bf16", "bf16-stochastic", "fp16-stochastic"],
)  # fmt: skip
def test_resume_is_bit_exact(config, form, dtype, precision, backend):
    options = {"backend": backend, "state_format": form, "param_precision": precision, "seed": 5}
    straight = parameters(*SHAPES, dtype=dtype)
    opt = config.make(straight, **options)
    train(opt, straight, 0, 3)
    resumed = copies(straight)
    loaded = config.make(resumed, **{**options, "seed": 0})
    loaded.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert_same_bits(tensors(loaded, resumed), tensors(opt, straight), "after loading:")
    train(opt, straight, 3, 6)
    train(loaded, resumed, 3, 6)
    assert_same_bits(tensors(loaded, resumed), tensors(opt, straight))
    assert int(loaded.state[resumed[0]]["step"]) == 6


@each_config(WITH_STATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_states_keep_their_dtype(config, dtype):
    """torch.optim.Optimizer.load_state_dict would cast fp32 moments to the parameter's dtype."""
    params = parameters((5, 4), dtype=dtype)
    opt = config.make(params)
    train(opt, params, 0, 2)
    before = {k: (v.dtype, v.clone()) for k, v in opt.state[params[0]].items()}
    opt.load_state_dict(opt.state_dict())
    for key, value in opt.state[params[0]].items():
        assert (
            value.dtype
            == before[key][0]
            == (torch.float64 if dtype == torch.float64 and key != "step" else torch.float32)
        )
        assert torch.equal(value, before[key][1])


@each_config(EVERY)
def test_loading_leaves_the_source_alone(config):
    params = parameters(*SHAPES)
    opt = config.make(params)
    train(opt, params, 0, 2)
    saved = opt.state_dict()
    kept = deepcopy(saved)
    other = copies(params)
    loaded = config.make(other)
    loaded.load_state_dict(saved)
    train(loaded, other, 2, 4)
    for index, entry in kept["state"].items():
        for key, value in entry.items():
            assert torch.equal(saved["state"][index][key], value), key


# torch.optim's state dicts


@each_backend
@each_config(WITH_TORCH)
@pytest.mark.parametrize("when", ["loaded before", "loaded after"])
def test_load_from_torch(config, when, backend):
    """A torch.optim state dict loads, and the next steps are torch's."""
    theirs = parameters(*SHAPES)
    other = config.make_torch(theirs)
    train(other, theirs, 0, 4)
    mine = copies(theirs)
    opt = config.make(mine, backend=backend)
    if when == "loaded after":
        train(opt, mine, 0, 2)
        with torch.no_grad():
            for p, q in zip(mine, theirs, strict=True):
                p.copy_(q)
    opt.load_state_dict(saved_and_loaded(other.state_dict()))
    train(opt, mine, 4, 8)
    train(other, theirs, 4, 8)
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


@each_backend
@each_config(WITH_TORCH)
@FORMS
def test_torch_form_loads_into_torch(config, form, backend):
    mine = parameters(*SHAPES)
    opt = config.make(mine, backend=backend, state_format=form)
    train(opt, mine, 0, 4)
    exported = saved_and_loaded(opt.state_dict(format="torch"))
    own = {"state_format", "param_precision", "min_quantized_numel", "seed"}
    assert not own & exported["param_groups"][0].keys()
    theirs = copies(mine)
    other = config.make_torch(theirs, lr=123.0)
    other.load_state_dict(exported)
    assert other.param_groups[0]["lr"] == config.options["lr"]
    exact = copies(mine)
    fp32 = config.make(exact, backend=backend)
    fp32.load_state_dict(exported)
    train(fp32, exact, 4, 7)
    train(other, theirs, 4, 7)
    for p, q in zip(exact, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


def test_torch_form_decodes_states():
    (p,) = params = parameters((30, 200))
    opt = fusedopt.AdamW(params, state_format="int8")
    train(opt, params, 0, 3)
    entry = opt.state_dict(format="torch")["state"][0]
    assert sorted(entry) == ["exp_avg", "exp_avg_sq", "step"]
    for state in opt.rule_for(opt.param_groups[0]).states:
        assert entry[state.name].dtype == torch.float32
        assert torch.equal(entry[state.name], states.decode(p, opt.state[p], state))
    assert entry["step"].data_ptr() != opt.state[p]["step"].data_ptr()


def test_unknown_form():
    with pytest.raises(ValueError, match="unknown format 'bnb'; it is 'native' or 'torch'"):
        fusedopt.SGD(parameters((2,))).state_dict(format="bnb")


# Conversion between formats


@each_backend
@each_config(WITH_STATES)
@pytest.mark.parametrize("source, target", [("fp32", "int8"), ("int8", "fp32"), ("bf16", "int8"),
    ("fp32", "bf16"), ("int8", "int8c"), ("int8c", "fp8"), ("fp8", "int4"), ("int4", "int8")])  # fmt: skip
def test_conversion_on_load(config, source, target, backend):
    params = parameters((40, 130), (7,))
    opt = config.make(params, backend=backend, state_format=source)
    train(opt, params, 0, 3)
    other = copies(params)
    loaded = config.make(other, backend=backend, state_format=target)
    loaded.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert loaded.param_groups[0]["state_format"] == target
    for state in config.cls.rule_for(opt.param_groups[0]).states:
        want, entry = states.decode(params[0], opt.state[params[0]], state), loaded.state[other[0]]
        form = get_format("fp32" if state.wide else target)
        bound = form.error_bound(state.signed)
        assert entry[state.name].dtype == form.storage
        assert loaded.state[other[1]][state.name].dtype == (torch.bfloat16 if form.name == "bf16" else torch.float32)
        error = (states.decode(other[0], entry, state) - want).abs()
        assert (error <= bound[0] * want.abs() + bound[1] * want.abs().max()).all()
    train(loaded, other, 3, 5)


@each_config(WITH_STATES)
def test_conversion_keeps_the_layout_of_a_transposed_parameter(config):
    """A contiguous parameter's int8 states loaded for a transposed one: blocks follow memory order, made anew."""
    values = torch.randn(64, 90)
    straight, turned = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.t().contiguous().t())
    options = {"state_format": "int8", "backend": "reference"}
    one, two = config.make([straight], **options), config.make([turned], **options)
    train(one, [straight], 0, 2)
    two.load_state_dict(one.state_dict())
    for state in config.cls.rule_for(one.param_groups[0]).states:
        a = states.decode(straight, one.state[straight], state)
        b = states.decode(turned, two.state[turned], state)
        assert two.state[turned][state.name].stride() == turned.stride()
        assert (a - b).abs().max() <= get_format("int8").error_bound(state.signed)[1] * a.abs().max()


# Refusals


def broken(config, damage):
    """An optimizer with two steps behind it, and a damaged copy of its state dict."""
    params = parameters((40, 130), (3, 2))
    opt = config.make(params, state_format="int8")
    train(opt, params, 0, 2)
    state_dict = deepcopy(opt.state_dict())
    damage(state_dict)
    return params, opt, state_dict


def assert_refused(config, damage, match):
    params, opt, state_dict = broken(config, damage)
    before, groups = tensors(opt, params), deepcopy([{**g, "params": None} for g in opt.param_groups])
    with pytest.raises(ValueError, match=match):
        opt.load_state_dict(state_dict)
    assert_same_bits(tensors(opt, params), before)
    assert [{**g, "params": None} for g in opt.param_groups] == groups
    set_grads(params, 2)
    opt.step()


def first_state(config, state_dict):
    states_ = config.cls.rule_for(state_dict["param_groups"][0]).states
    return next((s.name for s in states_ if not s.wide), states_[0].name)


@each_config(WITH_STATES)
def test_wrong_shape_is_refused(config):
    def damage(d):
        d["param_groups"][0]["lr"] = 77.0
        name = first_state(config, d)
        d["state"][1][name] = torch.zeros(3, 3)

    assert_refused(config, damage, r"parameter 1 \(shape \(3, 2\).*has shape \(3, 3\)")


@each_config([c for c in WITH_STATES if c.name not in ("madgrad", "schedulefree_sgd")])  # which have fp32 states only
def test_truncated_or_missing_scales_are_refused(config):
    def truncate(d):
        name = first_state(config, d) + "_int8_scale"
        d["state"][0][name] = d["state"][0][name][:-1]

    assert_refused(config, truncate, r"parameter 0 \(shape \(40, 130\).*needs 21 scales")

    def remove(d):
        d["state"][0].pop(first_state(config, d) + "_int8_scale")

    assert_refused(config, remove, r"parameter 0.*none of its scales .*_int8_scale")


@each_config(WITH_STATES)
def test_integer_states_and_strange_objects_are_refused(config):
    def integers(d):
        d["state"][1][first_state(config, d)] = torch.zeros(3, 2, dtype=torch.int64)

    def text(d):
        d["state"][1][first_state(config, d)] = "momentum"

    assert_refused(config, integers, r"parameter 1.*torch.int64, which no format stores")
    assert_refused(config, text, r"parameter 1.*is a str")


@pytest.mark.parametrize(
    "saver, loader",
    [("lion", "adamw"), ("sgd_momentum", "adamw"), ("adamw", "sgd_momentum"), ("adamw", "lars"), ("adamw", "lion"),
     ("lion", "lars"), ("adamw_amsgrad", "lamb"), ("adamw", "sgd")],
)  # fmt: skip
def test_states_of_another_rule_are_refused(saver, loader):
    params = parameters((5, 4), (3,))
    opt = BY_NAME[saver].make(params)
    train(opt, params, 0, 2)
    other = BY_NAME[loader].make(params)
    with pytest.raises(ValueError, match=r"parameter 0 \(shape \(5, 4\).*the loaded state holds"):
        other.load_state_dict(opt.state_dict())
    assert not other.state and other.param_groups[0]["lr"] == BY_NAME[loader].options["lr"]


@each_config(EVERY)
def test_wrong_groups_are_refused(config):
    params = parameters((3,), (4,))
    state_dict = config.make(params).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        config.make([{"params": params[:1]}, {"params": params[1:]}]).load_state_dict(state_dict)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        config.make(params[:1]).load_state_dict(state_dict)


# What other tools put into state dicts


@each_config(EVERY)
def test_older_state_dicts_without_newer_keys(config):
    params = parameters(*SHAPES)
    opt = config.make(params)
    train(opt, params, 0, 2)
    state_dict = deepcopy(opt.state_dict())
    for group in state_dict["param_groups"]:
        for key in ("foreach", "differentiable", "maximize", "capturable", "fused", "state_format", "param_precision",
                    "min_quantized_numel", "seed"):  # fmt: skip
            del group[key]
    other = copies(params)
    loaded = config.make(other)
    loaded.load_state_dict(state_dict)
    assert loaded.param_groups[0].keys() == opt.param_groups[0].keys()
    train(opt, params, 2, 4)
    train(loaded, other, 2, 4)
    assert_same_bits(tensors(loaded, other), tensors(opt, params))


@each_backend
@each_config(EVERY)
@pytest.mark.parametrize("kind", [float, int, lambda s: s.view(1), lambda s: s.double(), lambda s: s.long()])
def test_step_counts_of_other_kinds(config, kind, backend):
    """Python numbers, 1-element and integer tensors."""
    params = parameters(*SHAPES)
    opt = config.make(params, backend=backend)
    train(opt, params, 0, 3)
    state_dict = deepcopy(opt.state_dict())
    for entry in state_dict["state"].values():
        entry["step"] = kind(entry["step"])
    other = copies(params)
    loaded = config.make(other, backend=backend)
    loaded.load_state_dict(state_dict)
    train(opt, params, 3, 5)
    train(loaded, other, 3, 5)
    assert_same_bits(tensors(loaded, other), tensors(opt, params))


@each_config(EVERY)
@pytest.mark.parametrize("saver", [False, True])
@pytest.mark.parametrize("loader", [False, True])
def test_named_parameters(config, saver, loader):
    params = parameters((3, 2), (4,))
    names = ["weight", "bias"]

    def make(named, ps):
        return config.make(list(zip(names, ps, strict=True)) if named else ps)

    opt = make(saver, params)
    train(opt, params, 0, 2)
    assert ("param_names" in opt.state_dict()["param_groups"][0]) == saver
    other = copies(params)
    loaded = make(loader, other)
    loaded.load_state_dict(saved_and_loaded(opt.state_dict()))
    if saver or loader:
        assert loaded.param_groups[0]["param_names"] == names
    train(opt, params, 2, 4)
    train(loaded, other, 2, 4)
    assert_same_bits(tensors(loaded, other), tensors(opt, params))


@each_config(EVERY)
def test_parameters_without_state_stay_so(config):
    """A parameter that never had a gradient has no entry, before and after."""
    params = parameters((3,), (4,))
    opt = config.make(params)
    params[0].grad = torch.ones(3)
    opt.step()
    loaded = config.make(params)
    loaded.load_state_dict(opt.state_dict())
    assert list(opt.state_dict()["state"]) == list(loaded.state_dict()["state"]) == [0]
    set_grads(params, 1)
    loaded.step()
    assert [int(loaded.state[p]["step"]) for p in params] == [2, 1]


@each_config(EVERY)
def test_empty_state_round_trip(config):
    """accelerate loads the optimizer's own state dict before the first step; no state may appear."""
    params = parameters(*SHAPES)
    opt = config.make(params)
    opt.load_state_dict(opt.state_dict())
    assert not opt.state
    train(opt, params, 0, 1)
    assert len(opt.state) == len(SHAPES)


@each_config(EVERY)
def test_state_dict_is_deterministic(config):
    """Two optimizers from one state dict stay equal, and so do their state dicts."""
    params = parameters(*SHAPES)
    opt = config.make([{"params": params[:2], "lr": 0.003}, {"params": params[2:]}])
    train(opt, params, 0, 4)
    first = opt.state_dict()
    other = copies(params)
    loaded = config.make([{"params": other[:2]}, {"params": other[2:]}])
    loaded.load_state_dict(first)
    assert loaded.state_dict()["param_groups"] == first["param_groups"]
    train(opt, params, 4, 8)
    train(loaded, other, 4, 8)
    assert_same_bits(tensors(loaded, other), tensors(opt, params))
    a, b = opt.state_dict(), loaded.state_dict()
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()


def test_values_are_tensors_and_numbers_only():
    for config in EVERY:
        params = parameters(*SHAPES)
        opt = config.make(params, state_format="int8")
        train(opt, params, 0, 1)
        for entry in opt.state_dict()["state"].values():
            assert all(isinstance(v, (torch.Tensor, float, int)) for v in entry.values())
            assert not any("." in k for k in entry)
