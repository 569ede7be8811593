"""Adafactor against torch.optim, pytorch_optimizer and a transcription of the paper; its states, formats and precisions."""

import copy
import io
import math

import pytest
import pytorch_optimizer
import torch
from configs import BACKENDS, assert_same_bits, backend_argument, parameters, set_grads, tensors, train
from oracles.adafactor import Adafactor as Transcription
from oracles.adafactor import TorchAdafactor
from oracles.compare import gradient, tensor

import fusedopt
from fusedopt.masters import weights
from fusedopt.precision import list_precisions
from fusedopt.projections import pieces as pc
from fusedopt.projections.factored import factor_shapes, factored_bytes
from fusedopt.states import decode, state_bytes

SHAPES = ((12, 7), (7, 40), (30, 301), (5,), (3, 4, 5), (2, 3, 4, 4), ())
BOUND = {torch.float64: 1e-11, torch.float32: 1e-6}
over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_dtypes = pytest.mark.parametrize("dtype", BOUND, ids=str)

CASES = {
    "defaults": {},
    "momentum": {"beta1": 0.9, "weight_decay": 0.1},
    "warmup": {"warmup_init": True, "weight_decay": 0.1},
    "fixed": {"lr": 0.05, "relative_step": False, "scale_parameter": False, "weight_decay": 0.1},
    "scaled": {"lr": 0.05, "relative_step": False, "clip_threshold": 0.3, "decay_rate": -0.5, "eps": (1e-3, 0.1)},
}


def small(monkeypatch):
    monkeypatch.setattr(pc, "CPU_ELEMENTS", 4096)


def laid_out(shape, layout: str, seed: int, dtype) -> torch.nn.Parameter:
    t = tensor(shape, seed).to(dtype)
    if layout == "permuted" and t.dim() == 2:
        t = t.t().contiguous().t()
    if layout == "permuted" and t.dim() == 4:
        t = t.to(memory_format=torch.channels_last)
    return torch.nn.Parameter(t)


def follow(opt, params, oracles, steps: int, shapes=SHAPES) -> float:
    """The largest distance after some steps, relative to the largest weight; the transcriptions start and stay in fp64."""
    theirs = [tensor(s, i).clone() for i, s in enumerate(shapes)]
    for step in range(steps):
        for p, q, oracle in zip(params, theirs, oracles, strict=True):
            g = gradient(q, step)
            p.grad = torch.empty_like(p).copy_(g)
            oracle.step(q, g)
        opt.step()
    for i, (q, s) in enumerate(zip(theirs, shapes, strict=True)):
        assert (q - tensor(s, i)).abs().max() > 0
    return max(
        float((p.detach().double() - q).abs().max() / q.abs().max()) for p, q in zip(params, theirs, strict=True)
    )


@over_backends
@over_dtypes
@pytest.mark.parametrize("layout", ("contiguous", "permuted"))
@pytest.mark.parametrize("case", CASES)
def test_transcription(case, layout, dtype, backend, monkeypatch):
    small(monkeypatch)
    options = CASES[case]
    params = [laid_out(s, layout, i, dtype) for i, s in enumerate(SHAPES)]
    opt = fusedopt.Adafactor(params, backend=backend_argument(backend), **options)
    theirs = {"momentum" if k == "beta1" else k: v for k, v in options.items()}
    assert follow(opt, params, [Transcription(**theirs) for _ in SHAPES], 10) < BOUND[dtype]


@over_backends
def test_two_hundred_steps(backend):
    shapes = ((40, 33), (9,))
    params = [laid_out(s, "contiguous", i, torch.float32) for i, s in enumerate(shapes)]
    opt = fusedopt.Adafactor(params, beta1=0.9, weight_decay=0.01, backend=backend_argument(backend))
    assert follow(opt, params, [Transcription(momentum=0.9, weight_decay=0.01) for _ in shapes], 200, shapes) < 1e-5


TORCH_CASES = [
    {},
    {"lr": 0.5, "weight_decay": 0.1, "d": 2.0},
    {"beta2_decay": -0.5, "eps": (1e-2, 0.1)},
    {"maximize": True},
]


