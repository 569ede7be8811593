"""Copies and replacements: deepcopy, pickle, parameters swapped by accelerate and FSDP2, new groups, torch's DCP."""

import copy
import pickle

import pytest
import torch
from configs import (
    EVERY,
    WITH_STATES,
    assert_same_bits,
    copies,
    each_backend,
    each_config,
    parameters,
    set_grads,
    tensors,
    train,
)
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

import fusedopt

SHAPES = ((40, 130), (7,), (), (0,))


def twin_params(opt) -> list:
    return [p for group in opt.param_groups for p in group["params"]]


OPTIONS = {"state_format": "int8", "param_precision": "stochastic", "clip_grad_norm": 0.7, "seed": 3}


@each_backend
@each_config(EVERY)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("scheduled", [False, True])
def test_copies_step_identically(config, duplicate, scheduled, backend):
    params = parameters(*SHAPES, dtype=torch.bfloat16)
    opt = config.make(params, backend=backend, **OPTIONS)
    if scheduled:
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)  # replaces opt.step
        train(opt, params, 0, 1)
        scheduler.step()
    train(opt, params, 1, 3)
    twin = duplicate(opt)
    others = twin_params(twin)
    public = {k for k in vars(opt) if not k.startswith("_")} - {"step"}
    assert public <= vars(twin).keys() and twin.clip_grad_norm == 0.7
    assert not {a.data_ptr() for a in params if a.numel()} & {b.data_ptr() for b in others if b.numel()}
    before = tensors(opt, params)
    train(twin, others, 3, 5)
    assert_same_bits(tensors(opt, params), before, "stepping the copy changed the original:")
    train(opt, params, 3, 5)
    assert_same_bits(tensors(twin, others), tensors(opt, params))


@each_config(EVERY)
def test_public_attributes_survive(config):
    opt = config.make(parameters((3,)))
    opt.note = {"run": 7}
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert twin.note == {"run": 7} and twin.backend == opt.backend and twin.amp_fused is False
        assert twin.param_groups[0].keys() == opt.param_groups[0].keys() and twin.defaults == opt.defaults


@each_backend
@each_config(EVERY)
@pytest.mark.parametrize("when", [0, 2])
def test_parameters_replaced_in_their_groups(config, when, backend):
    """accelerate and FSDP2 put other Parameter objects into the groups; later replacements start with fresh state."""
    old, expected = parameters(*SHAPES), parameters(*SHAPES)
    opt, plain = config.make(old, backend=backend), config.make(expected, backend=backend)
    train(opt, old, 0, when)
    train(plain, expected, 0, when)
    new = copies(old)
    for group in opt.param_groups:
        group["params"] = [new[[id(p) for p in old].index(id(p))] for p in group["params"]]
    if when:
        opt.load_state_dict(plain.state_dict())
    untouched = [p.detach().clone() for p in old]
    train(opt, new, when, when + 3)
    train(plain, expected, when, when + 3)
    assert_same_bits(tensors(opt, new), tensors(plain, expected))
    assert_same_bits([p.detach() for p in old], untouched)


@each_backend
@each_config(EVERY)
def test_storage_replaced_under_a_parameter(config, backend):
    """`p.data = ...` moves a parameter; the next step must follow it."""
    params, expected = parameters(*SHAPES), parameters(*SHAPES)
    opt, plain = config.make(params, backend=backend), config.make(expected, backend=backend)
    for step in range(4):
        if step == 2:
            kept = [p.data for p in params]
            values = [k.clone() for k in kept]
            for p in params:
                p.data = p.data.clone()
        train(opt, params, step, step + 1)
        train(plain, expected, step, step + 1)
    assert_same_bits(tensors(opt, params), tensors(plain, expected))
    assert_same_bits(kept, values)


@each_backend
@each_config(WITH_STATES)
def test_states_replaced_by_hand(config, backend):
    """Another tensor in opt.state, or another step count, is taken at the next step."""
    params, expected = parameters((40, 130), (7,)), parameters((40, 130), (7,))
    opt, plain = config.make(params, backend=backend), config.make(expected, backend=backend)
    train(opt, params, 0, 2)
    train(plain, expected, 0, 2)
    for entry in opt.state.values():
        for key in list(entry):
            entry[key] = entry[key].clone()
    train(opt, params, 2, 3)
    train(plain, expected, 2, 3)
    assert_same_bits(tensors(opt, params), tensors(plain, expected))
    for o in (opt, plain):
        for entry in o.state.values():
            entry["step"].fill_(10) if o is opt else entry.update(step=torch.tensor(10.0))
    train(opt, params, 3, 5)
    train(plain, expected, 3, 5)
    assert_same_bits(tensors(opt, params), tensors(plain, expected))
    assert float(opt.state[params[0]]["step"]) == 12


