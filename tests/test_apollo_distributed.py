"""APOLLO with sharded matrices (FSDP2, tensor parallelism, hybrid meshes) in 2 and 4 processes against one process."""

import copy
import itertools
from functools import partial

import torch
import torch.distributed as dist
from processes import run
from sharded_models import (
    assert_equal,
    build,
    mesh,
    replicas_agree,
    resumes,
    set_whole_grads,
    sharded,
    shards,
    spreads,
    weights,
)  # fmt: skip
from test_lowrank_distributed import states
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import fusedopt
from fusedopt import distributed
from fusedopt.precision import COMPANIONS

SIZES = (1.0, 0.1, 0.1, 5.0, 0.3, 2.0)  # of the gradients: updates grow, and the limiter acts
STEPS = len(SIZES)
GROWTH = 1.01
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def apollo(**options):
    return fusedopt.Apollo(**{"rank": 4, "update_every": 2, "scale": 2.0, **options})


def train(model, opt, first: int, last: int) -> list[torch.Tensor]:
    """Returns the norms of the updates after each step, [projected matrices]; the same on every process."""
    norms = []
    for i in range(first, last):
        set_whole_grads(model, i, SIZES[i])
        opt.step()
        kept = [entry["update_norm"] for entry in opt.state.values() if "update_norm" in entry]
        norms.append(torch.stack(kept) if kept else torch.zeros(0))
        same_everywhere(norms[-1])
    return norms


def same_everywhere(x: torch.Tensor) -> None:
    """Bit for bit."""
    everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, x)
    assert all(torch.equal(y, x) for y in everyone)


def adamw(model, **options):
    return fusedopt.AdamW(model.parameters(), lr=0.02, **options)


def limited(norms: list[torch.Tensor]) -> int:
    """How many updates the limiter made smaller."""
    return sum(int(torch.isclose(y, GROWTH * x, rtol=1e-5).sum()) for x, y in itertools.pairwise(norms))


def pair(cls=fusedopt.AdamW, dtype=F32, on=None, projection=None, **options) -> list[tuple]:
    """(model, optimizer, norms) in one process and in shards."""
    out = []
    for model in (build(dtype), sharded(dtype, on)):
        chosen = projection or apollo()
        opt = cls(model.parameters(), projection=chosen, **{"lr": 0.02, "weight_decay": 0.1, **options})
        out.append((model, opt, train(model, opt, 0, STEPS)))
    return out


def close(rtol=2e-5, atol=2e-6, **options) -> None:
    one, spread = pair(**options)
    projected = [p for p, entry in one[1].state.items() if entry["exp_avg"].shape != p.shape]
    assert len(projected) == 3
    growth = options.get("projection", apollo()).norm_growth
    assert all(len(x) == (0 if growth is None else 3) for x in one[2])
    assert growth is None or limited(one[2]) == limited(spread[2]) >= 2
    for x, y in zip(spread[2], one[2], strict=True):
        torch.testing.assert_close(x, y, rtol=max(rtol, 1e-5), atol=0, msg=str(options))
    for x, y in zip(weights(spread[0]), weights(one[0]), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=str(options))
    for x, y in zip(states(*spread[:2]), states(*one[:2]), strict=True):
        assert x.keys() == y.keys()
        for name in x.keys() - set(COMPANIONS):  # low bits follow the high ones
            torch.testing.assert_close(x[name], y[name], rtol=max(rtol, 1e-4), atol=atol, msg=str((options, name)))
    replicas_agree(spread[1])


def like_one_process() -> None:
    for side, growth in itertools.product(("std", "left", "right"), (None, GROWTH)):
        for projection in (
            apollo(side=side, norm_growth=growth),
            fusedopt.ApolloMini(side=side, norm_growth=growth, update_every=2),
            apollo(side=side, norm_growth=growth, scope="tensor", stagger=False),
        ):
            close(projection=projection)
    close(clip_grad_norm=400.0)  # of two gradients
    close(projection=apollo(side="left"), dtype=F64, rtol=1e-11, atol=1e-12)


