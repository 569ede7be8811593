"""Metrics against their definitions, results that recording does not change, and check_numerics naming the culprit."""

import copy
import pickle

import pytest
import torch
from configs import BY_NAME, CONFIGS, assert_same_bits, each_backend, parameters, set_grads, tensors
from release_models import Tied, assert_equal, loss_of, train
from torch import nn

import fusedopt
from fusedopt import GaLore
from fusedopt.formats import get_format, list_formats
from fusedopt.metrics import code_kinds, sampled

CASES = [(c, None) for c in CONFIGS] + [(BY_NAME["adamw"], GaLore(rank=3, update_every=2))]


@each_backend
@pytest.mark.parametrize(("config", "projection"), CASES, ids=[c.name + "_galore" * bool(p) for c, p in CASES])
def test_recording_changes_no_bit(config, projection, backend):
    options = {"state_format": "int8", "param_precision": "stochastic", "min_quantized_numel": 64}
    shapes = ((12, 20), (7,), (), (0,))
    one, two = parameters(*shapes, dtype=torch.bfloat16), parameters(*shapes, dtype=torch.bfloat16)
    plain = config.make(one, backend=backend, projection=projection, **options)
    watched = config.make(two, backend=backend, projection=projection, **options)
    with watched.record_metrics(every=2), fusedopt.check_numerics(watched):
        for step in range(4):
            set_grads(one, step)
            set_grads(two, step)
            plain.step()
            watched.step()
            assert watched.metrics().step == step // 2 * 2 + 1
    assert watched._watchers == ()
    assert_same_bits(tensors(watched, two), tensors(plain, one))


def test_norms_and_ratios():
    params = parameters((30, 40), (7,), (0,), dtype=torch.float32) + parameters((11, 3), dtype=torch.bfloat16)
    params += [nn.Parameter(torch.randn(6, 5).t()), nn.Parameter(torch.randn(9).double())]
    opt = fusedopt.AdamW(params, lr=0.01, clip_grad_norm=0.1)
    opt.record_metrics()
    set_grads(params, 0)
    params[4].grad = params[4].grad.contiguous()
    before = [p.detach().double().clone() for p in params]
    opt.step()
    got = dict(opt.metrics().items())
    grads = [p.grad.double().norm() for p in params]
    for i, g in enumerate(grads):
        if params[i].numel():
            assert got[f"grad_norm/{i}"] == pytest.approx(float(g), rel=1e-6)
            ratio = (params[i].detach().double() - before[i]).norm() / before[i].norm()
            assert got[f"update_ratio/{i}"] == pytest.approx(float(ratio), rel=1e-5)
    assert "grad_norm/2" not in got and "update_ratio/2" not in got
    assert got["grad_norm"] == pytest.approx(float(torch.stack(grads).norm()), rel=1e-6)
    assert got["grad_norm"] == pytest.approx(float(opt.grad_norm), rel=1e-6)
    change = torch.cat([(p.detach().double() - b).flatten() for p, b in zip(params, before, strict=True)])
    whole = torch.cat([b.flatten() for b in before])
    assert got["update_ratio"] == pytest.approx(float(change.norm() / whole.norm()), rel=1e-5)
    assert got["skipped_steps"] == 0 and "underflow/exp_avg" not in got


@pytest.mark.parametrize("precision", ["master", "kahan", "split24"])
def test_update_ratio_of_the_weights_behind_16_bits(precision):
    """An update that no bf16 weight shows is there in the ratio, and is not lost."""
    params = parameters((50, 40), dtype=torch.bfloat16)
    opt = fusedopt.SGD(params, lr=1e-4, param_precision=precision)
    opt.record_metrics()
    set_grads(params, 0)
    opt.step()
    got = opt.metrics()
    expected = 1e-4 * float(params[0].grad.double().norm() / params[0].double().norm())
    assert got["update_ratio"] == pytest.approx(expected, rel=0.05)
    assert "lost_updates" not in got


