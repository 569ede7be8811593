"""Zeroth-order steps against MeZO's equations with random numbers of their own; the kernel that draws them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from configs import assert_same_bits, parameters
from harness import guarded, guards_untouched
from oracles.philox import philox4x32

import fusedopt
from fusedopt.transforms import noise
from fusedopt.transforms.zeroth import PURPOSE

SHAPES = ((4, 3), (5,), ())


def normal(i: int, key: int, tensor_id: int, step: int) -> float:
    """Number i, by its formula and a Philox of its own."""
    counter = (i // 4 & 0xFFFFFFFF, i // 4 >> 32 | 0xFE << 24, tensor_id, step)
    words = philox4x32(counter, (key & 0xFFFFFFFF, key >> 32))
    one, other = words[2 * (i % 4 // 2) : 2 * (i % 4 // 2) + 2]
    r = math.sqrt(-2 * math.log(((one >> 8) + 1) / 2**24))
    t = 2 * math.pi * (other >> 8) / 2**24
    return r * (math.sin(t) if i % 2 else math.cos(t))


def direction(shapes, key: int, step: int) -> list[torch.Tensor]:
    return [
        torch.tensor([normal(i, key, k, step) for i in range(math.prod(s))], dtype=torch.float64).view(s)
        for k, s in enumerate(shapes)
    ]


def loss_of(params) -> torch.Tensor:
    return sum(((p.double() - 0.3 * k) ** 2).sum() * (1 + k) + p.double().sin().sum() for k, p in enumerate(params))


def mezo(weights, steps, eps, lr, decay, samples, seed):
    """arXiv 2305.17333, algorithm 1, with n-SPSA."""
    count = 0
    for _ in range(steps):
        total = [torch.zeros_like(w) for w in weights]
        for _ in range(samples):
            z = direction(SHAPES, noise.key_of(seed, PURPOSE), count)
            up = loss_of([w + eps * x for w, x in zip(weights, z, strict=True)])
            down = loss_of([w - eps * x for w, x in zip(weights, z, strict=True)])
            for t, x in zip(total, z, strict=True):
                t += (up - down) / (2 * eps) * x / samples
            count += 1
        weights = [w - lr * (t + decay * w) for w, t in zip(weights, total, strict=True)]
    return weights


@pytest.mark.parametrize("steps, samples, decay", [(10, 1, 0.0), (10, 3, 0.1), (200, 1, 0.01)])
def test_sgd_is_mezo(steps, samples, decay):
    params = parameters(*SHAPES, dtype=torch.float64)
    start = [p.detach().clone() for p in params]
    opt = fusedopt.SGD(params, lr=0.003, weight_decay=decay)
    trainer = fusedopt.ZerothOrder(opt, eps=1e-3, samples=samples, seed=7)
    for _ in range(steps):
        trainer.step(lambda: loss_of(params))
        assert all(p.grad is None for p in params)
    want = mezo(start, steps, 1e-3, 0.003, decay, samples, 7)
    for p, w, w0 in zip(params, want, start, strict=True):
        assert (p.detach() - w).abs().max() <= 1e-7 * (w - w0).abs().max()
    assert all(opt.state[p]["step"] == steps for p in params)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("copies", [False, True])
def test_any_rule_takes_the_estimated_gradient(whole, copies):
    """A global clip steps all parameters at once, else one by one."""
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    options = {"lr": 0.01, "clip_grad_norm": 1.0 if whole else None}
    opt, plain = fusedopt.AdamW(one, **options), fusedopt.AdamW(two, **options)
    trainer = fusedopt.ZerothOrder(opt, samples=2, copies=copies)
    for _ in range(5):
        kept = [p.detach().clone() for p in one]
        _, directions = trainer.estimate(lambda: loss_of(one))
        for p, k in zip(one, kept, strict=True):
            if copies:
                assert_same_bits([p.detach()], [k])
            torch.testing.assert_close(p.detach(), k, rtol=3e-7, atol=3e-7)
            p.data.copy_(k)
        for tensor_id, q in enumerate(two):
            q.grad = trainer.gradient(tensor_id, q, directions)
        trainer.apply(directions)
        plain.step()
        assert_same_bits([p.detach() for p in one], [q.detach() for q in two])


def test_estimates_the_gradient():
    p = torch.nn.Parameter(torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    a = torch.arange(6, dtype=torch.float64)
    trainer = fusedopt.ZerothOrder(fusedopt.SGD([p]), samples=1000)
    _, directions = trainer.estimate(lambda: (a * p).sum())
    got = trainer.gradient(0, p, directions)
    assert (got - a).norm() < 0.2 * a.norm()


def test_workers_that_share_slopes_keep_the_same_weights():
    """Three workers with data of their own; each sends one number."""
    replicas = [parameters(*SHAPES) for _ in "123"]
    trainers = [fusedopt.ZerothOrder(fusedopt.SGD(ps), seed=100 + i, copies=True) for i, ps in enumerate(replicas)]
    first = float(loss_of(replicas[0]).detach())
    for _ in range(30):
        sent = []
        for i, (trainer, ps) in enumerate(zip(trainers, replicas, strict=True)):
            _, mine = trainer.estimate(lambda i=i, ps=ps: loss_of(ps) + 0.01 * i * ps[0].sum())
            sent += [fusedopt.Direction(d.seed, d.step, float(d.slope)) for d in mine]
        for ps in replicas:
            fusedopt.apply_directions(ps, sent, lr=0.003, weight_decay=0.01)
    for ps in replicas[1:]:
        assert_same_bits([p.detach() for p in ps], [p.detach() for p in replicas[0]])
    assert float(loss_of(replicas[0]).detach()) < first


def test_resumes_and_frozen_parameters():
    def train(steps, start=None, state=None, first=0):
        params = parameters(*SHAPES)
        params[1].requires_grad_(False)
        trainer = fusedopt.ZerothOrder(fusedopt.SGD(params, lr=0.003), seed=3)
        if state is not None:
            trainer.load_state_dict(state)
            for p, q in zip(params, start, strict=True):
                p.data.copy_(q)
        for _ in range(steps):
            trainer.step(lambda: loss_of(params))
        return [p.detach() for p in params], trainer.state_dict()

    straight, _ = train(6)
    half, state = train(3)
    resumed, _ = train(3, half, state)
    assert_same_bits(resumed, straight)
    assert_same_bits([straight[1]], [parameters(*SHAPES)[1].detach()])


def test_a_closure_that_fails_leaves_the_weights():
    params = parameters(*SHAPES, dtype=torch.float64)
    kept = [p.detach().clone() for p in params]
    calls = []

    def closure():
        calls.append(1)
        if len(calls) in (1, 3):
            raise KeyError("data")
        return loss_of(params)

    trainer = fusedopt.ZerothOrder(fusedopt.SGD(params))
    for _ in range(2):
        with pytest.raises(KeyError):
            trainer.step(closure)
        for p, k in zip(params, kept, strict=True):
            torch.testing.assert_close(p.detach(), k, rtol=0, atol=1e-15)


def test_refusals():
    params = parameters((4, 4), dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="expected an optimizer of fusedopt"):
        fusedopt.ZerothOrder(torch.optim.SGD(params))
    with pytest.raises(ValueError, match="invalid eps"):
        fusedopt.ZerothOrder(fusedopt.SGD(params), eps=0.0)
    with pytest.raises(ValueError, match="parameter 0 .*'split24'.*copies=True"):
        fusedopt.ZerothOrder(fusedopt.SGD(params, param_precision="split24"))
    fusedopt.ZerothOrder(fusedopt.SGD(params, param_precision="split24"), copies=True)
    with pytest.raises(ValueError, match="release_gradients, offload"):
        fusedopt.ZerothOrder(fusedopt.offload(fusedopt.SGD(params)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_numbers_do_not_depend_on_pieces_or_layout(dtype, monkeypatch):
    x = torch.zeros(4099, dtype=dtype)
    whole = noise.add_noise_(x.clone(), 0.5, 11, 3, 9)
    monkeypatch.setattr(noise, "PIECE", 64)
    assert_same_bits([noise.add_noise_(x.clone(), 0.5, 11, 3, 9)], [whole])
    apart = torch.zeros(4099, 2, dtype=dtype)[:, 0]
    assert_same_bits([noise.add_noise_(apart, 0.5, 11, 3, 9).contiguous()], [whole])
    assert float(whole.double().std()) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 1023, 1024, 2501])
def test_triton_kernel(dtype, numel):
    pytest.importorskip("triton")
    from fusedopt.backends.triton import interpreted

    if not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1 when Triton is imported")
    x = torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(dtype)
    mine, key = guarded(x), 0x9234567890ABCDEF
    noise.launch(mine, torch.full((1,), 0.01), key, 5, 201)
    assert guards_untouched(mine)
    exact = torch.zeros(numel, dtype=torch.float64)
    noise.add_noise_(exact, 0.01, key, 5, 201)
    exact += x.double()
    bound = {torch.float32: 6e-8, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert bool(((mine.double() - exact).abs() <= bound * exact.abs() * 1.01 + 4e-7 * 0.01 * 6).all())
    assert not torch.equal(mine, x) or numel == 1


COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.gates_triton import TARGETS, cuda_resources, hip_resources
from fusedopt.kernels.perturb import BLOCK, perturb_kernel as kernel
for target in TARGETS:
    hip = target.startswith("gfx")
    machine = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target[3:]), 32)
    for dtype in ("fp32", "bf16", "fp16"):
        signature = {n: "i32" for n in kernel.arg_names} | {"x": f"*{dtype}", "factor": "*fp32", "BLOCK": "constexpr"}
        aligned = {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]}
        source = ASTSource(kernel, signature, {"BLOCK": BLOCK}, aligned)
        made = triton.compile(source, target=machine, options={"num_warps": 4})
        use = hip_resources(made) if hip else cuda_resources(made)
        print(json.dumps({"target": target, "dtype": dtype, **use}))
"""


def test_kernel_compiles_without_spills_and_with_wide_accesses():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    run = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == 12
    for row in rows:
        assert row["spills"] == 0, row
        wide = "128" if row["dtype"] == "fp32" else "64"  # four elements a lane and more
        for way in ("loads", "stores"):
            assert sum(n for bits, n in row[way].items() if int(bits) >= int(wide)) > 0, row
