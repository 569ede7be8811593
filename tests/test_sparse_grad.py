"""SparseGrad against torch.optim.SparseAdam on weights that are kept rotated; its bases against singular vectors; resuming."""

import io

import pytest
import torch
from configs import BACKENDS, assert_same_bits, backend_argument
from torch import nn
from trainer_data import one_thread  # noqa: F401
from waits import NoWaiting

import fusedopt


def mlps(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)) for _ in range(3)]).to(dtype)


def matrices(net) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.dim() == 2]


def backward(net, step: int, scale: float = 1.0) -> torch.Tensor:
    """Data of a few directions, as of a limited scope."""
    net.zero_grad()
    gen = torch.Generator().manual_seed(step)
    few = torch.randn(3, 12, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    x = (torch.randn(16, 3, generator=gen, dtype=torch.float64) @ few).to(next(net.parameters()).dtype)
    loss = (net(x) - x.flip(1)).square().mean()
    (loss * scale).backward()
    return loss.detach()


def bases_of(net) -> list[fusedopt.GradientBasis]:
    steps = iter(range(1000, 1010))
    return fusedopt.sparse_grad_bases(matrices(net), lambda: backward(net, next(steps)), steps=10)


def optimizer(net, bases, density=0.05, **options):
    groups = [
        {"params": matrices(net), "projection": fusedopt.SparseGrad(bases, density)},
        {"params": [p for p in net.parameters() if p.dim() < 2]},
    ]
    return fusedopt.AdamW(groups, **{"lr": 0.01, **options})


def weights(net) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def everything(net, opt) -> list[torch.Tensor]:
    return weights(net) + [opt.state[p][name] for p in net.parameters() for name in sorted(opt.state[p])]


def test_bases_are_factor_matrices():
    """Left singular vectors of both unfoldings of the stack, up to sign; shared by all matrices of a shape."""
    net = mlps()
    before, bases = weights(net), bases_of(net)
    assert_same_bits(weights(net), before)
    assert [b.shape for b in bases] == [(20, 12), (12, 20)]
    for basis in bases:
        stack = []
        for step in range(1000, 1010):
            backward(net, step)
            stack += [p.grad for p in matrices(net) if tuple(p.shape) == basis.shape]
        for got, unfolded in ((basis.left, torch.cat(stack, 1)), (basis.right, torch.cat([g.t() for g in stack], 1))):
            torch.testing.assert_close(got.t() @ got, torch.eye(len(got), dtype=torch.float64))
            u, s, _ = torch.linalg.svd(unfolded, full_matrices=False)
            apart = s[:-1] > 1.05 * s[1:]  # a vector is determined where its value is far from the others
            apart = apart & torch.cat([torch.ones(1, dtype=torch.bool), apart[:-1]]) & (s[:-1] > 1e-5 * s[0])
            found = (u * got).sum(0).abs()[:-1][apart]
            assert len(found) >= 3
            torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-6, atol=1e-6)


