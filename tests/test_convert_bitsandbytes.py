"""State dicts of bitsandbytes and torchao: trained by them, converted bit for bit, gone on with, and given back."""

import logging
from copy import deepcopy

import pytest
import torch
from configs import assert_same_bits, copies, parameters, train

import fusedopt
from fusedopt import states
from fusedopt.__main__ import main
from fusedopt.checkpoint import convert, to_bitsandbytes
from fusedopt.conversion import Conversion, foreign
from fusedopt.formats import dynamic_map
from fusedopt.rule import State

SHAPES = ((70, 130), (9,), (4097,), ())
REFERENCE = {"backend": "reference"}


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes")


@pytest.fixture(autouse=True)
def reference_kernels(monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")


def build(bnb, name, params, **options):
    """(theirs, our class with the options that go with it, what convert takes as optimizer=)."""
    theirs, cls, base, mine, told = {
        "AdamW8bit": (bnb.optim.AdamW8bit, fusedopt.AdamW, {"lr": 1e-2, "weight_decay": 0.1}, {}, None),
        "AdamW32bit": (bnb.optim.AdamW32bit, fusedopt.AdamW, {"lr": 1e-2, "betas": (0.8, 0.95)}, {}, "adamw"),
        "Adam8bit": (bnb.optim.Adam8bit, fusedopt.Adam, {"lr": 1e-2}, {}, "adam"),
        "Lion8bit": (bnb.optim.Lion8bit, fusedopt.Lion, {"lr": 1e-2, "weight_decay": 0.1}, {}, "lion"),
        "Lion32bit": (bnb.optim.Lion32bit, fusedopt.Lion, {"lr": 1e-2}, {}, "lion"),
        "SGD8bit": (bnb.optim.SGD8bit, fusedopt.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}, {}, "sgd"),
    }[name]
    return theirs(params, **{**base, **options}), cls, mine, told


EACH = pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit", "Adam8bit", "Lion8bit", "Lion32bit", "SGD8bit"])


def their_trained(bnb, name, steps=4, shapes=SHAPES):
    params = parameters(*shapes)
    opt, cls, options, told = build(bnb, name, params)
    train(opt, params, 0, steps)
    return params, opt, cls, options, told


def states_of(opt, p):
    """(our name, codes or values, scales or None) of a parameter of a bitsandbytes optimizer."""
    entry, names = opt.state[p], ("exp_avg", "exp_avg_sq")
    if isinstance(opt, torch.optim.Optimizer) and opt.optimizer_name == "momentum":
        names = ("momentum_buffer",)
    return [(n, entry[f"state{i}"], entry.get(f"absmax{i}")) for i, n in enumerate(names, 1) if f"state{i}" in entry]


@EACH
def test_codes_and_scales_bit_for_bit(bnb, name):
    params, theirs, cls, _, told = their_trained(bnb, name)
    saved = theirs.state_dict()
    before = deepcopy(saved)
    c = Conversion(saved, "int8", optimizer=told)
    out = c.result()
    assert c.summary.source == "bitsandbytes" and c.summary.zeroed == 0
    for index, p in enumerate(params):
        entry = out["state"][index]
        assert entry["step"] == 4 and isinstance(entry["step"], torch.Tensor)
        coded = 0
        for state, codes, scale in states_of(theirs, p):
            if codes.dtype == torch.uint8 or p.numel() < 4096:
                assert_same_bits([entry[state]], [codes], state)
            if scale is not None:
                coded += 1
                assert_same_bits([entry[f"{state}_int8_scale"]], [scale])
        assert coded == (0 if "32" in name or p.numel() < 4096 else len(states_of(theirs, p)))
    quant = foreign.WRAPPED
    for index, entry in before["state"].items():
        assert saved["state"][index].keys() == entry.keys()
        for key, value in entry.get(quant, {}).items():
            assert torch.equal(saved["state"][index][quant][key], value)


@EACH
@pytest.mark.parametrize("path", ["direct", "converted"])
def test_training_goes_on_here(bnb, name, path):
    """The first step after loading is bitsandbytes' own; afterwards its CPU quantiser, which is not the nearest code, differs."""
    params, theirs, cls, options, told = their_trained(bnb, name)
    mine = copies(params)
    opt = cls(mine, lr=77.0, state_format="fp32" if "32" in name else "int8", **options, **REFERENCE)
    saved = theirs.state_dict()
    opt.load_state_dict(saved if path == "direct" else convert(saved, "int8", optimizer=told))
    group = opt.param_groups[0]
    assert group["lr"] == 1e-2 and not {"alpha", "t_alpha", "t_beta3"} & group.keys()
    assert group.get("momentum", 0.9) == 0.9 and isinstance(group.get("betas", ()), tuple)
    train(theirs, params, 4, 5)
    train(opt, mine, 4, 5)
    for p, q in zip(params, mine, strict=True):
        # int8 of 32-bit states, where the conversion was asked for them
        exact = path == "direct" or "8bit" in name or p.numel() < 4096
        if exact:
            torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-6)
    train(opt, mine, 5, 8)