@over_backends
@over_dtypes
@pytest.mark.parametrize("options", TORCH_CASES, ids=str)
def test_torch(options, dtype, backend, monkeypatch):
    """variant="torch" with torch.optim's arguments. Gradients of some columns are below its floors."""
    small(monkeypatch)
    shapes = [s for s in SHAPES if len(s) != 0]
    theirs = [torch.nn.Parameter(tensor(s, i).to(dtype)) for i, s in enumerate(shapes)]
    mine = copy.deepcopy(theirs)
    other = torch.optim.Adafactor(theirs, **options)
    renamed = {{"d": "clip_threshold", "beta2_decay": "decay_rate"}.get(k, k): v for k, v in options.items()}
    opt = fusedopt.Adafactor(
        mine, variant="torch", backend=backend_argument(backend), **{"eps": (None, 1e-3), **renamed}
    )
    for step in range(10):
        for p, q in zip(mine, theirs, strict=True):
            q.grad = gradient(q.detach().double(), step).to(dtype)
            q.grad[..., 0] *= 1e-9
            if p is mine[1]:  # its mean is below the floor of 1e-2 in one of the cases
                q.grad *= 1e-2
            p.grad = q.grad.clone()
        opt.step(), other.step()
    bound = 1e-10 if dtype == torch.float64 else 2e-6
    for p, q in zip(mine, theirs, strict=True):
        assert (p - q).abs().max() <= bound * q.abs().max(), tuple(p.shape)


def test_torch_transcription_follows_torch():
    """The floor of the second moment acts: without it the column of tiny gradients would move as far as the others."""
    p = torch.nn.Parameter(tensor((6, 5)))
    q, oracle = p.detach().clone(), TorchAdafactor(eps=(1e-3, 1e-3))
    opt = fusedopt.Adafactor([p], variant="torch", eps=(1e-3, 1e-3))
    for step in range(5):
        g = gradient(q, step)
        g[:, 0] *= 1e-7
        p.grad = g.clone()
        opt.step(), oracle.step(q, g)
    moved = (p.detach() - tensor((6, 5))).abs()
    assert moved[:, 0].max() < 1e-2 * moved[:, 1:].max() and (p.detach() - q).abs().max() < 1e-12


@pytest.mark.parametrize("beta1", (None, 0.9))
def test_pytorch_optimizer(beta1):
    """fp32 on both sides."""
    shapes = ((12, 7), (5,), (3, 4, 5))
    theirs = [torch.nn.Parameter(tensor(s, i).float()) for i, s in enumerate(shapes)]
    mine = copy.deepcopy(theirs)
    other = pytorch_optimizer.AdaFactor(theirs, lr=None, betas=(beta1, 0.999), weight_decay=0.1, foreach=False,
                                        momentum_dtype=torch.float32)  # fmt: skip
    opt = fusedopt.Adafactor(mine, beta1=beta1, weight_decay=0.1)
    for step in range(10):
        for p, q in zip(mine, theirs, strict=True):
            q.grad = gradient(q.detach().double(), step).float()
            p.grad = q.grad.clone()
        opt.step(), other.step()
    for p, q in zip(mine, theirs, strict=True):
        assert (p - q).abs().max() <= 2e-6 * q.abs().max()


def test_state_bytes_are_the_factors():
    shapes = ((64, 32), (3, 8, 16), (7,))
    opt = fusedopt.Adafactor(params := parameters(*shapes))
    train(opt, params, 0, 1)
    assert state_bytes(opt) == 4 * (64 + 32) + 4 * (3 * 8 + 3 * 16) + 4 * 7 == sum(map(factored_bytes, shapes))
    assert {k: tuple(v.shape) for k, v in opt.state[params[1]].items()} == {
        "step": (), "exp_avg_sq_row": factor_shapes((3, 8, 16))[0], "exp_avg_sq_col": (3, 16)}  # fmt: skip
    opt = fusedopt.Adafactor(params := parameters((64, 80)), beta1=0.9, state_format="int8")
    train(opt, params, 0, 1)
    assert state_bytes(opt) == 4 * (64 + 80) + 64 * 80 + 4 * math.ceil(64 * 80 / 256)


