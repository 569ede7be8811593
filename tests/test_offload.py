"""Offloaded states: every mode steps to the bits of an ordinary step, within its memory, and stays an optimizer."""

import gc
import os
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from configs import BY_NAME, CONFIGS, assert_same_bits, each_config, parameters, set_grads, tensors, train

import fusedopt
from fusedopt.offloading import engine, storage
from fusedopt.offloading import staging_bytes as staging

SHAPES = ((40, 130), (7,), (), (0,), (64, 64), (33, 57), (2000,))
LARGEST = 40 * 130
LIMIT = 3 * 105_000  # of the largest tensor's chunk: fp32 states and weights, and what streams
MODES = {
    "memory": {},
    "paged": {"step_on": "device"},
    "file": {"folder": True},
    "streamed": {},
    "streamed-file": {"folder": True},
}
STORAGE = [
    (torch.float32, "nearest", "fp32"), (torch.bfloat16, "stochastic", "int8"), (torch.bfloat16, "split24", "int4"),
    (torch.bfloat16, "master", {"exp_avg": "bf16_stochastic", "exp_avg_sq": "fp8", "momentum_buffer": "int8c"}),
]  # fmt: skip
each_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
def offloaded(tmp_path, monkeypatch):
    """Offloads an optimizer in a mode. "streamed" stages gradients and parameters as if they were on a GPU."""

    def do(opt, mode: str, limit: int = LIMIT):
        monkeypatch.setattr(engine, "streams_to_cpu", lambda settings, device: mode.startswith("streamed"))
        options = dict(MODES[mode])
        if options.get("folder"):
            options["folder"] = tmp_path
        fourth = LARGEST * 4 * 3 if len(opt.rule_for(opt.param_groups[0]).states) == 4 else 0
        return fusedopt.offload(opt, memory_limit=limit + fourth, **options)

    return do


def make(config, params, storage_of, **options):
    _, precision, form = storage_of
    common = {"state_format": form, "param_precision": precision, "min_quantized_numel": 100, "seed": 3}
    return config.make(params, **common | options)


def uneven_steps(opt, params, steps=range(5)) -> None:
    """Gradients that come late, stay away for a step, and parameters that never have any."""
    for step in steps:
        set_grads(params, step)
        params[2].grad = None
        if step == 1:
            params[0].grad = params[4].grad = None
        if step < 2:
            params[5].grad = None
        opt.step()


@each_mode
@each_config()
def test_steps_have_the_bits_of_ordinary_ones(config, mode, offloaded):
    for kept in STORAGE:
        for clip in (None, 0.7):
            runs = []
            for moved in (False, True):
                params = parameters(*SHAPES, dtype=kept[0])
                opt = make(config, params, kept, clip_grad_norm=clip)
                if moved:
                    assert offloaded(opt, mode) is opt
                uneven_steps(opt, params)
                runs.append(tensors(opt, params) + ([] if clip is None else [opt.grad_norm]))
            assert_same_bits(runs[1], runs[0], f"{kept}, clip {clip}:")


def test_modes_stage_what_they_say(offloaded):
    """The tests above are worth something only if chunks take turns in the buffers."""
    seen = {}
    for mode in MODES:
        params = parameters(*[(64, 80)] * 7)
        opt = offloaded(fusedopt.AdamW(params), mode)
        train(opt, params, 0, 2)
        seen[mode] = (len(opt._offload.chunks), staging(opt)["host"], staging(opt)["device"])
    states = moved = 2 * 4 * 64 * 80
    per_chunk = LIMIT // 3 // states  # tensors
    assert seen["memory"] == (1, 0, 0)
    assert seen["paged"] == (4, 0, 3 * per_chunk * states)
    assert seen["file"] == (4, 3 * per_chunk * states, 0)
    per_chunk = LIMIT // 3 // moved
    assert seen["streamed"] == (4, 3 * per_chunk * moved, 0)
    assert seen["streamed-file"] == (7, 3 * (states + moved), 0)