def storage() -> None:
    """Narrow states and weights: blocks of codes begin with a shard, random bits are the shard's own, and bf16 parts of R are
    rounded before they are summed: equal up to these."""
    cases = [({"state_format": "bf16"}, F32, 2e-3), ({"state_format": "int8", "min_quantized_numel": 0}, F32, 0.02)]
    cases += [({"param_precision": name}, BF16, 0.01) for name in ("nearest", "stochastic", "split24")]
    cases += [({"state_format": "bf16_stochastic", "param_precision": "stochastic"}, BF16, 0.01)]
    for side, (options, dtype, apart) in itertools.product(("left", "right"), cases):
        one, spread = pair(dtype=dtype, projection=apollo(side=side), **options)
        for p, x, y in zip(one[0].parameters(), weights(spread[0]), weights(one[0]), strict=True):
            if one[1].state[p]["exp_avg"].shape != p.shape:
                torch.testing.assert_close(x, y, rtol=0, atol=apart, msg=str(options))
        for x, y in zip(spread[2], one[2], strict=True):
            torch.testing.assert_close(x, y, rtol=2**-7, atol=0, msg=str(options))
        assert limited(one[2]) and replicas_agree(spread[1]) >= (6 if side == "left" else 0)


def random_bits_of_shards_differ() -> None:
    """Two shards with the same numbers are not rounded the same way."""
    w, g = (torch.randn(8, 64).bfloat16().repeat(2, 1) for _ in range(2))
    for side in ("right", "left"):
        p = torch.nn.Parameter(distribute_tensor(w, mesh(), [Shard(0)]))
        p.grad = distribute_tensor(g, mesh(), [Shard(0)])
        opt = fusedopt.AdamW([p], lr=1e-3, projection=apollo(side=side), param_precision="stochastic", weight_decay=0.0)
        opt.step()
        first, second = p.full_tensor().chunk(2)
        assert not torch.equal(first, second) and 0 < (first != w[:8]).sum()


def against_one(w, on, placements, projection, gen) -> torch.Tensor:
    """One matrix, whole and in shards. Returns the norms of its updates."""
    one = torch.nn.Parameter(w.clone())
    spread = torch.nn.Parameter(shards(w.clone(), on, placements))
    opts = [fusedopt.AdamW([p], lr=0.02, projection=projection) for p in (one, spread)]
    norms = []
    for size in SIZES:
        g = torch.randn(w.shape, generator=gen, dtype=w.dtype) * size
        one.grad, spread.grad = g, shards(g, on, placements)
        for opt in opts:
            opt.step()
        if projection.norm_growth is not None:
            want, mine = (opt.state[p]["update_norm"] for opt, p in zip(opts, (one, spread), strict=True))
            torch.testing.assert_close(mine, want, rtol=1e-10 if w.dtype == F64 else 1e-5, atol=0)
            same_everywhere(mine.view(1))
            norms.append(want.clone())
    apart = {"rtol": 1e-9, "atol": 1e-10} if w.dtype == F64 else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(spread.full_tensor(), one.detach(), **apart, msg=str((w.shape, placements, projection)))
    assert not torch.equal(one, w)
    replicas_agree(opts[1])
    return norms


def splits() -> None:
    """Rows, columns, both, and filters; shards that are empty on some processes, or have less than `rank` rows or columns."""
    gen, acted = torch.Generator().manual_seed(0), 0
    kinds = ((F32, "channel", 2), (F32, "tensor", 1), (F64, "channel", 2), (F64, "tensor", 2))
    for shape, (dtype, scope, rank) in itertools.product(((24, 10), (10, 24), (3, 40), (40, 3), (6, 5, 3, 3)), kinds):
        for (on, placements), side in itertools.product(spreads(shape), ("left", "right")):
            w = torch.randn(shape, generator=gen, dtype=dtype)
            projection = apollo(rank=rank, scope=scope, side=side, norm_growth=GROWTH)
            acted += limited(against_one(w, on, placements, projection, gen))
    assert acted > 20


def strided() -> None:
    """Shards of rows with gaps between them, and FSDP2 of tensor-parallel layers, whose meshes split rows twice."""
    gen = torch.Generator().manual_seed(0)
    half = _StridedShard(0, split_factor=2)
    for on, placements in ((mesh(), [half]), (mesh(2, 2), [half, Shard(0)])):
        for side in ("left", "right"):
            w = torch.randn(32, 20, generator=gen, dtype=F64)
            against_one(w, on, placements, apollo(side=side), gen)


