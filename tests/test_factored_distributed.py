"""Adafactor with sharded tensors (FSDP2, tensor parallelism, hybrid meshes) in 2 and 4 processes against one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from processes import run
from sharded_models import (
    assert_equal,
    build,
    mesh,
    replicas_agree,
    resumes,
    sharded,
    shards,
    spreads,
    train,
    weights,
    whole,
)
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fusedopt

STEPS = 4
VARIANTS = (
    {},
    {"beta1": 0.9, "weight_decay": 0.1},
    {"relative_step": False, "scale_parameter": False, "lr": 0.02, "clip_threshold": 0.1},
    {"variant": "torch", "eps": (None, 1e-3), "weight_decay": 0.1},
)


def close(dtype=torch.float32, on=None, rtol=2e-5, atol=2e-6, states=True, **options) -> None:
    pair = []
    for model in (build(dtype), sharded(dtype, on)):
        opt = fusedopt.Adafactor(model.parameters(), **options)
        train(model, opt, 0, STEPS)
        pair.append((model, opt))
    (one, single), (spread, opt) = pair
    for x, y in zip(weights(spread), weights(one), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=str(options))
    for p, q in zip(spread.parameters(), one.parameters(), strict=True):
        assert opt.state[p].keys() == single.state[q].keys()
        for name in single.state[q] if states else ():
            torch.testing.assert_close(
                whole(opt.state[p][name]), single.state[q][name], rtol=1e-4, atol=atol, msg=str((options, name))
            )
    assert replicas_agree(opt)


def like_one_process() -> None:
    for options in VARIANTS:
        close(**options)
    close(clip_grad_norm=0.5)


def storage() -> None:
    """Narrow momentum and weights: blocks of codes begin with a shard, and random bits are the shard's own."""
    for precision in ("nearest", "stochastic", "split24"):
        close(torch.bfloat16, param_precision=precision, rtol=0, atol=0.02, states=False)
    for form in ("bf16", "int8"):
        close(beta1=0.9, state_format=form, min_quantized_numel=0, rtol=0, atol=2e-3, states=False)


def splits() -> None:
    """Rows, columns, both, filters and vectors; shards that are empty on some processes."""
    gen = torch.Generator().manual_seed(0)
    for shape in ((24, 10), (3, 40), (40, 3), (6, 5, 3, 3), (4, 6, 10), (17,), (3,)):
        for on, placements in spreads(shape):
            for options in VARIANTS[1:3]:
                w, grads = torch.randn(shape, generator=gen), torch.randn(STEPS, *shape, generator=gen)
                one = torch.nn.Parameter(w.clone())
                spread = torch.nn.Parameter(shards(w.clone(), on, placements))
                opts = [fusedopt.Adafactor([p], **options) for p in (one, spread)]
                for g in grads:
                    one.grad, spread.grad = g, shards(g, on, placements)
                    for opt in opts:
                        opt.step()
                torch.testing.assert_close(spread.full_tensor(), one.detach(), rtol=1e-5, atol=1e-6)
                for name, value in opts[0].state[one].items():
                    torch.testing.assert_close(whole(opts[1].state[spread][name]), value, rtol=1e-5, atol=1e-6)
                assert not torch.equal(one, w), (shape, placements)
                replicas_agree(opts[1])


def columns_of_filters() -> None:
    """The dimensions that are factored, and those before them, of a stack of matrices."""
    gen = torch.Generator().manual_seed(0)
    for dim in range(4):
        w, grads = torch.randn(4, 6, 5, 3, generator=gen), torch.randn(STEPS, 4, 6, 5, 3, generator=gen)
        one = torch.nn.Parameter(w.clone())
        spread = torch.nn.Parameter(shards(w.clone(), mesh(), [Shard(dim)]))
        opts = [fusedopt.Adafactor([p]) for p in (one, spread)]
        for g in grads:
            one.grad, spread.grad = g, shards(g, mesh(), [Shard(dim)])
            for opt in opts:
                opt.step()
        torch.testing.assert_close(spread.full_tensor(), one.detach(), rtol=1e-5, atol=1e-6)
        row, col = (opts[1].state[spread][f"exp_avg_sq_{name}"] for name in ("row", "col"))
        assert row.placements == ((Shard(dim),) if dim < 3 else (Replicate(),))
        assert col.placements == ((Replicate(),) if dim == 2 else (Shard(min(dim, 2)),))


