"""checkpoint.convert: formats against the reference encoder, companions, layouts, saved files and the command line."""

import json
import os
import re
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from configs import BY_NAME, WITH_STATES, WITH_TORCH, assert_same_bits, copies, each_config, parameters, tensors, train

import fusedopt
from fusedopt import conversion, states
from fusedopt.__main__ import main
from fusedopt.checkpoint import convert
from fusedopt.conversion import Conversion, files, piece
from fusedopt.formats import FP32, get_format, list_formats
from fusedopt.memory import flat
from fusedopt.precision import list_precisions
from fusedopt.rule import Rule, State, list_rules

SHAPES = ((40, 130), (65, 67), (7,), (), (0,), (4097,))
REFERENCE = {"backend": "reference"}
FORMATS = pytest.mark.parametrize("target", list_formats())


def trained(config, source, steps=3, shapes=SHAPES, dtype=torch.float32, **options):
    params = parameters(*shapes, dtype=dtype)
    opt = config.make(params, **REFERENCE, state_format=source, **options)
    train(opt, params, 0, steps)
    return params, opt


def same_entries(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].stride() == b[name].stride(), name
        assert_same_bits([a[name]], [b[name]], name)


@pytest.fixture(autouse=True)
def reference_kernels(monkeypatch):
    """The encoder that defines the codes; drivers are compared with it elsewhere."""
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")


# Formats


@each_config(WITH_STATES)
@pytest.mark.parametrize("source", ["fp32", "bf16", "int8", "int4"])
@FORMATS
def test_every_state_in_the_asked_format(config, source, target, monkeypatch):
    """Codes and scales are the reference encoder's of the source's values, in chunks smaller than a tensor too."""
    monkeypatch.setattr(piece, "CHUNK", 1024)
    params, opt = trained(config, source)
    saved = opt.state_dict()
    before = deepcopy(saved)
    converted = convert(saved, target)
    for index, entry in before["state"].items():
        for name in entry:
            assert_same_bits([saved["state"][index][name]], [entry[name]], f"{name} of the source")
    group = converted["param_groups"][0]
    assert group["state_format"] == target and group["min_quantized_numel"] == 4096
    for index, p in enumerate(params):
        entry, out = saved["state"][index], converted["state"][index]
        assert out["step"] == 3 and out["step"] is not entry["step"]
        for state in opt.rule_for(opt.param_groups[0]).states:
            form = get_format(target)
            form = FP32 if state.wide or form.block and p.numel() < 4096 else form
            if form is states.stored_format(entry, state.name):
                codes, scale = flat(entry[state.name]), states.stored_scale(entry, state.name, form)
            else:
                codes, scale = form.encode(flat(states.decode(p, entry, state)), state.signed)
            got = flat(out[state.name])
            assert got.dtype == form.storage and got.data_ptr() != codes.data_ptr() or not got.numel()
            n = form.stored_count(p.numel())
            assert_same_bits([got[:n]], [codes], f"{index} {state.name}")
            if scale is not None:
                assert_same_bits([out[states.scale_name(state.name, form)]], [scale])
        coded = [s for s in opt.rule_for(group).states if not s.wide and get_format(target).block and p.numel() >= 4096]
        assert sum(name.endswith("_scale") for name in out) == len(coded)
    other = copies(params)
    loaded = config.make(other, **REFERENCE, state_format=target)
    loaded.load_state_dict(converted)
    straight = copies(params)
    direct = config.make(straight, **REFERENCE, state_format=target)
    direct.load_state_dict(saved)
    assert_same_bits(tensors(loaded, other), tensors(direct, straight), "loaded after convert and directly:")
    train(loaded, other, 3, 5)


def test_mixed_formats_and_small_tensors():
    params, opt = trained(BY_NAME["adamw_amsgrad"], {"exp_avg": "int4", "exp_avg_sq": "fp8"})
    out = convert(opt.state_dict(), {"exp_avg": "int8", "max_exp_avg_sq": "bf16"}, min_quantized_numel=5000)
    large, small = out["state"][0], out["state"][1]
    assert large["exp_avg"].dtype == torch.uint8 and "exp_avg_int8_scale" in large
    assert large["exp_avg_sq"].dtype == torch.float32 and large["max_exp_avg_sq"].dtype == torch.bfloat16
    assert small["exp_avg"].dtype == torch.float32 and small["max_exp_avg_sq"].dtype == torch.bfloat16
    assert len([name for name in large if name.endswith("_scale")]) == 1
    assert out["param_groups"][0]["state_format"] == {"exp_avg": "int8", "max_exp_avg_sq": "bf16"}
    assert out["param_groups"][0]["min_quantized_numel"] == 5000


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_same_format_keeps_every_bit(form):
    params, opt = trained(BY_NAME["adamw"], form)
    saved = opt.state_dict()
    out = convert(saved, form)
    for index, entry in saved["state"].items():
        same_entries(out["state"][index], entry)