@pytest.mark.parametrize(
    "shapes, strides", [(((48, 60),), (1, 48)), (((48, 60),), (121, 2))], ids=["transposed", "gaps"]
)
@each_mode
def test_other_layouts(mode, shapes, strides, offloaded):
    runs = []
    for moved in (False, True):
        whole = torch.randn(48 * 121 + 60, generator=torch.Generator().manual_seed(0)).bfloat16()
        p = torch.nn.Parameter(whole.as_strided((48, 60), strides))
        opt = fusedopt.AdamW(
            [p], param_precision="split32", state_format="int8", min_quantized_numel=1, clip_grad_norm=0.1
        )
        opt = offloaded(opt, mode) if moved else opt
        for step in range(3):
            set_grads([p], step)
            if step == 2:
                p.grad = p.grad.contiguous()
            opt.step()
        runs.append([whole, *tensors(opt, [p])])
    assert_same_bits(runs[1], runs[0])


@each_mode
def test_groups_schedulers_and_closures(mode, offloaded):
    """A group added later, rates that change, torch's clipping, options by parameter, and hooks."""
    runs = []
    for moved in (False, True):
        params = parameters(*SHAPES, dtype=torch.bfloat16)
        fusedopt.override(params[4], state_format="fp32", param_precision="kahan")
        opt = fusedopt.Lion([{"params": params[:4], "lr": 0.1}], state_format="int8", min_quantized_numel=1)
        opt = offloaded(opt, mode) if moved else opt
        schedule = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
        calls = []
        opt.register_step_post_hook(lambda *_: calls.append(1))  # noqa: B023
        for step in range(6):
            if step == 2:
                opt.add_param_group({"params": params[4:], "lr": 0.01, "weight_decay": 0.3})

            def closure(step=step, params=params):
                set_grads(params, step)
                torch.nn.utils.clip_grad_norm_(params, 0.5)
                return torch.tensor(1.0)

            assert opt.step(closure) == 1.0
            schedule.step()
        assert len(calls) == 6
        runs.append(tensors(opt, params))
    assert_same_bits(runs[1], runs[0])


@each_mode
def test_options_that_change_between_steps(mode, offloaded):
    runs = []
    for moved in (False, True):
        params = parameters(*SHAPES, dtype=torch.bfloat16)
        opt = fusedopt.AdamW(params, param_precision="split24", clip_grad_norm=1.0)
        opt = offloaded(opt, mode) if moved else opt
        train(opt, params, 0, 2)
        opt.clip_grad_norm = None
        train(opt, params, 2, 3)
        opt.clip_grad_norm = 0.3
        opt.param_groups[0]["param_precision"] = "master"
        train(opt, params, 3, 5)
        opt.state[params[0]]["step"].fill_(9)
        opt.state[params[1]]["exp_avg"].zero_()
        train(opt, params, 5, 6)
        runs.append(tensors(opt, params))
    assert_same_bits(runs[1], runs[0])


@each_mode
def test_offload_in_the_middle_of_a_run_and_again(mode, offloaded):
    params, other = parameters(*SHAPES), parameters(*SHAPES)
    opt, same = fusedopt.AdamW(params), fusedopt.AdamW(other)
    train(opt, params, 0, 2)
    offloaded(opt, mode)
    train(opt, params, 2, 4)
    offloaded(opt, "paged")
    train(opt, params, 4, 5)
    train(same, other, 0, 5)
    assert_same_bits(tensors(opt, params), tensors(same, other))


@each_mode
def test_checkpoints(mode, offloaded, tmp_path):
    """Saved and loaded with weights_only, between offloaded and ordinary optimizers in both directions."""
    kept = STORAGE[1]
    params = parameters(*SHAPES, dtype=kept[0])
    opt = offloaded(make(BY_NAME["adamw"], params, kept), mode)
    uneven_steps(opt, params, range(3))
    torch.save({"model": params, "opt": opt.state_dict()}, tmp_path / "saved.pt")
    uneven_steps(opt, params, range(3, 6))
    for moved in (False, True):
        saved = torch.load(tmp_path / "saved.pt", weights_only=True)
        resumed = [torch.nn.Parameter(p) for p in saved["model"]]
        loaded = make(BY_NAME["adamw"], resumed, kept)
        loaded = offloaded(loaded, mode) if moved else loaded
        loaded.load_state_dict(saved["opt"])
        uneven_steps(loaded, resumed, range(3, 6))
        assert_same_bits(tensors(loaded, resumed), tensors(opt, params), f"offloaded: {moved}")