def test_lost_updates():
    """Half of the weights are so large that the update is lost; those without a gradient do not count."""
    p = nn.Parameter(torch.tensor([1.0] * 30 + [2.0**-10] * 30 + [1.0] * 40).bfloat16())
    opt = fusedopt.SGD([p], lr=1.0)
    opt.record_metrics()
    p.grad = torch.tensor([2.0**-11] * 60 + [0.0] * 40).bfloat16()
    opt.step()
    assert opt.metrics()["lost_updates"] == 0.5 == opt.metrics()["lost_updates/0"]
    stochastic = fusedopt.SGD([p], lr=1.0, param_precision="stochastic")
    stochastic.record_metrics()
    stochastic.step()
    assert "lost_updates" not in stochastic.metrics()


def test_samples():
    """Evenly spaced weights stand for all: a ratio that is the same everywhere is met by any sample."""
    p, q = nn.Parameter(torch.ones(1000, 30)), nn.Parameter(torch.full((17,), 2.0))
    opt = fusedopt.SGD([p, q], lr=0.1)
    opt.record_metrics(sample=100)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    opt.step()
    got = opt.metrics()
    assert got["update_ratio/0"] == pytest.approx(0.1, rel=1e-5) and got["update_ratio/1"] == pytest.approx(
        0.05, rel=1e-5
    )
    whole = ((0.01 * 30000 + 0.01 * 17) / (30000 + 4 * 17)) ** 0.5
    assert got["update_ratio"] == pytest.approx(whole, rel=1e-5)
    assert got["grad_norm/0"] == pytest.approx(30000**0.5, rel=1e-6)  # norms of gradients are never sampled
    for n in (1, 99, 100, 101, 199, 1000):
        assert (
            50 <= sampled(torch.arange(n), 100).numel() <= 100 or n < 100 and sampled(torch.arange(n), 100).numel() == n
        )


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", [n for n in list_formats() if get_format(n).block])
def test_kinds_of_codes(name, signed):
    """What is encoded says what a code is: nothing, too small for its block, or its largest."""
    form = get_format(name)
    x = torch.full((form.block,), 1e-12)
    x[0], x[1] = 1.0, 0.5
    codes, _ = form.encode(x, signed)
    kinds = code_kinds(name, signed)[codes.long()].view(-1)
    assert kinds[0] == 2 and kinds[1] == 0 and (kinds[2:] == 1).all()


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_underflow_and_saturation(form):
    """SGD's buffer is the gradient: three quarters of it are too small beside the rest, an eighth is at the top."""
    p = nn.Parameter(torch.zeros(1024))
    opt = fusedopt.SGD([p], lr=0.1, momentum=0.9, state_format=form, min_quantized_numel=0)
    opt.record_metrics()
    p.grad = torch.full((1024,), 1e-9)
    p.grad[::8], p.grad[1::8] = 1.0, -0.5
    opt.step()
    got = opt.metrics()
    assert got["underflow/momentum_buffer"] == 0.75 and got["saturated/momentum_buffer"] == 0.125
    p.grad = torch.zeros(1024)
    fresh = fusedopt.SGD([p], lr=0.1, momentum=0.9, state_format=form, min_quantized_numel=0)
    fresh.record_metrics()
    fresh.step()
    assert fresh.metrics()["underflow/momentum_buffer"] == 0.0, "a block of zeros has lost nothing"


def test_skipped_steps_and_the_loss_scale():
    model = nn.Linear(5, 5)
    opt = fusedopt.AdamW(model.named_parameters(), amp_fused=True)
    opt.record_metrics()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    x = torch.randn(3, 5)
    for factor in (1.0, float("inf"), 1.0, float("nan"), 1.0):
        opt.zero_grad()
        scaler.scale(model(x).square().sum() * factor).backward()
        scaler.step(opt)
        scaler.update()
    assert opt.metrics()["skipped_steps"] == 2.0
    expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm() / 64
    assert opt.metrics()["grad_norm"] == pytest.approx(float(expected), rel=1e-5)


