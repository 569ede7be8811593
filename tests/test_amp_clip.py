"""Mixed precision and clipping inside the step: found_inf, grad_scale, GradScaler, clip_grad_norm=, norm functions."""

import pytest
import torch
from configs import (
    CONFIGS,
    EVERY,
    assert_same_bits,
    backend_argument,
    each_backend,
    each_config,
    parameters,
    set_grads,
    tensors,
    train,
)

import fusedopt

SHAPES = ((40, 130), (7,), (), (0,))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NOT_LAMB = [c for c in CONFIGS if c.optimizer != "lamb"]


def mixed(seed=0):
    """Parameters of all dtypes and alignments: several buckets, native and reference ones."""
    params = [p for dtype in DTYPES for p in parameters((30, 20), (5,), dtype=dtype, seed=seed)]
    return [*params, torch.nn.Parameter(torch.randn(41, generator=torch.Generator().manual_seed(9))[1:])]


@each_backend
@each_config(EVERY)
@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e6])
def test_clip_inside_equals_torch_clip_and_step(config, max_norm, backend):
    inside, outside = mixed(), mixed()
    one = config.make(inside, backend=backend, clip_grad_norm=max_norm)
    two = config.make(outside, backend=backend, clip_grad_norm=None)
    for step in range(3):
        set_grads(inside, step)
        set_grads(outside, step)
        for p in outside:  # torch would round 16-bit gradients after scaling
            p.grad = p.grad.double() if p.dtype == torch.float64 else p.grad
        kept = [p.grad.clone() for p in inside]
        total = torch.nn.utils.get_total_norm([p.grad.double() for p in outside])
        coefficient = (max_norm / (total + 1e-6)).clamp(max=1.0)
        one.step()
        two_step_with_scaled_gradients(two, outside, coefficient)
        torch.testing.assert_close(one.grad_norm.double().view(()), total, rtol=1e-6, atol=0)
        assert_same_bits([p.grad for p in inside], kept, "gradients are not written:")
    for p, q in zip(inside, outside, strict=True):
        tolerance = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(p.dtype, 3e-6)
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance / 10)


def two_step_with_scaled_gradients(opt, params, coefficient):
    """A step with exactly scaled gradients, through grad_scale: 16-bit gradients keep their bits."""
    opt.amp_fused = True
    opt.grad_scale, opt.found_inf = (1 / coefficient).float(), torch.zeros(1)
    opt.step()
    del opt.grad_scale, opt.found_inf


@each_backend
@each_config(NOT_LAMB)
def test_fp32_clip_equals_torch_function(config, backend):
    inside, outside = parameters(*SHAPES), parameters(*SHAPES)
    one, two = config.make(inside, backend=backend, clip_grad_norm=0.3), config.make(outside, backend=backend)
    for step in range(4):
        set_grads(inside, step)
        set_grads(outside, step)
        norm = torch.nn.utils.clip_grad_norm_(outside, 0.3)
        one.step()
        two.step()
        torch.testing.assert_close(one.grad_norm.float().view(()), norm, rtol=1e-6, atol=0)
    for p, q in zip(inside, outside, strict=True):
        torch.testing.assert_close(p, q, rtol=3e-6, atol=3e-7)


@each_backend
@each_config()
def test_clip_by_a_tensor_is_live(config, backend):
    """A tensor limit is read at every step: the same steps as with numbers, without a new plan."""
    lists = [mixed(), mixed()]
    limit = torch.tensor(0.5)
    live = config.make(lists[0], backend=backend, clip_grad_norm=limit)
    plain = config.make(lists[1], backend=backend, clip_grad_norm=0.5)
    plans = set()
    for step, value in enumerate([0.5, 1e-2, 1e3]):
        limit.fill_(value)
        plain.clip_grad_norm = value
        for opt, params in zip((live, plain), lists, strict=True):
            set_grads(params, step)
            opt.amp_fused = True
            opt.grad_scale, opt.found_inf = torch.full((1,), 2.0), torch.zeros(1)
            opt.step()
        plans.add(id(live._plan))
        torch.testing.assert_close(live.grad_norm.float(), plain.grad_norm.float(), rtol=1e-6, atol=0)
    for p, q in zip(*lists, strict=True):
        tolerance = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(p.dtype, 1e-6)
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance / 10)
    assert len(plans) == 1


