"""Transforms that rescale a step element by element: cautious masking of any rule, gradient grouping; Adam's critical momenta."""

import copy

import pytest
import torch
from configs import assert_resumes, assert_same_bits, parameters, set_grads
from oracles import wrappers as oracle
from test_transforms import feed_back

import fusedopt
from fusedopt import transforms as tf
from fusedopt.losses import TakesLoss
from fusedopt.rule import optimizers
from fusedopt.states import decode
from fusedopt.transforms.masking import group_bounds

SHAPES = ((7, 5), (5,), (3, 4, 2, 2), (12, 9))
RULES = {
    "adamw": (fusedopt.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "lion": (fusedopt.Lion, {"lr": 0.003, "weight_decay": 0.1}),
    "sgd": (fusedopt.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}),
}
GROUPING = {"every": 3, "beta_c": 0.6, "beta_s": 0.5, "low": 0.3, "high": 2.0}


def momenta_of(opt, params):
    def of(i):
        rule = opt.rule_for(opt.param_groups[0])
        return decode(params[i], opt.state[params[i]], rule.states[rule.state_names.index("exp_avg")]).view(
            params[i].shape
        )

    return of


def pair(name, rule, dtype=torch.float64, **options):
    """(parameters, optimizer with the transform), (parameters, plain optimizer, oracle)."""
    cls, given = RULES[rule]
    mine, theirs = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    plain = cls(theirs, **given, backend="reference")
    decay = given["lr"] * given["weight_decay"] if rule != "sgd" else 0.0
    if name.startswith("cautious"):
        count = name == "cautious_count"
        transform, around = tf.Cautious("count" if count else "mean"), oracle.Cautious(decay, count)
    else:
        around = oracle.GradientGrouping(decay, momenta_of(plain, theirs), **GROUPING)
        transform = tf.GradientGrouping(**GROUPING)
    opt = cls(mine, **given, gradient_transforms=[transform], **options)
    return (mine, opt), (theirs, plain, around)


NAMES = ("cautious", "cautious_count", "grouping")
CASES = [(name, rule) for name in NAMES for rule in RULES if rule != "sgd" or name != "grouping"]
each_case = pytest.mark.parametrize("name, rule", CASES)


@each_case
@pytest.mark.parametrize("capturable", [False, True])
def test_two_hundred_steps_of_the_reference(name, rule, capturable):
    """With capturable the rule's own numbers are fp32. 40 steps then: masks of elements that hardly move begin to differ."""
    (mine, opt), (theirs, plain, around) = pair(name, rule, backend="reference", capturable=capturable)
    start = [p.detach().clone() for p in theirs]
    for step in range(40 if capturable else 200):
        feed_back(theirs, step)
        for p, q in zip(mine, theirs, strict=True):
            p.grad = q.grad.clone()
        opt.step()
        around(theirs)
        plain.step()
        around.after(theirs, None)
    for p, q, first in zip(mine, theirs, start, strict=True):
        moved = (q.detach() - first).abs().max()
        assert moved > 0
        assert (p - q).detach().abs().max() / moved <= (1e-5 if capturable else 1e-9)


@each_case
@pytest.mark.parametrize("maximize", [False, True])
def test_each_step_in_fp32(name, rule, maximize):
    """The oracle, in fp64, around a plain fp32 step from the same weights, states and gradients."""
    (mine, opt), (theirs, plain, around) = pair(name, rule, torch.float32, maximize=maximize)
    cls, given = RULES[rule]
    plain = cls(theirs, **given, maximize=maximize)
    if name == "grouping":
        around.momenta = lambda i: momenta_of(plain, theirs)(i).double()
    for step in range(12):
        set_grads(mine, step)
        for p, q in zip(mine, theirs, strict=True):
            q.data.copy_(p.data)
            q.grad = p.grad.clone()
        exact = [torch.nn.Parameter(p.detach().double()) for p in mine]
        for p, q in zip(mine, exact, strict=True):
            q.grad = p.grad.double() * (-1 if maximize else 1)
        around(exact)
        opt.step()
        plain.step()
        for p, q in zip(theirs, exact, strict=True):
            q.data.copy_(p.detach())
        around.after(exact, None)
        for p, q in zip(mine, exact, strict=True):
            torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-6, atol=1e-6)


def test_masking_is_that_of_the_kernels():
    """AdamW and Lion with cautious=True, over which the transform agrees but for rounding."""
    for cls, normalise in ((fusedopt.AdamW, "mean"), (fusedopt.Lion, "count")):
        one, two = parameters(*SHAPES, dtype=torch.float64), parameters(*SHAPES, dtype=torch.float64)
        inside = cls(one, lr=0.01, weight_decay=0.1, cautious=normalise)
        around = cls(two, lr=0.01, weight_decay=0.1, gradient_transforms=[tf.Cautious(normalise)])
        for step in range(30):
            for ps, opt in ((one, inside), (two, around)):
                set_grads(ps, step)
                opt.step()
        for p, q in zip(one, two, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(optimizers()))