@each_backend
@each_config(EVERY)
def test_clearing_the_state_starts_anew(config, backend):
    params = parameters(*SHAPES)
    opt = config.make(params, backend=backend)
    train(opt, params, 0, 3)
    opt.state.clear()
    fresh = copies(params)
    other = config.make(fresh, backend=backend)
    train(opt, params, 3, 5)
    train(other, fresh, 3, 5)
    assert_same_bits(tensors(opt, params), tensors(other, fresh))


@each_backend
@each_config(EVERY)
def test_add_param_group(config, backend):
    params, expected = parameters((6, 5), (4,), (3,)), parameters((6, 5), (4,), (3,))
    opt, both = config.make(params[:2], backend=backend), config.make(expected[:2], backend=backend)
    train(opt, params[:2], 0, 2)
    train(both, expected[:2], 0, 2)
    opt.add_param_group({"params": [params[2]], "lr": 0.5})
    assert opt.param_groups[1]["state_format"] == "fp32" and opt.param_groups[1]["lr"] == 0.5
    late = config.make([expected[2]], backend=backend, lr=0.5)
    for step in range(2, 5):
        set_grads(params, step)
        for p, q in zip(params, expected, strict=True):
            q.grad = p.grad.clone()
        opt.step()
        both.step()
        late.step()
    assert [int(opt.state[p]["step"]) for p in params] == [5, 5, 3]
    if config.optimizer != "lamb":  # its default clipping takes the norm over all groups
        assert_same_bits([p.detach() for p in params], [p.detach() for p in expected])


@each_backend
@each_config(EVERY)
def test_layers_frozen_later_keep_their_values(config, backend):
    params = parameters(*SHAPES)
    opt = config.make(params, backend=backend)
    train(opt, params, 0, 2)
    frozen = [v.clone() for v in (params[0].detach(), *opt.state[params[0]].values())]
    params[0].requires_grad_(False)
    params[0].grad = None
    train(opt, params[1:], 2, 4)
    assert_same_bits([params[0].detach(), *opt.state[params[0]].values()], frozen)


def test_flags_changed_in_a_group_are_followed():
    """amsgrad and momentum switch the rule, maximize the sign; weight_decay and lr are only numbers."""
    params, expected = parameters((6, 5)), parameters((6, 5))
    opt, other = fusedopt.SGD(params, lr=0.1), torch.optim.SGD(expected, lr=0.1)
    for step, change in enumerate([{}, {"maximize": True}, {"weight_decay": 0.3}, {"maximize": False}, {"lr": 0.01}]):
        for o in (opt, other):
            o.param_groups[0].update(change)
        train(opt, params, step, step + 1)
        train(other, expected, step, step + 1)
        torch.testing.assert_close(params[0], expected[0], rtol=1e-6, atol=1e-7)
    opt.param_groups[0]["momentum"] = 0.9
    train(opt, params, 5, 7)
    assert "momentum_buffer" in opt.state[params[0]]
    adam = fusedopt.AdamW(parameters((3,)))
    train(adam, twin_params(adam), 0, 1)
    adam.param_groups[0]["amsgrad"] = True
    train(adam, twin_params(adam), 1, 2)
    assert "max_exp_avg_sq" in next(iter(adam.state.values()))


# torch.distributed.checkpoint, which needs no process group for one process


def model_of(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 80), nn.LayerNorm(80), nn.Linear(80, 3)).to(dtype)


@each_backend
@each_config(EVERY)
@pytest.mark.parametrize("form", ["fp32", "int8"])
@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_round_trip(config, form, flatten, backend):
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = model_of(torch.bfloat16)
    opt = config.make(model.parameters(), backend=backend, state_format=form)
    train(opt, list(model.parameters()), 0, 3)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, opt, options=options))
    other = model_of(torch.bfloat16)
    other.load_state_dict(model.state_dict())
    loaded = config.make(other.parameters(), backend=backend, state_format=form)
    dcp.set_optimizer_state_dict(other, loaded, saved, options=options)
    assert_same_bits(tensors(loaded, list(other.parameters())), tensors(opt, list(model.parameters())))
    train(opt, list(model.parameters()), 3, 5)
    train(loaded, list(other.parameters()), 3, 5)
    assert_same_bits(tensors(loaded, list(other.parameters())), tensors(opt, list(model.parameters())))


@each_config(EVERY)
def test_distributed_checkpoint_of_a_fresh_optimizer(config):
    """It makes the states by a step with lr=0 and zero gradients, which must leave the parameters alone."""
    model = model_of(torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    opt = config.make(model.parameters())
    saved = dcp.get_optimizer_state_dict(model, opt)
    assert_same_bits([p.detach() for p in model.parameters()], before)
    assert len(saved["state"]) == 6 and saved["param_groups"][0]["lr"] == config.options["lr"]
