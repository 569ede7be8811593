"""int8 weights stepped by the engine: Q-GaLore against its transcription, rules and projections, memory, resuming."""

from __future__ import annotations

import gc
import io

import pytest
import torch
from configs import BACKENDS, assert_same_bits, backend_argument, set_grads
from oracles.compare import gradient
from oracles.qgalore import QGaLore as Transcription
from oracles.qgalore import affine_dequantize, affine_quantize
from projections import BETAS, EPS, LR, basis_of

import fusedopt
from fusedopt.precision import philox16
from fusedopt.weights import Int8Weight

ADAM = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.0}
PROJECTIONS = (
    None,
    fusedopt.GaLore(4, 3),
    fusedopt.QGaLore(4, 3),
    fusedopt.DCT(4),
    fusedopt.Frugal(0.3, 3),
    fusedopt.Apollo(4, 3),
)
each_projection = pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: "none" if p is None else p.name)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def weight(rows: int = 64, cols: int = 48, dtype=torch.float32) -> torch.nn.Parameter:
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    return torch.nn.Parameter(Int8Weight.from_float(values.to(dtype)))


def uniform(step: int, n: int) -> torch.Tensor:
    """The numbers of [0, 1) that a step rounds with."""
    return philox16(0, step, 0, n).double() / 65536


@each_backend
@pytest.mark.parametrize("shape", ((64, 48), (48, 64)), ids=str)
def test_qgalore_with_int8_weights(shape, backend):
    """The whole method, with the engine's bases. A code may tip where fp32 and fp64 disagree about a random number."""
    p = weight(*shape)
    opt = fusedopt.AdamW([p], projection=fusedopt.QGaLore(4, 3, 0.5), backend=backend_argument(backend), **ADAM)
    mine = p.detach().dequantize().double()
    oracle = Transcription(4, 3, 0.5, LR, BETAS, EPS, 0.0, projector_bits=None, weight_bits=8)
    for step in range(1, 8):
        g = gradient(mine, step).float()
        p.grad = g.clone()
        opt.step()
        before = mine.clone()
        given = {"basis": basis_of(opt)} if step in (1, 4, 7) else {}
        oracle.step(mine, g.double(), uniform(step, mine.numel()).view(shape), **given)
        stored = p.detach().dequantize().double()
        codes = (stored - mine).abs() / (mine.abs().max() / 127)
        assert (codes > 0.1).float().mean() < 0.002 and codes.max() < 3, step
        assert (stored - before).abs().max() > 0
        mine.copy_(stored)  # the next step from the same codes


@each_projection
@each_backend
def test_every_projection_steps_int8_weights(projection, backend):
    """As the decoded weight would be stepped, and then rounded."""
    p = weight()
    wide = torch.nn.Parameter(p.detach().dequantize())
    options = {**ADAM, "weight_decay": 0.1, "state_format": "int8", "min_quantized_numel": 16}
    opt = fusedopt.AdamW([p], projection=projection, backend=backend_argument(backend), **options)
    other = fusedopt.AdamW([wide], projection=projection, backend=backend_argument(backend), **options)
    for step in range(4):
        set_grads([wide], step)
        p.grad = wide.grad.clone()
        opt.step()
        other.step()
        expected = affine_quantize(wide.detach().view(-1), 8, 256, uniform(step + 1, wide.numel()), with_zero=True)
        want = affine_dequantize(*expected, 256).view(wide.shape)
        unit = want.abs().max() / 127
        assert ((p.detach().dequantize() - want).abs() > 0.1 * unit).float().mean() < 0.002, step
        with torch.no_grad():
            wide.copy_(p.detach().dequantize())


@pytest.mark.parametrize("cls", ("lion", "sgd"))
def test_other_rules(cls):
    p = weight()
    opt = fusedopt.create(cls, [p], lr=0.5)
    before = p.detach().dequantize()
    p.grad = torch.ones(64, 48)
    opt.step()
    assert (p.detach().dequantize() - (before - 0.5)).abs().max() < 0.05


def test_clipping_and_skipped_steps():
    p = weight()
    opt = fusedopt.AdamW([p], clip_grad_norm=1.0, amp_fused=True, **ADAM)
    p.grad = torch.full((64, 48), 2.0)
    codes = p.codes.clone()
    opt.grad_scale, opt.found_inf = torch.tensor([2.0]), torch.tensor([1.0])
    opt.step()
    assert torch.equal(p.codes, codes)
    opt.found_inf = torch.tensor([0.0])
    opt.step()
    assert not torch.equal(p.codes, codes)
    assert float(opt.grad_norm) == pytest.approx((64 * 48) ** 0.5)


def test_resuming_keeps_every_bit():
    def run(p, opt, first, last):
        for step in range(first, last):
            p.grad = torch.randn(64, 48, generator=torch.Generator().manual_seed(step))
            opt.step()

    def make(p):
        return fusedopt.create("qgalore_adamw8bit", [p], rank=4, update_every=3, min_quantized_numel=16, **ADAM)

    whole, halved = weight(), weight()
    opt = make(whole)
    run(whole, opt, 0, 9)
    first = make(halved)
    run(halved, first, 0, 5)
    file = io.BytesIO()
    torch.save((first.state_dict(), {"w": halved.detach()}), file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    resumed = torch.nn.Parameter(weights["w"])
    second = make(resumed)
    second.load_state_dict(state)
    run(resumed, second, 5, 9)
    assert_same_bits([resumed.codes, resumed.scale, resumed.zero], [whole.codes, whole.scale, whole.zero])


def float_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [t for t in gc.get_objects() if type(t) is torch.Tensor and t.is_floating_point() and t.device.type == "cpu"]


def test_no_float_copy_of_a_weight_is_alive_between_steps():
    before = float_tensors()  # of other tests; held, so that none of them makes room for a new one under its id
    known = {id(t) for t in before}
    model = torch.nn.Sequential(torch.nn.Linear(512, 768), torch.nn.ReLU(), torch.nn.Linear(768, 512))
    fusedopt.quantize_weights_(model)
    opt = fusedopt.create("qgalore_adamw8bit", model, rank=16, lr=1e-3)
    for _ in range(3):
        model(torch.randn(8, 512)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    new = [t for t in float_tensors() if id(t) not in known]
    assert new and max(t.untyped_storage().nbytes() for t in new) < 512 * 768 * 2


def test_refusals():
    p = weight()
    p.grad = torch.ones(64, 48)
    with pytest.raises(RuntimeError, match="parameter 0 .* is an int8 weight, which Frugal cannot step"):
        fusedopt.AdamW([p], projection=fusedopt.Frugal(method="columns")).step()
    with pytest.raises(RuntimeError, match="is an int8 weight, and LAMB needs sums over its values"):
        fusedopt.LAMB([p]).step()
    with pytest.raises(RuntimeError, match="param_precision 'kahan' keeps a companion"):
        fusedopt.AdamW([p], param_precision="kahan").step()
    with pytest.raises(RuntimeError, match="is an int8 weight, which Factored cannot step"):
        fusedopt.Adafactor([p]).step()


def test_training_with_int8_weights():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.Tanh(), torch.nn.Linear(128, 8))
    x = torch.randn(256, 32)
    y = torch.tanh(x @ torch.randn(32, 8))
    fusedopt.quantize_weights_(model)
    opt = fusedopt.create("qgalore_adamw8bit", model, rank=8, update_every=20, scale=1.0, lr=1e-2)
    losses = []
    for _ in range(120):
        loss = (model(x) - y).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.35 * losses[0]
