"""Data parallelism of whole tensors (DDP), whole tensors dealt out (ZeroRedundancyOptimizer), and flat partitions: FSDP1 and
DeepSpeed's ZeRO. Each really runs, in 2 gloo processes on the CPU, against one process."""

import copy
import os
import sys
import types

import pytest
import torch
import torch.distributed as dist
from processes import run
from sharded_models import assert_equal, backward, build, weights
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import fusedopt

STEPS = 3


def alone(cls, steps: int = STEPS, dtype=torch.float32, **options):
    """One process that trains throughout."""
    model = build(dtype)
    opt = cls(model.parameters(), **options)
    for i in range(steps):
        backward(model, i)
        opt.step()
    return model, opt


def ddp() -> None:
    """Gradients are equal everywhere after the reduction: every rule, clipping, projections and codes as in one process."""
    for cls, options in (
        (fusedopt.AdamW, {"lr": 0.01, "state_format": "int8", "min_quantized_numel": 0, "clip_grad_norm": 0.1}),
        (fusedopt.LAMB, {"lr": 0.01}),
        (fusedopt.AdamW, {"lr": 0.01, "projection": fusedopt.GaLore(rank=4, update_every=2)}),
        (fusedopt.Adafactor, {}),
    ):
        want, single = alone(cls, **options)
        model = DistributedDataParallel(build())
        opt = cls(model.parameters(), **options)
        for i in range(STEPS):
            backward(model, i)
            opt.step()
        assert_equal(weights(model), weights(want), str(options))
        if "clip_grad_norm" in options:
            assert torch.equal(opt.grad_norm, single.grad_norm) and float(opt.grad_norm) > 0.1


def zero_redundancy() -> None:
    for cls, options in (
        (fusedopt.AdamW, {"lr": 0.01, "state_format": "int8", "min_quantized_numel": 0}),
        (fusedopt.LAMB, {"lr": 0.01, "clip_grad_norm": None}),
    ):
        want, single = alone(cls, **options)
        model = DistributedDataParallel(build())
        opt = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, **options)
        for i in range(STEPS):
            backward(model, i)
            opt.step()
        assert_equal(weights(model), weights(want), str(options))
        opt.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            state = opt.state_dict()["state"]
            assert len(state) == len(list(model.parameters()))
            for i, p in enumerate(want.parameters()):
                assert_equal([state[i][k] for k in single.state[p]], list(single.state[p].values()))
            saved = [copy.deepcopy(opt.state_dict())]  # loading shares tensors with what it is given
        else:
            saved = [None]
        dist.broadcast_object_list(saved)
        other = DistributedDataParallel(build())
        other.load_state_dict(model.state_dict())
        resumed = ZeroRedundancyOptimizer(other.parameters(), optimizer_class=cls, **options)
        resumed.load_state_dict(saved[0])
        for m, o in ((model, opt), (other, resumed)):
            backward(m, STEPS)
            o.step()
        assert_equal(weights(other), weights(model))
        assert_equal(weights(model), weights(alone(cls, STEPS + 1, **options)[0]))


def wrapped(original: bool):
    return FullyShardedDataParallel(
        build(), use_orig_params=original, device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.FULL_SHARD
    )


def fsdp1() -> None:
    for original in (True, False):
        want, _ = alone(fusedopt.AdamW, lr=0.01, weight_decay=0.1)
        model = wrapped(original)
        opt = fusedopt.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        twins = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
        plain = fusedopt.AdamW(twins, lr=0.01, weight_decay=0.1)
        for i in range(STEPS):
            backward(model, i)
            for p, twin in zip(model.parameters(), twins, strict=True):
                twin.grad = None if p.grad is None else p.grad.clone()
            opt.step()
            plain.step()
        mine = [p.detach().clone() for p in model.parameters()]
        assert_equal(mine, [twin.detach() for twin in twins])
        if original:  # flat parameters get other gradients than one process by 5e-6 after 3 steps, with torch.optim too
            with FullyShardedDataParallel.summon_full_params(model):
                assert_equal([p.detach().clone() for p in model.parameters()], weights(want))
        for other, message in (
            (fusedopt.LAMB(model.parameters(), clip_grad_norm=None), "LAMB needs their shapes"),
            (fusedopt.AdamW(model.parameters(), clip_grad_norm=1.0), "clip_grad_norm would see this process's part"),
            (
                fusedopt.AdamW(model.parameters(), projection=fusedopt.GaLore(rank=2)),
                "no matrices for galore to project",
            ),
        ):
            backward(model, 0)
            with pytest.raises(RuntimeError, match=f"flat partition of FullySharded.*{message}"):
                other.step()