@each_mode
def test_states_moved_by_others_are_taken_back(mode, offloaded):
    """Lightning moves every state but `step` to the parameter's device, accelerate loads state dicts onto it."""
    params, other = parameters(*SHAPES), parameters(*SHAPES)
    opt, same = offloaded(fusedopt.AdamW(params), mode), fusedopt.AdamW(other)
    opt.load_state_dict(opt.state_dict())
    train(opt, params, 0, 2)
    for entry in opt.state.values():
        for name in entry:
            if name != "step":
                entry[name] = entry[name].clone()
    train(opt, params, 2, 3)
    opt.load_state_dict(deepcopy(opt.state_dict()))
    train(opt, params, 3, 4)
    train(same, other, 0, 4)
    assert_same_bits(tensors(opt, params), tensors(same, other))


@each_mode
def test_copies_go_their_own_way(mode, offloaded):
    params = parameters(*SHAPES)
    opt = offloaded(fusedopt.AdamW(params), mode)
    train(opt, params, 0, 2)
    copied = deepcopy(opt)
    mine = copied.param_groups[0]["params"]
    before = tensors(opt, params)
    train(copied, mine, 2, 4)
    assert_same_bits(tensors(opt, params), before)
    train(opt, params, 2, 4)
    assert_same_bits(tensors(copied, mine), tensors(opt, params))


@each_mode
def test_overflow_skips_a_step(mode, offloaded):
    params = parameters(*SHAPES)
    opt = offloaded(fusedopt.AdamW(params, amp_fused=True, clip_grad_norm=1.0), mode)
    train(opt, params, 0, 2)
    before = tensors(opt, params)
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    train(opt, params, 2, 3)
    assert_same_bits(tensors(opt, params), before)
    opt.found_inf = torch.tensor(0.0)
    other = parameters(*SHAPES)
    same = fusedopt.AdamW(other, amp_fused=True, clip_grad_norm=1.0)
    train(same, other, 0, 2)
    same.grad_scale, same.found_inf = opt.grad_scale, opt.found_inf
    train(opt, params, 2, 3)
    train(same, other, 2, 3)
    assert_same_bits(tensors(opt, params), tensors(same, other))


def test_states_four_times_larger_than_the_limit(tmp_path):
    """Staging never exceeds the limit, also while chunks are made, grow in number, and are loaded."""
    params, other = parameters(*[(100, 100)] * 24), parameters(*[(100, 100)] * 24)
    opt, same = fusedopt.AdamW(params), fusedopt.AdamW(other)
    limit = 24 * 8 * 10_000 // 4
    fusedopt.offload(opt, folder=tmp_path, memory_limit=limit)
    for mine, step_of in ((params, opt), (other, same)):
        set_grads(mine, 0)
        for p in mine[18:]:
            p.grad = None
        step_of.step()
        train(step_of, mine, 1, 3)
    opt.load_state_dict(opt.state_dict())
    train(opt, params, 3, 4)
    train(same, other, 3, 4)
    assert_same_bits(tensors(opt, params), tensors(same, other))
    assert fusedopt.state_bytes(opt) == 4 * limit
    assert limit / 2 < staging(opt)["host_peak"] <= limit
    assert staging(opt)["device_peak"] == 0


def test_scratch_files_leave_nothing_behind(tmp_path):
    params = parameters((100, 100))
    opt = fusedopt.offload(fusedopt.AdamW(params), folder=tmp_path)
    gc.collect()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    train(opt, params, 0, 2)
    opt.load_state_dict(opt.state_dict())
    train(opt, params, 2, 3)
    assert os.listdir(tmp_path) == []
    del opt
    gc.collect()
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


# Refusals