def test_every_rule_can_be_cautious(name):
    """A step never goes along the gradient."""
    params = parameters((40, 30), (50,))
    opt = optimizers()[name](params, gradient_transforms=[tf.Cautious()])
    moved = 0
    for step in range(6):
        set_grads(params, step)
        before = [p.detach().clone() for p in params]
        kwargs = {"loss": 1.0} if isinstance(opt, TakesLoss) else {}
        opt.step(**kwargs)
        decay = any(opt.decay_mode_for(g) != "coupled" and g["weight_decay"] > 0 for g in opt.param_groups)
        for p, old in zip(params, before, strict=True):
            delta = p.detach() - old
            assert bool(delta.isfinite().all())
            moved += int((delta != 0).sum())
            if not decay:
                assert not bool((delta * p.grad > 0).any())
    assert moved > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_changes_nothing(name):
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    options = {
        "lr": 0.02,
        "capturable": True,
        "gradient_transforms": [pair(name, "adamw")[0][1].gradient_transforms[0]],
    }
    skipping, plain = fusedopt.AdamW(one, **options, amp_fused=True), fusedopt.AdamW(two, **options)
    for step in range(9):
        overflow = step in (0, 3, 4)
        set_grads(one, step)
        kept = [p.detach().clone() for p in one]
        if overflow:
            one[0].grad[0] = float("inf")
        skipping.grad_scale, skipping.found_inf = torch.tensor(1.0), torch.tensor(float(overflow))
        skipping.step()
        if overflow:
            assert_same_bits([p.detach() for p in one], kept)
        else:
            set_grads(two, step)
            plain.step()
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def resumable(name, **options):
    if name == "adam_cm":
        return lambda ps: fusedopt.AdamCM(ps, lr=0.02, capacity=3, **options)
    transform = pair(name, "adamw")[0][1].gradient_transforms[0]
    return lambda ps: fusedopt.AdamW(ps, lr=0.02, gradient_transforms=[transform], **options)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "adam_cm"])
def test_resumes_bit_for_bit(name, capturable):
    assert_resumes(resumable(name, capturable=capturable), SHAPES, 5, 11)


def test_adam_cm_on_the_device_is_that_on_the_host_and_skips():
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    host = fusedopt.AdamCM(one, lr=0.02, capacity=2)
    device = fusedopt.AdamCM(two, lr=0.02, capacity=2, capturable=True, amp_fused=True)
    for step in range(9):
        set_grads(two, step)
        overflow = step in (0, 4)
        if overflow:
            two[1].grad[0] = float("inf")
        device.grad_scale, device.found_inf = torch.tensor(1.0), torch.tensor(float(overflow))
        device.step()
        if not overflow:
            set_grads(one, step)
            host.step()
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_one_dimensional_clusters():
    x = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1, 9.0, 9.5])
    assert torch.bucketize(x.double(), group_bounds(x, 3)).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert group_bounds(torch.ones(4), 3).tolist() == [1.0, 1.0]
    assert group_bounds(torch.tensor([2.0]), 2).tolist() == [2.0]


def test_clusters_are_bytes_and_travel():
    params = parameters((6, 4))
    opt = fusedopt.AdamW(params, gradient_transforms=[tf.GradientGrouping(every=1)])
    set_grads(params, 0)
    opt.step()
    clusters = opt.state[params[0]]["grouping_cluster"]
    assert clusters.dtype == torch.uint8 and clusters.unique().numel() == 3
    other = fusedopt.AdamW(parameters((6, 4)), gradient_transforms=[tf.GradientGrouping(every=1)])
    other.load_state_dict(opt.state_dict())
    loaded = next(iter(other.state.values()))["grouping_cluster"]
    assert loaded.dtype == torch.uint8 and torch.equal(loaded, clusters)
    broken = copy.deepcopy(opt.state_dict())
    broken["state"][0]["grouping_cluster"] = broken["state"][0]["grouping_cluster"].float()
    with pytest.raises(ValueError, match="grouping_cluster.*float32"):
        other.load_state_dict(broken)


@pytest.mark.parametrize(
    "build",
    [
        lambda: tf.Cautious("median"),
        lambda: tf.GradientGrouping(clusters=1),
        lambda: tf.GradientGrouping(clusters=256),
        lambda: tf.GradientGrouping(every=0),
        lambda: tf.GradientGrouping(beta_c=1.0),
        lambda: tf.GradientGrouping(low=3.0, high=2.0),
        lambda: tf.CriticalMomenta(capacity=0),
        lambda: tf.CriticalMomenta(decay=0.0),
    ],
)
def test_options_out_of_range(build):
    with pytest.raises(ValueError):
        build()


@pytest.mark.parametrize(
    "transform, cls, what",
    [(tf.GradientGrouping(), fusedopt.SGD, "exp_avg"), (tf.CriticalMomenta(), fusedopt.AdamW, "AdamCM")],
)
def test_rules_without_the_state_are_refused_before_anything_changes(transform, cls, what):
    params = parameters((6, 4))
    opt = cls(params, lr=0.1, gradient_transforms=[transform])
    set_grads(params, 0)
    kept = params[0].detach().clone()
    with pytest.raises(ValueError, match=what):
        opt.step()
    assert torch.equal(params[0], kept)
