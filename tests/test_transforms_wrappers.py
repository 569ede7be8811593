"""Transforms that change weights around a step, against transcriptions; hypergradients and GradES."""

import pytest
import torch
from configs import assert_resumes, assert_same_bits, parameters, set_grads
from oracles import wrappers as oracle
from pytorch_optimizer import Lookahead as PackageLookahead
from test_transforms import RULES, feed_back, make

import fusedopt
from fusedopt import transforms as tf

SHAPES = ((7, 5), (5,), (3, 4, 2, 2), (12, 9))
PULL = {"kappa": 3.0, "silent": 2, "ramp": 4, "bits": 3}
# transform, its oracle given the arguments of the rule
PAIRS = {
    "lookahead": (tf.Lookahead(every=3, alpha=0.3), lambda given: oracle.Lookahead(3, 0.3)),
    "lawn": (tf.LAWN(free_steps=2), lambda given: oracle.LAWN(2)),
    "layca": (tf.Layca(), lambda given: oracle.Layca()),
    "tangent": (
        tf.TangentProjection(delta=1.5, wd_ratio=0.3),
        lambda given: oracle.TangentProjection(given.get("weight_decay", 0.0), 1.5, 0.3),
    ),
    "pull": (tf.QuantizationPull(**PULL), lambda given: oracle.QuantizationPull(**PULL)),
    "norm_loss": (tf.NormLoss(factor=0.5), lambda given: oracle.NormLoss(given["lr"], factor=0.5)),
    "stable_decay": (tf.StableDecay(decay=0.3), lambda given: oracle.StableDecay(given["lr"], decay=0.3)),
}
CASES = [(name, rule) for name in PAIRS for rule in RULES if name != "stable_decay" or rule == "adamw"]
each_case = pytest.mark.parametrize("name, rule", CASES)


def in_fp32(params) -> None:
    for p in params:
        p.data.copy_(p.data.float())


def errors(name, rule, steps, dtype, backend, **options):
    """The error of each tensor by how far it moved, and that of the oracle if its weights are fp32 after the step
    and after what follows it: Layca takes steps of 1e-3 from their difference."""
    transform, make_oracle = PAIRS[name]
    cls, given = RULES[rule]
    mine, *others = (parameters(*SHAPES, dtype=d) for d in (dtype, torch.float64, torch.float64))
    for ps in others:
        for p, q in zip(mine, ps, strict=True):
            q.data.copy_(p.data)
    start = [q.detach().clone() for q in others[0]]
    opt = make(rule, mine, transform, backend=backend, **options)
    runs = [(ps, cls(ps, **given, backend="reference"), make_oracle(given)) for ps in others]
    for step in range(steps):
        feed_back(others[0], step)
        for p, *qs in zip(mine, *others, strict=True):
            p.grad = qs[0].grad.to(dtype)
            for q in qs:
                q.grad = p.grad.double()
        opt.step()
        for ps, other, around in runs:
            around(ps)
            other.step()
            if ps is others[1]:
                in_fp32(ps)
            if hasattr(around, "after"):
                around.after(ps, given["lr"])
        in_fp32(others[1])
    for p, q, r, q0 in zip(mine, *others, start, strict=True):
        moved = (q.detach() - q0).abs().max()
        assert moved > 0
        yield tuple(float((x.detach().double() - q.detach()).abs().max() / moved) for x in (p, r))


@each_case
@pytest.mark.parametrize("capturable", [False, True])
def test_ten_steps_of_the_reference(name, rule, capturable):
    """With capturable the rule's own numbers are fp32."""
    for error, _ in errors(name, rule, 10, torch.float64, "reference", capturable=capturable):
        assert error <= (1e-6 if capturable else 1e-10)


@each_case
def test_two_hundred_steps_in_fp32(name, rule):
    """Weights near a rounding boundary of the pull fall on either side of it: they are held against the oracle's own rounding."""
    for error, rounding in errors(name, rule, 200, torch.float32, None):
        assert error <= 1e-5 + 3 * rounding


def test_lookahead_transcription_matches_package():
    one, two = parameters(*SHAPES, dtype=torch.float64), parameters(*SHAPES, dtype=torch.float64)
    package = PackageLookahead(torch.optim.SGD(one, lr=0.1), k=3, alpha=0.3, pullback_momentum="none")
    plain, around = torch.optim.SGD(two, lr=0.1), oracle.Lookahead(3, 0.3)
    for step in range(10):
        set_grads(one, step)
        set_grads(two, step)
        package.step()
        around(two)
        plain.step()
        around.after(two, 0.1)
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


