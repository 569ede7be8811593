"""Gradient transforms on a GPU: against the CPU, in CUDA graphs, without waiting for the device; SPSA's kernel.

The same tests run on the CPU with its backends, so that what is skipped without a GPU is only the device.
"""

import pytest
import torch
from test_gpu import LR, assert_same, build, gpu_checks, on_each, parameters, set_gradients, tensors

import fusedopt
from fusedopt import transforms as tf
from fusedopt.transforms.noise import add_noise_

# LAWN and Layca cannot have the tensor that is one number, nor Layca empty ones of no direction
LISTS = {
    "filters": (tf.Grokfast(), tf.GrokfastMA(window=2)),
    "tensor": (tf.OrthoGrad(), tf.ClipComponents(0.5), tf.Normalize(), tf.UnitNorm()),
    "rows": (tf.Centralize(), tf.AdaptiveClip(0.1), tf.UnitNorm(per="unit"), tf.NormLoss()),
    "elements": (tf.ClipFraction(0.2), tf.ClipValue(0.05), tf.PrivacyNoise(0.01)),
    "tangent": (tf.TangentProjection(delta=1.0),),
    "model": (tf.StableDecay(0.1), tf.Hypergradient(1e-6), tf.Bloop()),
    "weights": (tf.Lookahead(every=2), tf.QuantizationPull(bits=6), tf.LAWN(free_steps=1)),
}
each_list = pytest.mark.parametrize("name", LISTS)


def optimizer(device, backend, name, **options):
    opt = build(str(device), backend, "adamw", gradient_transforms=LISTS[name], **options)
    for group in opt.param_groups:
        group["lr"] = torch.tensor(LR, device=device)
    return opt


@on_each
@each_list
def test_equals_the_cpu(name, device, backend):
    pair = [optimizer(device, backend, name, capturable=True), optimizer("cpu", "reference", name)]
    for i in range(4):
        for opt in pair:
            set_gradients(opt, 1 + i)
            opt.step()
    for a, b in zip(*map(parameters, pair), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4 * LR)


@on_each
@each_list
def test_graph_replay_equals_eager(name, device, backend):
    """Replays and eager steps take turns; one step is skipped by found_inf."""
    device = torch.device(device)
    pair = [optimizer(device, backend, name, capturable=True, amp_fused=True) for _ in "12"]
    for opt in pair:
        opt.grad_scale, opt.found_inf = torch.ones(1, device=device), torch.zeros(1, device=device)
        set_gradients(opt, 1)
        gpu_checks.warm_up(opt, device)
    eager, captured = pair
    replay = gpu_checks.Replay(captured, device)
    for i in range(6):
        for opt, step in ((eager, eager.step), (captured, captured.step if i in (2, 4) else replay)):
            opt.found_inf.fill_(float(i == 3))
            opt.grad_scale.fill_(2.0**i)
            for p, g in zip(parameters(opt), tensors(5 + i, torch.float32, device, 0.1 * 2.0**i), strict=True):
                p.grad.copy_(g)
            step()
    assert_same(captured, eager)


@pytest.mark.gpu
@each_list
def test_nothing_waits_for_the_device(name):
    opt = optimizer(torch.device("cuda"), "cuda", name, capturable=True, amp_fused=True)
    opt.grad_scale, opt.found_inf = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
    for _ in range(2):
        set_gradients(opt, 1)
        opt.step()
    set_gradients(opt, 2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_that_of_the_cpu(dtype):
    for numel in (1, 4099, 1 << 20):
        there, here = torch.zeros(numel, dtype=dtype, device="cuda"), torch.zeros(numel, dtype=torch.float64)
        add_noise_(there, 0.5, 77, 3, 4)
        add_noise_(here, 0.5, 77, 3, 4)
        bound = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        torch.testing.assert_close(there.cpu().double(), here, rtol=bound, atol=1e-6)


@on_each
def test_zeroth_order(device, backend):
    """Two losses a step; the optimizer's kernels take the estimated gradient."""
    pair = []
    for where, with_ in ((device, backend), ("cpu", "reference")):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 300).to(where))
        trainer = fusedopt.ZerothOrder(fusedopt.AdamW([p], lr=LR, backend=with_), eps=0.01, samples=2)
        for _ in range(3):
            trainer.step(lambda p=p: (p.double() ** 2).sum())
        pair.append(p.detach().cpu())
    torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4)
