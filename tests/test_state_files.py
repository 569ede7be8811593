"""Optimizer states in safetensors files, and what loading refuses: the parameter is named, the optimizer is as it was."""

import json

import pytest
import torch
from configs import assert_same_bits, copies, parameters, tensors, train

import fusedopt
from fusedopt.state_files import read_safetensors, write_safetensors

SHAPES = ((40, 130), (7,), (), (0,), (64, 48))
KINDS = {
    "fp32": (torch.float32, {}),
    "int8-stochastic": (torch.bfloat16, {"state_format": "int8", "param_precision": "stochastic"}),
    "int4-split24": (torch.bfloat16, {"state_format": "int4", "param_precision": "split24"}),
    "mixed-master": (torch.bfloat16, {"state_format": {"exp_avg": "bf16", "exp_avg_sq": "fp8"}, "param_precision": "master"}),
    "kahan": (torch.float16, {"param_precision": "kahan"}),
    "galore": (torch.float32, {"projection": fusedopt.GaLore(rank=8), "state_format": "int8"}),
    "qgalore": (torch.bfloat16, {"projection": fusedopt.QGaLore(rank=8)}),
}  # fmt: skip


def make(params, options, cls=fusedopt.AdamW, **more):
    return cls(params, lr=0.01, min_quantized_numel=16, seed=4, **options, **more)