KEPT = [
    (name, precision)
    for name in ("lookahead", "lawn", "tangent", "pull", "norm_loss")
    for precision in ("split32", "master", "kahan", "nearest")
    if (name, precision) != ("pull", "nearest")
]


@pytest.mark.parametrize("name, precision", KEPT)
def test_sixteen_bit_weights(name, precision):
    """split32 and master walk as fp32 weights do; the parameter is their rounded copy. Without pull-nearest: it takes
    bf16 weights over a boundary of its three bits."""
    transform = PAIRS[name][0]
    wide, narrow = parameters(*SHAPES), parameters(*SHAPES, dtype=torch.bfloat16)
    for p, q in zip(wide, narrow, strict=True):
        p.data.copy_(q.data)
    opts = [make("adamw", wide, transform), make("adamw", narrow, transform, param_precision=precision)]
    for step in range(8):
        set_grads(narrow, step)
        for p, q in zip(wide, narrow, strict=True):
            p.grad = q.grad.float()
        for opt in opts:
            opt.step()
    kept = torch.nn.ParameterList(narrow)
    exact = opts[1].fp32_state_dict(kept)
    for i, p in enumerate(wide):
        bound = {"split32": 1e-6, "master": 1e-6, "kahan": 1e-3, "nearest": 3e-2}[precision]
        torch.testing.assert_close(exact[str(i)], p.detach(), rtol=bound, atol=bound)
    if precision in ("split32", "master"):
        assert_same_bits([exact[str(i)].bfloat16() for i in range(4)], [p.detach() for p in narrow])


@pytest.mark.parametrize("name", PAIRS)
def test_a_skipped_step_changes_nothing(name):
    transform = PAIRS[name][0]
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    skipping = make("adamw", one, transform, amp_fused=True, capturable=True)
    plain = make("adamw", two, transform, capturable=True)
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


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_resumes_bit_for_bit(name, capturable):
    assert_resumes(lambda ps: make("adamw", ps, PAIRS[name][0], capturable=capturable), SHAPES, 4, 9)


def test_a_quantiser_of_ones_own():
    (p,) = parameters((6, 4))
    opt = fusedopt.SGD([p], lr=0.5, gradient_transforms=[tf.QuantizationPull(kappa=2.0, quantize=torch.round)])
    p.grad = torch.zeros_like(p)
    before = p.detach().clone()
    opt.step()
    torch.testing.assert_close(p.detach(), before.round(), rtol=0, atol=1e-6)


def test_layca_turns_by_the_learning_rate():
    params = parameters((40, 30))
    before = params[0].detach().clone()
    opt = fusedopt.AdamW(params, lr=0.1, weight_decay=0.0, gradient_transforms=[tf.Layca()])
    set_grads(params, 0)
    opt.step()
    cosine = torch.nn.functional.cosine_similarity(before.flatten(), params[0].detach().flatten(), 0)
    assert float(cosine.acos()) == pytest.approx(torch.tensor(0.1).atan().item(), rel=1e-4)
    torch.testing.assert_close(params[0].detach().norm(), before.norm(), rtol=1e-6, atol=0)


def test_zero_tensors_are_not_bound():
    p = torch.nn.Parameter(torch.zeros(5))
    opt = fusedopt.SGD([p], lr=0.1, gradient_transforms=[tf.LAWN()])
    p.grad = torch.ones(5)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((5,), -0.1))
    p.grad = torch.tensor([1.0, 0, 0, 0, 0])
    opt.step()
    torch.testing.assert_close(p.detach().norm(), torch.full((5,), -0.1).norm())


def test_what_is_missing_is_said_before_anything_changes():
    params = parameters((6, 4))
    opt = fusedopt.SGD(params, lr=0.1, gradient_transforms=[tf.Grokfast(), tf.StableDecay()])
    set_grads(params, 0)
    with pytest.raises(ValueError, match=r"rule 'sgd.*' keeps no full exp_avg_sq of parameter 0"):
        opt.step()
    assert opt.state[params[0]]["grokfast_steps"] == 0
    with pytest.raises(ValueError, match="lr=torch.tensor"):
        fusedopt.SGD(params, lr=0.1, gradient_transforms=[tf.Hypergradient()]).step()
    with pytest.raises(ValueError, match="release_gradients: Lookahead .* needs all gradients"):
        net = torch.nn.Linear(3, 3)
        fusedopt.release_gradients(net, make("sgd", net.parameters(), tf.Lookahead()))