def transposed() -> None:
    """A transposed weight has contiguous shards, whatever the strides of the whole say."""
    for placement, side in itertools.product((Shard(0), Shard(1)), ("left", "right")):
        for projection in (apollo(side=side), fusedopt.GaLore(rank=4, side=side, update_every=2)):
            w = torch.randn(24, 10).t()
            one, spread = (
                torch.nn.Parameter(w.contiguous()),
                torch.nn.Parameter(distribute_tensor(w, mesh(), [placement])),
            )
            assert distributed.local(spread).is_contiguous()
            for p in (one, spread):
                opt = fusedopt.AdamW([p], lr=0.02, projection=projection)
                for i in range(STEPS):
                    g = torch.randn(10, 24, generator=torch.Generator().manual_seed(i))
                    p.grad = g if p is one else shards(g, mesh(), [placement])
                    opt.step()
            torch.testing.assert_close(spread.full_tensor(), one.detach(), rtol=1e-5, atol=2e-6)


def layers() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 24)).double()


def tensor_parallel() -> None:
    """FSDP2 over a mesh dimension, tensor parallelism over the other."""
    square = mesh(2, 2)
    for side in ("left", "right"):
        one, spread = layers(), layers()
        parallelize_module(spread, square["shards"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(spread, mesh=square["replicas"])
        opts = [fusedopt.AdamW(m.parameters(), lr=0.02, projection=apollo(side=side)) for m in (one, spread)]
        for i, size in enumerate(SIZES):
            gen = torch.Generator().manual_seed(i)
            x = torch.randn(6, 20, generator=gen, dtype=F64)
            for m, opt in zip((one, spread), opts, strict=True):
                m.zero_grad()
                (m(x).square().mean() * size).backward()
                opt.step()
        for x, y in zip(weights(spread), weights(one), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def sends_no_gradients() -> None:
    """R and the squares where the processes share out what is projected away, else a number or three."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sent(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.numels: list[int] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
                tensors = torch.utils._pytree.tree_leaves(args)
                self.numels.append(sum(t.numel() for t in tensors if isinstance(t, torch.Tensor)))
            return func(*args, **(kwargs or {}))

    for side, placement, scope, growth, want in (
        ("left", Shard(0), "channel", GROWTH, [4 * 48, 48]),
        ("left", Shard(0), "tensor", GROWTH, [4 * 48, 48]),
        ("left", Shard(0), "tensor", None, [4 * 48]),
        ("right", Shard(1), "channel", GROWTH, [4 * 64, 64]),
        ("left", Shard(1), "channel", GROWTH, [1]),
        ("left", Shard(1), "channel", None, []),
        ("right", Shard(0), "tensor", GROWTH, [2, 1]),
        ("right", Shard(0), "tensor", None, [2]),
    ):
        p = torch.nn.Parameter(shards(torch.randn(64, 48), mesh(), [placement]))
        opt = fusedopt.AdamW([p], projection=apollo(side=side, scope=scope, norm_growth=growth))
        for _ in range(3):
            p.grad = shards(torch.randn(64, 48), mesh(), [placement])
            with Sent() as sent:
                opt.step()
            assert sent.numels == want, (side, placement, scope, growth, sent.numels)


def states_are_spread() -> None:
    """A process keeps its part of what the processes share out."""
    world = dist.get_world_size()
    for side, placement in (("right", Shard(0)), ("left", Shard(1)), ("left", Shard(0)), ("right", Shard(1))):
        p = torch.nn.Parameter(shards(torch.randn(64, 48), mesh(), [placement]))
        p.grad = p.detach().clone()
        opt = fusedopt.AdamW([p], projection=apollo(side=side))
        opt.step()
        entry, kept = opt.state[p], 1 if side == "left" else 0
        for name in ("exp_avg", "exp_avg_sq"):
            numel = entry[name].numel()
            assert entry[name].to_local().numel() == (numel // world if placement.dim == kept else numel), (
                side,
                placement,
            )
        assert entry["exp_avg"].shape == ((4, 48) if side == "left" else (64, 4))
        assert not isinstance(entry["update_norm"], DTensor) and entry["update_norm"].shape == ()


KINDS = (
    {"projection": apollo()},
    {"projection": apollo(scope="tensor"), "state_format": "int8", "min_quantized_numel": 0},
    {"projection": fusedopt.ApolloMini(side="left", update_every=2)},
)


def resumed() -> None:
    """The norm that was saved is of use: the limiter acts in the first step after."""
    for kind in KINDS:
        model = sharded()
        assert limited(train(model, adamw(model, **kind), 0, STEPS)[2:4])
        resumes(partial(adamw, **kind), train)


def overflow() -> None:
    """One infinity, in one process's shard: nobody steps, no norm is kept, and the run goes on as if there had been no step."""
    protocols = ({}, {"amp_fused": True}, {"amp_fused": True, "capturable": True})  # the last is not told by the host
    for side, options in itertools.product(("left", "right"), protocols):
        found = []
        for overflows in (False, True):
            model = sharded()
            opt = fusedopt.AdamW(model.parameters(), lr=0.02, projection=apollo(side=side), **options)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
            for i, size in enumerate(SIZES):
                for infinite in (True, False) if overflows and i in (0, 3) else (False,):
                    set_whole_grads(model, i, size * scaler.get_scale())
                    if infinite and dist.get_rank() == dist.get_world_size() - 1:
                        list(model.parameters())[0].grad.to_local()[0, 0] = float("inf")
                    before = weights(model)
                    scaler.scale(torch.ones(()))
                    scaler.step(opt)
                    scaler.update()
                    assert all(torch.equal(x, y) for x, y in zip(weights(model), before, strict=True)) == infinite
            norms = [entry["update_norm"] for entry in opt.state.values() if "update_norm" in entry]
            assert len(norms) == 3
            found.append(weights(model) + norms)
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6)


def checkpoints(folder: str) -> None:
    """torch.distributed.checkpoint, full state dicts to one process and back."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    for number, options in enumerate(KINDS):
        model = sharded()
        opt = fusedopt.AdamW(model.parameters(), lr=0.02, **options)
        last = train(model, opt, 0, 3)[-1]
        names, saved = get_state_dict(model, opt)
        path = f"{folder}/{number}"
        dcp.save({"model": names, "optimizer": saved}, checkpoint_id=path)
        full = get_state_dict(model, opt, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        full = copy.deepcopy(full)  # of replicated tensors it holds the live ones
        assert limited([last, *train(model, opt, 3, STEPS)[:1]])

        again = sharded()
        other = fusedopt.AdamW(again.parameters(), lr=0.02, **options)
        names, state = get_state_dict(again, other)
        loaded = {"model": names, "optimizer": state}
        dcp.load(loaded, checkpoint_id=path)
        set_state_dict(again, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        train(again, other, 3, STEPS)
        assert_equal(weights(again), weights(model), f"dcp {options}")

        parts = [None, None] if dist.get_rank() else list(full)
        dist.broadcast_object_list(parts)
        for target in (build(), sharded()):
            other = fusedopt.AdamW(target.parameters(), lr=0.02, **options)
            set_state_dict(
                target, other, model_state_dict=parts[0], optim_state_dict=parts[1],
                options=StateDictOptions(full_state_dict=True),
            )  # fmt: skip
            train(target, other, 3, STEPS)
            for x, y in zip(weights(target), weights(model), strict=True):
                apart = 0.05 if "state_format" in options else 2e-5
                torch.testing.assert_close(x, y, rtol=0, atol=apart, msg=f"full {options}")


def resharded(folder: str) -> None:
    """What two processes saved, four load."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    for number in (0, 2):
        model, one = sharded(), build()
        opt, single = (fusedopt.AdamW(m.parameters(), lr=0.02, **KINDS[number]) for m in (model, one))
        names, state = get_state_dict(model, opt)
        loaded = {"model": names, "optimizer": state}
        dcp.load(loaded, checkpoint_id=f"{folder}/{number}")
        set_state_dict(model, opt, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        norms = train(model, opt, 3, STEPS)
        for x, y in zip(norms, train(one, single, 0, STEPS)[3:], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=0)
        for x, y in zip(weights(model), weights(one), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


CHECKS = [
    splits, transposed, like_one_process, storage, random_bits_of_shards_differ, sends_no_gradients, states_are_spread,
    resumed, overflow,
]  # fmt: skip


def test_two_processes(tmp_path):
    run(2, CHECKS)
    run(2, [checkpoints], str(tmp_path))
    run(4, [resharded], str(tmp_path))


def hybrid() -> None:
    """Replicas of shards."""
    for scope, side in itertools.product(("channel", "tensor"), ("left", "right")):
        close(on=mesh(2, 2), projection=apollo(scope=scope, side=side))


def test_four_processes():
    run(4, [splits, strided, tensor_parallel, hybrid, states_are_spread, resumed])