def random_bits_of_shards_differ() -> None:
    """Two shards with the same numbers are not rounded the same way."""
    w, g = (torch.randn(8, 64).bfloat16().repeat(2, 1) for _ in range(2))
    for beta1 in (None, 0.9):
        p = torch.nn.Parameter(distribute_tensor(w, mesh(), [Shard(0)]))
        p.grad = distribute_tensor(g, mesh(), [Shard(0)])
        fusedopt.Adafactor([p], lr=1e-3, beta1=beta1, param_precision="stochastic").step()
        first, second = p.full_tensor().chunk(2)
        assert not torch.equal(first, second) and 0 < (first != w[:8]).sum() < w.numel() / 2


def resumed() -> None:
    options = {"lr": 0.02, "beta1": 0.9, "state_format": "int8", "min_quantized_numel": 0}
    resumes(lambda model, **more: fusedopt.Adafactor(model.parameters(), **options, **more))


def checkpoints(folder: str) -> None:
    """torch.distributed.checkpoint, full state dicts to one process and back."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = {"lr": 0.02, "beta1": 0.9}
    model = sharded()
    opt = fusedopt.Adafactor(model.parameters(), **options)
    train(model, opt, 0, 3)
    names, saved = get_state_dict(model, opt)
    dcp.save({"model": names, "optimizer": saved}, checkpoint_id=folder)
    full = copy.deepcopy(get_state_dict(model, opt, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))
    train(model, opt, 3, 6)
    load(folder, model)

    parts = [None, None] if dist.get_rank() else list(full)
    dist.broadcast_object_list(parts)
    for target in (build(), sharded()):
        other = fusedopt.Adafactor(target.parameters(), **options)
        set_state_dict(
            target, other, model_state_dict=parts[0], optim_state_dict=parts[1],
            options=StateDictOptions(full_state_dict=True),
        )  # fmt: skip
        train(target, other, 3, 6)
        for x, y in zip(weights(target), weights(model), strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)


def load(folder: str, want=None) -> None:
    """What two processes saved, two or four load. want: the model that was trained on, None: one process's."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    options = {"lr": 0.02, "beta1": 0.9}
    model = sharded()
    opt = fusedopt.Adafactor(model.parameters(), **options)
    names, state = get_state_dict(model, opt)
    loaded = {"model": names, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(model, opt, 3, 6)
    if want is not None:
        assert_equal(weights(model), weights(want), "dcp")
        return
    one = build()
    train(one, fusedopt.Adafactor(one.parameters(), **options), 0, 6)
    for x, y in zip(weights(model), weights(one), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)


def refusals() -> None:
    turned = distribute_tensor(torch.randn(6, 8), mesh(), [Shard(1)])
    if turned.to_local().is_contiguous():
        turned = distribute_tensor(torch.randn(8, 6), mesh(), [Shard(0)]).t()
    p = torch.nn.Parameter(turned.detach())
    p.grad = p.detach().clone()
    with pytest.raises(RuntimeError, match="parameter 0 .*shard of strides"):
        fusedopt.Adafactor([p]).step()


CHECKS = [refusals, splits, like_one_process, storage, columns_of_filters, random_bits_of_shards_differ, resumed]


def test_two_processes(tmp_path):
    run(2, CHECKS)
    run(2, [checkpoints], str(tmp_path))
    run(4, [load], str(tmp_path))


def hybrid() -> None:
    """Replicas of shards."""
    close(on=mesh(2, 2), beta1=0.9)


def test_four_processes():
    run(4, [splits, hybrid, resumed])
