"""Rules that read the loss: how a step takes it, what it refuses, loss scales, step counts on the device, and shards."""

import math

import pytest
import torch
from configs import BACKENDS, assert_same_bits, parameters, set_grads, tensors
from processes import run
from sharded_models import build, set_whole_grads, sharded, weights

import fusedopt
from fusedopt.losses import TakesLoss
from fusedopt.rule import optimizers

pytestmark = pytest.mark.own_loss
READERS = [
    (fusedopt.AEGD, {"lr": 0.1}),
    (fusedopt.AEGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (fusedopt.SPS, {"max_rate": 0.05, "weight_decay": 0.1}),
    (fusedopt.SANIA, {"eps": 0.5}),
    (fusedopt.SANIA, {"preconditioner": "adagrad", "sqrt": True}),
    (fusedopt.InducedMetric, {"lr": 0.1, "log": True}),
]
each_reader = pytest.mark.parametrize("cls, options", READERS, ids=lambda x: getattr(x, "__name__", None))
each_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = ((40, 30), (7,), ())


def losses(step: int) -> torch.Tensor:
    return torch.tensor(0.5 + 0.3 * math.sin(step))


def test_every_class_that_reads_the_loss_is_here():
    assert {cls for cls in optimizers().values() if issubclass(cls, TakesLoss)} - {fusedopt.SANIAHessian} == {
        cls for cls, _ in READERS
    }


@each_reader
@each_backend
def test_from_a_closure_and_as_an_argument(cls, options, backend):
    """The same bits, from a tensor, a 1-element one, a number and a closure; the result is the loss."""
    ways = (
        lambda opt, loss, step: opt.step(loss=loss),
        lambda opt, loss, step: opt.step(loss=loss.view(1)),
        lambda opt, loss, step: opt.step(loss=float(loss)),
        lambda opt, loss, step: opt.step(lambda: loss.clone().requires_grad_()),
    )
    found = []
    for way in ways:
        params = parameters(*SHAPES)
        opt = cls(params, backend=backend, **options)
        for step in range(4):
            set_grads(params, step)
            loss = losses(step)
            assert float(way(opt, loss, step)) == float(loss)
        found.append(tensors(opt, params))
        assert opt.given == {}
    for other in found[1:]:
        assert_same_bits(other, found[0])
    assert not torch.equal(found[0][0], parameters(*SHAPES)[0])


@each_reader
@each_backend
def test_the_loss_matters(cls, options, backend):
    moved = []
    for scale in (1.0, 0.5):
        params = parameters(*SHAPES)
        opt = cls(params, backend=backend, **options)
        for step in range(2):
            set_grads(params, step)
            opt.step(loss=scale * losses(step))
        moved.append(tensors(opt, params))
    assert not torch.equal(moved[0][0], moved[1][0])


@each_reader
def test_what_a_step_refuses(cls, options):
    params = parameters(*SHAPES)
    opt = cls(params, **options)
    set_grads(params, 0)
    opt.step(loss=0.5)
    set_grads(params, 1)
    before = tensors(opt, params)
    with pytest.raises(ValueError, match=rf"{cls.__name__}.step needs the loss: step\(closure\)"):
        opt.step()
    with pytest.raises(ValueError, match="needs the loss"):
        opt.step(lambda: None)
    with pytest.raises(ValueError, match=r"must be one number, not of shape \(3,\)"):
        opt.step(loss=torch.ones(3))
    with pytest.raises(ValueError, match="not both"):
        opt.step(lambda: 0.5, loss=0.5)
    assert_same_bits(tensors(opt, params), before)
    opt.step(loss=0.5)
    assert not torch.equal(params[0], before[0])


def test_energy_needs_a_positive_sum():
    params = parameters(*SHAPES)
    for changes, loss in (({}, -1.5), ({"shift": 2.0, "maximize": True}, 2.0)):
        opt = fusedopt.AEGD(params, **changes)
        set_grads(params, 0)
        with pytest.raises(ValueError, match="Choose a larger shift"):
            opt.step(loss=loss)
        assert not opt.state


def test_without_log_no_loss_is_needed():
    params = parameters(*SHAPES)
    opt = fusedopt.InducedMetric([{"params": params[:1]}, {"params": params[1:]}])
    set_grads(params, 0)
    opt.step()
    opt.param_groups[1]["log"] = True
    with pytest.raises(ValueError, match="needs the loss"):
        opt.step()
    with pytest.raises(ValueError, match="two variants"):
        fusedopt.InducedMetric(params, rms=True, log=True)


@each_reader
def test_states_are_made_without_a_loss(cls, options):
    """As torch.distributed.checkpoint does: learning rate 0 and gradients of zeros."""
    params = parameters(*SHAPES)
    opt = cls(params, **{**options, "lr": 0.0})
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all(int(opt.state[p]["step"]) == 0 for p in params)


@each_reader
@pytest.mark.parametrize("fused", [False, True])
def test_through_a_grad_scaler(cls, options, fused):
    """The unscaled loss goes with scaler.step; a step of infinite gradients changes nothing."""
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    scaled = cls(one, amp_fused=fused, **options)
    plain = cls(two, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=100)
    for step in range(5):
        scaler.scale(torch.zeros((), requires_grad=True) * 1.0)
        set_grads(one, step, float(scaler.get_scale()))
        if step == 2:
            one[0].grad.view(-1)[3] = math.inf
            before = tensors(scaled, one)
        scaler.step(scaled, loss=losses(step))
        scaler.update()
        if step == 2:
            assert_same_bits(tensors(scaled, one), before)
        else:
            set_grads(two, step)
            plain.step(loss=losses(step))
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-6)


