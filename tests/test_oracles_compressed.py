"""The transcriptions of compressed methods (Q-GaLore's codes, MicroAdam's window), for which there is no package, against what
they reduce to."""

import torch
from oracles.compare import STEPS, close, gradient, tensor
from oracles.galore import GaLore
from oracles.microadam import MicroAdam
from oracles.qgalore import LazyRefresh, QGaLore, affine_dequantize, affine_quantize

# Q-GaLore


def test_affine_codes():
    x = tensor((1000,)) * 0.1
    for bits in (4, 8):
        codes, scale, zero = affine_quantize(x, bits)
        back = affine_dequantize(codes, scale, zero)
        top = 2**bits - 1
        assert codes.min() == 0 and codes.max() == top and len(scale) == 4
        assert (
            (back - x).abs() <= scale.repeat_interleave(256)[:1000] * 1.01
        ).all()  # the zero point rounds: up to one unit
        inner = (codes > 0) & (codes < top)
        assert ((back - x).abs()[inner] <= scale.repeat_interleave(256)[:1000][inner] / 2 * (1 + 1e-9)).all()
    saturated = affine_dequantize(*affine_quantize(torch.rand(256) + 5, 8))
    assert saturated.max() < 1.1, "an all-positive group loses its offset"


def test_lazy_refresh():
    """By hand: the same vector each time; the fifth cosine fills the queue and doubles the gap, each later one again;
    the gap counts from step 1, not from the last refresh."""
    schedule, vector, refreshes = LazyRefresh(2, queue=5), torch.tensor([0.6, 0.8]), []
    for t in range(1, 40):
        if schedule.due(t):
            refreshes.append(t)
            schedule.observe(vector)
    assert refreshes == [1, 3, 5, 7, 9, 11, 13, 17, 33]
    flipping, vector = LazyRefresh(2, queue=2), torch.tensor([1.0, 0.0])
    for t in range(1, 40):
        if flipping.due(t):
            flipping.observe(vector)
            vector = -vector
    assert flipping.gap == 2


def test_qgalore_without_codes_is_galore():
    shape = (9, 6)
    p, q = tensor(shape), tensor(shape)
    a = QGaLore(3, 4, 0.25, weight_decay=0.0, projector_bits=None, cos_threshold=2.0)
    b = GaLore(3, 4, 0.25, eps=1e-8, form="D1")
    for step in range(STEPS):
        a.step(p, gradient(q, step))
        b.step(q, gradient(q, step))
    close(p, q, tensor(shape))


def test_qgalore_weights_are_codes():
    shape = (32, 16)
    p = tensor(shape)
    oracle = QGaLore(4, 3, weight_bits=8)
    for step in range(4):
        oracle.step(p, gradient(p, step), uniform=torch.rand(shape))
        again = affine_dequantize(*affine_quantize(p.reshape(-1), 8))
        assert (again.view(shape) - p).abs().max() < 0.05 and p.unique().numel() <= 512
    assert oracle.basis.unique().numel() <= 16 * -(-4 * 16 // 256)


# MicroAdam


def test_microadam_that_keeps_everything_is_adam():
    """Density 1 and a window as long as the run, with gradients that bf16 holds: nothing is lost, so it is Adam."""
    n, steps = 200, 6
    oracle = MicroAdam(n, window=steps, density=1.0, block=64, lr=0.01, weight_decay=0.1)
    p, q = tensor((n,)), torch.nn.Parameter(tensor((n,)))
    opt = torch.optim.AdamW([q], lr=0.01, weight_decay=0.1)
    for step in range(steps):
        g = tensor((n,), step).bfloat16().double()
        oracle.step(p, g)
        q.grad = g
        opt.step()
        close(p, q.detach(), tensor((n,)))


def test_microadam_forgets_beyond_its_window():
    oracle = MicroAdam(8, window=2, density=1.0, betas=(0.9, 0.99))
    gradients = [tensor((8,), step).bfloat16().double() for step in range(5)]
    for g in gradients:
        u = oracle.update(g)
    m = 0.1 * (gradients[4] + 0.9 * gradients[3]) / (1 - 0.9**5)
    v = 0.01 * (gradients[4] ** 2 + 0.99 * gradients[3] ** 2) / (1 - 0.99**5)
    close(u, m / (v.sqrt() + 1e-8), torch.zeros(8, dtype=torch.float64))


def test_microadam_feeds_the_error_back():
    """What leaves through the window and what stays in the codes is all that came in, up to half a code per step."""
    n, total = 300, torch.zeros(300, dtype=torch.float64)
    oracle, sent = MicroAdam(n, window=30, density=0.05, block=128, error_block=64), torch.zeros(n, dtype=torch.float64)
    for step in range(20):
        g = tensor((n,), step)
        total += g
        oracle.update(g)
        row = oracle.rows[step]
        assert len(row) == 7 + 7 + 3
        for i, value in row:
            sent[i] += value
    units = torch.tensor([(high - low) / 15 for low, high in oracle.bounds])
    assert (total - sent - oracle.error).abs().max() <= 20 * 0.75 * units.max()
    assert (total - sent).abs().max() > 2 * (total - sent - oracle.error).abs().max()