def test_clip_tensor_is_checked():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="Tensor clip_grad_norm must be 1-element"):
        fusedopt.AdamW([p], clip_grad_norm=torch.ones(2))
    with pytest.raises(ValueError, match="Invalid clip_grad_norm value"):
        fusedopt.AdamW([p], clip_grad_norm=torch.tensor(-1.0))


def test_grad_norm_attribute():
    params = parameters(*SHAPES)
    opt = fusedopt.AdamW(params)
    train(opt, params, 0, 1)
    assert opt.grad_norm is None
    opt = fusedopt.AdamW(params, clip_grad_norm=1.0)
    assert opt.grad_norm is None
    for p in params:
        p.grad = torch.zeros_like(p)
    params[1].grad[:2] = torch.tensor([3.0, -4.0])
    opt.step()
    assert float(opt.grad_norm) == 5.0
    opt.clip_grad_norm = None
    opt.step()
    assert opt.grad_norm is None


@pytest.mark.parametrize("clip", [float("inf"), 1e9])
def test_clipping_that_never_clips_gives_the_norm(clip):
    plain, logged = parameters(*SHAPES), parameters(*SHAPES)
    one, two = fusedopt.AdamW(plain), fusedopt.AdamW(logged, clip_grad_norm=clip)
    train(one, plain, 0, 2)
    train(two, logged, 0, 2)
    assert_same_bits([p.detach() for p in logged], [p.detach() for p in plain])
    assert float(two.grad_norm) > 0


# Functions