@each_reader
@each_backend
def test_counts_on_the_device(cls, options, backend):
    """capturable=True, and a loss that a graph would read again from where it lies."""
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    opts = cls(one, backend=backend, **options), cls(two, backend=backend, capturable=True, **options)
    static = torch.zeros((), dtype=torch.float64)
    for step in range(5):
        for params, opt in zip((one, two), opts, strict=True):
            set_grads(params, step)
            static.copy_(losses(step).double())
            opt.step(loss=static)
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)


def test_polyak_steps_reach_the_bound():
    """On a quadratic with one minimum, with scale 1/2 and no other knob."""
    (x,) = parameters((20,), dtype=torch.float64)
    scales = torch.linspace(0.5, 2.0, 20, dtype=torch.float64)
    opt = fusedopt.SPS([x], max_rate=math.inf, lower_bound=3.0)
    values = []
    for _ in range(60):
        loss = 3.0 + 0.5 * (scales * x * x).sum()
        opt.zero_grad()
        loss.backward()
        opt.step(loss=loss)
        values.append(float(loss) - 3.0)
    assert values[-1] < 1e-8 * values[0]


def test_polyak_stands_still():
    """Where every gradient is 0, and below the bound."""
    params = parameters(*SHAPES)
    opt = fusedopt.SPS(params, weight_decay=0.1)
    start = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step(loss=1.0)
    set_grads(params, 0)
    opt.step(loss=-1.0)
    assert_same_bits([p.detach() for p in params], start)


def test_energy_only_falls_and_bounds_the_step():
    params = parameters((30,))
    opt = fusedopt.AEGD(params, lr=10.0)
    last = torch.full((30,), math.inf)
    for step in range(20):
        set_grads(params, step)
        opt.step(loss=2.0)
        energy = opt.state[params[0]]["energy"].clone()
        assert (energy > 0).all() and (energy <= last).all() and torch.isfinite(params[0]).all()
        last = energy


def sharded_steps():
    for cls, options in READERS:
        trained = []
        for model in (build(), sharded()):
            opt = cls(model.parameters(), **options)
            for i in range(4):
                set_whole_grads(model, i)
                opt.step(loss=losses(i))
            trained.append(weights(model))
        for x, y in zip(trained[1], trained[0], strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6, msg=f"{cls.__name__} {options}")


def test_two_processes():
    run(2, [sharded_steps])