def test_gradients_are_sparser_in_their_basis():
    net = mlps()
    bases = {b.shape: b for b in bases_of(net)}
    backward(net, 5)
    for p in matrices(net):
        basis, k = bases[tuple(p.shape)], p.numel() // 20
        kept = [float(g.flatten().square().topk(k).values.sum() / g.square().sum())
                for g in (p.grad, basis.left.t() @ p.grad @ basis.right)]  # fmt: skip
        assert kept[1] > 0.8 and kept[1] > 1.6 * kept[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matches_sparse_adam_on_rotated_weights(dtype, backend):
    """12 steps; eps stands elsewhere there, so it is tiny. Without ties, both choose the same elements."""
    net, exact = mlps(dtype), mlps()
    with torch.no_grad():
        for p, q in zip(net.parameters(), exact.parameters(), strict=True):
            q.copy_(p)
    bases = bases_of(exact)
    given = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-20}
    opt = optimizer(net, bases, 0.05, **given, weight_decay=0.0, backend=backend_argument(backend))
    by_shape = {b.shape: b for b in bases}
    rotated = []
    for p in matrices(exact):
        b = by_shape[tuple(p.shape)]
        rotated.append((p, b, (b.left.t() @ p.detach() @ b.right).requires_grad_()))
    sparse = torch.optim.SparseAdam([r for *_, r in rotated], **given)
    plain = torch.optim.AdamW([p for p in exact.parameters() if p.dim() < 2], **given, weight_decay=0.0)
    touched = [set() for _ in rotated]
    for step in range(12):
        backward(exact, step)
        for p, q in zip(net.parameters(), exact.parameters(), strict=True):
            p.grad = q.grad.to(dtype)
        for (p, b, r), seen in zip(rotated, touched, strict=True):
            g = b.left.t() @ p.grad @ b.right
            k = -(-p.numel() // 20)
            index = g.flatten().abs().argsort(descending=True)[:k]
            seen.update(index.tolist())
            where = torch.stack([index // g.shape[1], index % g.shape[1]])
            r.grad = torch.sparse_coo_tensor(where, g.flatten()[index], g.shape, check_invariants=True)
        opt.step()
        sparse.step()
        plain.step()
        with torch.no_grad():
            for p, b, r in rotated:
                p.copy_(b.left @ r @ b.right.t())
    tol = 1e-10 if dtype == torch.float64 else 2e-5
    for p, q in zip(weights(net), weights(exact), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=tol, atol=tol)
    for p, seen in zip(matrices(net), touched, strict=True):
        assert int((opt.state[p]["exp_avg_sq"] != 0).sum()) == len(seen) < p.numel() // 2


def test_everything_chosen_in_the_unit_basis_is_adamw():
    net, other = mlps(torch.float32), mlps(torch.float32)
    bases = [fusedopt.GradientBasis(torch.eye(m), torch.eye(n)) for m, n in ((20, 12), (12, 20))]
    opt, plain = (
        optimizer(net, bases, 1.0, weight_decay=0.1),
        fusedopt.AdamW(other.parameters(), lr=0.01, weight_decay=0.1),
    )
    for step in range(5):
        for m, o in ((net, opt), (other, plain)):
            backward(m, step)
            o.step()
    for p, q in zip(weights(net), weights(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_trains_and_resumes_bit_for_bit(form):
    """bf16 weights, from a file with the bases beside it."""
    bases = bases_of(mlps())
    options = {"state_format": form, "min_quantized_numel": 1, "param_precision": "stochastic"}
    straight, net = mlps(torch.bfloat16), mlps(torch.bfloat16)
    whole, opt = optimizer(straight, bases, **options), optimizer(net, bases, **options)
    losses = []
    for step in range(30):
        if step == 8:
            file = io.BytesIO()
            torch.save(
                {"opt": opt.state_dict(), "net": net.state_dict(), "bases": [(b.left, b.right) for b in bases]}, file
            )
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            net = mlps(torch.bfloat16)
            net.load_state_dict(saved["net"])
            opt = optimizer(net, [fusedopt.GradientBasis(*both) for both in saved["bases"]], **options)
            opt.load_state_dict(saved["opt"])
        for m, o in ((straight, whole), (net, opt)):
            losses.append(float(backward(m, step % 3)))
            o.step()
    assert_same_bits(everything(net, opt), everything(straight, whole))
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


@pytest.mark.parametrize("capturable", [False, True])
def test_a_skipped_step_changes_nothing(capturable):
    bases = bases_of(mlps())
    one, two = mlps(torch.float32), mlps(torch.float32)
    skipping = optimizer(one, bases, amp_fused=True, capturable=capturable)
    plain = optimizer(two, bases, capturable=capturable)
    for step in range(5):
        overflow = step in (0, 3)
        backward(one, step, scale=1024.0)
        if overflow:
            one[0][0].weight.grad[0] = float("inf")
        skipping.grad_scale, skipping.found_inf = torch.tensor(1024.0), torch.tensor(float(overflow))
        before = everything(one, skipping) if step else weights(one)
        before = [t.clone() for t in before]
        skipping.step()
        if overflow:
            assert_same_bits(everything(one, skipping) if step else weights(one), before)
        else:
            backward(two, step)
            plain.step()
    assert_same_bits(everything(one, skipping), everything(two, plain))


def test_refuses():
    net = mlps(torch.float32)
    bases = bases_of(net)
    with pytest.raises(ValueError, match="Invalid density"):
        fusedopt.SparseGrad(bases, 0.0)
    with pytest.raises(ValueError, match="two bases are of one shape"):
        fusedopt.SparseGrad([*bases, bases[0]])
    with pytest.raises(ValueError, match="is a form of Adam"):
        fusedopt.Lion(net.parameters(), projection=fusedopt.SparseGrad(bases))
    with pytest.raises(ValueError, match="is no matrix"):
        fusedopt.sparse_grad_bases(net.parameters(), lambda: None)
    with pytest.raises(ValueError, match=r"\(20, 12\) has no gradient"):
        fusedopt.sparse_grad_bases(matrices(net), net.zero_grad)
    with pytest.raises(ValueError, match="all zero or not finite"):
        fusedopt.sparse_grad_bases(
            matrices(net), lambda: [setattr(p, "grad", torch.zeros_like(p)) for p in matrices(net)], 1
        )
    opt = optimizer(net, bases)
    backward(net, 0)
    opt.step()
    other = optimizer(net, [fusedopt.GradientBasis(-b.left, b.right) for b in bases])
    other.load_state_dict(opt.state_dict())
    before = everything(net, other)
    before = [t.clone() for t in before]
    with pytest.raises(RuntimeError, match=r"shape \(20, 12\)\): its states are those of another basis"):
        other.step()
    assert_same_bits(everything(net, other), before)
    odd = nn.Parameter(torch.randn(5, 4))
    opt = fusedopt.AdamW([odd], projection=fusedopt.SparseGrad(bases))
    odd.grad = torch.randn(5, 4)
    opt.step()
    assert "there is no basis of shape (5, 4)" in opt.plan().explain()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the reference reads its numbers")
def test_nothing_waits_for_the_device():
    bases, net = bases_of(mlps()), mlps(torch.float32)
    opt = optimizer(net, bases, lr=torch.tensor(0.01), capturable=True, amp_fused=True)
    opt.grad_scale, opt.found_inf = torch.ones(1), torch.zeros(1)
    backward(net, 0)
    opt.step()
    with NoWaiting():
        opt.step()