def test_a_tensor_that_does_not_fit_is_named(tmp_path):
    params = parameters((4,), (100, 100))
    opt = fusedopt.offload(fusedopt.AdamW(params), folder=tmp_path, memory_limit=100_000)
    set_grads(params, 0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"parameter 1 \(shape \(100, 100\).*memory_limit=240000 or more"):
        opt.step()
    assert_same_bits([p.detach() for p in params], before)
    assert not opt.state
    fusedopt.offload(opt, folder=tmp_path, memory_limit=240_000)
    opt.step()


@each_mode
def test_a_late_tensor_that_does_not_fit_leaves_the_others(mode, offloaded):
    if mode == "memory":
        pytest.skip("nothing is staged")
    params, other = parameters((30, 30), (200, 200)), parameters((30, 30))
    opt, same = offloaded(fusedopt.AdamW(params), mode), fusedopt.AdamW(other)
    train(opt, params[:1], 0, 2)
    set_grads(params, 2)
    with pytest.raises(ValueError, match="parameter 1"):
        opt.step()
    params[1].grad = None
    train(opt, params[:1], 2, 4)
    train(same, other, 0, 4)
    assert_same_bits(tensors(opt, params[:1]), tensors(same, other))


def test_gradients_are_checked_before_anything_moves(tmp_path):
    params = parameters((30, 30), (30, 30))
    opt = fusedopt.offload(fusedopt.AdamW(params), folder=tmp_path)
    train(opt, params, 0, 2)
    before = tensors(opt, params)
    set_grads(params, 2)
    params[1].grad = torch.ones(30, 30).to_sparse()
    with pytest.raises(RuntimeError, match="parameter 1 .* sparse gradient"):
        opt.step()
    assert_same_bits(tensors(opt, params), before)


def test_a_disk_error_in_a_step_asks_for_a_checkpoint(tmp_path, monkeypatch):
    params = parameters(*[(100, 100)] * 6)
    opt = fusedopt.offload(fusedopt.AdamW(params), folder=tmp_path, memory_limit=3 * 80_000)
    train(opt, params, 0, 2)
    saved, weights = deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
    write, calls = storage.ScratchFile.write, []

    def failing(self, source, offset):
        calls.append(offset)
        if len(calls) == 3:
            raise OSError("input/output error")
        write(self, source, offset)

    monkeypatch.setattr(storage.ScratchFile, "write", failing)
    with pytest.raises(OSError, match="input/output error"):
        train(opt, params, 2, 3)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="broke off half-way.*input/output error.*Load a checkpoint"):
        train(opt, params, 2, 3)
    opt.load_state_dict(saved)
    with torch.no_grad():
        for p, kept in zip(params, weights, strict=True):
            p.copy_(kept)
    train(opt, params, 2, 4)
    other = parameters(*[(100, 100)] * 6)
    same = fusedopt.AdamW(other)
    train(same, other, 0, 4)
    assert_same_bits(tensors(opt, params), tensors(same, other))


