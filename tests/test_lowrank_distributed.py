"""GaLore with sharded matrices (FSDP2, tensor parallelism, hybrid meshes) in 2 and 4 processes against one process."""

import copy
from functools import partial

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
from torch.distributed.tensor import Shard, distribute_tensor

import fusedopt
from fusedopt import distributed
from fusedopt.precision import COMPANIONS

STEPS = 5  # with refreshes at the first, the third and the fifth, or staggered
RANK = 4


def galore(**options):
    return fusedopt.GaLore(rank=RANK, update_every=2, scale=0.5, **options)


def adamw(model, **options):
    return fusedopt.AdamW(model.parameters(), lr=0.02, projection=galore(), **options)


def pair(cls=fusedopt.AdamW, dtype=torch.float32, on=None, projection=None, last=STEPS, **options) -> list[tuple]:
    out = []
    for model in (build(dtype), sharded(dtype, on)):
        opt = cls(model.parameters(), projection=projection or galore(), **{"lr": 0.02, "weight_decay": 0.1, **options})
        train(model, opt, 0, last)
        out.append((model, opt))
    return out


def states(model, opt) -> list[dict[str, torch.Tensor]]:
    return [{k: whole(v).clone() for k, v in opt.state[p].items()} for p in model.parameters()]


def close(rtol=2e-5, atol=2e-6, projected=3, **options) -> None:
    one, spread = pair(**options)
    assert sum("projector" in entry for entry in one[1].state.values()) == projected
    for x, y in zip(weights(spread[0]), weights(one[0]), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=str(options))
    for x, y in zip(states(*spread), states(*one), strict=True):
        assert x.keys() == y.keys()
        for name in x.keys() - set(COMPANIONS):  # low bits follow the high ones
            torch.testing.assert_close(x[name], y[name], rtol=max(rtol, 1e-4), atol=atol, msg=str((options, name)))


def like_one_process() -> None:
    for side in ("std", "left", "right"):
        for method in ("randomized", "svd", "random"):
            close(projection=galore(side=side, method=method))
    close(cls=fusedopt.SGD, momentum=0.9, weight_decay=0.0, projection=galore(side="right", stagger=False))
    close(clip_grad_norm=0.5)
    for form in ("fp32", "bf16_stochastic", "int8"):
        options = {"projection": galore(side="left"), "state_format": form, "min_quantized_numel": 0}
        assert replicas_agree(pair(dtype=torch.bfloat16, param_precision="stochastic", **options)[1][1])


def storage() -> None:
    """Narrow states and weights: blocks of codes begin with a shard, and random bits are the shard's own: equal up to these."""
    bf16 = {"dtype": torch.bfloat16, "rtol": 0, "atol": 0.02}
    close(state_format="bf16", rtol=0, atol=2e-3)
    for precision in ("nearest", "stochastic", "split24"):
        close(param_precision=precision, **bf16)
    for state_format in ("int8", "int4"):
        one, spread = pair(state_format=state_format, min_quantized_numel=0)
        for x, y in zip(weights(spread[0]), weights(one[0]), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0.02 if state_format == "int8" else 0.1)


def random_bits_of_shards_differ() -> None:
    """Two shards with the same numbers are not rounded the same way: neither their weights nor their states."""
    w, g = (torch.randn(8, 64).bfloat16().repeat(2, 1) for _ in range(2))
    for side in ("right", "left"):
        p = torch.nn.Parameter(distribute_tensor(w, mesh(), [Shard(0)]))
        p.grad = distribute_tensor(g, mesh(), [Shard(0)])
        options = {"param_precision": "stochastic", "state_format": "bf16_stochastic", "weight_decay": 0.0}
        opt = fusedopt.AdamW([p], lr=1e-3, projection=fusedopt.GaLore(rank=4, side=side), **options)
        opt.step()
        first, second = p.full_tensor().chunk(2)
        assert not torch.equal(first, second) and 0 < (first != w[:8]).sum()
        if side == "right":
            first, second = opt.state[p]["exp_avg"].full_tensor().chunk(2)
            assert not torch.equal(first, second)
            torch.testing.assert_close(first, second, rtol=2**-7, atol=1e-6)


