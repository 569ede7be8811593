"""AdamP and SGDP: against other people's code; the decay that a projected tensor takes, for every rule that decays."""

import pytest
import torch
from configs import assert_same_bits, copies, parameters, set_grads
from oracle_cases import make_params, relative_error
from oracle_cases import set_grads as growing_grads
from oracles.installed import package
from oracles.wrappers import TangentProjection as Oracle
from test_transforms import feed_back

import fusedopt
from fusedopt import transforms as tf

SHAPES = ((7, 5), (5,), (3, 4, 2, 2), (12, 9))
BOTH = {"adamp": "AdamP", "sgdp": "SGDP"}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("delta", [0.1, 1.0, 2.0, 30.0])
@pytest.mark.parametrize("name", BOTH)
def test_matches_package(name, delta, nesterov):
    """With a tiny eps, which pytorch_optimizer's AdamP adds to the root before its bias is corrected."""
    mine, theirs = make_params(), make_params()
    start = copies(mine)
    given = {"lr": 0.01, "delta": delta, "wd_ratio": 0.3, "nesterov": nesterov, "eps": 1e-20}
    given |= {"weight_decay": 0.1, **({"momentum": 0.9} if name == "sgdp" else {})}
    opt, other = fusedopt.create(name, mine, backend="reference", **given), package(BOTH[name])(theirs, **given)
    for step in range(14):
        growing_grads(mine, step)
        growing_grads(theirs, step)
        opt.step()
        other.step()
    for p, q, q0 in zip(mine, theirs, start, strict=True):
        assert relative_error(p.detach() - q0.detach(), q.detach() - q0.detach()) <= 1e-9


def test_every_outcome_of_the_test_is_seen():
    """By rows, as a whole and not at all: under one threshold, so that the comparisons with the oracle mean something."""
    params, seen = parameters(*SHAPES, dtype=torch.float64), Oracle(delta=1.5)
    opt = fusedopt.SGD(params, lr=0.002, momentum=0.9)
    for step in range(40):
        feed_back(params, step)
        seen(params)
        opt.step()
    assert min(seen.seen.values()) >= 10, seen.seen


RULES = {
    "adamw": {},
    "adamw lr": {"lr": torch.tensor(0.05)},
    "adamw galore": {"projection": fusedopt.GaLore(rank=4)},
    "lion": {},
    "radam": {"decoupled_weight_decay": True},
    "nadam": {"decoupled_weight_decay": True},
    "sgdp": {"momentum": 0.5},
    "prodigy": {"lr": 1.0, "d0": 0.05},
    "dadapt_adam": {"lr": 1.0, "d0": 0.05, "decoupled_weight_decay": True},
}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_left_of_the_decay(rule, capturable):
    """Along its old weights a projected row shrinks by wd_ratio of the rule's own decay at that step, whatever the rule, with
    rates that change."""
    name, ratio, wd = rule.split(" ")[0], 0.25, 0.5
    options = {"lr": 0.05, "weight_decay": wd, "capturable": capturable, "backend": "reference", **RULES[rule]}
    projection = tf.TangentProjection(delta=100.0, wd_ratio=ratio, eps=0.0)
    params = parameters((6, 8), (9,), dtype=torch.float64)
    if name == "sgdp":
        opt = fusedopt.SGDP(params, delta=100.0, wd_ratio=ratio, eps=0.0, **options)
    else:
        opt = fusedopt.create(name, params, gradient_transforms=[projection], **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 1 / (1 + epoch))
    for step in range(4):
        old = params[0].detach().clone()
        decay = float(opt.param_groups[0]["lr"]) * wd
        if name == "sgdp":
            decay *= 2  # 1 / (1 - momentum)
        elif name in ("prodigy", "dadapt_adam"):
            decay *= float(opt.state[params[0]]["d"]) if step else 0.05
        set_grads(params, step)
        opt.step()
        schedule.step()
        along = (params[0].detach() * old).sum(1) / old.square().sum(1)
        torch.testing.assert_close(
            along, torch.full_like(along, 1 - ratio * decay), rtol=1e-6 if capturable else 1e-9, atol=0
        )


def test_without_a_projection_every_bit_is_adamws():
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    given = {"lr": 0.01, "weight_decay": 0.1}
    opts = [fusedopt.AdamP(one, delta=1e-9, **given), fusedopt.AdamW(two, **given)]
    for step in range(5):
        for params, opt in zip((one, two), opts, strict=True):
            set_grads(params, step)
            opt.step()
    assert_same_bits([p.detach() for p in one], [p.detach() for p in two])


@pytest.mark.parametrize("state_format", ["fp32", "int8", "int4"])
def test_norms_of_projected_weights_hardly_grow(state_format):
    """What the paper is about: without decay, |p| of a projected tensor grows with the square of the step only."""
    net = torch.nn.Linear(64, 64, bias=False)
    start = net.weight.detach().norm()
    opt = fusedopt.AdamP(net.parameters(), lr=1e-3, delta=1e3, state_format=state_format, min_quantized_numel=0)
    for step in range(50):
        before = net.weight.detach().clone()
        net.weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step)) + before  # pulls inwards
        opt.step()
        moved = net.weight.detach() - before
        cosines = torch.nn.functional.cosine_similarity(moved, before, dim=1)
        assert float(cosines.abs().max()) < 1e-4 and float(moved.norm()) > 1e-3
    assert float((net.weight.detach().norm() / start - 1).abs()) < 0.05


def test_groups_may_stay_out_and_others_join():
    one, two = parameters((6, 8), (6, 8)), parameters((6, 8), (6, 8))
    groups = [{"params": one[:1]}, {"params": one[1:], "transform_gradients": False}]
    opt = fusedopt.AdamP(groups, lr=0.01, delta=100.0, gradient_transforms=tf.ClipValue(0.5))
    assert [type(t) for t in opt.gradient_transforms] == [tf.TangentProjection, tf.ClipValue]
    plain = fusedopt.AdamW(two, lr=0.01, weight_decay=0.0)
    for params, o in ((one, opt), (two, plain)):
        set_grads(params, 0)
        o.step()
    assert not torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_options_out_of_range():
    params = parameters((3, 3))
    for cls in (fusedopt.AdamP, fusedopt.SGDP):
        with pytest.raises(ValueError, match="invalid delta: 0.0; it must be positive"):
            cls(params, delta=0.0)
        with pytest.raises(ValueError, match=r"invalid wd_ratio: 1.5; it is in \[0, 1\]"):
            cls(params, wd_ratio=1.5)
        with pytest.raises(ValueError, match="differentiable=True does not differentiate through gradient_transforms"):
            cls(params, differentiable=True)
    with pytest.raises(ValueError, match="invalid eps: -1; it is 0 or more"):
        tf.TangentProjection(eps=-1)
    with pytest.raises(ValueError, match=r"Invalid momentum value: 1.0; it is in \[0, 1\)"):
        fusedopt.SGDP(params, momentum=1.0)
    with pytest.raises(ValueError, match="Invalid dampening value: 0.5; without momentum there is no buffer to dampen"):
        fusedopt.SGDP([{"params": params, "dampening": 0.5}])
    with pytest.raises(ValueError, match="Nesterov momentum requires a momentum and zero dampening"):
        fusedopt.SGDP(params, nesterov=True)