@over_backends
@pytest.mark.parametrize("form", ("bf16", "int8", "int4", "fp8"))
def test_quantised_momentum(form, backend, monkeypatch):
    """Momentum in a format is the fp32 one within the format's error after a step, and training still follows it."""
    small(monkeypatch)
    made = []
    for name in ("fp32", form):
        params = parameters((30, 301), (9000,))
        opt = fusedopt.Adafactor(params, beta1=0.9, lr=0.05, state_format=name, backend=backend_argument(backend))
        train(opt, params, 0, 6)
        made.append((opt, params))
    (opt, exact), (other, params) = made
    for p, q in zip(exact, params, strict=True):
        start = parameters((30, 301), (9000,))[0 if p.dim() == 2 else 1]
        assert (p - q).norm() < (0.2 if form == "int4" else 0.05) * (p - start).norm()
        state = other.kept_rule(q, other.param_groups[0]).states[0]
        m = decode(q, other.state[q], state)
        assert (m - opt.state[p]["exp_avg"]).norm() < (0.3 if form == "int4" else 0.06) * m.norm()


@over_backends
@pytest.mark.parametrize("beta1", (None, 0.9))
@pytest.mark.parametrize("precision", list_precisions())
def test_bf16_parameters(precision, beta1, backend, monkeypatch):
    """Small steps: companions keep them, stochastic rounding keeps their mean, nearest loses them."""
    small(monkeypatch)
    p32, p16 = parameters((60, 200)), parameters((60, 200), dtype=torch.bfloat16)
    p32[0].data.copy_(p16[0].data)
    start = p32[0].detach().clone()
    options = {"lr": 1e-4, "relative_step": False, "scale_parameter": False, "beta1": beta1,
               "backend": backend_argument(backend)}  # fmt: skip
    one = fusedopt.Adafactor(p32, **options)
    two = fusedopt.Adafactor(p16, param_precision=precision, **options)
    for step in range(8):
        p32[0].grad = torch.randn((60, 200), generator=torch.Generator().manual_seed(step)).bfloat16().float() + 0.5
        p16[0].grad = p32[0].grad.bfloat16()
        one.step(), two.step()
    kept = weights(p16[0], two.state[p16[0]])
    moved, error = (p32[0] - start).norm(), (kept - p32[0]).norm()
    if precision == "nearest":
        assert error > 0.5 * moved
    elif precision == "stochastic":
        assert abs(float((kept - p32[0].detach()).mean() / (p32[0].detach() - start).mean())) < 0.25
    else:
        assert error < (0.3 if precision == "split24" else 0.02) * moved


@over_backends
def test_clipping_equals_clipped_gradients(backend):
    mine, theirs = parameters((12, 30), (7,)), parameters((12, 30), (7,))
    one = fusedopt.Adafactor(mine, eps=(1e-2, 1e-3), clip_grad_norm=0.5, backend=backend_argument(backend))
    two = fusedopt.Adafactor(theirs, eps=(1e-2, 1e-3), backend=backend_argument(backend))
    for step in range(3):
        set_grads(mine, step), set_grads(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        one.step(), two.step()
        torch.testing.assert_close(one.grad_norm, norm.view(1))
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)


@over_backends
@pytest.mark.parametrize("beta1", (None, 0.9))
def test_maximize_negates_the_gradient(beta1, backend):
    mine, theirs = parameters((12, 30), (7,)), parameters((12, 30), (7,))
    one = fusedopt.Adafactor(mine, maximize=True, beta1=beta1, backend=backend_argument(backend))
    two = fusedopt.Adafactor(theirs, beta1=beta1, backend=backend_argument(backend))
    for step in range(3):
        set_grads(mine, step), set_grads(theirs, step, scale=-1.0)
        one.step(), two.step()
    assert_same_bits(tensors(one, mine), tensors(two, theirs))


@over_backends
@pytest.mark.parametrize("options", [{}, {"beta1": 0.9, "state_format": "int8"}], ids=["plain", "momentum"])
def test_resume_is_exact(options, backend):
    made = {"param_precision": "split24", "backend": backend_argument(backend), **options}
    params = parameters((40, 130), (9,), dtype=torch.bfloat16)
    opt = fusedopt.Adafactor(params, **made)
    train(opt, params, 0, 3)
    file = io.BytesIO()
    torch.save((opt.state_dict(), [p.detach() for p in params]), file)
    train(opt, params, 3, 6)
    file.seek(0)
    saved, values = torch.load(file, weights_only=True)
    again = [torch.nn.Parameter(v) for v in values]
    other = fusedopt.Adafactor(again, **made)
    other.load_state_dict(saved)
    train(other, again, 3, 6)
    assert_same_bits(tensors(other, again), tensors(opt, params))


