"""U-DoG against its definition with every iterate kept; storage, restarts and refusals."""

import copy

import pytest
import torch

import fusedopt


def problem(dtype=torch.float64):
    gen = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=gen, dtype=torch.float64).to(dtype)) for s in ((5, 4), (3,))]
    scale = [torch.rand(p.shape, generator=gen, dtype=torch.float64) + 0.1 for p in params]
    return params, scale


def loss_of(params, scale):
    return sum((c.to(p.dtype) * (p - 0.5).square()).sum() for p, c in zip(params, scale, strict=True))


def closure_of(opt, params, scale):
    def closure():
        opt.zero_grad()
        loss = loss_of(params, scale)
        loss.backward()
        return loss

    return closure


def by_definition(start, scale, steps, reps_rel, eps, decay):
    """Flat vectors, and all iterates from the beginning in every step."""
    c = torch.cat([x.flatten() for x in scale])
    x0 = torch.cat([p.detach().flatten() for p in start])
    xs, ys, radii, weights, changes = [x0], [x0], [], [], []

    def gradient(at):
        return 2 * c * (at - 0.5) + decay * at

    for _ in range(steps):
        r = max([reps_rel * float(1 + x0.norm())] + [float((v - x0).norm()) for v in (*xs, *ys)])
        radii.append(r)
        a = sum(radii) / r
        weights.append(a * r)

        def average(last, weights=weights):
            return sum(w * v for w, v in zip(weights, [*xs[1:], last], strict=True)) / sum(weights)

        m = gradient(average(ys[-1]))
        gx = eps + sum(b * b * d for b, d in changes)
        x = ys[-1] - a * r / gx**0.5 * m
        g = gradient(average(x))
        changes.append((a, float((g - m).norm()) ** 2))
        z = average(x)
        xs.append(x)
        ys.append(ys[-1] - a * r / (gx + a * a * changes[-1][1]) ** 0.5 * g)
    return z


@pytest.mark.parametrize("steps", [1, 10, 200])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_follows_its_definition(steps, decay):
    params, scale = problem()
    want = by_definition(params, scale, steps, 1e-3, 1e-8, decay)
    opt = fusedopt.UDoG(params, reps_rel=1e-3, weight_decay=decay)
    closure = closure_of(opt, params, scale)
    for _ in range(steps):
        opt.step(closure)
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in params]), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converges_and_keeps_the_average_wide(dtype):
    params, scale = problem(dtype)
    first = float(loss_of(params, scale))
    opt = fusedopt.UDoG(params)
    for _ in range(150):
        opt.step(closure_of(opt, params, scale))
    assert float(loss_of(params, scale)) < 0.01 * first
    for p in params:
        assert ("average" in opt.state[p]) == (dtype == torch.bfloat16)
        if "average" in opt.state[p]:
            assert torch.equal(opt.state[p]["average"].to(dtype), p.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_for_bit(dtype):
    (straight, scale), (params, _) = problem(dtype), problem(dtype)
    one, two = fusedopt.UDoG(straight, reps_rel=1e-2), fusedopt.UDoG(params, reps_rel=1e-2)
    for _ in range(4):
        one.step(closure_of(one, straight, scale))
        two.step(closure_of(two, params, scale))
    three = fusedopt.UDoG(params, reps_rel=1e-2)
    three.load_state_dict(copy.deepcopy(two.state_dict()))
    for _ in range(4):
        one.step(closure_of(one, straight, scale))
        three.step(closure_of(three, params, scale))
    assert all(torch.equal(p, q) for p, q in zip(straight, params, strict=True))


def test_a_closure_that_fails_leaves_the_parameters():
    params, scale = problem()
    opt = fusedopt.UDoG(params)
    opt.step(closure_of(opt, params, scale))
    before = [p.detach().clone() for p in params]
    calls = []

    def fails():
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("data")
        return closure_of(opt, params, scale)()

    with pytest.raises(KeyError):
        opt.step(fails)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_refusals():
    params, _ = problem()
    with pytest.raises(ValueError, match="closure"):
        fusedopt.UDoG(params).step()
    for bad in ({"reps_rel": 0.0}, {"eps": 0.0}, {"weight_decay": -1.0}, {"lr": -1.0}):
        with pytest.raises(ValueError):
            fusedopt.UDoG(params, **bad)