@pytest.mark.parametrize("precision", list_precisions()[1:])
def test_companions_and_weights_survive(precision):
    params, opt = trained(BY_NAME["adamw"], "int8", shapes=((40, 130), (9,)), dtype=torch.bfloat16,
                          param_precision=precision, seed=7)  # fmt: skip
    out = convert(opt.state_dict(), "int4")
    assert out["param_groups"][0]["param_precision"] == precision and out["param_groups"][0]["seed"] == 7
    other = copies(params)
    loaded = BY_NAME["adamw"].make(other, **REFERENCE, state_format="int4", param_precision=precision)
    loaded.load_state_dict(out)
    for p, q in zip(params, other, strict=True):
        for name in ("kahan_comp", "low_bits", "master_param"):
            assert (name in opt.state[p]) == (name in loaded.state[q])
            if name in opt.state[p]:
                assert_same_bits([loaded.state[q][name]], [opt.state[p][name]])


def test_fp64_states_stay():
    params, opt = trained(BY_NAME["adamw"], "int8", dtype=torch.float64, shapes=((80, 80),))
    out = convert(opt.state_dict(), "int8")
    same_entries(out["state"][0], opt.state_dict()["state"][0])
    assert out["state"][0]["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize(
    "turn", [lambda t: t.t(), lambda t: t.view(5, 13, 8, 10).to(memory_format=torch.channels_last)]
)
@pytest.mark.parametrize(
    "source, target", [("fp32", "int8"), ("int8", "int8"), ("int8", "bf16"), ("int8", "int4"), ("int4", "int8")]
)
def test_memory_layout_is_kept(turn, source, target):
    p = torch.nn.Parameter(turn(torch.randn(40, 130)))
    opt = fusedopt.AdamW([p], state_format=source, **REFERENCE)
    train(opt, [p], 0, 2)
    out = convert(opt.state_dict(), target)["state"][0]
    if "int4" not in (source, target):
        assert out["exp_avg"].stride() == p.stride()
    q = torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format))
    other = fusedopt.AdamW([q], state_format=target, **REFERENCE)
    other.load_state_dict({"state": {0: out}, "param_groups": opt.state_dict()["param_groups"]})
    for state in opt.rule_for(opt.param_groups[0]).states:
        want, got = states.decode(p, opt.state[p], state), states.decode(q, other.state[q], state)
        relative, absolute = get_format(target).error_bound(state.signed)
        assert source != target or torch.equal(got, want)
        assert ((got - want).abs() <= relative * want.abs() + absolute * want.abs().max() + 1e-12).all()


@pytest.mark.parametrize("form", ["fp32", "int8", "int4"])
def test_packed_states_of_a_contiguous_parameter_load_for_a_transposed_one(form):
    values = torch.randn(64, 90)
    p, q = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.t().contiguous().t())
    opt = fusedopt.Lion([p], state_format="int4", **REFERENCE)
    train(opt, [p], 0, 2)
    other = fusedopt.Lion([q], state_format=form, **REFERENCE)
    other.load_state_dict(opt.state_dict())
    want, got = states.decode(p, opt.state[p], State("exp_avg")), states.decode(q, other.state[q], State("exp_avg"))
    bound = get_format(form).error_bound(True)[1] * want.abs().max()
    assert (got - want).abs().max() <= bound


# Other optimizers' state dicts


