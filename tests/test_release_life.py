"""Gradient release: copies and checkpoints of a released optimizer, and what is refused."""

import copy
import pickle

import pytest
import torch
from release_models import Tied, alive, assert_equal, loss_of, pair, train
from torch import nn

import fusedopt
from fusedopt.projections import GaLore

SMALL = {"min_quantized_numel": 64}


# Copies and checkpoints


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_step_in_step(how):
    plain, released, _ = pair(lambda m: fusedopt.AdamW(m.parameters()))
    train(*plain, 0, 2)
    train(*released, 0, 2)
    pack = {"model": released[0], "opt": released[1]}
    twin = copy.deepcopy(pack) if how == "deepcopy" else pickle.loads(pickle.dumps(pack))
    loss_of(twin["model"], 2).backward()
    assert alive(twin["model"]) > 0
    twin["opt"].step()
    train(*plain, 2, 3)
    assert_equal(plain, (twin["model"], twin["opt"]))


@pytest.mark.parametrize("projection", [None, GaLore(rank=4, update_every=3)])
def test_resume(projection, tmp_path):
    """The state dict is an ordinary run's, and a released run resumes it, before its first step and in its middle."""

    def make(model):
        return fusedopt.AdamW(
            model.parameters(),
            lr=0.01,
            state_format="int8",
            param_precision="stochastic",
            projection=projection,
            **SMALL,
        )

    plain, released, _ = pair(make, torch.bfloat16, collect=0)
    train(*plain, 0, 3)
    train(*released, 0, 3)
    saved, expected = released[1].state_dict(), plain[1].state_dict()
    assert saved["param_groups"] == expected["param_groups"] and saved["state"].keys() == expected["state"].keys()
    torch.save([released[0].state_dict(), saved], tmp_path / "run.pt")
    weights, states = torch.load(tmp_path / "run.pt", weights_only=True)
    train(*plain, 3, 6)
    fresh = Tied(torch.bfloat16, seed=1)
    fresh.load_state_dict(weights)
    opt = make(fresh)
    fusedopt.release_gradients(fresh, opt, collect=0)
    opt.load_state_dict(states)
    train(fresh, opt, 3, 6)
    assert_equal(plain, (fresh, opt))
    train(*released, 3, 5)
    released[0].load_state_dict(weights)
    released[1].load_state_dict(states)
    train(*released, 3, 6)
    assert_equal(plain, released)


# What is refused


class Wrapped(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.inner.__class__ = type(name, (nn.Linear,), {})


def test_refusals():
    model = Tied()

    def refused(match, kind=ValueError, model=model, release=None, **options):
        opt = fusedopt.AdamW(model.parameters(), **options)
        with pytest.raises(kind, match=match):
            fusedopt.release_gradients(model, opt, **(release or {}))
        assert opt._release is None and not any(p._post_accumulate_grad_hooks for p in model.parameters())

    refused("clip='previous'", clip_grad_norm=1.0)
    refused("clip_grad_norm=, which it has not", release={"clip": "previous"})
    refused("Invalid clip", clip_grad_norm=1.0, release={"clip": "now"})
    refused("overflow is known only after the backward pass", amp_fused=True)
    refused("differentiable=True", differentiable=True)
    refused("Invalid micro_batches", release={"micro_batches": 0})
    refused("Invalid accumulate_in", release={"accumulate_in": "hope"})
    refused("Invalid collect", release={"collect": -1})
    refused("'inner' of the model is a DistributedDataParallel", model=Wrapped("DistributedDataParallel"))
    refused("'inner' of the model is a FullyShardedDataParallel", model=Wrapped("FullyShardedDataParallel"))
    with pytest.raises(TypeError, match="expected an optimizer of fusedopt, got AdamW"):
        fusedopt.release_gradients(model, torch.optim.AdamW(model.parameters()))
    opt = fusedopt.AdamW(model.parameters())
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got list"):
        fusedopt.release_gradients(list(model.parameters()), opt)
    fusedopt.release_gradients(model, opt)
    with pytest.raises(ValueError, match="already has one"):
        fusedopt.release_gradients(model, opt)


def test_projected_linear_is_refused():
    model = nn.Sequential(nn.Linear(16, 16))
    opt = fusedopt.AdamW(model.parameters(), projection=GaLore(rank=4))
    handle = fusedopt.projected_linear(model, opt)
    with pytest.raises(ValueError, match="projected_linear keeps low-rank gradients"):
        fusedopt.release_gradients(model, opt)
    handle.remove()
    with fusedopt.release_gradients(model, opt), pytest.raises(ValueError, match="release_gradients steps"):
        fusedopt.projected_linear(model, opt)


def test_grad_scaler_is_refused():
    model = nn.Linear(4, 4)
    opt = fusedopt.AdamW(model.parameters())
    fusedopt.release_gradients(model, opt)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(2, 4)).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler .*Use bf16 autocast"):
        scaler.step(opt)


def test_a_gradient_that_cannot_be_stepped_stops_the_backward_pass():
    model = nn.Embedding(5, 4, sparse=True)
    opt = fusedopt.AdamW(model.parameters())
    fusedopt.release_gradients(model, opt)
    with pytest.raises(RuntimeError, match="sparse gradient"):
        model(torch.tensor([1])).sum().backward()
    assert model.weight.grad is not None and not opt.state
