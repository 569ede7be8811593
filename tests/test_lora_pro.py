"""LoRA-Pro and LoRA-One's preconditioner against least squares over whole weights; LoRA-Pro's AdamW; their surroundings."""

import pytest
import torch
from configs import BACKENDS, assert_same_bits, backend_argument
from lora_models import backward, factors, full_gradients, model
from oracles.lora import LoraProAdam, lora_pro
from trainer_data import one_thread  # noqa: F401

import fusedopt
from fusedopt.factors import Factors, sylvester


def trained(net) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters() if p.requires_grad]


def random_pairs(k=3, r=3, m=7, n=6, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return [torch.randn(shape, generator=gen, dtype=torch.float64) for _ in range(k)]

    return draw(r, n), draw(m, r), draw(m, n)


# Algebra


@pytest.mark.parametrize("spread", [0, 2, 4])
def test_sylvester_solves_its_equation(spread):
    """Eigenvalues over 2 * spread decades on both sides, against the Kronecker system."""
    gen = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(4, 5, 5, generator=gen, dtype=torch.float64))[0] for _ in "12")
    values = torch.logspace(0, -2 * spread, 5, dtype=torch.float64)
    left, right = (q @ torch.diag(values) @ q.mT for q in (left, right))
    rhs = torch.randn(4, 5, 5, generator=gen, dtype=torch.float64)
    for got, a, b, c in zip(sylvester(left, right, rhs), left, right, rhs, strict=True):
        unit = torch.eye(5, dtype=torch.float64)
        want = torch.linalg.solve(torch.kron(a, unit) + torch.kron(unit, b.t().contiguous()), c.flatten()).view(5, 5)
        assert (got - want).norm() <= 1e-14 * 100**spread * 10 * want.norm()
        assert (a @ got + got @ b - c).norm() <= 1e-12 * (a.norm() + b.norm()) * got.norm()