@each_config(WITH_TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_torch_and_back(config, dtype):
    theirs = parameters((70, 70), (5,), dtype=dtype)
    other = config.make_torch(theirs)
    train(other, theirs, 0, 3)
    saved = other.state_dict()
    conversion_ = Conversion(saved, "fp32", to="torch")
    back = conversion_.result()
    assert conversion_.summary.source == "torch"
    again = copies(theirs)
    resumed = config.make_torch(again, lr=77.0)
    resumed.load_state_dict(back)
    train(resumed, again, 3, 5)
    mine = copies(theirs)
    opt = config.make(mine, **REFERENCE)
    native = convert(saved, "fp32")
    assert (
        native["param_groups"][0].items() >= {"state_format": "fp32", "param_precision": "nearest", "seed": 0}.items()
    )
    opt.load_state_dict(native)
    train(opt, mine, 3, 5)
    train(other, theirs, 3, 5)
    if config.name == "nadam":  # mu_product is computed anew, torch's own is a product of fp32 roundings
        for p, q in zip(again, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6 if dtype == torch.float32 else 2.0**-7, atol=1e-6)
    else:
        assert_same_bits(again, theirs)
    if dtype == torch.float32:
        for p, q in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


def test_native_to_torch_is_what_the_optimizer_itself_gives():
    params, opt = trained(
        BY_NAME["adamw"], "int8", shapes=((40, 130), (9,)), dtype=torch.bfloat16, param_precision="split32"
    )
    c = Conversion(opt.state_dict(), "fp32", to="torch")
    got, want = c.result(), opt.state_dict(format="torch")
    assert c.summary.dropped == ("low_bits",) and c.summary.source == "fusedopt"
    assert got["param_groups"] == want["param_groups"]
    for index in want["state"]:
        assert got["state"][index].keys() == want["state"][index].keys()
        for name, tensor in want["state"][index].items():
            assert_same_bits([got["state"][index][name]], [tensor])


@pytest.mark.parametrize("target", ["fp32", "int8", "int4"])
def test_second_moments_lost_in_fp16_take_their_first_moments_along(target):
    """torch.optim keeps fp16 moments of fp16 parameters: v below 6e-8 is zero, and m / sqrt(v) would be m / eps."""
    m, v = torch.full((5000,), 1e-3).half(), torch.full((5000,), 1e-4).half()
    v[::7] = 0
    m[14] = 0
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
    saved = {"state": {0: {"step": torch.tensor(5.0), "exp_avg": m, "exp_avg_sq": v}}, "param_groups": [group]}
    c = Conversion(saved, target)
    out = c.result()
    assert c.summary.zeroed == len(range(0, 5000, 7)) - 1
    p = torch.nn.Parameter(torch.zeros(5000))
    opt = fusedopt.AdamW([p], state_format=target, **REFERENCE)
    opt.load_state_dict(out)
    got = states.decode(p, opt.state[p], State("exp_avg"))
    assert (got[::7] == 0).all() and (got[1::7] > 0).all()


# Errors


def entry_of(**tensors_):
    return {"state": {0: {"step": torch.tensor(1.0), **tensors_}}, "param_groups": [{"params": [0], "lr": 0.1}]}


@pytest.mark.parametrize(
    "state_dict, form, match",
    [
        (entry_of(odd_avg=torch.zeros(3)), "int8", r"entry 0 holds \['odd_avg'\].*no rule.*Convert the state dict"),
        (entry_of(exp_avg=torch.zeros(3, dtype=torch.uint8)), "fp32", r"entry 0: state 'exp_avg' is torch.uint8.*none"),
        (entry_of(exp_avg=torch.zeros(3, dtype=torch.int64)), "fp32", r"entry 0: state 'exp_avg' is torch.int64"),
        (entry_of(exp_avg=[1.0]), "fp32", r"entry 0: state 'exp_avg' is a list"),
        (entry_of(exp_avg=torch.zeros(4, 3), exp_avg_sq=torch.zeros(5)), "fp32", r"'exp_avg' has shape \(4, 3\)"),
        (
            entry_of(exp_avg=torch.zeros(300, dtype=torch.uint8), exp_avg_int8_scale=torch.zeros(3)),
            "fp32", r"int8 state 'exp_avg' needs 2 scales, not 3",
        ),
        ({"exp_avg": torch.zeros(3)}, "int8", "expected an optimizer's state dict"),
        (entry_of(), "int5", "unknown state_format 'int5'"),
        (entry_of(), {"exp_av": "int8"}, r"names \['exp_av'\]; states are .*exp_avg, .*exp_avg_sq, "),
    ],
)  # fmt: skip
def test_refusals(state_dict, form, match):
    with pytest.raises(ValueError, match=match):
        convert(state_dict, form)


@pytest.mark.parametrize(
    "state, message",
    [
        (State("exp_avg", signed=False), "'exp_avg' is signed in one rule and unsigned in another"),
        (State("exp_avg", wide=True), "'exp_avg' is wide in one rule and not in another"),
    ],
)
def test_rules_must_agree_about_a_state(state, message, monkeypatch):
    bad = Rule("bad", (state,), (), None, None, None)
    get = piece.get_rule
    monkeypatch.setattr(piece, "list_rules", lambda: [*list_rules(), "bad"])
    monkeypatch.setattr(piece, "get_rule", lambda name: bad if name == "bad" else get(name))
    with pytest.raises(ValueError, match=message):
        convert(entry_of(exp_avg=torch.zeros(3)), "int8")


def test_progress_counts_every_element(monkeypatch):
    monkeypatch.setattr(piece, "CHUNK", 1024)
    _, opt = trained(BY_NAME["adamw"], "fp32", shapes=((50, 100),))
    seen = []
    convert(opt.state_dict(), "int8", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (10000, 10000) and len(seen) == 10 and seen == sorted(seen)


def test_kernels_are_those_of_the_device(monkeypatch):
    """A backend asked for by name for the steps of a GPU does not get the CPU tensors of a file."""
    monkeypatch.setenv("FUSEDOPT_BACKEND", "cuda")
    assert piece._codec(torch.device("cpu")).name in ("cpu", "reference")
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")
    assert piece._codec(torch.device("cpu")).name == "reference"


# Files


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint with tied and strided weights beside the state, and its path."""
    params, opt = trained(BY_NAME["adamw"], "fp32", shapes=((40, 130), (9,)))
    weight = torch.randn(30, 20)
    model = torch.nn.Module()
    model.register_parameter("w", torch.nn.Parameter(weight))
    whole = {
        "model": model.state_dict(), "tied": [weight, weight.t(), weight[3:, 1]], "empty": torch.zeros(0, 3),
        "half": torch.arange(5).bfloat16(), "epoch": 3, "run": {"opt.im": opt.state_dict(), "name": "x"},
    }  # fmt: skip
    path = tmp_path / "last.ckpt"
    torch.save(whole, path)
    return whole, path


def test_checkpoint_file(checkpoint, tmp_path, capsys):
    whole, path = checkpoint
    out = tmp_path / "out.ckpt"
    source = path.read_bytes()
    assert main(["convert", str(path), str(out), "--key", "run.opt.im", "--state-format", "int8"]) == 0
    text = capsys.readouterr().out
    assert "before (fusedopt)" in text and "after (fusedopt, int8)" in text
    assert path.read_bytes() == source and sorted(os.listdir(tmp_path)) == ["last.ckpt", "out.ckpt"]
    got = torch.load(out, weights_only=True)
    assert got["epoch"] == 3 and got["run"]["name"] == "x" and got["empty"].shape == (0, 3)
    assert_same_bits([got["model"]["w"], got["half"]], [whole["model"]["w"], whole["half"]])
    for a, b in zip(got["tied"], whole["tied"], strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
        assert a.untyped_storage().data_ptr() == got["model"]["w"].untyped_storage().data_ptr()
    want = convert(whole["run"]["opt.im"], "int8")
    assert got["run"]["opt.im"]["param_groups"] == want["param_groups"]
    for index, entry in want["state"].items():
        same_entries(got["run"]["opt.im"]["state"][index], entry)
    assert f"{sum(t.nbytes for e in want['state'].values() for k, t in e.items() if k != 'step'):,}" in text


@pytest.mark.parametrize("old_format", [False, True])
def test_state_dict_file_to_torch(tmp_path, old_format, capsys):
    params, opt = trained(BY_NAME["adamw"], "int8", shapes=((40, 130), (9,)))
    path, out = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(opt.state_dict(), path, _use_new_zipfile_serialization=not old_format)
    assert main(["convert", str(path), str(out), "--to", "torch", "--json", "-"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["source"] == "fusedopt" and numbers["elements"] == 2 * 5209 and numbers["bytes_after"] == 8 * 5209
    got, want = torch.load(out, weights_only=True), opt.state_dict(format="torch")
    assert got["param_groups"] == want["param_groups"]
    for index, entry in want["state"].items():
        same_entries(got["state"][index], entry)


MEMORY = """
import sys, threading, torch
from fusedopt.conversion.files import convert_file
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024
peak, stop = 0.0, threading.Event()
def watch(*_):
    global peak
    peak = max(peak, anonymous())
def loop():
    while not stop.wait(0.002):
        watch()
convert_file(sys.argv[1] + ".warm", sys.argv[2], "int8")
base = anonymous()
thread = threading.Thread(target=loop)
thread.start()
convert_file(sys.argv[1], sys.argv[2], {"exp_avg": "fp32", "exp_avg_sq": "bf16", "momentum_buffer": "int8"}, progress=watch)
stop.set()
thread.join()
print(peak - base)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_state(tmp_path):
    """A file of 160 MB and a result of 160 MB, with 40 MB at most that are not the files' pages."""
    big = torch.arange(2**24, dtype=torch.float32).view(4096, 4096)
    group = {"params": [0, 1], "lr": 0.1}
    entries = {0: {"exp_avg": big.bfloat16(), "exp_avg_sq": big}, 1: {"momentum_buffer": big[:128].clone()}}
    torch.save({"model": big.clone(), "optimizer": {"state": entries, "param_groups": [group]}}, tmp_path / "in")
    torch.save({"state": {1: entries[1]}, "param_groups": [group]}, tmp_path / "in.warm")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40, done.stdout
    got = torch.load(tmp_path / "out", weights_only=True, mmap=True)
    first, second = (got["optimizer"]["state"][0][name] for name in ("exp_avg", "exp_avg_sq"))
    assert torch.equal(got["model"], big) and second.dtype == torch.bfloat16 and torch.equal(second, big.bfloat16())
    assert first.dtype == torch.float32 and torch.equal(first, big.bfloat16().float())


def test_nothing_is_left_of_a_failure(checkpoint, tmp_path, monkeypatch):
    _, path = checkpoint

    def fail(*_):
        raise RuntimeError("stopped")

    monkeypatch.setattr(conversion.Conversion, "fill", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        files.convert_file(path, tmp_path / "out", "int8", key="run.opt.im")
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_tensors_that_cannot_be_reached_are_an_error(tmp_path, monkeypatch):
    """Otherwise they would be zeros in the result."""
    _, opt = trained(BY_NAME["lion"], "fp32", shapes=((4,),))
    torch.save({"a": {"hidden": [torch.ones(3)]}, "optimizer": opt.state_dict()}, tmp_path / "in")
    pairs = files._pairs
    monkeypatch.setattr(files, "_pairs", lambda a, b: (pair for pair in pairs(a, b) if pair[0].shape != (3,)))
    with pytest.raises(ValueError, match="inside objects that cannot be copied"):
        files.convert_file(tmp_path / "in", tmp_path / "out", "bf16")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["{in}", "{in}", "--state-format", "int8"], "is the file to convert"),
        (["{in}", "{folder}/../{name}/last.ckpt", "--state-format", "int8"], "is the file to convert"),
        (["{in}", "{out}"], "--state-format is needed"),
        (["{in}", "{out}", "--state-format", "int7"], "unknown state_format 'int7'"),
        (["{in}", "{out}", "--state-format", "int8,exp_avg=bf16"], "one format, or NAME=FORMAT"),
        (["{in}", "{out}", "--to", "torch", "--state-format", "int8"], "--to torch takes fp32"),
        (["{in}", "{out}", "--state-format", "int8"], "There is none among model, tied, empty, half, epoch, run"),
        (["{in}", "{out}", "--state-format", "int8", "--key", "run.x"], "no 'x' among opt.im, name"),
        (["{in}", "{out}", "--state-format", "int8", "--key", "model"], "'model' is not an optimizer's state dict; it holds w"),
        (["{folder}/absent", "{out}", "--state-format", "int8"], "No such file"),
        (["{in}", "{folder}/no/out", "--state-format", "int8", "--key", "run.opt.im"], "/no: there is no such folder"),
        (["{in}", "{out}", "--state-format", "foo=int8", "--key", "run.opt.im"], r"names \['foo'\]"),
    ],
)  # fmt: skip
def test_command_line_errors(checkpoint, tmp_path, capsys, arguments, match):
    _, path = checkpoint
    names = {"in": str(path), "out": str(tmp_path / "out"), "folder": str(tmp_path), "name": tmp_path.name}
    assert main(["convert", *(a.format_map(names) for a in arguments)]) == 2
    captured = capsys.readouterr()
    assert re.search(match, captured.err), captured.err
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_files_of_other_things(tmp_path):
    (tmp_path / "text").write_text("no checkpoint")
    with pytest.raises(ValueError, match="text is not a file of torch.save"):
        files.convert_file(tmp_path / "text", tmp_path / "out", "int8")
    torch.save({"state": {}, "param_groups": [], "args": Rule}, tmp_path / "objects")
    with pytest.raises(ValueError, match=r"or holds more than tensors.*fusedopt.rule.Rule"):
        files.convert_file(tmp_path / "objects", tmp_path / "out", "int8")