@pytest.mark.parametrize("offload", [None, "memory", "file"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_go_through_a_file_bit_for_bit(kind, offload, tmp_path):
    dtype, options = KINDS[kind]
    if offload and "galore" in kind:
        pytest.skip("projections are not offloaded")
    params = parameters(*SHAPES, dtype=dtype)
    opt = make(params, options)
    if offload:
        fusedopt.offload(opt, folder=tmp_path if offload == "file" else None)
    train(opt, params[:4], 0, 2)
    train(opt, params, 2, 3)
    fusedopt.export_states(opt, tmp_path / "states.safetensors")
    resumed = copies(params)
    loaded = make(resumed, options)
    if offload:
        fusedopt.offload(loaded, folder=tmp_path if offload == "file" else None)
    fusedopt.import_states(loaded, tmp_path / "states.safetensors")
    assert_same_bits(tensors(loaded, resumed), tensors(opt, params), "after loading:")
    train(opt, params, 3, 5)
    train(loaded, resumed, 3, 5)
    assert_same_bits(tensors(loaded, resumed), tensors(opt, params))


@pytest.mark.parametrize("form", ["fp32", "int8", "int4"])
def test_transposed_parameters(form, tmp_path):
    runs = []
    for _ in range(2):
        p = torch.nn.Parameter(parameters((48, 60))[0].detach().t().contiguous().t())
        runs.append((p, fusedopt.AdamW([p], state_format=form, min_quantized_numel=1)))
    (p, opt), (q, loaded) = runs
    train(opt, [p], 0, 2)
    q.data.copy_(p.data)
    fusedopt.export_states(opt, tmp_path / "s")
    fusedopt.import_states(loaded, tmp_path / "s")
    train(opt, [p], 2, 3)
    train(loaded, [q], 2, 3)
    assert_same_bits(tensors(loaded, [q]), tensors(opt, [p]))


def test_names_and_metadata(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 2))
    path = tmp_path / "s"
    opt = fusedopt.AdamW(model.parameters(), state_format="int8", min_quantized_numel=100)
    model(torch.ones(1, 20)).sum().backward()
    opt.step()
    fusedopt.export_states(opt, path, model)
    found, metadata = read_safetensors(path)
    assert {"0.weight.exp_avg", "0.weight.exp_avg_int8_scale", "1.bias.exp_avg_sq"} <= found.keys()
    told = json.loads(metadata["fusedopt"])
    assert told["optimizer"] == "AdamW" and told["version"] == 1
    weight = told["parameters"]["0.weight"]
    assert weight["rule"] == "adam" and weight["step"] == 1 and weight["shape"] == [30, 20]
    assert weight["formats"] == {"exp_avg": "int8", "exp_avg_sq": "int8"}
    assert told["parameters"]["1.bias"]["formats"] == {"exp_avg": "fp32", "exp_avg_sq": "fp32"}
    # The order of parameters is another one, and the names are the optimizer's own.
    torch.manual_seed(1)
    twin = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 2))
    other = fusedopt.AdamW(list(twin.named_parameters())[::-1], state_format="int8", min_quantized_numel=100)
    fusedopt.import_states(other, path)
    for (_, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert_same_bits(tensors(other, [q])[1:], tensors(opt, [p])[1:])
    with pytest.raises(ValueError, match="it has 0.bias, 0.weight, .*it lacks param.0"):
        fusedopt.import_states(fusedopt.AdamW(twin.parameters()), path)
    with pytest.raises(ValueError, match=r"parameter 0 \(shape \(3,\)\) is not in the model"):
        fusedopt.export_states(fusedopt.AdamW(parameters((3,))), path, model)


def test_the_safetensors_library_agrees(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    given = {
        "a.x": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.uint8), "c": torch.randn(5, 4).bfloat16().t(),
        "d": torch.randn(()).double(), "e": torch.zeros(0, 3), "f": torch.arange(3), "g": torch.tensor([True, False]),
        "h": torch.randn(9).half(), "i": torch.arange(3, dtype=torch.int8), "j": torch.arange(3, dtype=torch.int16),
    }  # fmt: skip
    write_safetensors(tmp_path / "ours", given, {"k": "vä"})
    theirs = library.load_file(tmp_path / "ours")
    library.save_file({k: v.contiguous() for k, v in given.items()}, tmp_path / "theirs", {"k": "vä"})
    ours, metadata = read_safetensors(tmp_path / "theirs")
    assert metadata == {"k": "vä"} and theirs.keys() == ours.keys() == given.keys()
    for name, t in given.items():
        assert_same_bits([theirs[name], ours[name]], [t.contiguous()] * 2, name)


def test_unaligned_tensors_of_another_writer(tmp_path):
    head = json.dumps({"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
                       "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]}}).encode()  # fmt: skip
    data = bytes([1, 2, 3]) + torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "f").write_bytes(len(head).to_bytes(8, "little") + head + data)
    found, _ = read_safetensors(tmp_path / "f")
    assert found["a"].tolist() == [1, 2, 3] and found["b"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_truncated_files_are_named(cut, tmp_path):
    params = parameters((30, 30))
    opt = fusedopt.AdamW(params)
    train(opt, params, 0, 1)
    fusedopt.export_states(opt, tmp_path / "s")
    whole = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match="s is truncated, damaged, or no safetensors file"):
        fusedopt.import_states(opt, tmp_path / "s")


# What loading refuses


class Snapshot:
    """Everything of an optimizer that a refused load must leave: the objects themselves and their bits."""

    def __init__(self, opt, params):
        self.opt, self.params = opt, params
        self.bits = tensors(opt, params)
        self.entries = {p: (e, dict(e)) for p, e in opt.state.items()}
        self.groups = [(g, {k: v for k, v in g.items() if k != "params"}, list(g["params"])) for g in opt.param_groups]
        self.plan, self.engine = opt._plan, opt._offload

    def check(self) -> None:
        assert_same_bits(tensors(self.opt, self.params), self.bits)
        assert self.opt.state.keys() == self.entries.keys()
        for p, (entry, values) in self.entries.items():
            assert self.opt.state[p] is entry and entry.keys() == values.keys()
            assert all(entry[k] is v for k, v in values.items())
        assert len(self.opt.param_groups) == len(self.groups)
        for group, (same, values, params) in zip(self.opt.param_groups, self.groups, strict=True):
            assert group is same and {k: v for k, v in group.items() if k != "params"} == values
            assert all(a is b for a, b in zip(group["params"], params, strict=True))
        assert self.opt._plan is self.plan and self.opt._offload is self.engine


def _resized(entry, name):
    entry[name] = torch.zeros(5, 5)


def _as_ints(entry, name):
    entry[name] = entry[name].long()


FAULTS = {
    "state of another shape": (lambda e: _resized(e, "exp_avg_sq"), r"'exp_avg_sq' has shape \(5, 5\)"),
    "codes without scales": (lambda e: e.pop("exp_avg_int8_scale"), "'exp_avg' is in codes, but none of its scales"),
    "too few scales": (lambda e: _resized(e, "exp_avg_int8_scale"), "needs 21 scales .*, not 25"),
    "integer scales": (lambda e: _as_ints(e, "exp_avg_sq_int8_scale"), "scales 'exp_avg_sq_int8_scale' are torch.int64"),
    "integer state": (lambda e: _as_ints(e, "exp_avg"), "'exp_avg' has dtype torch.int64"),
    "no tensor": (lambda e: e.update(exp_avg=3), "'exp_avg' is a int"),
    "a state missing": (lambda e: e.pop("exp_avg_sq"), "rule 'adam' keeps"),
    "another rule": (lambda e: e.update(momentum_buffer=torch.zeros(40, 130)), "rule 'adam' keeps"),
    "many steps": (lambda e: e.update(step=torch.ones(3)), "the loaded 'step' is tensor"),
    "words for steps": (lambda e: e.update(step="three"), "the loaded 'step' is 'three'"),
    "companion of another shape": (lambda e: _resized(e, "low_bits"), r"'low_bits' has shape \(5, 5\)"),
    "companion of another dtype": (lambda e: e.update(low_bits=e["low_bits"].float()), "'low_bits' is torch.float32, not int8"),
}  # fmt: skip


@pytest.mark.parametrize("offload", [None, "memory", "file"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_refused_load_leaves_the_optimizer_as_it_was(fault, offload, tmp_path):
    """The fault is in the last parameter, when the others have been read."""
    spoil, why = FAULTS[fault]
    shapes = ((7,), (40, 130))
    params, other = parameters(*shapes, dtype=torch.bfloat16), parameters(*shapes, dtype=torch.bfloat16)
    options = {"state_format": "int8", "param_precision": "split24"}
    opt = make([("bias", params[0]), ("weight", params[1])], options)
    same = make(other, options)
    if offload:
        fusedopt.offload(opt, folder=tmp_path if offload == "file" else None)
    train(opt, params, 0, 2)
    train(same, other, 0, 2)
    saved = opt.state_dict()
    saved = {"state": {i: dict(e) for i, e in saved["state"].items()}, "param_groups": saved["param_groups"]}
    saved["param_groups"] = [{**g, "lr": 0.5} for g in saved["param_groups"]]
    spoil(saved["state"][1])
    before = Snapshot(opt, params)
    with pytest.raises(ValueError, match=r"AdamW: parameter 1 'weight' \(shape \(40, 130\).*" + why):
        opt.load_state_dict(saved)
    before.check()
    train(opt, params, 2, 4)
    train(same, other, 2, 4)
    assert_same_bits(tensors(opt, params), tensors(same, other))


@pytest.mark.parametrize("broken", [{}, {"state": {}}, {"state": {}, "param_groups": []}])
def test_what_is_no_state_dict_is_refused(broken):
    params = parameters((5,))
    opt = fusedopt.AdamW(params)
    train(opt, params, 0, 1)
    before = Snapshot(opt, params)
    with pytest.raises(ValueError, match="not an optimizer's state dict|different number of parameter groups"):
        opt.load_state_dict(broken)
    before.check()


def test_a_projector_of_another_kind_is_refused():
    params = parameters((40, 130))
    opt = make(params, {"projection": fusedopt.GaLore(rank=8)})
    train(opt, params, 0, 2)
    saved = opt.state_dict()
    entry = saved["state"][0] = dict(saved["state"][0])
    name = next(k for k in entry if k not in ("step", "exp_avg", "exp_avg_sq") and entry[k].is_floating_point())
    entry[name] = entry[name].int()
    before = Snapshot(opt, params)
    with pytest.raises(ValueError, match=f"parameter 0 .*the loaded {name!r} is torch.int32"):
        opt.load_state_dict(saved)
    before.check()


def _change(path, edit_tensors=None, edit_about=None) -> None:
    found, metadata = read_safetensors(path)
    found = {k: v.clone() for k, v in found.items()}
    told = json.loads(metadata["fusedopt"])
    if edit_tensors:
        edit_tensors(found)
    if edit_about:
        edit_about(told["parameters"])
    write_safetensors(path, found, {"fusedopt": json.dumps(told)})


def test_import_refuses_what_does_not_fit_and_names_it(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    params, path = list(model.parameters()), tmp_path / "s"
    opt = fusedopt.AdamW(params)
    train(opt, params, 0, 2)

    def refused(why, edit_tensors=None, edit_about=None, target=opt):
        fusedopt.export_states(opt, path, model)
        _change(path, edit_tensors, edit_about)
        before = Snapshot(target, params)
        with pytest.raises(ValueError, match=why):
            fusedopt.import_states(target, path, model)
        before.check()

    key = "1.weight.exp_avg"
    refused(r"'1.weight' \(shape \(8, 8\).*'exp_avg' has shape \(3, 3\)", lambda t: t.update({key: torch.zeros(3, 3)}))
    refused(r"'1.weight' \(shape \(8, 8\).*'exp_avg' has dtype torch.int64", lambda t: t.update({key: t[key].long()}))
    refused("'1.weight' lacks its state exp_avg", lambda t: t.pop(key))
    refused("'1.weight' has states of rule 'sgd'", None, lambda a: a["1.weight"].update(rule="sgd"))
    refused(r"'1.weight' has shape \[4, 16\] in the file", None, lambda a: a["1.weight"].update(shape=[4, 16]))
    refused("it lacks 1.weight", None, lambda a: a.pop("1.weight"))
    lion = fusedopt.Lion(params)
    train(lion, params, 0, 1)
    refused("'0.weight' has states of rule 'adam' .*this Lion keeps those of 'lion'", target=lion)
    write_safetensors(path, {}, {})
    with pytest.raises(ValueError, match="holds no optimizer states"):
        fusedopt.import_states(opt, path, model)
