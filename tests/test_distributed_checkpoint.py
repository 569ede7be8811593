"""torch.distributed.checkpoint of sharded models: exact resumption, 2 -> 4 -> 1 processes, full and flattened state dicts."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import run
from sharded_models import assert_equal, build, contents, sharded, train, weights, whole
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import fusedopt
from fusedopt.formats import get_format

# The form of states, the precision of bf16 parameters, and whether a resharded state is what was saved, bit for bit.
KINDS = {
    "fp32": ({"state_format": "fp32"}, torch.float32),
    "kahan": ({"state_format": "bf16", "param_precision": "kahan"}, torch.bfloat16),
    "master": ({"param_precision": "master", "clip_grad_norm": None}, torch.bfloat16),
    "split32": ({"param_precision": "split32"}, torch.bfloat16),
    "int8": ({"state_format": "int8", "min_quantized_numel": 0}, torch.float32),
    "int4": ({"state_format": "int4", "min_quantized_numel": 0, "param_precision": "split24"}, torch.bfloat16),
    "fp8": ({"state_format": {"exp_avg": "fp8", "exp_avg_sq": "int8c"}, "min_quantized_numel": 0}, torch.float32),
}
CODED = ("int8", "int4", "fp8")


def make(kind: str, distribute: bool = True):
    options, dtype = KINDS[kind]
    model = sharded(dtype) if distribute else build(dtype)
    groups = [{"params": list(model.parameters())[:3], "lr": 0.02}, {"params": list(model.parameters())[3:]}]
    return model, fusedopt.AdamW(groups, lr=0.01, weight_decay=0.1, seed=5, **options)


def fetch(model, opt, **options) -> dict:
    options = StateDictOptions(**options)
    return {
        "model": get_model_state_dict(model, options=StateDictOptions()),
        "optim": get_optimizer_state_dict(model, opt, options=options),
    }


def put(model, opt, saved: dict, **options) -> None:
    set_model_state_dict(model, saved["model"])
    set_optimizer_state_dict(model, opt, saved["optim"], options=StateDictOptions(**options))


def stored(opt) -> list[torch.Tensor]:
    """Every tensor of the state of this process, as it lies there."""
    return [v.to_local() if isinstance(v, DTensor) else v for entry in opt.state.values() for v in entry.values()]


def resumes_exactly(folder) -> None:
    """Through files, nested and flattened, with as many processes as saved."""
    for kind in KINDS:
        for flatten in (False, True):
            model, opt = make(kind)
            train(model, opt, 0, 3)
            path = f"{folder}/{kind}_{flatten}"
            dcp.save(fetch(model, opt, flatten_optimizer_state_dict=flatten), checkpoint_id=path)
            other, loaded = make(kind)
            loaded.param_groups[0]["lr"] = 1.0
            saved = fetch(other, loaded, flatten_optimizer_state_dict=flatten)
            dcp.load(saved, checkpoint_id=path)
            put(other, loaded, saved, flatten_optimizer_state_dict=flatten)
            assert loaded.param_groups[0]["lr"] == 0.02 and loaded.param_groups[0]["projection"] is None
            assert loaded.param_groups[0]["betas"] == (0.9, 0.999)
            assert_equal(stored(loaded), stored(opt), kind)
            for m, o in ((model, opt), (other, loaded)):
                train(m, o, 3, 5)
            assert_equal(weights(other), weights(model), kind)
            assert_equal(stored(loaded), stored(opt), kind)


def full_state_dicts(folder) -> None:
    """Gathered to the CPU of the first process, and sent from there; also into an optimizer of whole tensors and back."""
    for kind in KINDS:
        if kind == "split32":
            continue  # neither gloo nor NCCL sends 16-bit integers
        model, opt = make(kind)
        train(model, opt, 0, 3)
        full = fetch(model, opt, full_state_dict=True, cpu_offload=True)["optim"]
        if dist.get_rank() == 0:
            assert all(not isinstance(v, DTensor) for e in full["state"].values() for v in e.values())
        other, loaded = make(kind)
        set_model_state_dict(other, get_model_state_dict(model))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(other, loaded, full if dist.get_rank() == 0 else {}, options=options)
        assert_equal(stored(loaded), stored(opt), kind)
        everywhere = get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True))
        plain, whole_opt = make(kind, distribute=False)
        plain.load_state_dict({k: whole(v) for k, v in model.state_dict().items()})
        set_optimizer_state_dict(plain, whole_opt, copy.deepcopy(everywhere))
        assert_decoded_close(kind, contents(plain, whole_opt), contents(model, opt))
        again, reloaded = make(kind)
        reloaded.load_state_dict(copy.deepcopy(whole_opt.state_dict()))  # whole tensors, the same on every process
        set_model_state_dict(again, get_model_state_dict(model))
        assert_decoded_close(kind, contents(again, reloaded), contents(plain, whole_opt))
        adamw = torch.optim.AdamW(plain.parameters(), lr=0.01)
        adamw.load_state_dict({**adamw.state_dict(), "state": whole_opt.state_dict(format="torch")["state"]})
        reloaded.load_state_dict({**reloaded.state_dict(), "state": adamw.state_dict()["state"]})
        assert_decoded_close(kind, contents(again, reloaded)[:11], contents(plain, whole_opt)[:11])


def assert_decoded_close(kind: str, got: list, want: list) -> None:
    """Exact, but for states in codes whose blocks were cut anew: within the format's error of what was saved."""
    if kind not in CODED:
        return assert_equal(got, want, kind)
    formats = KINDS[kind][0]["state_format"]
    worst = max(
        max(bound) for name in (formats.values() if isinstance(formats, dict) else [formats])
        for bound in get_format(name).error_bounds
    )  # fmt: skip
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        if x.numel() and not torch.equal(x, y):
            assert float((x.double() - y.double()).abs().max()) <= worst * float(y.abs().max()) * 1.0001, (
                kind,
                x.shape,
                x.dtype,
                x,
                y,
            )
    return None