@EACH
def test_back_to_bitsandbytes_is_as_if_never_left(bnb, name):
    """Through our form and back, the next steps are those of the uninterrupted run, bit for bit."""
    params, theirs, cls, options, _ = their_trained(bnb, name)
    mine = copies(params)
    opt = cls(mine, state_format="fp32" if "32" in name else "int8", **options, **REFERENCE)
    opt.load_state_dict(theirs.state_dict())
    back = to_bitsandbytes(opt.state_dict(), bits=32 if "32" in name else 8)
    other = copies(params)
    resumed = build(bnb, name, other, lr=33.0)[0]
    resumed.load_state_dict(back)
    for p, q in zip(params, other, strict=True):
        for (_, a, s), (_, b, t) in zip(states_of(theirs, p), states_of(resumed, q), strict=True):
            assert_same_bits([a], [b])
            assert s is None and t is None or torch.equal(s, t)
    train(theirs, params, 4, 7)
    train(resumed, other, 4, 7)
    assert_same_bits(other, params)
    assert {k: v for k, v in resumed.param_groups[0].items() if k != "params"} == {
        k: v for k, v in theirs.param_groups[0].items() if k != "params"
    }


@pytest.mark.parametrize("source", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("precision", ["nearest", "split24"])
def test_own_states_step_in_bitsandbytes(bnb, source, precision, caplog):
    params = parameters((70, 130), (9,), dtype=torch.bfloat16)
    opt = fusedopt.AdamW(params, lr=1e-2, state_format=source, param_precision=precision, **REFERENCE)
    train(opt, params, 0, 3)
    with caplog.at_level(logging.WARNING, "fusedopt"):
        given = to_bitsandbytes(opt.state_dict())
    assert ("low_bits left out" in caplog.text) == (precision == "split24")
    theirs = bnb.optim.AdamW8bit(params, lr=5.0)
    theirs.load_state_dict(given)
    entry = theirs.state[params[0]]
    assert entry["state1"].dtype == torch.uint8 and entry["step"] == 3
    for number, state in enumerate((State("exp_avg"), State("exp_avg_sq", signed=False)), 1):
        want = states.decode(params[0], opt.state[params[0]], state)
        values = dynamic_map(state.signed)[entry[f"state{number}"].long()].view(-1)
        got = values * entry[f"absmax{number}"].repeat_interleave(256)[: values.numel()]
        assert ((got.view(want.shape) - want).abs() <= 0.00705 * want.abs().max()).all()
    before = copies(params)
    train(theirs, params, 3, 4)
    assert not torch.equal(before[0], params[0]) and params[0].isfinite().all()


def test_a_transposed_parameter_goes_to_bitsandbytes_in_index_order(bnb):
    """bitsandbytes makes parameters contiguous; their blocks are others then."""
    (p,) = [torch.nn.Parameter(torch.randn(90, 64).t())]
    opt = fusedopt.AdamW([p], state_format="int8", **REFERENCE)
    train(opt, [p], 0, 2)
    entry = to_bitsandbytes(opt.state_dict())["state"][0]
    assert entry["state1"].is_contiguous() and entry["state1"].shape == p.shape
    got = dynamic_map(True)[entry["state1"].long()].view(-1) * entry["absmax1"].repeat_interleave(256)[: p.numel()]
    want = states.decode(p, opt.state[p], State("exp_avg"))
    assert (got.view(p.shape) - want).abs().max() <= 0.00705 * want.abs().max()


# What bitsandbytes rounds to zero


def with_zeros(bnb):
    """A state dict whose second moments hold zeros where first moments do not, as its quantiser leaves them."""
    params = parameters((70, 130))
    opt = bnb.optim.AdamW8bit(params, lr=1e-2)
    train(opt, params, 0, 3)
    entry = opt.state[params[0]]
    flat = entry["state2"].view(-1)
    flat[::11] = 0
    entry["absmax2"][3] = 0.0
    zero = (flat == 0) | (torch.arange(flat.numel()) // 256 == 3)
    return params, opt, zero & (entry["state1"].view(-1) != 127)


@pytest.mark.parametrize("target", ["int8", "fp32", "bf16", "int4"])
def test_first_moments_without_a_second_become_zero(bnb, target):
    params, theirs, hit = with_zeros(bnb)
    c = Conversion(theirs.state_dict(), target)
    out = c.result()
    assert c.summary.zeroed == int(hit.sum()) > 800
    q = copies(params)
    opt = fusedopt.AdamW(q, state_format=target, **REFERENCE)
    opt.load_state_dict(out)
    m = states.decode(q[0], opt.state[q[0]], State("exp_avg")).view(-1)
    assert (m[hit] == 0).all()
    if target == "int8":
        codes = theirs.state[params[0]]["state1"].view(-1)
        assert torch.equal(out["state"][0]["exp_avg"].view(-1)[~hit], codes[~hit])
        assert torch.equal(out["state"][0]["exp_avg_sq"], theirs.state[params[0]]["state2"])
        assert torch.equal(out["state"][0]["exp_avg_int8_scale"], theirs.state[params[0]]["absmax1"])


def test_the_first_update_after_loading_stays_small(bnb):
    """m / sqrt(v) of a first moment whose second moment is gone would be m / eps: 10^5 and more times lr."""
    params, theirs, hit = with_zeros(bnb)
    q = copies(params)
    opt = fusedopt.AdamW(q, lr=1e-2, weight_decay=0.0, state_format="int8", **REFERENCE)
    opt.load_state_dict(theirs.state_dict())
    opt.param_groups[0].update(lr=1e-2, weight_decay=0.0)
    before = q[0].detach().clone()
    q[0].grad = torch.full_like(q[0], 1e-6)  # much smaller than those that made the first moments
    opt.step()
    assert (q[0].detach() - before).view(-1)[hit].abs().max() <= 10 * 1e-2


# Older and other forms


def test_flat_entries_and_blocks_of_2048(bnb):
    params, theirs, *_ = their_trained(bnb, "AdamW8bit", shapes=((70, 130),))
    saved = theirs.state_dict()
    entry = saved["state"][0]
    entry.update(entry.pop(foreign.WRAPPED))  # before 0.49 they were not wrapped
    plain = convert(saved, "int8")["state"][0]
    assert torch.equal(plain["exp_avg_int8_scale"], entry["absmax1"])
    for number in (1, 2):
        entry[f"absmax{number}"] = entry[f"absmax{number}"][::8].clone()
    old = convert(saved, "int8")["state"][0]
    assert torch.equal(old["exp_avg"], entry["state1"])
    q = copies(params)[0]
    got = states.decode(q, old, State("exp_avg")).view(-1)
    want = dynamic_map(True)[entry["state1"].long()].view(-1).float()
    want *= entry["absmax1"].repeat_interleave(2048)[: want.numel()]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def refused(saved, match, **options):
    with pytest.raises(ValueError, match=match):
        convert(saved, "int8", **options)


def test_refusals(bnb):
    lion = their_trained(bnb, "Lion8bit", shapes=((70, 130),))[1].state_dict()
    refused(lion, "does not say which optimizer it is of. Pass optimizer='lion'")
    refused(lion, "entry 0 holds 1 states of bitsandbytes, but rule 'adam'", optimizer="adamw")
    refused(lion, "optimizer 'adagrad' cannot be read", optimizer="adagrad")
    refused(lion, "optimizer 'lars' cannot be read", optimizer="lars")
    with pytest.raises(ValueError, match="holds 1 states of bitsandbytes, but rule 'adam' keeps"):
        fusedopt.AdamW(parameters((70, 130))).load_state_dict(lion)
    with pytest.raises(ValueError, match="LARS: bitsandbytes keeps gradients in the momentum buffer"):
        fusedopt.LARS(parameters((70, 130))).load_state_dict(lion)
    params = parameters((70, 130))
    mix = bnb.optim.AdEMAMix8bit(params)
    train(mix, params, 0, 1)
    refused(mix.state_dict(), "it is AdEMAMix's")
    adam = their_trained(bnb, "AdamW8bit", shapes=((70, 130),))[1].state_dict()
    wrapped = adam["state"][0][foreign.WRAPPED]
    for changes, match in (
        ({"qmap2": wrapped["qmap1"]}, "qmap2 is not the dynamic map"),
        ({"absmax1": torch.zeros(7)}, "absmax1 has 7 values for 9100 elements"),
        ({"max1": torch.zeros(1)}, "one scale for all, of bitsandbytes before"),
        ({"state1": wrapped["state1"].t()}, "AdEMAMix|not contiguous"),
        (
            {k: wrapped[k].view(130, 70).t() for k in ("state1", "state2")},
            "state1 is not contiguous.*Make the parameter",
        ),
    ):
        refused({**adam, "state": {0: {"step": 1, foreign.WRAPPED: {**wrapped, **changes}}}}, match)


def test_what_bitsandbytes_does_not_have():
    for cls, options, match in (
        (fusedopt.AdamW, {"amsgrad": True}, "group 0 has amsgrad, which bitsandbytes does not have"),
        (fusedopt.SGD, {"momentum": 0.9, "nesterov": True}, "group 0 has nesterov"),
        (fusedopt.SGD, {}, "group 0 has momentum=0"),
        (fusedopt.LARS, {"momentum": 0.9}, "group 0 has trust_coefficient"),
    ):
        with pytest.raises(ValueError, match=match):
            to_bitsandbytes(cls(parameters((3,)), **options).state_dict())
    with pytest.raises(ValueError, match="bits is 8 or 32, not 4"):
        to_bitsandbytes(fusedopt.Lion(parameters((3,))).state_dict(), bits=4)


def test_coupled_decay_is_told(bnb, caplog):
    saved = their_trained(bnb, "AdamW8bit", shapes=((70, 130),))[1].state_dict()
    fusedopt.AdamW(parameters((70, 130)), **REFERENCE).load_state_dict(saved)
    assert not caplog.records
    fusedopt.Adam(parameters((70, 130)), **REFERENCE).load_state_dict(saved)
    assert "Adam: weight decay is coupled here and decoupled in bitsandbytes; use AdamW" in caplog.text


def test_command_line(bnb, tmp_path, capsys):
    params, theirs, *_ = their_trained(bnb, "Lion8bit")
    torch.save(theirs.state_dict(), tmp_path / "in.pt")
    assert main(["convert", str(tmp_path / "in.pt"), str(tmp_path / "native.pt"), "--state-format", "int8"]) == 2
    assert "--optimizer" in capsys.readouterr().err
    arguments = ["--state-format", "int8", "--optimizer", "lion"]
    assert main(["convert", str(tmp_path / "in.pt"), str(tmp_path / "native.pt"), *arguments]) == 0
    assert main(["convert", str(tmp_path / "native.pt"), str(tmp_path / "out.pt"), "--to", "bitsandbytes"]) == 0
    other = copies(params)
    resumed = bnb.optim.Lion8bit(other, lr=5.0)
    resumed.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    train(theirs, params, 4, 6)
    train(resumed, other, 4, 6)
    assert_same_bits(other, params)


def test_command_line_counts_zeroed_moments(bnb, tmp_path, capsys):
    _, theirs, hit = with_zeros(bnb)
    torch.save(theirs.state_dict(), tmp_path / "in.pt")
    assert main(["convert", str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), "--to", "torch"]) == 0
    assert f"{int(hit.sum())} first moments set to zero" in capsys.readouterr().out.replace(",", "")


# torchao


@pytest.fixture(scope="module")
def torchao_optim():
    return pytest.importorskip("torchao.optim")


@pytest.mark.parametrize("cls, form", [("AdamW8bit", "int8"), ("AdamW4bit", "int4"), ("AdamWFp8", "fp8")])
@pytest.mark.parametrize("through", ["memory", "file"])
def test_torchao(torchao_optim, monkeypatch, tmp_path, cls, form, through):
    """int8 and int4 codes bit for bit; fp8, whose second moments are e4m3 there, by value."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    params = parameters((64, 128), (9,))
    theirs = getattr(torchao_optim, cls)(params, lr=1e-2)
    train(theirs, params, 0, 3)
    saved = theirs.state_dict()
    if through == "file":
        torch.save(saved, tmp_path / "in.pt")
        assert main(["convert", str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), "--state-format", form]) == 0
        out = torch.load(tmp_path / "out.pt", weights_only=True)
    else:
        out = convert(saved, form)
    mine = copies(params)
    opt = fusedopt.AdamW(mine, state_format=form, **REFERENCE)
    opt.load_state_dict(out)
    assert isinstance(opt.param_groups[0]["lr"], float)
    kept = opt.state[mine[0]]
    for state in opt.rule_for(opt.param_groups[0]).states:
        value = saved["state"][0][state.name]
        if form != "fp8":
            zero = out["state"][0]["exp_avg_sq"].view(-1) == 0 if form == "int8" and state.signed else None
            codes, got = value.codes.view(-1), kept[state.name].view(-1)
            assert torch.equal(got, codes if zero is None else codes.masked_fill(zero, 127))
            assert torch.equal(kept[f"{state.name}_{form}_scale"], value.scale)
        else:
            want = value.dequantize()
            lost = saved["state"][0]["exp_avg_sq"].dequantize() == 0
            want = want.masked_fill(lost, 0.0) if state.signed else want
            got = states.decode(mine[0], kept, state)
            assert ((got - want).abs() <= want.abs() / 16 + want.abs().max() * 2.0**-18).all()
    direct = copies(params)
    other = fusedopt.AdamW(direct, state_format=form, **REFERENCE)
    other.load_state_dict(saved)
    train(opt, mine, 3, 4)
    train(other, direct, 3, 4)
    assert_same_bits(direct, mine)
    train(theirs, params, 3, 4)
    lost = saved["state"][0]["exp_avg_sq"].dequantize() == 0
    if not lost.any() and form != "fp8":
        torch.testing.assert_close(mine[0], params[0], rtol=1e-5, atol=1e-6)
