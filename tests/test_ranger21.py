"""Ranger21 and its schedule against another implementation; its components, groups and refusals."""

import pytest
import torch
from configs import assert_same_bits, parameters, set_grads
from oracle_cases import make_params, relative_error
from oracle_cases import set_grads as growing_grads
from pytorch_optimizer import Ranger21 as Package

import fusedopt
from fusedopt import transforms as tf

SHAPES = ((12, 9), (7, 5), (3, 4, 2, 2), (5,), ())


@pytest.mark.parametrize("steps", [1, 3, 10, 100, 2000, 4000, 5000, 20000])
def test_schedule_matches_package(steps):
    lr = 0.02
    other = Package(parameters((2,)), num_iterations=steps, lr=lr)
    factor = fusedopt.ranger21_schedule(lr, steps)
    for step in {1, 2, *range(1, steps + 1, max(1, steps // 97)), steps}:
        if step > steps or not other.num_warm_up_iterations and step < other.start_warm_down:
            continue
        theirs = other.warm_down(other.warm_up_dampening(lr, step), step)
        assert lr * factor(step - 1) == pytest.approx(theirs, rel=1e-12), step


def test_schedule_by_hand():
    factor = fusedopt.ranger21_schedule(1.0, 10, warmup_steps=4, flat_until=0.7, min_lr=0.2)
    assert [factor(i) for i in range(12)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    flat = fusedopt.ranger21_schedule(1.0, 10, warmup_steps=0, flat_until=None)
    assert [flat(i) for i in range(15)] == [1.0] * 15


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": 0.0}, "invalid lr"),
        ({"total_steps": 0}, "invalid total_steps"),
        ({"min_lr": 0.2}, "invalid min_lr"),
        ({"flat_until": 1.5}, "invalid flat_until"),
        ({"warmup_steps": -1}, "invalid warmup_steps"),
    ],
)
def test_schedule_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"ranger21_schedule: {message}"):
        fusedopt.ranger21_schedule(**{"lr": 0.1, "total_steps": 10, **options})


@pytest.mark.parametrize(
    "options", [{}, {"centralize": False}, {"normalize": False}, {"softplus": None}, {"lookahead": 3}]
)
def test_matches_package_under_its_schedule(options):
    """Without decay, whose mean second moment the package begins at 1 over the number of weights. It normalises twice, which
    takes a gradient's std / (std + 1e-8) back: 1e-6 of the smallest here."""
    steps, lr = 40, 0.02
    mine, theirs = make_params()[:4], make_params()[:4]
    start = [p.detach().clone() for p in mine]
    opt = fusedopt.Ranger21(mine, lr=lr, weight_decay=0.0, backend="reference", clip=0.5, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, fusedopt.ranger21_schedule(lr, steps))
    names = {
        "centralize": "centralize_gradients",
        "normalize": "normalize_gradients",
        "lookahead": "lookahead_merge_time",
    }
    given = {names.get(k, k): v for k, v in options.items()}
    if "softplus" in given:
        given["use_softplus"] = given.pop("softplus") is not None
    other = Package(theirs, steps, lr=lr, weight_decay=0.0, agc_clipping_value=0.5, foreach=False, **given)
    for step in range(steps):
        growing_grads(mine, step)
        growing_grads(theirs, step)
        opt.step()
        other.step()
        schedule.step()
    for p, q, q0 in zip(mine, theirs, start, strict=True):
        assert relative_error(p.detach() - q0, q.detach() - q0) <= 5e-6


def test_components():
    p = parameters((4, 3))
    kinds = [type(t) for t in fusedopt.Ranger21(p, gradient_transforms=[tf.ClipValue()]).gradient_transforms]
    assert kinds == [
        tf.ClipValue, tf.Lookahead, tf.AdaptiveClip, tf.Centralize, tf.Normalize, tf.StableDecay, tf.NormLoss
    ]  # fmt: skip
    off = {
        "clip": None,
        "centralize": False,
        "normalize": False,
        "stable_decay": False,
        "norm_loss": None,
        "lookahead": None,
    }
    for left_out, kind in zip(off, (tf.AdaptiveClip, tf.Centralize, tf.Normalize, tf.StableDecay, tf.NormLoss, tf.Lookahead),
                              strict=True):  # fmt: skip
        opt = fusedopt.Ranger21(p, **{left_out: off[left_out]})
        assert kind not in [type(t) for t in opt.gradient_transforms] and len(opt.gradient_transforms) == 5
    bare = fusedopt.Ranger21(p, pnm=None, amsgrad=False, softplus=None, weight_decay=0.1, **off)
    assert bare.gradient_transforms == ()
    twins = parameters((4, 3))
    adamw = fusedopt.AdamW(twins, weight_decay=0.1)
    for step in range(5):
        for params, opt in ((p, bare), (twins, adamw)):
            set_grads(params, step)
            opt.step()
    torch.testing.assert_close(p, twins, rtol=1e-6, atol=1e-8)


def test_groups_outside_take_adamws_decay():
    one, two = parameters((4, 3), (4, 3)), parameters((4, 3), (4, 3))
    groups = [{"params": one[:1]}, {"params": one[1:], "transform_gradients": False}]
    opt = fusedopt.Ranger21(groups, weight_decay=0.1)
    assert [opt.decay_mode_for(g) for g in opt.param_groups] == ["rule", "decoupled"]
    plain = fusedopt.Ranger21(two, weight_decay=0.1, clip=None, centralize=False, normalize=False, stable_decay=False,
                              norm_loss=None, lookahead=None)  # fmt: skip
    for step in range(3):
        for params, o in ((one, opt), (two, plain)):
            set_grads(params, step)
            o.step()
    assert_same_bits([one[1].detach()], [two[1].detach()])


def test_each_groups_own_decay():
    """Stable decay takes the coefficient of each group: biases may have none."""
    params = parameters((4, 3), (4, 3))
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}]
    before = [p.detach().clone() for p in params]
    off = {"norm_loss": None, "lookahead": None, "clip": None}
    opt = fusedopt.Ranger21(groups, lr=0.1, weight_decay=0.5, **off)
    other = parameters((4, 3), (4, 3))
    none = fusedopt.Ranger21(other, lr=0.1, weight_decay=0.0, **off)
    for ps, o in ((params, opt), (other, none)):
        set_grads(ps, 0)
        o.step()
    assert_same_bits([params[1].detach()], [other[1].detach()])
    grads = torch.cat([p.grad.sub(p.grad.mean(1, keepdim=True)).flatten() for p in params]).view(2, -1)
    sigma = (grads / grads.std(1, keepdim=True)).square().mean().sqrt()
    torch.testing.assert_close(other[0] - params[0], before[0] * 0.1 * 0.5 / sigma, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("capturable", [False, True])
def test_two_hundred_steps_in_fp32(capturable):
    from oracles.composed import Ranger21 as Oracle

    options = {"lr": 0.01, "weight_decay": 0.1, "norm_loss": 0.1}
    mine = parameters(*SHAPES)
    exact = [torch.nn.Parameter(p.detach().double()) for p in mine]
    opt, other = fusedopt.Ranger21(mine, capturable=capturable, **options), Oracle(exact, **options)
    for step in range(200):
        set_grads(mine, step)
        for p, q in zip(mine, exact, strict=True):
            q.grad = p.grad.double()
        opt.step()
        other.step()
    for p, q, q0 in zip(mine, exact, parameters(*SHAPES), strict=True):
        moved = q.detach() - q0.detach()
        assert relative_error(p.detach().double() - q0.detach(), moved) <= 1e-5


def test_refusals():
    p = parameters((8, 8))
    with pytest.raises(ValueError, match="Ranger21: stable decay .* takes no projection. Use stable_decay=False"):
        fusedopt.Ranger21(p, projection=fusedopt.GaLore(rank=4))
    fusedopt.Ranger21(p, projection=fusedopt.GaLore(rank=4), stable_decay=False)
    for options, message in (
        ({"softplus": 0.0}, "Invalid softplus value: 0.0"),
        ({"pnm": -0.1}, "Invalid pnm value: -0.1"),
        ({"clip": 0.0}, "AdaptiveClip: invalid clip"),
        ({"norm_loss": 0.0}, "NormLoss: invalid factor"),
        ({"lookahead": 0}, "Lookahead: invalid every"),
        ({"differentiable": True}, "does not differentiate through gradient_transforms"),
    ):
        with pytest.raises(ValueError, match=message):
            fusedopt.Ranger21(p, **options)
