"""LoFT against its transcription column by column; what its calibrations keep; where it is AdamW of the full weight."""

import pytest
import torch
from configs import BACKENDS, backend_argument
from lora_models import Adapted, backward, model
from oracles.lora import Loft, LoftFactor
from trainer_data import one_thread  # noqa: F401

import fusedopt

GIVEN = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4}


def trained(net) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters() if p.requires_grad]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matches_its_transcription(dtype, alternate, transposed, backend):
    """Ten calls, the last layer by Adam with the same undivided decay. fp32 from a B that is not zero: else 1e-6 decides."""
    zero = dtype == torch.float64
    net, exact = model(dtype, zero), model(torch.float64, zero)
    opt = fusedopt.LoFTAdamW(net, **GIVEN, weight_decay=0.01, alternate=alternate, transposed_calibration=transposed,
                             backend=backend_argument(backend))  # fmt: skip
    oracles = [
        Loft(p.scale, **GIVEN, decay=0.01, alternate=alternate, transposed=transposed)
        for p in fusedopt.lora_pairs(exact)
    ]
    plain = torch.optim.Adam(exact[-1].parameters(), **GIVEN)
    with torch.no_grad():
        for p, q in zip(net.parameters(), exact.parameters(), strict=True):
            q.copy_(p)
    for step in range(10):
        backward(exact, step)
        for p, q in zip(net.parameters(), exact.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.to(dtype)
        opt.step()
        with torch.no_grad():
            for p in exact[-1].parameters():
                p.mul_(0.99)
        plain.step()
        with torch.no_grad():
            for oracle, pair in zip(oracles, fusedopt.lora_pairs(exact), strict=True):
                for p, new in zip((pair.A, pair.B), oracle.step(pair.A, pair.B, pair.A.grad, pair.B.grad), strict=True):
                    p.copy_(new)
        for p, q in zip(trained(net), trained(exact), strict=True):
            torch.testing.assert_close(p.double(), q, rtol=1e-8 if zero else 2e-5, atol=1e-8 if zero else 2e-5)


def test_alternates_and_counts_both():
    net = model()
    opt = fusedopt.LoFTAdamW(net, **GIVEN)
    pair = fusedopt.lora_pairs(net)[0]
    for step in range(4):
        before = [x.detach().clone() for x in (pair.A, pair.B, net[-1].weight)]
        backward(net, step)
        opt.step()
        moved = [not torch.equal(x, y) for x, y in zip((pair.A, pair.B, net[-1].weight), before, strict=True)]
        assert moved == [step % 2 == 1, step % 2 == 0, True]
    assert opt.state[pair.A]["step"] == opt.state[pair.B]["step"] == 4
    assert opt.state[pair.A]["loft_products"].shape == (9, 3, 3)


def test_is_adamw_of_the_weight_where_b_is_a_basis():
    """B orthogonal, square and at rest: every gradient of the weight can be stepped, with the scale or without."""
    torch.manual_seed(0)
    for use_scale in (True, False):
        layer = Adapted(6, 5, 5, 10.0, False, torch.float64)
        with torch.no_grad():
            layer.lora_B.weight.copy_(torch.eye(5))
        a, b = layer.lora_A.weight, layer.lora_B.weight
        groups = [{"params": [a]}, {"params": [b], "lr": 0.0}]
        opt = fusedopt.LoFTAdamW(groups, **GIVEN, weight_decay=0.0, alternate=False, damping_a=0.0, use_scale=use_scale,
                                 pairs=fusedopt.lora_pairs(layer))  # fmt: skip
        full = torch.nn.Parameter(2 * a.detach().clone())
        adam = torch.optim.Adam(
            [full], lr=GIVEN["lr"] * (1 if use_scale else 2), betas=GIVEN["betas"], eps=GIVEN["eps"]
        )
        for _ in range(8):
            full.grad = torch.randn_like(full)
            a.grad, b.grad = 2 * full.grad, 2 * full.grad @ a.detach().t()
            if not use_scale:
                full.grad *= 2
            opt.step()
            adam.step()
            torch.testing.assert_close(2 * a.detach(), full.detach(), rtol=1e-9, atol=1e-11)


def test_only_the_straight_calibration_keeps_second_moments():
    """B <- B Q changes nothing of the weight's moments; the released arrangement changes the second ones."""
    torch.manual_seed(1)
    o, q = torch.randn(7, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    grads, none = [torch.randn(3, dtype=torch.float64) for _ in range(4)], [torch.zeros(3, dtype=torch.float64)] * 4
    for transposed in (False, True):
        factor = LoftFactor((1.0, 1.0), 1e-4, 0.0, transposed)
        factor.follow(o, grads)
        factor.m, factor.p = [g.clone() for g in grads], [torch.outer(g, g) for g in grads]
        before = [(o @ m, torch.stack([x @ p @ x for x in o])) for m, p in zip(factor.m, factor.p, strict=True)]
        factor.follow(o @ q, none)
        for (m0, v0), m, p in zip(before, factor.m, factor.p, strict=True):
            torch.testing.assert_close(o @ q @ m, m0)
            v = torch.stack([x @ p @ x for x in o @ q])
            assert torch.allclose(v, v0) != transposed


def test_moments_survive_a_change_of_basis():
    """B times an invertible matrix and A times its inverse between two steps: the weight's steps do not see it."""
    steps = []
    for turned in (False, True):
        torch.manual_seed(2)
        layer = Adapted(6, 7, 3, 3.0, False, torch.float64)
        a, b = layer.lora_A.weight, layer.lora_B.weight
        opt = fusedopt.LoFTAdamW(layer, lr=1e-3, weight_decay=0.0, alternate=False, damping_a=0.0, damping_b=0.0)
        q = torch.randn(3, 3, dtype=torch.float64)
        for step in range(4):
            if turned and step == 2:
                with torch.no_grad():
                    a.copy_(torch.linalg.inv(q) @ a)
                    b.copy_(b @ q)
            full = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            a.grad, b.grad = b.detach().t() @ full, full @ a.detach().t()
            opt.step()
        steps.append(b.detach() @ a.detach())
    torch.testing.assert_close(*steps, rtol=1e-9, atol=1e-11)


def test_trains_bf16_adapters():
    net = model(torch.bfloat16)
    opt = fusedopt.LoFTAdamW(net, lr=0.02, weight_decay=0.0, param_precision="split32", state_format="int8")
    losses = []
    for step in range(30):
        losses.append(float(backward(net, step % 3)))
        opt.step()
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
