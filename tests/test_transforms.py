"""Gradient transforms against independent ones, with several rules; their states, precision and surroundings."""

import copy
import io

import pytest
import torch
from configs import assert_same_bits, parameters, set_grads
from oracles import transforms as oracle
from pytorch_optimizer.optimizer.grokfast import gradfilter_ema, gradfilter_ma
from pytorch_optimizer.optimizer.orthograd import OrthoGrad as PackageOrthoGrad

import fusedopt
from fusedopt import transforms as tf

SHAPES = ((7, 5), (5,), (3, 4, 2, 2), (12, 9))
RULES = {
    "sgd": (fusedopt.SGD, {"lr": 0.002, "momentum": 0.9}),
    "adamw": (fusedopt.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "lion": (fusedopt.Lion, {"lr": 0.003, "weight_decay": 0.1}),
}
# transform -> its oracle
PAIRS = {
    "grokfast": (tf.Grokfast(alpha=0.9), oracle.Grokfast, {"alpha": 0.9}),
    "grokfast_ma": (tf.GrokfastMA(window=4), oracle.GrokfastMA, {"window": 4}),
    "grokfast_ma_sum": (
        tf.GrokfastMA(window=3, reduce="sum", warmup=False, amplify=0.5),
        oracle.GrokfastMA,
        {"window": 3, "reduce": "sum", "warmup": False, "amplify": 0.5},
    ),
    "orthograd": (tf.OrthoGrad(), oracle.OrthoGrad, {}),
    "orthograd_plain": (tf.OrthoGrad(rescale=False), oracle.OrthoGrad, {"rescale": False}),
    "clip_value": (tf.ClipValue(0.3), oracle.ClipValue, {"threshold": 0.3}),
    "clip_fraction": (tf.ClipFraction(0.2), oracle.ClipFraction, {"fraction": 0.2}),
    "clip_components": (tf.ClipComponents(0.5), oracle.ClipComponents, {"max_norm": 0.5}),
    "agc": (tf.AdaptiveClip(clip=0.1), oracle.AdaptiveClip, {"clip": 0.1}),
    "centralize": (tf.Centralize(), oracle.Centralize, {}),
    "centralize_conv": (tf.Centralize(conv_only=True), oracle.Centralize, {"conv_only": True}),
    "normalize": (tf.Normalize(), oracle.Normalize, {}),
    "unit_norm": (tf.UnitNorm(), oracle.UnitNorm, {}),
    "unit_norm_rows": (tf.UnitNorm(per="unit"), oracle.UnitNorm, {"per": "unit"}),
}
ELSEWHERE = {  # test_transforms_wrappers, _masking, test_losses, test_private, test_lora_pro, test_mfac; test_oracles (AdamCM)
    tf.Lookahead, tf.LAWN, tf.Layca, tf.TangentProjection, tf.QuantizationPull, tf.NormLoss, tf.StableDecay, tf.Hypergradient,
    tf.Bloop, tf.PrivacyNoise, tf.ErrorFeedback, tf.Cautious, tf.GradientGrouping, tf.CriticalMomenta,
    tf.LoRAPro, tf.LoRAOne, tf.InverseFisher,
}  # fmt: skip
each_pair = pytest.mark.parametrize("name", PAIRS)
each_rule = pytest.mark.parametrize("rule", RULES)


def make(rule: str, params, *transforms, **options):
    cls, given = RULES[rule]
    return cls(params, **{**given, **options}, gradient_transforms=transforms)


def feed_back(params, step: int) -> None:
    """Gradients that depend on the parameters, so that errors feed back; magnitudes differ from tensor to tensor."""
    gen = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        noise = torch.randn(p.shape, generator=gen, dtype=torch.float64)
        p.grad = ((0.3 * p.detach().double() + noise) * 10.0 ** ((i % 3) - 1)).to(p.dtype)


def trajectories(rule, transform, make_oracle, steps, dtype, backend):
    """The error of each tensor over 200 steps by how far it moved, and that of the oracle if it rounds its weights to fp32."""
    cls, given = RULES[rule]
    mine, theirs, rounded = parameters(*SHAPES, dtype=dtype), *(parameters(*SHAPES, dtype=torch.float64) for _ in "12")
    for p, *qs in zip(mine, theirs, rounded, strict=True):
        for q in qs:
            q.data.copy_(p.data)
    start = [q.detach().clone() for q in theirs]
    opt = make(rule, mine, transform, backend=backend)
    others = [(params, cls(params, **given, backend="reference"), make_oracle()) for params in (theirs, rounded)]
    for step in range(steps):
        feed_back(theirs, step)
        for p, q, r in zip(mine, theirs, rounded, strict=True):
            p.grad = q.grad.to(dtype)
            q.grad, r.grad = p.grad.double(), p.grad.double()
        kept = [p.grad.clone() for p in mine]
        opt.step()
        assert_same_bits([p.grad for p in mine], kept, "gradients are not written:")
        for params, other, transformed in others:
            transformed(params)
            other.step()
        for r in rounded:
            r.data.copy_(r.data.float())
    for p, q, r, q0 in zip(mine, theirs, rounded, start, strict=True):
        moved = (q.detach() - q0).abs().max()
        assert moved > 0
        yield tuple(float((x.detach().double() - q.detach()).abs().max() / moved) for x in (p, r))


@each_rule
@each_pair
def test_ten_steps_of_the_reference(name, rule):
    transform, cls, options = PAIRS[name]
    for error, _ in trajectories(rule, transform, lambda: cls(**options), 10, torch.float64, "reference"):
        assert error <= 1e-10


@each_pair
@each_rule
def test_two_hundred_steps_in_fp32(name, rule):
    """Both get the gradients at the oracle's weights. Only OrthoGrad with SGD needs the second term: it turns away from its
    weights ever faster, and the oracle itself, begun 6e-10 away, ends 3 of its way elsewhere at lr 0.02."""
    transform, cls, options = PAIRS[name]
    for error, rounding in trajectories(rule, transform, lambda: cls(**options), 200, torch.float32, None):
        assert error <= 1e-5 + (3 * rounding if rule == "sgd" and "ortho" in name else 0.0)


def test_every_transform_has_an_oracle():
    assert {type(t) for t, *_ in PAIRS.values()} | ELSEWHERE == set(tf.TRANSFORMS)


@pytest.mark.parametrize("kind", ["ema", "ma"])
def test_grokfast_transcription_matches_package(kind):
    model = torch.nn.Linear(5, 3).double()
    params = list(model.parameters())
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    mine, grads = oracle.Grokfast() if kind == "ema" else oracle.GrokfastMA(window=3), None
    for step in range(7):
        feed_back(params, step)
        feed_back(twins, step)
        grads = gradfilter_ema(model, grads) if kind == "ema" else gradfilter_ma(model, grads, window_size=3)
        mine(twins)
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


def test_orthograd_transcription_matches_package():
    params, twins = parameters(*SHAPES, dtype=torch.float64), parameters(*SHAPES, dtype=torch.float64)
    feed_back(params, 0)
    feed_back(twins, 0)
    PackageOrthoGrad(torch.optim.SGD(params, lr=0.1)).step()
    oracle.OrthoGrad()(twins)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


# Precision


@pytest.mark.parametrize("share", [1e-1, 1e-3, 1e-5])
def test_orthograd_of_nearly_parallel_gradients(share):
    """What is left is orthogonal to the weights to rounding, and right to eps / share."""
    w = torch.randn(4001, generator=torch.Generator().manual_seed(1))
    p = torch.nn.Parameter(w.clone())
    p.grad = 3 * w + 3 * share * torch.randn(4001, generator=torch.Generator().manual_seed(2))
    exact, norm = p.grad.double(), p.grad.double().norm()
    exact = exact - torch.dot(exact, w.double()) / w.double().square().sum() * w.double()
    exact *= norm / exact.norm()
    opt = fusedopt.SGD([p], lr=1.0, gradient_transforms=[tf.OrthoGrad()])
    p.data.copy_(w)
    opt.step()
    got = opt_gradient(w, p)
    assert torch.dot(got, w.double()).abs() <= 1e-6 * got.norm() * w.norm()
    assert (got - exact).norm() <= 4 * 1.2e-7 / share * norm + 1e-6 * norm


def opt_gradient(before, p) -> torch.Tensor:
    return before.double() - p.detach().double()


def test_orthograd_of_a_parallel_gradient_is_zero():
    w = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    p = torch.nn.Parameter(w.clone())
    p.grad = w * (1 / 3)
    fusedopt.SGD([p], lr=1.0, gradient_transforms=[tf.OrthoGrad()]).step()
    assert_same_bits([p.detach()], [w])


def test_norms_of_large_tensors():
    """The CPU's fp32 sum of squares would be 4 % off."""
    p = torch.nn.Parameter(torch.zeros(30_000_000))
    p.grad = torch.full_like(p, 0.1)
    fusedopt.SGD([p], lr=1.0, gradient_transforms=[tf.ClipComponents(1.0)]).step()
    torch.testing.assert_close(p.detach().double().norm(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_pair
def test_sixteen_bit_gradients_are_transformed_in_fp32(name, dtype):
    """A step of 16-bit parameters with their gradients is that with the same gradients in fp32, bit for bit."""
    transform = PAIRS[name][0]
    one, two = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    opts = [make("adamw", ps, transform, param_precision="master") for ps in (one, two)]
    for step in range(4):
        set_grads(one, step)
        for p, q in zip(one, two, strict=True):
            if hasattr(
                q, "grad_dtype"
            ):  # torch 2.10; before, a gradient of another dtype could be assigned through .data
                q.grad_dtype = None
            q.grad = p.grad.float()
        for opt in opts:
            opt.step()
    assert_same_bits([p.detach() for p in one], [p.detach() for p in two])
    for p in one:
        for state in transform.tensors(p):
            assert opts[0].state[p][state].dtype == torch.float32


def test_transforms_run_in_order():
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    opts = [make("sgd", one, tf.ClipValue(0.5), tf.Normalize()), make("sgd", two, tf.Normalize(), tf.ClipValue(0.5))]
    for params, first, second in ((one, oracle.ClipValue(0.5), oracle.Normalize()),
                                  (two, oracle.Normalize(), oracle.ClipValue(0.5))):  # fmt: skip
        want = parameters(*SHAPES, dtype=torch.float64)
        feed_back(params, 0)
        for p, q in zip(params, want, strict=True):
            q.grad = p.grad.double()
        first(want), second(want)
        opts.pop(0).step()
        for p, q in zip(params, want, strict=True):
            torch.testing.assert_close(p.double(), q - 0.002 * q.grad, rtol=1e-6, atol=1e-7)
    assert not torch.equal(one[0], two[0])


def test_global_clip_comes_after():
    params = parameters(*SHAPES)
    opt = make("sgd", params, tf.Normalize(), clip_grad_norm=0.5)
    feed_back(params, 0)
    want = [p.grad.double() / (p.grad.double().std() + 1e-8) for p in params]
    opt.step()
    total = torch.cat([g.flatten() for g in want]).norm()
    torch.testing.assert_close(opt.grad_norm.double().view(()), total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_maximize_negates(name):
    """All are odd: T(-g) = -T(g)."""
    transform = PAIRS[name][0]
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    up, down = make("sgd", one, transform, maximize=True), make("sgd", two, transform)
    for step in range(5):
        set_grads(one, step)
        set_grads(two, step, scale=-1.0)
        up.step()
        down.step()
    assert_same_bits([p.detach() for p in one], [p.detach() for p in two])


# Mixed precision


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_loss_scale_is_removed_before(name, capturable):
    transform = PAIRS[name][0]
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    scaled = make("adamw", one, transform, amp_fused=True, capturable=capturable)
    plain = make("adamw", two, transform, capturable=capturable)
    for step in range(6):
        set_grads(one, step, scale=1024.0)
        set_grads(two, step)
        scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.zeros(())
        scaled.step()
        plain.step()
    assert_same_bits([p.detach() for p in one], [p.detach() for p in two])


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_a_skipped_step_changes_nothing(name, capturable):
    """capturable: the device alone knows. Also the first step may be skipped."""
    transform = PAIRS[name][0]
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    skipping = make("adamw", one, transform, amp_fused=True, capturable=capturable)
    plain = make("adamw", two, transform, capturable=capturable)
    for step in range(9):
        overflow = step in (0, 3, 4)
        set_grads(one, step)
        if overflow:
            one[0].grad[0] = float("inf")
            one[1].grad.fill_(float("nan"))
        skipping.grad_scale, skipping.found_inf = torch.tensor(1.0), torch.tensor(float(overflow))
        skipping.step()
        if not overflow:
            set_grads(two, step)
            plain.step()
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        for state in transform.tensors(p):
            torch.testing.assert_close(skipping.state[p][state], plain.state[q][state], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PAIRS)
def test_counts_on_the_device_give_the_same(name):
    transform = PAIRS[name][0]
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    opts = [make("sgd", one, transform), make("sgd", two, transform, capturable=True)]
    for step in range(7):
        for params, opt in zip((one, two), opts, strict=True):
            set_grads(params, step)
            opt.step()
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


# State dicts


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", ["grokfast", "grokfast_ma"])
def test_resumes_bit_for_bit(name, capturable):
    transform = PAIRS[name][0]

    def fresh():
        params = parameters(*SHAPES, (4, 3, 2, 2))
        params[-1].data = params[-1].data.to(memory_format=torch.channels_last)
        return params, make("adamw", params, transform, capturable=capturable)

    straight, opt = fresh()
    for step in range(9):
        set_grads(straight, step)
        opt.step()
    params, first = fresh()
    for step in range(5):
        set_grads(params, step)
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed, second = fresh()
    for p, q in zip(resumed, params, strict=True):
        p.data.copy_(q.data)
    second.load_state_dict(torch.load(file, weights_only=True))
    for step in range(5, 9):
        set_grads(resumed, step)
        second.step()
    assert_same_bits([p.detach() for p in resumed], [p.detach() for p in straight])
    for p, q in zip(resumed, straight, strict=True):
        for state in transform.tensors(p):
            assert_same_bits([second.state[p][state]], [opt.state[q][state]])


def test_copies_go_on_alike():
    params = parameters(*SHAPES)
    opt = make("adamw", params, tf.Grokfast())
    set_grads(params, 0)
    opt.step()
    twins, twin = copy.deepcopy((params, opt))
    for step in (1, 2):
        for ps, o in ((params, opt), (twins, twin)):
            set_grads(ps, step)
            o.step()
    assert_same_bits([p.detach() for p in params], [p.detach() for p in twins])


def test_states_are_counted_and_begin_anew_where_a_checkpoint_has_none():
    params, others = parameters(*SHAPES), parameters(*SHAPES)
    plain, opt = make("adamw", params), make("adamw", others, tf.Grokfast())
    for ps, o in ((params, plain), (others, opt)):
        set_grads(ps, 0)
        o.step()
    numel = sum(p.numel() for p in params)
    assert fusedopt.state_bytes(opt) == fusedopt.state_bytes(plain) + 4 * (numel + len(params))
    opt.load_state_dict(plain.state_dict())
    set_grads(others, 1)
    opt.step()
    for p in others:
        torch.testing.assert_close(opt.state[p]["grokfast_ema"], p.grad, rtol=0, atol=0)


def test_states_of_transforms_need_the_transform():
    params = parameters(*SHAPES)
    opt = make("adamw", params, tf.Grokfast())
    set_grads(params, 0)
    opt.step()
    with pytest.raises(ValueError, match=r"grokfast_ema.*with gradient_transforms=Grokfast"):
        make("adamw", parameters(*SHAPES)).load_state_dict(opt.state_dict())
    wrong = opt.state_dict()
    wrong["state"][1] = {**wrong["state"][1], "grokfast_ema": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"parameter 1 .*'grokfast_ema' has shape \(3,\)"):
        opt.load_state_dict(wrong)


def test_converted_state_dicts_keep_them():
    from fusedopt.conversion import convert

    params = parameters((80, 64))
    opt = make("adamw", params, tf.Grokfast())
    set_grads(params, 0)
    opt.step()
    converted = convert(opt.state_dict(), "int8")
    other = make("adamw", parameters((80, 64)), tf.Grokfast(), state_format="int8")
    other.load_state_dict(converted)
    entry = other.state_dict()["state"][0]
    assert torch.equal(entry["grokfast_ema"], params[0].grad)
    assert entry["exp_avg"].dtype == torch.uint8
    assert "grokfast_ema" not in opt.state_dict(format="torch")["state"][0]
    torch.optim.AdamW(parameters((80, 64))).load_state_dict(opt.state_dict(format="torch"))


# Groups and names


def test_groups_may_be_left_out():
    params = parameters(*SHAPES)
    groups = [{"params": params[:2]}, {"params": params[2:], "transform_gradients": False}]
    opt = fusedopt.SGD(groups, lr=1.0, gradient_transforms=[tf.Grokfast(), tf.UnitNorm()])
    start = [p.detach().clone() for p in params]
    set_grads(params, 0)
    opt.step()
    for i, (p, p0) in enumerate(zip(params, start, strict=True)):
        want = p.grad / p.grad.norm() if i < 2 else p.grad
        torch.testing.assert_close(p0 - p, want, rtol=1e-5, atol=1e-6)
        assert ("grokfast_ema" in opt.state[p]) == (i < 2)
    again = fusedopt.SGD([{"params": params[:2]}, {"params": params[2:], "transform_gradients": False}], lr=1.0,
                         gradient_transforms=[tf.Grokfast(), tf.UnitNorm()])  # fmt: skip
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[1]["transform_gradients"] is False


def test_components_of_several_tensors():
    names = ["a.q.weight", "a.q.bias", "b.q.weight", "head"]
    one, two = parameters(*SHAPES), parameters(*SHAPES, dtype=torch.float64)
    transform = tf.ClipComponents(0.5, components=("a.", "head"))
    opt = fusedopt.SGD(list(zip(names, one, strict=True)), lr=1.0, gradient_transforms=[transform])
    set_grads(one, 0)
    for p, q in zip(one, two, strict=True):
        q.grad = p.grad.double()
    opt.step()
    oracle.ClipComponents(0.5, [[0, 1], [2], [3]])(two)
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p.double(), q - q.grad, rtol=1e-6, atol=1e-6)
    unnamed = parameters(*SHAPES)
    opt = fusedopt.SGD(unnamed, lr=1.0, gradient_transforms=[transform])
    set_grads(unnamed, 0)
    with pytest.raises(ValueError, match=r"Create it with model.named_parameters"):
        opt.step()


def test_layouts_and_empty_tensors():
    params = parameters((4, 3, 2, 2), (6, 5), (0,), ())
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    twins = [torch.nn.Parameter(p.detach().double().contiguous()) for p in params]
    opt = make("sgd", params, tf.Grokfast(alpha=0.9), tf.OrthoGrad(), tf.Centralize())
    other = fusedopt.SGD(twins, lr=0.002, momentum=0.9, backend="reference")
    filters = [oracle.Grokfast(alpha=0.9), oracle.OrthoGrad(), oracle.Centralize()]
    for step in range(4):
        set_grads(params, step)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.double().contiguous()
        opt.step()
        for f in filters[:-1]:
            f([q for q in twins if q.dim()])
        filters[-1]([q for q in twins if q.numel()])
        other.step()
    for p, q in zip(params[:3], twins[:3], strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-6)
    assert opt.state[params[0]]["grokfast_ema"].stride() == params[0].stride()