def test_overflow_on_the_device_changes_nothing(monkeypatch):
    """The device's way of skipping a step: every write looks at found_inf."""
    small(monkeypatch)
    for options in ({}, {"beta1": 0.9}, {"variant": "torch"}):
        params = parameters((40, 130), (9,))
        opt = fusedopt.Adafactor(params, **options)
        train(opt, params, 0, 2)
        before = tensors(opt, params)
        for p in params:
            p.grad.fill_(float("inf"))
        device = opt._plan.devices[0]
        device.set_amp(None, torch.ones(1))
        device.step([p.grad for p in params])
        assert_same_bits(tensors(opt, params), before)


def test_loss_scale_is_divided_out():
    mine, theirs = parameters((40, 130), (9,)), parameters((40, 130), (9,))
    one, two = fusedopt.Adafactor(mine, amp_fused=True), fusedopt.Adafactor(theirs)
    one.grad_scale, one.found_inf = torch.full((1,), 1024.0), torch.zeros(1)
    for step in range(3):
        set_grads(mine, step, scale=1024.0), set_grads(theirs, step)
        one.step(), two.step()
    assert_same_bits(tensors(one, mine), tensors(two, theirs))


def test_capturable_numbers_come_from_tensors():
    mine, theirs = parameters((12, 30), (7,)), parameters((12, 30), (7,))
    one = fusedopt.Adafactor(mine, lr=torch.tensor(0.05), capturable=True, weight_decay=0.1)
    two = fusedopt.Adafactor(theirs, lr=0.05, weight_decay=0.1)
    train(one, mine, 0, 4), train(two, theirs, 0, 4)
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_the_scale_is_that_of_the_weights_behind_a_bf16_parameter():
    """rms(p) of what parameter and companion stand for: bf16 alone would be 1e-3 off where all weights are 1.0029."""
    p16 = torch.nn.Parameter(torch.ones(40, 60, dtype=torch.bfloat16))
    opt = fusedopt.Adafactor([p16], param_precision="split32")
    p16.grad = torch.zeros_like(p16)
    opt.step()
    opt.state[p16]["low_bits"].fill_(24576)
    before = weights(p16, opt.state[p16])
    p16.grad = torch.ones_like(p16)
    opt.step()
    step = before - weights(p16, opt.state[p16])
    assert float(before[0, 0]) > 1.0025
    torch.testing.assert_close(step, torch.full_like(step, 1e-2 * float(before[0, 0])), rtol=2e-5, atol=0)


def test_zero_and_empty_tensors():
    params = [*parameters((4, 6), (0, 3), (3,)), torch.nn.Parameter(torch.zeros(5, 5))]
    opt = fusedopt.Adafactor(params, beta1=0.9)
    for p in params:
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in params]
    opt.step()
    assert_same_bits([p.detach() for p in params], before)
    set_grads(params, 0)
    opt.step()
    assert params[3].abs().max() > 0, "a zero tensor leaves zero by eps[1]"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"relative_step": False}, "relative_step=False needs a learning rate"),
        ({"warmup_init": True, "relative_step": False, "lr": 1.0}, "warmup_init=True needs relative_step=True"),
        ({"eps": (None, 1e-3)}, r"eps\[0\]=None is for variant='torch'"),
        ({"eps": (-1.0, 1e-3)}, "Invalid epsilon value: -1.0"),
        ({"eps": 1e-8}, "Adafactor takes two, such as"),
        ({"differentiable": True}, "differentiable=True is not supported"),
        ({"clip_threshold": 0.0}, "Invalid clip_threshold value: 0.0"),
        ({"decay_rate": 0.8}, "Invalid decay_rate value: 0.8"),
        ({"beta1": 1.0}, "Invalid beta1 value: 1.0"),
        ({"variant": "timm"}, "Invalid variant: 'timm'; it is one of transformers, torch"),
        ({"projection": fusedopt.GaLore()}, "its second moment is factored already"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        fusedopt.Adafactor(parameters((3, 3)), **options)


def test_the_plan_says_what_is_stepped_by_itself():
    opt = fusedopt.Adafactor(params := parameters((64, 80), (9,)), beta1=0.9, state_format="int8")
    set_grads(params, 0)
    report = str(opt.plan())
    assert "factored, p float32 (nearest), exp_avg int8; 1 tensors stepped one by one" in report
    assert "exp_avg fp32; 1 tensors" in report
