"""What steps LoRA pairs, on a GPU: against the CPU, in CUDA graphs, without waiting for the device.

The same tests run on the CPU with its backends; there what would make the host wait is found among the dispatched operations.
"""

import pytest
import torch
from lora_models import backward, model
from test_gpu import gpu_checks, on_each
from trainer_data import one_thread  # noqa: F401
from waits import NoWaiting

import fusedopt

MAKERS = {
    "lora_pro": lambda net, **o: fusedopt.AdamW(net.parameters(), gradient_transforms=[fusedopt.LoRAPro(net)], **o),
    "lora_one": lambda net, **o: fusedopt.AdamW(net.parameters(), gradient_transforms=[fusedopt.LoRAOne(net)], **o),
    "lora_pro_adamw": lambda net, **o: fusedopt.LoRAProAdamW(net, weight_decay=0.1, **o),
    "loft": lambda net, **o: fusedopt.LoFTAdamW(net, **o),
    "loft_both": lambda net, **o: fusedopt.LoFTAdamW(net, alternate=False, **o),
}
each = pytest.mark.parametrize("maker", MAKERS)
LR = 1e-3


def build(maker, device, backend, dtype=torch.float32, **options):
    """A model on a device, its optimizer, and the same model in fp64 that gives the gradients."""
    net = model(torch.float64, zero=False).to(device, dtype)
    if options.get("capturable"):
        options["lr"] = torch.tensor(LR, device=device)
    return net, MAKERS[maker](net, backend=backend, **{"lr": LR, **options})


def take_gradients(net, source, step: int, scale: float = 1.0) -> None:
    """Into the same memory at every step."""
    backward(source, step, scale)
    for p, q in zip(net.parameters(), source.parameters(), strict=True):
        if q.grad is not None:
            p.grad = torch.empty_like(p) if p.grad is None else p.grad
            p.grad.copy_(q.grad)


@on_each
@each
def test_equals_the_reference_in_fp64(maker, device, backend):
    source = model(torch.float64, zero=False)
    net, opt = build(maker, device, backend, capturable=True)
    exact, other = build(maker, "cpu", "reference", torch.float64)
    for step in range(4):
        for m, o in ((net, opt), (exact, other)):
            take_gradients(m, source, step)
            o.step()
    for p, q in zip(net.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.cpu().double(), q, rtol=1e-4, atol=1e-2 * LR)


@on_each
@each
def test_graph_replay_equals_eager(maker, device, backend):
    """Replays and eager steps take turns; one step is skipped by found_inf. LoFT's turns are the device's to take."""
    device = torch.device(device)
    source = model(torch.float64, zero=False)
    pair = [build(maker, device, backend, capturable=True, amp_fused=True) for _ in "12"]
    for net, opt in pair:
        opt.grad_scale, opt.found_inf = torch.ones(1, device=device), torch.zeros(1, device=device)
        take_gradients(net, source, 0)
        gpu_checks.warm_up(opt, device)
    (eager_net, eager), (net, captured) = pair
    replay = gpu_checks.Replay(captured, device)
    for i in range(6):
        for m, opt, step in ((eager_net, eager, eager.step), (net, captured, captured.step if i in (2, 4) else replay)):
            opt.found_inf.fill_(float(i == 3))
            opt.grad_scale.fill_(2.0**i)
            take_gradients(m, source, 1 + i, 2.0**i)
            step()
    for p, q in zip(net.parameters(), eager_net.parameters(), strict=True):
        assert torch.equal(p, q)


@on_each
@each
def test_nothing_waits_for_the_device(maker, device, backend):
    source = model(torch.float64, zero=False)
    net, opt = build(maker, device, backend, capturable=True, amp_fused=True)
    opt.grad_scale, opt.found_inf = torch.ones(1, device=device), torch.zeros(1, device=device)
    for step in range(3):
        take_gradients(net, source, step)
        if step < 2:
            opt.step()
    context = NoWaiting() if device == "cpu" else gpu_checks.no_synchronisation(torch.device(device))
    if (device, backend) == ("cpu", "reference"):
        pytest.skip("the reference reads found_inf and its numbers")
    with context:
        opt.step()