def engine(stage: int, make, dtype=torch.float32):
    import deepspeed

    model = build(dtype)
    config = {
        "train_micro_batch_size_per_gpu": 6, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16}, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    opt = make(model)
    return deepspeed.initialize(model=model, optimizer=opt, config=config, dist_init_required=False)[0], opt


def engine_steps(runner, dtype) -> None:
    for i in range(STEPS):
        x = torch.randn(6, 24, generator=torch.Generator().manual_seed(100 + i)).to(dtype)
        runner.backward(runner(x).float().square().mean())
        runner.step()


def deepspeed_zero() -> None:
    """Partitions cut tensors in two and mix them: an elementwise rule does not mind. bf16 weights are copies of fp32 ones."""
    from deepspeed.utils import safe_get_full_fp32_param

    two_groups = [
        lambda m: [{"params": list(m.parameters())[:4], "weight_decay": 0.1}, {"params": list(m.parameters())[4:]}]
    ][0]
    for stage in (1, 2, 3):
        runner, opt = engine(
            stage, lambda m: fusedopt.AdamW(two_groups(m), lr=0.01, state_format="fp32"), torch.bfloat16
        )
        same, _ = engine(stage, lambda m: torch.optim.AdamW(two_groups(m), lr=0.01, weight_decay=0.01), torch.bfloat16)
        for r in (runner, same):
            engine_steps(r, torch.bfloat16)
        parts = [p for group in opt.param_groups for p in group["params"]]
        assert all(p.dim() == 1 and p.dtype == torch.float32 for p in parts) and len(parts) <= 2
        for p, q in zip(runner.module.parameters(), same.module.parameters(), strict=True):
            torch.testing.assert_close(safe_get_full_fp32_param(p), safe_get_full_fp32_param(q), rtol=1e-5, atol=1e-7)
        for entry in opt.state.values():
            assert entry["exp_avg"].dim() == 1 and entry["step"] == STEPS


def deepspeed_refusals() -> None:
    for stage in (1, 2):
        for make, message in (
            (lambda m: fusedopt.LAMB(m.parameters(), clip_grad_norm=None), "LAMB needs their shapes"),
            (lambda m: fusedopt.LARS(m.parameters(), lr=0.1), "LARS needs their shapes"),
            (lambda m: fusedopt.Adafactor(m.parameters()), "Adafactor needs their shapes"),
            (lambda m: fusedopt.AdamW(m.parameters(), projection=fusedopt.GaLore(rank=2)), "no matrices for galore"),
            (lambda m: fusedopt.AdamW(m.parameters(), clip_grad_norm=1.0), "gradient_clipping in DeepSpeed"),
        ):
            with pytest.raises(RuntimeError, match=f"parameter 0 .*flat partition of DeepSpeed ZeRO.*{message}"):
                runner, _ = engine(stage, make, torch.bfloat16)
                engine_steps(runner, torch.bfloat16)


def test_two_processes():
    run(2, [ddp, zero_redundancy, fsdp1])


def test_deepspeed():
    pytest.importorskip("deepspeed")
    os.environ["DS_ACCELERATOR"] = "cpu"
    run(2, [deepspeed_zero, deepspeed_refusals])


def test_plain_tensors_are_no_partitions_because_deepspeed_is_imported(monkeypatch):
    """accelerate imports it wherever it is installed."""
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    p = torch.ones(64, requires_grad=True)
    p.grad = torch.ones(64)
    fusedopt.LAMB([p], lr=0.1, clip_grad_norm=1.0).step()
    assert not torch.equal(p.detach(), torch.ones(64))
