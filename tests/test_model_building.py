"""SMB against a transcription of its paper's algorithm 1, and its schedule, restarts and refusals."""

import copy
import math

import pytest
import torch
from configs import BACKENDS, assert_same_bits, parameters

import fusedopt

SHAPES = ((6, 5), (4,), (3, 2, 2), ())
F64 = torch.float64


def loss_of(params, i: int):
    """Different at each batch, and every third so steep that trials fail."""
    gen = torch.Generator().manual_seed(i)
    total = 0
    for k, p in enumerate(params):
        target = torch.randn(p.shape, generator=gen, dtype=F64).to(p.dtype)
        total = (
            total + (0.5 + 0.6 * k) * (1 if i % 3 else 3) * ((p - target) ** 2).sum() + (p - target).cos().sum() * 0.1
        )
    return total


def by_hand(params, rates, i: int, c=0.1, kappa=0.99) -> bool:
    """One step of algorithm 1 in place; whether it was the trial."""
    loss = loss_of(params, i)
    g = torch.autograd.grad(loss, params)
    s = [-rate * x for rate, x in zip(rates, g, strict=True)]
    there = [(p + x).detach().requires_grad_() for p, x in zip(params, s, strict=True)]
    reached = loss_of(there, i)
    promised = sum(c * rate * float((x * x).sum()) for rate, x in zip(rates, g, strict=True))
    accepted = float(reached) <= float(loss) - promised
    after = torch.autograd.grad(reached, there)
    for p, x, old, new in zip(params, s, g, after, strict=True):
        if accepted:
            p.data += x
            continue
        y = new - old
        sy, yg, sg = (float((a * b).sum()) for a, b in ((x, y), (y, old), (x, old)))
        ns, ny, ng = float(x.norm()), float(y.norm()), float(old.norm())
        sigma = 0.5 * (ns * (ny + ng / kappa) - sy)
        theta = (sy + 2 * sigma) ** 2 - ns**2 * ny**2
        cg = -(ns**2) / (2 * sigma)
        cs = cg / theta * (-(sy + 2 * sigma) * yg + ny**2 * sg)
        cy = cg / theta * (-(sy + 2 * sigma) * sg + ns**2 * yg)
        p.data += cg * old + cs * x + cy * y
    return accepted


def closure_of(opt, params, i: int, calls: list | None = None):
    def closure():
        opt.zero_grad()
        loss = loss_of(params, i)
        loss.backward()
        if calls is not None:
            calls.append(1)
        return loss

    return closure


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype, steps, bound", [(F64, 10, 1e-10), (torch.float32, 10, 1e-5), (torch.float32, 200, 1e-5)]
)
def test_trajectory(backend, dtype, steps, bound):
    mine, exact = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=F64)
    opt = fusedopt.SMB(
        [{"params": mine[:2], "lr": 0.4}, {"params": mine[2:]}], lr=0.3, backend=backend if dtype != F64 else None
    )
    kinds = set()
    for i in range(steps):
        first = opt.step(closure_of(opt, mine, i))
        assert float(first.detach()) == pytest.approx(float(loss_of(exact, i)), rel=1e-4)
        kinds.add(by_hand(exact, [0.4, 0.4, 0.3, 0.3], i))
    assert kinds == {True, False}, "both kinds of steps"
    for p, q in zip(mine, exact, strict=True):
        assert float((p.double() - q).detach().abs().max()) <= bound * max(1.0, float(q.detach().abs().max()))


def test_a_cheap_trial_saves_calls():
    """The same steps; the closure is called again only where the model is needed."""
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    opts = fusedopt.SMB(one, lr=0.3), fusedopt.SMB(two, lr=0.3)
    calls, models = [], 0
    for i in range(20):
        before = opts[0].param_groups[0]["model_steps"]
        opts[0].step(closure_of(opts[0], one, i))
        opts[1].step(closure_of(opts[1], two, i, calls), trial=lambda i=i: loss_of(two, i))
        models += opts[0].param_groups[0]["model_steps"] - before
    assert_same_bits([p.detach() for p in one], [p.detach() for p in two])
    assert 0 < models < 20 and len(calls) == 20 + models


@pytest.mark.parametrize("lr", [0.6, 1.0, 2.0])
def test_rates_at_which_sgd_diverges(lr):
    (x,) = parameters((30,))
    slope = torch.linspace(0.5, 2, 30)  # SGD converges below 0.5
    opt = fusedopt.SMB([x], lr=lr)

    def closure():
        opt.zero_grad()
        loss = (slope * x * x).sum()
        loss.backward()
        return loss

    for _ in range(60):
        last = opt.step(closure)
    assert float(last.detach()) < 1e-10 and opt.param_groups[0]["model_steps"] > 30


def test_gradients_that_are_zero_or_missing():
    a, b, c = parameters((3,), (4,), (2,))
    start = [x.detach().clone() for x in (a, b, c)]
    opt = fusedopt.SMB([a, b, c], lr=50.0)

    def closure():
        opt.zero_grad()
        loss = (a * a).sum() + 0 * b.sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.param_groups[0]["model_steps"] == 1
    assert torch.equal(b, start[1]) and torch.equal(c, start[2]) and not torch.equal(a, start[0])
    assert torch.isfinite(a).all()


def test_schedule_and_restart():
    params = parameters(*SHAPES)
    opt = fusedopt.SMB(params, lr=1.0, autoschedule=True, period=4, shrink=0.5, tolerance=0.3, max_lr=1.5)
    rates = []
    for i in range(24):
        opt.step(closure_of(opt, params, i))
        rates.append(opt.param_groups[0]["lr"])
        if i == 9:
            saved, kept = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
    assert len(set(rates)) > 1 and max(rates) <= 1.5
    again = [torch.nn.Parameter(p) for p in kept]
    other = fusedopt.SMB(again, lr=7.0)
    other.load_state_dict(saved)
    for i in range(10, 24):
        other.step(closure_of(other, again, i))
    assert_same_bits([p.detach() for p in again], [p.detach() for p in params])
    assert other.param_groups[0]["lr"] == rates[-1]


def test_bf16_parameters():
    params = parameters((40, 30), dtype=torch.bfloat16)
    opt = fusedopt.SMB(params, lr=3.0)
    first = float(loss_of(params, 0))
    for _ in range(30):
        opt.step(closure_of(opt, params, 0))
    assert opt.param_groups[0]["model_steps"] > 0 and float(loss_of(params, 0)) < 0.7 * first


def test_refusals():
    p = parameters((3,))
    for options in ({"c": 0.0}, {"c": 1.0}, {"kappa": 1.0}, {"shrink": 1.5}, {"period": 0}, {"lr": -1.0}):
        with pytest.raises(ValueError, match="Invalid"):
            fusedopt.SMB(p, **options)
    opt = fusedopt.SMB(p)
    with pytest.raises(ValueError, match="needs a closure"):
        opt.step()
    assert not opt.state and not math.isnan(float(p[0].sum()))