@pytest.mark.parametrize(
    "build",
    [
        lambda: tf.Lookahead(every=0),
        lambda: tf.Lookahead(alpha=0.0),
        lambda: tf.LAWN(free_steps=-1),
        lambda: tf.QuantizationPull(kappa=0.0),
        lambda: tf.QuantizationPull(silent=-1),
        lambda: tf.QuantizationPull(ramp=0),
        lambda: tf.QuantizationPull(bits=1),
        lambda: tf.NormLoss(factor=0.0),
        lambda: tf.StableDecay(decay=-1.0),
        lambda: tf.Hypergradient(rate=0.0),
        lambda: tf.Hypergradient(least=2.0, most=1.0),
        lambda: tf.Hypergradient(per="tensor"),
        lambda: fusedopt.GradES(None, threshold=0.0, start=1),
        lambda: fusedopt.GradES(None, threshold=1.0, start=-1),
        lambda: fusedopt.GradES(None, threshold=1.0, start=1, metric="l2"),
    ],
)
def test_options_out_of_range(build):
    with pytest.raises(ValueError, match="invalid|unknown"):
        build()


# Learning rates


@pytest.mark.parametrize("steps", [10, 200])
@pytest.mark.parametrize("per", ["model", "group"])
def test_hypergradient(per, steps):
    """SGD-HD by hand: arXiv 1703.04782."""
    one, two = parameters(*SHAPES, dtype=torch.float64), parameters(*SHAPES, dtype=torch.float64)
    lrs = [torch.tensor(0.01, dtype=torch.float64) for _ in "12"]
    groups = [{"params": one[:2], "lr": lrs[0]}, {"params": one[2:], "lr": lrs[1]}]
    transform = tf.Hypergradient(rate=1e-5, least=1e-3, most=0.02, per=per)
    opt = fusedopt.SGD(groups, lr=torch.tensor(0.01), gradient_transforms=[transform])
    rates, last, seen = [0.01, 0.01], None, set()
    for step in range(steps):
        feed_back(one, step)
        grads = [p.grad.clone() for p in one]
        if last is not None:
            dots = [sum(float((grads[i] * last[i]).sum()) for i in ids) for ids in ((0, 1), (2, 3))]
            dots = [sum(dots)] * 2 if per == "model" else dots
            rates = [min(max(r + 1e-5 * d, 1e-3), 0.02) for r, d in zip(rates, dots, strict=True)]
        last = grads
        opt.step()
        for i, q in enumerate(two):
            q.data -= rates[i // 2] * grads[i]
        assert [float(lr) for lr in lrs] == pytest.approx(rates, rel=1e-9)
        seen.add(rates[0])
    assert len(seen) > 5
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_hypergradient_of_a_skipped_step():
    params = parameters((5, 4))
    lr = torch.tensor(0.01)
    opt = fusedopt.SGD(params, lr=lr, capturable=True, amp_fused=True, gradient_transforms=[tf.Hypergradient(0.1)])
    for step in range(4):
        params[0].grad = torch.ones(5, 4)
        opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(float(step == 2))
        before = float(lr)
        opt.step()
        assert (float(lr) == before) == (step in (0, 2))


# Freezing


@pytest.mark.parametrize("metric", ["l1", "l1_change"])
@pytest.mark.parametrize("normalise", ["sum", "mean"])
def test_grades_freezes_for_good(metric, normalise):
    params = parameters((6, 4), (8, 5), (5,))
    opt = fusedopt.AdamW(params, lr=0.1)
    threshold = 0.5 / (24 if normalise == "mean" else 1)
    gate = fusedopt.GradES(opt, threshold, start=2, metric=metric, normalise=normalise)
    frozen_at = []
    for step in range(6):
        sizes = [0.3 / 24, 3.0 / 40] if metric == "l1" else [1.0 + 0.3 / 24 * (step % 2), 1.0 + step]
        for p, size in zip(params, [*sizes, 0.0], strict=True):
            p.grad = torch.full_like(p, size) if p.requires_grad else None
        before = [p.detach().clone() for p in params]
        frozen = gate.update()
        opt.step()
        frozen_at += [(step, i) for i, p in enumerate(params) for q in frozen if q is p]
        if step >= 2:
            assert_same_bits([params[0].detach()], [before[0]])
        assert not torch.equal(params[1], before[1])
    assert frozen_at == [(2, 0)]
    assert opt.state[params[0]]["step"] == 2
    again = parameters((6, 4), (8, 5), (5,))
    other = fusedopt.GradES(fusedopt.AdamW(again), threshold, start=2)
    other.load_state_dict(gate.state_dict())
    assert [p.requires_grad for p in again] == [False, True, True]