def test_names_and_what_is_asked_for():
    model = Tied()
    opt = fusedopt.AdamW(model.parameters())
    with pytest.raises(RuntimeError, match=r"nothing is recorded. Call opt.record_metrics\(\)"):
        opt.metrics()
    with pytest.raises(ValueError, match="Invalid every"):
        opt.record_metrics(every=0)
    with pytest.raises(ValueError, match="Invalid sample"):
        opt.record_metrics(sample=0)
    recorder = opt.record_metrics(model=model)
    assert dict(opt.metrics()) == {} and opt.metrics().step is None
    train(model, opt, 0, 1)
    assert {"grad_norm/twice.weight", "update_ratio/scale", "grad_norm", "skipped_steps"} <= set(opt.metrics())
    kept = opt.metrics()
    assert opt.record_metrics() is not recorder and len(opt._watchers) == 1
    train(model, opt, 1, 2)
    assert {"grad_norm/0", "update_ratio/1"} <= set(opt.metrics()) and "grad_norm/branch.weight" in kept
    assert kept.ready() and "update_ratio" in repr(kept)
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert twin._watchers == ()


@pytest.mark.parametrize("collect", [0, 1 << 20])
def test_metrics_of_released_gradients(collect):
    """The parts of a step add up to the metrics of an ordinary one."""
    one, two = Tied(torch.bfloat16), Tied(torch.bfloat16)
    plain, released = (
        fusedopt.AdamW(m.named_parameters(), lr=1e-3, state_format="int8", min_quantized_numel=64) for m in (one, two)
    )
    fusedopt.release_gradients(two, released, collect=collect)
    for model, opt in ((one, plain), (two, released)):
        opt.record_metrics(every=2)
        train(model, opt, 0, 3)
    assert_equal((one, plain), (two, released))
    got, expected = released.metrics(), plain.metrics()
    assert got.step == expected.step == 3 and got.keys() == expected.keys() and len(got) > 25
    for key in expected:
        assert got[key] == pytest.approx(expected[key], rel=1e-6), key


def test_metrics_of_parameters_stepped_one_by_one():
    params = parameters((6, 5), (7,))
    opt = fusedopt.AdamW(params)
    opt.record_metrics()
    for step in range(2):
        set_grads(params, step)
        for p in params:
            opt.step_parameter(p)
    assert opt.metrics().step == 2 and {"grad_norm/0", "grad_norm/1"} <= set(opt.metrics())


def test_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = Tied()
    opt = fusedopt.AdamW(model.named_parameters())
    opt.record_metrics()
    writer = tensorboard.SummaryWriter(tmp_path)
    for step in range(3):
        train(model, opt, step, step + 1)
        for k, v in opt.metrics().items():
            writer.add_scalar(k, v, step)
    writer.close()
    found = events.EventAccumulator(str(tmp_path))
    found.Reload()
    assert set(found.Tags()["scalars"]) == set(opt.metrics()) | {
        "grad_norm/branch.weight",
        "update_ratio/branch.weight",
    }
    assert found.Scalars("grad_norm")[-1].value == pytest.approx(opt.metrics()["grad_norm"], rel=1e-6)


# check_numerics


