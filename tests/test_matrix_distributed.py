"""Muon and its kin with sharded matrices (FSDP2, tensor parallelism, hybrid meshes) in 2 and 4 processes against one process: the
bits are the same, since every process takes the whole direction through the same iteration."""

import pytest
import torch
from processes import run
from sharded_models import assert_equal, build, mesh, resumes, sharded, shards, spreads, train, weights, whole
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fusedopt

STEPS = 3
FAMILY = (
    (fusedopt.Muon, {"adam_lr": 0.01}),
    (fusedopt.Muon, {"adam_lr": 0.01, "noise_rates": (1.0, 0.9), "ns_dtype": "fp32"}),
    (fusedopt.AdaMuon, {"adam_lr": 0.01}),
)
OPTIONS = {"lr": 0.02, "weight_decay": 0.1}


def pair(cls, dtype=torch.float32, on=None, first=0, last=STEPS, **options) -> list[tuple]:
    out = []
    for model in (build(dtype), sharded(dtype, on)):
        opt = cls(model.named_parameters(), **OPTIONS, **options)
        train(model, opt, first, last)
        out.append((model, opt))
    return out


def contents(model, opt) -> list[torch.Tensor]:
    """Parameters and states, whole."""
    entries = [opt.state[p] for p in model.parameters()]
    return weights(model) + [whole(v).clone() for entry in entries for v in entry.values()]


def same(cls, *args, **options) -> None:
    one, spread = pair(cls, *args, **options)
    assert_equal(contents(*spread), contents(*one), f"{cls.__name__} {args} {options}")


def close(cls, *args, **options) -> None:
    one, spread = pair(cls, *args, **options)
    for x, y in zip(contents(*spread), contents(*one), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-7)


def every_class():
    for cls, options in FAMILY:
        same(cls, **options)
    # sums over whole tensors: the balls of vectors, MARS's clipping in the groups of AdamW's kin
    close(fusedopt.TrustRegion, other_lr=0.01)
    close(fusedopt.MARSShampoo, adam_lr=0.01)
    close(fusedopt.LANTON)


def storage():
    """Narrow states and weights. Blocks of codes begin with a shard, and random bits are the shard's own: equal up to these."""
    same(fusedopt.Muon, state_format="bf16")
    for precision in ("nearest", "split32", "master"):
        same(fusedopt.Muon, torch.bfloat16, param_precision=precision)
    for dtype, options, apart in (
        (torch.float32, {"state_format": "int8", "min_quantized_numel": 0}, 0.01),
        (torch.bfloat16, {"param_precision": "stochastic"}, 0.03),
        (torch.bfloat16, {"param_precision": "split24"}, 0.02),
    ):
        one, spread = pair(fusedopt.Muon, dtype, **options)
        for x, y in zip(weights(spread[0]), weights(one[0]), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=apart)


def random_bits_of_shards_differ():
    """Two shards with the same numbers are not rounded the same way."""
    w, g = (torch.randn(8, 64).bfloat16().repeat(2, 1) for _ in range(2))
    p = nn.Parameter(distribute_tensor(w, mesh(), [Shard(0)]))
    p.grad = distribute_tensor(g, mesh(), [Shard(0)])
    group = {"params": [p], "orthogonalize": True}
    fusedopt.Muon([group], lr=1e-3, weight_decay=0.0, param_precision="stochastic").step()
    first, second = p.full_tensor().chunk(2)
    assert not torch.equal(first, second) and 0 < (first != w[:8]).sum() < w.numel() / 2


def clipped():
    one, spread = pair(fusedopt.Muon, adam_lr=0.01, clip_grad_norm=0.5)
    torch.testing.assert_close(spread[1].grad_norm, one[1].grad_norm, rtol=1e-6, atol=0)
    for x, y in zip(contents(*spread), contents(*one), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def resumed():
    resumes(lambda model, **more: fusedopt.Muon(model.named_parameters(), **OPTIONS, **more))


def splits():
    """Matrices and stacks of filters, split along any dimension or not at all; a shard that is not contiguous is refused."""
    gen = torch.Generator().manual_seed(0)
    for shape in ((24, 10), (10, 24), (6, 5, 3, 3), (16, 16)):
        every = spreads(shape) if len(shape) == 2 else [(mesh(), [x]) for x in (Shard(0), Shard(1), Replicate())]
        for on, placements in every:
            w, grads = torch.randn(shape, generator=gen), torch.randn(3, *shape, generator=gen)
            one = nn.Parameter(w.clone())
            spread = nn.Parameter(shards(w.clone(), on, placements))
            groups = [[{"params": [p], "orthogonalize": True}] for p in (one, spread)]
            opts = [fusedopt.Muon(group, **OPTIONS) for group in groups]
            for g in grads:
                one.grad, spread.grad = g, distribute_tensor(g, on, placements)
                for opt in opts:
                    opt.step()
            assert torch.equal(spread.full_tensor(), one) and not torch.equal(one, w), (shape, placements)
    turned = nn.Parameter(DTensor.from_local(torch.randn(10, 12).t(), mesh(), [Shard(0)]))
    turned.grad = turned.detach().clone()
    with pytest.raises(RuntimeError, match="shard of strides"):
        fusedopt.Muon([{"params": [turned], "orthogonalize": True}], **OPTIONS).step()


def checkpoint_of_noise(folder: str):
    """A state that every process has whole, in torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    options = {**OPTIONS, "noise_rates": (1.0, 0.9)}
    model = sharded()
    opt = fusedopt.Muon(model.named_parameters(), **options)
    train(model, opt, 0, 2)
    names, state = get_state_dict(model, opt)
    dcp.save({"model": names, "optimizer": state}, checkpoint_id=folder)
    train(model, opt, 2, 4)
    again = sharded()
    other = fusedopt.Muon(again.named_parameters(), **options)
    names, state = get_state_dict(again, other)
    loaded = {"model": names, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(again, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(again, other, 2, 4)
    assert_equal(contents(again, other), contents(model, opt))


def hybrid():
    """Replicas of shards."""
    same(fusedopt.Muon, torch.float32, mesh(2, 2), adam_lr=0.01)


CHECKS = [splits, every_class, storage, random_bits_of_shards_differ, clipped, resumed]


def test_two_processes(tmp_path):
    run(2, CHECKS)
    run(2, [checkpoint_of_noise], str(tmp_path))


def test_four_processes():
    run(4, [every_class, splits, hybrid])