def splits() -> None:
    """Rows, columns, both, and filters; shards that are empty on some processes."""
    gen = torch.Generator().manual_seed(0)
    for shape in ((24, 10), (10, 24), (3, 40), (40, 3), (6, 5, 3, 3)):
        for on, placements in spreads(shape):
            for side in ("left", "right"):
                w, grads = torch.randn(shape, generator=gen), torch.randn(STEPS, *shape, generator=gen)
                one = torch.nn.Parameter(w.clone())
                spread = torch.nn.Parameter(shards(w.clone(), on, placements))
                projection = fusedopt.GaLore(rank=2, update_every=2, side=side)
                opts = [fusedopt.Lion([p], lr=0.02, projection=projection) for p in (one, spread)]
                for g in grads:
                    one.grad, spread.grad = g, shards(g, on, placements)
                    for opt in opts:
                        opt.step()
                torch.testing.assert_close(spread.full_tensor(), one.detach(), rtol=1e-5, atol=1e-5)
                assert not torch.equal(one, w), (shape, side, placements)
                replicas_agree(opts[1])


def sends_no_gradients() -> None:
    """Between refreshes: nothing where the processes share out what the projection keeps, else R and no more."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sent(TorchDispatchMode):
        numels: list[int] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
                tensors = torch.utils._pytree.tree_leaves(args)
                self.numels.append(sum(t.numel() for t in tensors if isinstance(t, torch.Tensor)))
            return func(*args, **(kwargs or {}))

    for side, placement, want in (("right", Shard(0), []), ("left", Shard(0), [4 * 48]), ("left", Shard(1), [])):
        p = torch.nn.Parameter(shards(torch.randn(64, 48), mesh(), [placement]))
        opt = fusedopt.AdamW([p], projection=fusedopt.GaLore(rank=4, update_every=3, side=side))
        for step in range(4):
            p.grad = shards(torch.randn(64, 48), mesh(), [placement])
            with Sent() as sent:
                sent.numels = []
                opt.step()
            assert (sent.numels != want) == (step in (0, 3)), (side, placement, step, sent.numels)
            assert step not in (0, 3) or sum(sent.numels) >= 64 * 48 / dist.get_world_size()


def sums_in_fp32() -> None:
    """256 + 1 + 1 + 1 in bf16, whose numbers are 2 apart there: each sum would lose the 1 that is added to 256."""
    x = torch.full((64,), 256.0 if dist.get_rank() == 0 else 1.0).bfloat16()
    out = distributed.add_up(x, (mesh().get_group(),))
    assert out is x and torch.equal(x, torch.full((64,), 260.0).bfloat16())


def states_are_spread() -> None:
    """A process keeps its part of what the processes share out."""
    world = dist.get_world_size()
    for side, placement in (("right", Shard(0)), ("left", Shard(1)), ("left", Shard(0)), ("right", Shard(1))):
        p = torch.nn.Parameter(shards(torch.randn(64, 48), mesh(), [placement]))
        p.grad = p.detach().clone()
        opt = fusedopt.AdamW([p], projection=fusedopt.GaLore(rank=4, side=side))
        opt.step()
        entry, kept = opt.state[p], 1 if side == "left" else 0
        split = placement.dim
        for name, is_split in (("exp_avg", split == kept), ("exp_avg_sq", split == kept), ("projector", split != kept)):
            whole_numel = entry[name].numel()
            assert entry[name].to_local().numel() == (whole_numel // world if is_split else whole_numel), (side, split)
        assert entry["exp_avg"].shape == ((4, 48) if side == "left" else (64, 4))


def resumed() -> None:
    for kind in ({}, {"state_format": "int8", "min_quantized_numel": 0}):
        resumes(partial(adamw, **kind))


def checkpoints(folder: str) -> None:
    """torch.distributed.checkpoint, full state dicts to one process and back."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    for number, options in enumerate(
        ({}, {"state_format": "int8", "min_quantized_numel": 0}, {"state_format": "int4"})
    ):
        options = {"lr": 0.02, "projection": galore(), **options}
        model = sharded()
        opt = fusedopt.AdamW(model.parameters(), **options)
        train(model, opt, 0, 3)
        names, saved = get_state_dict(model, opt)
        path = f"{folder}/{number}"
        dcp.save({"model": names, "optimizer": saved}, checkpoint_id=path)
        full = get_state_dict(model, opt, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        full = copy.deepcopy(full)  # of replicated tensors it holds the live ones
        train(model, opt, 3, 6)

        again = sharded()
        other = fusedopt.AdamW(again.parameters(), **options)
        names, state = get_state_dict(again, other)
        loaded = {"model": names, "optimizer": state}
        dcp.load(loaded, checkpoint_id=path)
        set_state_dict(again, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        train(again, other, 3, 6)
        assert_equal(weights(again), weights(model), f"dcp {options}")

        parts = [None, None] if dist.get_rank() else list(full)
        dist.broadcast_object_list(parts)
        for target in (build(), sharded()):
            other = fusedopt.AdamW(target.parameters(), **options)
            set_state_dict(
                target, other, model_state_dict=parts[0], optim_state_dict=parts[1],
                options=StateDictOptions(full_state_dict=True),
            )  # fmt: skip
            train(target, other, 3, 6)
            for x, y in zip(weights(target), weights(model), strict=True):
                apart = 0.05 if "state_format" in options else 2e-5
                torch.testing.assert_close(x, y, rtol=0, atol=apart, msg=f"full {options}")


def resharded(folder: str) -> None:
    """What two processes saved, four load."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    options = {"lr": 0.02, "projection": galore()}
    model = sharded()
    opt = fusedopt.AdamW(model.parameters(), **options)
    names, state = get_state_dict(model, opt)
    loaded = {"model": names, "optimizer": state}
    dcp.load(loaded, checkpoint_id=f"{folder}/0")
    set_state_dict(model, opt, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(model, opt, 3, 6)
    one = build()
    single = fusedopt.AdamW(one.parameters(), **options, weight_decay=0.01)
    train(one, single, 0, 6)
    for x, y in zip(weights(model), weights(one), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def refusals() -> None:
    """Nothing is updated."""
    filters = shards(torch.randn(6, 8, 3, 3), mesh(), [Shard(1)])
    matrix = distribute_tensor(torch.randn(64, 48), mesh(), [Shard(0)])
    for w, projection, message in (
        (filters, fusedopt.GaLore(rank=2), "GaLore takes matrices whose first dimension is split"),
        (matrix, fusedopt.DCT(rank=4), "is a DTensor, and DCT needs the whole tensor"),
        (matrix, fusedopt.QGaLore(rank=4), "is a DTensor, and QGaLore needs the whole tensor"),
        (matrix, fusedopt.Frugal(), "is a DTensor, and Frugal needs the whole tensor"),
    ):
        p, good = torch.nn.Parameter(w.clone()), torch.nn.Parameter(torch.ones(8))
        opt = fusedopt.AdamW([good, p], projection=projection)
        good.grad, p.grad = torch.ones(8), w.clone()
        with pytest.raises(RuntimeError, match=f"parameter 1 .*{message}"):
            opt.step()
        assert torch.equal(good, torch.ones(8)) and not opt.state[p]


CHECKS = [
    refusals, splits, like_one_process, storage, random_bits_of_shards_differ, sends_no_gradients, states_are_spread, resumed,
]  # fmt: skip


def test_two_processes(tmp_path):
    run(2, CHECKS)
    run(2, [checkpoints], str(tmp_path))
    run(4, [resharded], str(tmp_path))


def hybrid() -> None:
    """Replicas of shards."""
    close(on=mesh(2, 2))


def test_four_processes():
    run(4, [sums_in_fp32, splits, hybrid, states_are_spread, resumed])