def before_the_first_step(folder) -> None:
    """States are made by a step with lr 0 and zero gradients: it moves nothing and is not counted."""
    for kind in KINDS:
        model, opt = make(kind)
        before = weights(model)
        saved = fetch(model, opt)
        assert_equal(weights(model), before)
        assert all(entry["step"] == 0 for entry in opt.state.values())
        assert all(entry["step"] == 0 for entry in saved["optim"]["state"].values())
        fresh, other = make(kind)
        put(fresh, other, saved)
        untouched, never_saved = make(kind)
        for m, o in ((model, opt), (fresh, other), (untouched, never_saved)):
            train(m, o, 0, 3)
        assert_equal(stored(opt), stored(never_saved), kind)
        assert_equal(stored(other), stored(never_saved), kind)
        assert_equal(weights(fresh), weights(untouched), kind)


def a_first_step_with_lr_zero_counts(folder) -> None:
    """Warm-up from 0: gradients are there on some process, so every process counts the step."""
    model, opt = make("fp32")
    for group in opt.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if dist.get_rank() == 1:
        next(model.parameters()).grad.to_local()[0, 0] = 1.0
    opt.step()
    assert all(entry["step"] == 1 for entry in opt.state.values())


def empty_groups_and_tensor_lr(folder) -> None:
    model = sharded()
    groups = [{"params": list(model.parameters())}, {"params": [], "weight_decay": 0.0}]
    opt = fusedopt.AdamW(groups, lr=torch.tensor(0.01))
    train(model, opt, 0, 2)
    other = sharded()
    loaded = fusedopt.AdamW([{"params": list(other.parameters())}, {"params": []}], lr=torch.tensor(0.5))
    put(other, loaded, fetch(model, opt))
    assert float(loaded.param_groups[0]["lr"]) == pytest.approx(0.01) and loaded.param_groups[1]["params"] == []
    for m, o in ((model, opt), (other, loaded)):
        train(m, o, 2, 4)
    assert_equal(contents(other, loaded), contents(model, opt))


def refusals(folder) -> None:
    model, opt = make("int8")
    train(model, opt, 0, 1)
    saved = opt.state_dict()
    before = stored(opt)
    for name, value, message in (
        ("exp_avg", torch.zeros(3, 24, dtype=torch.uint8), "parameter 0 .*'exp_avg' has shape .3, 24."),
        ("exp_avg_int8_scale", torch.zeros(8), "parameter 0 .*'exp_avg' has 1560 codes and 8 scales, not 1560 and 7"),
    ):
        broken = {**saved, "state": {i: dict(entry) for i, entry in saved["state"].items()}}
        broken["state"][0][name] = value
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(broken)
        assert_equal(stored(opt), before)


CHECKS = [
    resumes_exactly, full_state_dicts, before_the_first_step, a_first_step_with_lr_zero_counts, empty_groups_and_tensor_lr,
    refusals,
]  # fmt: skip


def test_two_processes(tmp_path):
    run(2, CHECKS, str(tmp_path))


def save(folder) -> None:
    for kind in KINDS:
        model, opt = make(kind)
        train(model, opt, 0, 3)
        dcp.save(fetch(model, opt), checkpoint_id=f"{folder}/2/{kind}")
        keep(folder, 2, kind, model, opt)


def keep(folder, processes: int, kind: str, model, opt) -> None:
    whole_state = contents(model, opt)
    if dist.get_rank() == 0:
        torch.save(whole_state, f"{folder}/{processes}_{kind}.pt")


def load_and_save(folder) -> None:
    """Loads what half or four times as many processes saved: the same whole tensors."""
    processes = dist.get_world_size()
    before = {4: 2, 1: 4}[processes]
    for kind in KINDS:
        model, opt = make(kind)
        saved = fetch(model, opt)
        dcp.load(saved, checkpoint_id=f"{folder}/{before}/{kind}")
        put(model, opt, saved)
        assert_decoded_close(kind, contents(model, opt), torch.load(f"{folder}/{before}_{kind}.pt"))
        train(model, opt, before + 1, before + 3)
        dcp.save(fetch(model, opt), checkpoint_id=f"{folder}/{processes}/{kind}")
        keep(folder, processes, kind, model, opt)


def test_two_four_one(tmp_path):
    """And the run ends where one process that trained throughout does."""
    run(2, [save], str(tmp_path))
    run(4, [load_and_save], str(tmp_path))
    run(1, [load_and_save], str(tmp_path))
    for kind in KINDS:
        model, opt = make(kind, distribute=False)
        train(model, opt, 0, 3)
        train(model, opt, 3, 5)
        train(model, opt, 5, 7)
        got, want = torch.load(tmp_path / f"1_{kind}.pt"), contents(model, opt)
        if kind in ("fp32", "master", "split32"):
            assert_equal(got, want, kind)
        else:  # codes of blocks that were cut anew, bits of shards that begin between octets: a share of the way
            start = weights(make(kind, distribute=False)[0])
            way = torch.stack([(x.double() - y.double()).norm() for x, y in zip(want, start, strict=False)]).norm()
            off = torch.stack(
                [(x.double() - y.double()).norm() for x, y in list(zip(got, want, strict=True))[: len(start)]]
            ).norm()
            assert off < {"int4": 0.06}.get(kind, 0.03) * way, (kind, off / way)