def test_the_first_gradient_of_the_backward_pass_is_named():
    """A NaN made in one layer reaches every layer before it: the culprit is the one that the backward pass met first."""

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("nan")

    model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(5)])
    opt = fusedopt.AdamW(model.named_parameters())
    before = copy.deepcopy(model)
    with fusedopt.check_numerics(opt) as check:
        x = torch.randn(2, 4)
        for i, layer in enumerate(model):
            x = Bad.apply(layer(x)) if i == 2 else layer(x)
        x.sum().backward()
        with pytest.raises(
            fusedopt.NonFiniteError, match=r"parameter 2 .*'2.weight': its gradient has 16 NaN"
        ) as caught:
            opt.step()
    error = caught.value
    assert (error.kind, error.index, error.name, error.state, error.step) == ("gradient", 2, "2.weight", None, 1)
    assert error.count == 16 and error.others == 2 and "2 more parameters" in str(error)
    assert pickle.loads(pickle.dumps(error)).__dict__ == error.__dict__
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)
    check.remove()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    opt.step()  # nobody looks any more
    assert model[0].weight.isnan().all() and not model[3].weight.isnan().any()


def failing(opt, params, steps=1, gradients=1.0):
    with fusedopt.check_numerics(opt), pytest.raises(fusedopt.NonFiniteError) as caught:
        for step in range(steps):
            set_grads(params, step, scale=gradients)
            opt.step()
    return caught.value


def test_states_and_parameters():
    params = parameters((5, 5), (3,))
    error = failing(fusedopt.AdamW(params), params, gradients=1e25)
    assert (error.kind, error.state, error.index, error.step) == ("state", "exp_avg_sq", 0, 1)
    assert "their squares overflow" in str(error)
    params = parameters((5, 5), dtype=torch.float16)
    with torch.no_grad():
        params[0].fill_(65000.0)
    opt = fusedopt.SGD(params, lr=100.0, maximize=True)
    params[0].grad = torch.ones_like(params[0])
    opt.step()
    with (
        fusedopt.check_numerics(opt),
        pytest.raises(fusedopt.NonFiniteError, match=r"overflows torch.float16.*6.55e\+04"),
    ):
        for _ in range(10):
            params[0].grad = torch.ones_like(params[0])
            opt.step()
    params = parameters((5, 5), (3,), dtype=torch.bfloat16)
    opt = fusedopt.SGD(params, lr=1.0, param_precision="kahan")
    with torch.no_grad():
        params[1][2] = float("inf")
    error = failing(opt, params)
    assert (error.kind, error.index, error.count) == ("parameter", 1, 1) and "changed outside" in str(error)


def test_large_finite_numbers_are_no_error():
    """The sum of squares that is looked at first overflows where no element does."""
    params = parameters((5, 5))
    opt = fusedopt.SGD(params, lr=1e-30)
    with fusedopt.check_numerics(opt):
        params[0].grad = torch.full((5, 5), 1e30)
        opt.step()


def test_steps_that_grad_scaler_skips_are_not_looked_at():
    params = parameters((5, 5))
    opt = fusedopt.AdamW(params, amp_fused=True)
    with fusedopt.check_numerics(opt):
        set_grads(params, 0, scale=float("inf"))
        opt.found_inf, opt.grad_scale = torch.ones(1), torch.ones(1)
        opt.step()
        opt.found_inf = torch.zeros(1)
        with pytest.raises(fusedopt.NonFiniteError, match="its gradient has"):
            opt.step()


def test_numerics_of_released_gradients():
    """The error comes out of the backward pass; the layer is not stepped."""
    model = Tied()
    opt = fusedopt.AdamW(model.parameters())
    fusedopt.release_gradients(model, opt, collect=0)
    with fusedopt.check_numerics(opt, model):
        train(model, opt, 0, 2)
        before = model.wide.weight.detach().clone()
        model.wide.weight.register_hook(lambda g: g * float("inf"))
        with pytest.raises(fusedopt.NonFiniteError, match=r"'wide.weight': its gradient .* before step 3"):
            loss_of(model, 2).backward()
    assert torch.equal(model.wide.weight, before)


def test_check_numerics_refuses_other_optimizers():
    with pytest.raises(TypeError, match="expected an optimizer of fusedopt, got SGD"):
        fusedopt.check_numerics(torch.optim.SGD(parameters((2,)), lr=0.1))