@pytest.mark.parametrize("dtype", DTYPES)
def test_global_norm(dtype):
    ts = [
        torch.randn(s, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i, s in enumerate([(300, 70), (5,), (), (0,)])
    ]
    ts += [ts[0].t(), ts[0][:, ::3], None]
    want = torch.cat([t.double().reshape(-1) for t in ts if t is not None]).norm()
    torch.testing.assert_close(fusedopt.global_norm(ts).double(), want, rtol=1e-6, atol=0)


def test_global_norm_of_mixed_dtypes_and_of_nothing():
    ts = [torch.full((10,), 2.0, dtype=d) for d in DTYPES]
    got = fusedopt.global_norm(t for t in ts)
    assert got.dtype == torch.float32 and got.shape == () and float(got) == pytest.approx(160**0.5, rel=1e-6)
    assert float(fusedopt.global_norm([])) == 0 and float(fusedopt.global_norm([None, torch.zeros(0)])) == 0
    with pytest.raises(RuntimeError, match=r"tensor 0 \(torch.complex64.*must be dense and floating point"):
        fusedopt.global_norm([torch.zeros(2, dtype=torch.complex64)])
    with pytest.raises(RuntimeError, match="tensor 1 .*sparse"):
        fusedopt.global_norm([torch.zeros(2), torch.zeros(2).to_sparse()])


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clip_grad_norm_function(max_norm):
    ours, theirs = mixed(), mixed()
    set_grads(ours, 0)
    set_grads(theirs, 0)
    norm = fusedopt.clip_grad_norm_(ours, max_norm)
    want = torch.nn.utils.clip_grad_norm_(theirs, max_norm, foreach=False)
    torch.testing.assert_close(norm.double(), want.double(), rtol=2e-3, atol=0)  # torch rounds norms to 16 bits
    exact = torch.cat([p.grad.double().reshape(-1) for p in ours]).norm()
    assert float(exact) == pytest.approx(min(max_norm, float(norm)), rel=3e-4)
    one = parameters((4,))[0]
    one.grad = torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert float(fusedopt.clip_grad_norm_(one, 1.0)) == 5.0
    torch.testing.assert_close(one.grad, torch.tensor([0.6, 0.8, 0, 0]))


# GradScaler's protocol


def amp_step(opt, params, step, found_inf, grad_scale):
    set_grads(params, step, scale=1.0 if grad_scale is None else grad_scale)
    opt.found_inf = torch.tensor([float(found_inf)])
    opt.grad_scale = None if grad_scale is None else torch.tensor([float(grad_scale)])
    opt.step()
    del opt.found_inf, opt.grad_scale


@each_backend
@each_config(EVERY)
@pytest.mark.parametrize("form", ["fp32", "int8"])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("grad_scale", [None, 1.0, 2.0**10])
def test_found_inf_leaves_everything_as_it_was(config, form, capturable, grad_scale, backend):
    """A skipped step changes no bit, and the steps after it are those of a run without it."""
    options = {"state_format": form, "param_precision": "stochastic", "clip_grad_norm": 1.0, "capturable": capturable}
    params, expected = parameters(*SHAPES), parameters(*SHAPES)
    opt = config.make(params, backend=backend, amp_fused=True, **options)
    plain = config.make(expected, backend=backend, amp_fused=True, **options)
    amp_step(opt, params, 0, True, grad_scale)
    assert all(float(entry["step"]) == 0 for entry in opt.state.values())
    assert_same_bits([p.detach() for p in params], [p.detach() for p in expected])
    for step in range(4):
        amp_step(opt, params, step, False, grad_scale)
        amp_step(plain, expected, step, False, grad_scale)
        before = tensors(opt, params)
        set_grads(params, 99)
        params[0].grad[3, 5] = float("inf")
        opt.found_inf, opt.grad_scale = torch.ones(1), torch.ones(1)
        opt.step()
        assert_same_bits(tensors(opt, params), before, "skipped:")
    assert_same_bits(tensors(opt, params), tensors(plain, expected))
    assert int(opt.state[params[0]]["step"]) == 4


@each_backend
@each_config(EVERY)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_grad_scale_is_undone(config, clip, backend):
    """A power of two scales and unscales without rounding: the steps are the same bit by bit."""
    scaled, plain = parameters(*SHAPES), parameters(*SHAPES)
    one = config.make(scaled, backend=backend, amp_fused=True, clip_grad_norm=clip)
    two = config.make(plain, backend=backend, clip_grad_norm=clip)
    for step in range(3):
        amp_step(one, scaled, step, False, 2.0**12)
        train(two, plain, step, step + 1)
        if clip:
            torch.testing.assert_close(one.grad_norm, two.grad_norm, rtol=1e-6, atol=0)
    for p, q in zip(scaled, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


@each_config(EVERY)
def test_attributes_are_ignored_unless_asked_for(config):
    assert config.make(parameters((2,)))._step_supports_amp_scaling is False
    assert config.make(parameters((2,)), amp_fused=True)._step_supports_amp_scaling is True
    params, expected = parameters((5,)), parameters((5,))
    opt, plain = config.make(params), config.make(expected)
    opt.found_inf, opt.grad_scale = torch.ones(1), torch.full((1,), 8.0)
    train(opt, params, 0, 1)
    train(plain, expected, 0, 1)
    assert_same_bits([params[0].detach()], [expected[0].detach()])


@each_backend
@each_config(EVERY)
@pytest.mark.parametrize("amp_fused", [False, True])
def test_with_grad_scaler(config, amp_fused, backend):
    """Scaled losses train as unscaled ones; a step with an overflow is skipped and halves the scale."""
    scaled, plain = parameters((6, 5)), parameters((6, 5))
    one, two = config.make(scaled, backend=backend, amp_fused=amp_fused), config.make(plain, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    for step in range(4):
        if step == 2:
            before = tensors(one, scaled)
            one.zero_grad()
            scaler.scale((x @ scaled[0]).square().sum() * float("inf")).backward()
            scaler.step(one)
            scaler.update()
            assert_same_bits(tensors(one, scaled), before)
            assert scaler.get_scale() == 128.0
        for p, o in ((scaled[0], one), (plain[0], two)):
            o.zero_grad()
            loss = (x @ p).square().sum()
            (scaler.scale(loss) if o is one else loss).backward()
        scaler.step(one)
        scaler.update()
        two.step()
    torch.testing.assert_close(scaled[0], plain[0], rtol=2e-6, atol=2e-7)
    assert not hasattr(one, "grad_scale") and not hasattr(one, "found_inf")
    assert int(one.state[scaled[0]]["step"]) == 4


@each_backend
@pytest.mark.parametrize("separately", [False, True])
def test_unscale_before_clipping(separately, backend):
    """scaler.unscale_ + torch's clipping, and clipping inside a fused step, agree."""
    a, b = parameters((6, 5)), parameters((6, 5))
    name = backend_argument(backend)
    one = fusedopt.AdamW(a, lr=0.1, amp_fused=True, clip_grad_norm=None if separately else 0.5, backend=name)
    two = torch.optim.AdamW(b, lr=0.1)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    for p, o, clip_outside in ((a[0], one, separately), (b[0], two, True)):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for _ in range(3):
            o.zero_grad()
            scaler.scale((x @ p).square().sum()).backward()
            if clip_outside:
                scaler.unscale_(o)
                torch.nn.utils.clip_grad_norm_([p], 0.5)
            scaler.step(o)
            scaler.update()
    torch.testing.assert_close(a[0], b[0], rtol=3e-6, atol=3e-7)