def test_sylvester_with_a_singular_side():
    gen = torch.Generator().manual_seed(1)
    b = torch.randn(2, 4, 4, generator=gen, dtype=torch.float64)
    right, rhs = b @ b.mT, torch.randn(2, 4, 4, generator=gen, dtype=torch.float64)
    got = sylvester(torch.zeros_like(right), right, rhs)
    torch.testing.assert_close(got, rhs @ torch.linalg.inv(right), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_factor_gradients_are_the_nearest(scale):
    """The step of the product is the best one, and no other factor gradients with this step are nearer to LoRA's."""
    a, b, full = random_pairs()
    grad_a = [scale * y.t() @ g for y, g in zip(b, full, strict=True)]
    grad_b = [scale * g @ x.t() for x, g in zip(a, full, strict=True)]
    pro = Factors(a, b, [scale] * 3, 0.0)
    plain = pro.nearest(grad_a, grad_b, closest=False)
    rows = zip(pro.nearest(grad_a, grad_b), plain, a, b, full, grad_a, grad_b, strict=True)
    for (ta, tb), (pa, pb), x, y, g, ga, gb in rows:
        want_a, want_b = lora_pro(x, y, scale, g)
        torch.testing.assert_close(ta, want_a, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(tb, want_b, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(y @ pa + pb @ x, y @ ta + tb @ x, rtol=1e-9, atol=1e-11)
        left, right = y @ torch.linalg.pinv(y), torch.linalg.pinv(x) @ x
        torch.testing.assert_close(
            scale * (y @ ta + tb @ x), left @ g + g @ right - left @ g @ right, rtol=1e-9, atol=1e-11
        )
        apart = (ta - pa) @ torch.linalg.pinv(x)
        equation = y.t() @ y @ apart + apart @ x @ x.t()
        torch.testing.assert_close(
            equation, -torch.linalg.inv(y.t() @ y) @ ga @ x.t() / scale**2, rtol=1e-8, atol=1e-10
        )
        base = (ta - ga).square().sum() + (tb - gb).square().sum()
        for seed in range(5):
            x_other = 1e-3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            assert (ta + x_other @ x - ga).square().sum() + (tb - y @ x_other - gb).square().sum() > base


@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_the_distance_is_least_for_every_damping(damping):
    """Also where gradients are of no common full one: the derivative along X is zero."""
    a, b, _ = random_pairs()
    grad_a, grad_b = [torch.randn_like(x) for x in a], [torch.randn_like(y) for y in b]
    rows = zip(Factors(a, b, [1.5] * 3, damping).nearest(grad_a, grad_b), a, b, grad_a, grad_b, strict=True)
    for (ta, tb), x, y, ga, gb in rows:
        slope = (ta - ga) @ x.t() - y.t() @ (tb - gb)
        assert slope.norm() <= 1e-11 * (ga @ x.t()).norm()


def test_dependent_columns_and_zeros_stay_finite():
    """B of rank one, then zero, with no damping asked for."""
    a, b, full = random_pairs()
    b[0] = b[0][:, :1].expand(-1, 3).contiguous()
    b[1] = torch.zeros_like(b[1])
    grads = [y.t() @ g for y, g in zip(b, full, strict=True)], [g @ x.t() for x, g in zip(a, full, strict=True)]
    out = list(Factors(a, b, [1.0] * 3, 0.0).nearest(*grads))
    assert all(t.isfinite().all() for pair in out for t in pair)
    assert not out[1][0].any()
    torch.testing.assert_close(out[1][1], grads[1][1] @ torch.linalg.inv(a[1] @ a[1].t()), rtol=1e-9, atol=1e-11)


# Transforms


@pytest.mark.parametrize("zero", [True, False])
def test_lora_pro_transform(zero):
    net = model(zero=zero)
    opt = fusedopt.SGD(net.parameters(), lr=0.1, gradient_transforms=[fusedopt.LoRAPro(net, damping=0.0)])
    for step in range(4):
        full, before = full_gradients(net, step), factors(net)
        last = net[-1].weight.detach() - 0.1 * net[-1].weight.grad
        kept = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        opt.step()
        assert_same_bits([p.grad for p in net.parameters() if p.grad is not None], kept)
        for (a, b, s), (a1, b1, _), g in zip(before, factors(net), full, strict=True):
            ta, tb = lora_pro(a, b, s, g)
            torch.testing.assert_close(a1, a - 0.1 * ta, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(b1, b - 0.1 * tb, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(net[-1].weight.detach(), last)


def test_lora_one_transform():
    net, eps = model(zero=False), 1e-2
    opt = fusedopt.SGD(net.parameters(), lr=0.1, gradient_transforms=[fusedopt.LoRAOne(net, damping=eps)])
    full, before = full_gradients(net, 0), factors(net)
    opt.step()
    for (a, b, s), (a1, b1, _), g in zip(before, factors(net), full, strict=True):
        unit = eps * torch.eye(len(a), dtype=torch.float64)
        ga = torch.linalg.solve(b.t() @ b + unit, s * b.t() @ g)
        gb = torch.linalg.solve(a @ a.t() + unit, s * a @ g.t()).t()
        torch.testing.assert_close(a1, a - 0.1 * ga, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(b1, b - 0.1 * gb, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cls", [fusedopt.LoRAPro, fusedopt.LoRAOne])
@pytest.mark.parametrize("rule", ["adamw8bit", "lion", "lamb", "rmsprop"])
def test_any_rule(cls, rule):
    """bf16 weights with their low bits, 8-bit states, a rule that reads tensors' norms: all of them train."""
    net = model(torch.bfloat16, zero=False)
    opt = fusedopt.create(rule, net.parameters(), lr=0.01, gradient_transforms=[cls(net)], param_precision="split32")
    losses = []
    for step in range(24):
        losses.append(float(backward(net, step % 3)))
        opt.step()
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


# AdamW


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adamw_of_full_moments(dtype, backend):
    """From B = 0 in fp64, where the first steps of A are large."""
    zero, given = dtype == torch.float64, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}
    net, exact = model(dtype, zero), model(torch.float64, zero)
    opt = fusedopt.LoRAProAdamW(net, **given, weight_decay=0.1, damping=0.0, backend=backend_argument(backend))
    plain = torch.optim.AdamW(exact[-1].parameters(), **given, weight_decay=0.1)
    oracles = [LoraProAdam(p.scale, **given, decay=0.1) for p in fusedopt.lora_pairs(exact)]
    with torch.no_grad():
        for p, q in zip(net.parameters(), exact.parameters(), strict=True):
            q.copy_(p)
    for step in range(10):
        full = full_gradients(exact, step)
        for p, q in zip(net.parameters(), exact.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.to(dtype)
        opt.step()
        plain.step()
        with torch.no_grad():
            for oracle, pair, g in zip(oracles, fusedopt.lora_pairs(exact), full, strict=True):
                for p, new in zip((pair.A, pair.B), oracle.step(pair.A, pair.B, g), strict=True):
                    p.copy_(new)
        tol = 1e-8 if zero else 1e-5
        for p, q in zip(trained(net), trained(exact), strict=True):
            torch.testing.assert_close(p.double(), q, rtol=tol, atol=tol)


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_adamw_narrow_moments_stay_near(form):
    one, two = model(torch.float32, zero=False), model(torch.float32, zero=False)
    opts = [fusedopt.LoRAProAdamW(net, lr=3e-3, state_format=f, min_quantized_numel=1)
            for net, f in ((one, "fp32"), (two, form))]  # fmt: skip
    start = trained(one)
    for step in range(20):
        for net, opt in zip((one, two), opts, strict=True):
            backward(net, step)
            opt.step()
    entry = opts[1].state[two[0].lora_B.weight]
    assert entry["exp_avg"].shape == (8, 9)
    assert entry["exp_avg"].dtype == (torch.uint8 if form == "int8" else torch.bfloat16)
    assert list(opts[1].state[two[0].lora_A.weight]) == ["step"]
    moved = sum((p - q).square().sum() for p, q in zip(trained(one), start, strict=True))
    apart = sum((p - q).square().sum() for p, q in zip(trained(one), trained(two), strict=True))
    assert 0 < apart < 0.1**2 * moved
