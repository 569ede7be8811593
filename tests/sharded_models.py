"""A small model with every kind of shard, trained once in shards and once whole, from the same numbers."""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from fusedopt import distributed
from fusedopt.precision import COMPANIONS


def build(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Rows that do not come out even, fewer rows than processes (empty shards), rows of whole blocks, vectors."""
    torch.manual_seed(1)
    layers = (
        nn.Linear(24, 65),
        nn.Tanh(),
        nn.Linear(65, 512),
        nn.Tanh(),
        nn.Linear(512, 19),
        nn.LayerNorm(19),
        nn.Linear(19, 1),
    )
    return nn.Sequential(*layers).to(dtype)


def mesh(*shape: int):
    shape = shape or (dist.get_world_size(),)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])


def sharded(dtype: torch.dtype = torch.float32, on=None) -> nn.Sequential:
    model = build(dtype)
    fully_shard(model, mesh=mesh() if on is None else on)
    return model


def backward(model: nn.Module, i: int) -> None:
    """The gradients of step i; every process sees the same data, whose mean over 2 or 4 processes is exact."""
    gen = torch.Generator().manual_seed(100 + i)
    x = torch.randn(6, 24, generator=gen).to(next(model.parameters()).dtype)
    model.zero_grad()
    model(x).float().square().mean().backward()


def whole(t) -> torch.Tensor:
    if not isinstance(t, DTensor):
        return t.detach()
    if t.dtype == torch.int16:  # neither gloo nor NCCL sends 16-bit integers
        return t.to(torch.int32).full_tensor().to(torch.int16)
    return t.full_tensor()


def set_whole_grads(model: nn.Module, i: int, scale: float = 1.0) -> None:
    """Random gradients, the same for a sharded model and a whole one, without a backward pass."""
    gen = torch.Generator().manual_seed(200 + i)
    for p in model.parameters():
        g = (torch.randn(p.shape, generator=gen) * scale).to(p.dtype)
        if isinstance(p, DTensor):
            replicated = DTensor.from_local(g, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
            g = replicated.redistribute(placements=p.placements)
        p.grad = g


def train(model: nn.Module, opt, first: int, last: int) -> None:
    for i in range(first, last):
        set_whole_grads(model, i)
        opt.step()


def contents(model: nn.Module, opt) -> list[torch.Tensor]:
    """Parameters, decoded states, companions and step counts, whole."""
    decoded = opt.state_dict(format="torch")["state"]
    out = weights(model)
    for i, p in enumerate(model.parameters()):
        out += [whole(v).clone() for v in decoded[i].values()]
        out += [whole(opt.state[p][name]).clone() for name in COMPANIONS if name in opt.state[p]]
    return out


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [whole(p).clone() for p in model.parameters()]


def assert_equal(a: list[torch.Tensor], b: list[torch.Tensor], what: str = "") -> None:
    """Bit for bit."""
    assert len(a) == len(b), f"{what}: {len(a)} tensors and {len(b)}"
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert x.dtype == y.dtype and x.shape == y.shape, (
            f"{what}: tensor {i}, {x.dtype} {x.shape} and {y.dtype} {y.shape}"
        )
        assert torch.equal(x, y), (
            f"{what}: tensor {i} {tuple(x.shape)} differs by {(x.double() - y.double()).abs().max()}"
        )


def shards(w: torch.Tensor, on, placements) -> DTensor:
    """w as a DTensor whose shards are contiguous, which those that torch 2.6 cuts out of columns are not."""
    cut = distribute_tensor(w, on, placements)
    return DTensor.from_local(cut.to_local().contiguous(), on, placements, shape=w.shape, stride=cut.stride())


def replicas_agree(opt) -> int:
    """What every process has whole is the same everywhere, and how many such tensors there are."""
    found = 0
    for entry in opt.state.values():
        for name, value in entry.items():
            if not (isinstance(value, DTensor) and all(isinstance(x, Replicate) for x in value.placements)):
                continue
            mine = value.to_local().contiguous().view(-1)
            everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, mine)
            assert all(torch.equal(x, mine) for x in everyone), name
            found += 1
    return found


def spreads(shape) -> list[tuple]:
    """Meshes and placements of a matrix."""
    flat = mesh()
    out = [(flat, [Shard(0)]), (flat, [Shard(1)]), (flat, [Replicate()])] if len(shape) == 2 else [(flat, [Shard(0)])]
    if dist.get_world_size() == 4 and len(shape) == 2:
        square = mesh(2, 2)
        out += [(square, [Shard(0), Shard(1)]), (square, [Shard(1), Shard(0)]), (square, [Replicate(), Shard(0)])]
        out += [(square, [Shard(0), Shard(0)])]
        if shape[0] % 4 == 0:
            out += [(square, [_StridedShard(0, split_factor=2), Shard(0)])]  # FSDP2 of tensor parallelism
    return out


def resumes(make: Callable, train: Callable = train) -> None:
    """Bit for bit from a state dict of shards; a step that overflows leaves everything as it was.

    make(model, **options): its optimizer. train(model, opt, first, last): steps on the same gradients each time.
    """
    model = sharded()
    opt = make(model)
    train(model, opt, 0, 3)
    buffer = io.BytesIO()
    torch.save([opt.state_dict(), [p.to_local().clone() for p in model.parameters()]], buffer)
    train(model, opt, 3, 6)
    buffer.seek(0)
    state, kept = torch.load(buffer, weights_only=False)  # DTensors
    again = sharded()
    for p, w in zip(again.parameters(), kept, strict=True):
        distributed.local(p).data.copy_(w)
    other = make(again, amp_fused=True)
    other.load_state_dict(state)
    train(again, other, 3, 4)
    before = weights(again)
    other.grad_scale, other.found_inf = None, torch.ones(())
    set_whole_grads(again, 4)
    other.step()
    del other.grad_scale, other.found_inf
    assert_equal(weights(again), before, "a skipped step")
    train(again, other, 4, 6)
    assert_equal(weights(again), weights(model), "resumed")
    for mine, want in zip(other.state_dict()["state"].values(), opt.state_dict()["state"].values(), strict=True):
        assert mine.keys() == want.keys()
        assert_equal([whole(mine[name]) for name in want], [whole(v) for v in want.values()], "resumed")