def test_what_cannot_be_offloaded_is_refused(tmp_path):
    params = parameters((64, 64))
    with pytest.raises(TypeError, match="AdamW is not an optimizer of fusedopt"):
        fusedopt.offload(torch.optim.AdamW(params))
    for opt, why in (
        (fusedopt.AdamW(params, projection=fusedopt.GaLore(rank=4)), r"parameter 0 .*low-rank or factored \(galore\)"),
        (fusedopt.Adafactor(params), "parameter 0 .*low-rank or factored"),
        (fusedopt.AdamW(params, capturable=True), "capturable=True"),
        (fusedopt.AdamW(params, differentiable=True), "differentiable=True"),
    ):
        with pytest.raises(ValueError, match=why):
            fusedopt.offload(opt)
        assert opt.offloading is None
    model = torch.nn.Linear(64, 64)
    opt = fusedopt.AdamW(model.parameters())
    with (
        fusedopt.release_gradients(model, opt),
        pytest.raises(ValueError, match="offload: release_gradients steps this"),
    ):
        fusedopt.offload(opt)
    for watched in (opt.record_metrics, lambda: fusedopt.check_numerics(opt)):
        with watched(), pytest.raises(ValueError, match="offload: record_metrics and check_numerics"):
            fusedopt.offload(opt)
    fusedopt.offload(opt)
    with pytest.raises(ValueError, match="release_gradients: the states of this AdamW are offloaded"):
        fusedopt.release_gradients(model, opt)
    with pytest.raises(ValueError, match="record_metrics: .* of an offloaded AdamW"):
        opt.record_metrics()
    with pytest.raises(ValueError, match="check_numerics: .* of an offloaded AdamW"):
        fusedopt.check_numerics(opt)
    model(torch.randn(3, 64)).sum().backward()
    assert not opt.supports_fused_back_pass()
    with pytest.raises(RuntimeError, match="parameter 0 .*offloaded states are stepped in chunks"):
        opt.step_parameter(model.weight)
    opt = fusedopt.AdamW(params)
    with pytest.raises(ValueError, match="unknown step_on 'gpu'"):
        fusedopt.offload(opt, step_on="gpu")
    with pytest.raises(ValueError, match="invalid memory_limit"):
        fusedopt.offload(opt, memory_limit=0)
    with pytest.raises(ValueError, match="does not exist"):
        fusedopt.offload(opt, folder=tmp_path / "missing")
    with pytest.raises(ValueError, match="is not offloaded"):
        staging(opt)


def test_the_plan_says_what_is_launched(tmp_path):
    params = parameters(*[(100, 100)] * 6)
    opt = fusedopt.offload(fusedopt.AdamW(params), folder=tmp_path, memory_limit=6 * 80_000)
    report = opt.plan()
    assert report.launches == 3 and [b["tensors"] for b in report.buckets] == [2, 2, 2]
    assert "3 launches" in report.explain()


@pytest.mark.gpu
@each_config([c for c in CONFIGS if c.name in ("adamw", "lion", "lars", "lamb")])
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("step_on, folder", [("cpu", False), ("cpu", True), ("device", False), ("device", True)])
def test_on_a_gpu(config, clip, step_on, folder, tmp_path):
    """Paged steps have the bits of the GPU's, streamed ones those of the CPU's, apart from the norm."""
    for kept in STORAGE:
        runs = []
        for moved in (False, True):
            home = "cuda" if step_on == "device" or moved else "cpu"
            params = [torch.nn.Parameter(p.detach().to(home)) for p in parameters(*SHAPES, dtype=kept[0])]
            opt = make(config, params, kept, clip_grad_norm=None if step_on == "cpu" else clip)
            if moved:
                fusedopt.offload(opt, step_on=step_on, folder=tmp_path if folder else None, memory_limit=LIMIT)
            for step in range(5):
                drawn = parameters(*SHAPES, dtype=kept[0])
                set_grads(drawn, step)
                for p, q in zip(params, drawn, strict=True):
                    p.grad = q.grad.to(home)
                opt.step()
            runs.append([t.cpu() for t in tensors(opt, params)])
        assert_same_bits(runs[1], runs[0], f"{kept}:")


MEMORY = """
import sys, torch, fusedopt

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

torch.set_num_threads(1)
params = [torch.nn.Parameter(torch.zeros(1 << 19)) for _ in range(24)]
for p in params:
    p.grad = torch.ones_like(p)
warm = fusedopt.AdamW(params[:1])
warm.step()
del warm
limit = 24 * (8 << 19) // 4
opt = fusedopt.offload(fusedopt.AdamW(params), folder=sys.argv[1], memory_limit=limit)
before, most = anonymous(), 0
for _ in range(3):
    opt.step()
    most = max(most, anonymous() - before)
opt.load_state_dict(opt.state_dict())
most = max(most, anonymous() - before)
opt.step()
most = max(most, anonymous() - before)
print(limit, most)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_memory_of_the_process_stays_at_the_limit(tmp_path):
    """States are 4 times the limit (and 100 MB): resident memory must not tell of more than the staging buffers."""
    env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(fusedopt.__file__))}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], env=env, capture_output=True, text=True, check=True
    )
    limit, most = map(int, done.stdout.split())
    assert limit / 2 < most < 1.25 * limit
