"""MicroAdam as an optimizer: against its transcription in fp64, and what the engine adds: backends, precisions, resuming."""

from __future__ import annotations

import io

import pytest
import torch
from configs import BACKENDS, assert_same_bits, backend_argument, parameters, tensors, train
from oracles.compare import gradient
from oracles.microadam import MicroAdam as Transcription

import fusedopt

OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "block": 2048, "error_block": 512, "density": 0.05}


@pytest.mark.parametrize("shape", ((70, 45), (100,), (3000, 31), (1,)), ids=str)
def test_the_papers_algorithm(shape):
    p = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    mine, start = p.detach().clone(), p.detach().clone()
    opt = fusedopt.MicroAdam([p], **OPTIONS)
    oracle = Transcription(p.numel(), **OPTIONS)
    for step in range(1, 14):
        g = gradient(mine, step)
        p.grad = g.clone()
        opt.step()
        oracle.step(mine, g)
    assert (p.detach() - mine).abs().max() <= 1e-9 * (mine - start).abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", ({}, {"clip_grad_norm": 0.5}, {"maximize": True}, {"capturable": True}), ids=str)
def test_backends_agree(backend, options):
    """State and direction are torch's on each; what differs is the rounding of p."""
    params, others = parameters((400, 93), (33,)), parameters((400, 93), (33,))
    opt = fusedopt.MicroAdam(params, **OPTIONS, backend=backend_argument(backend), **options)
    reference = fusedopt.MicroAdam(others, **OPTIONS, backend="reference", **options)
    for o, ps in ((opt, params), (reference, others)):
        train(o, ps, 0, 12)
    for p, q in zip(params, others, strict=True):
        assert (p - q).abs().max() < 1e-6
        assert torch.equal(opt.state[p]["error_codes"], reference.state[q]["error_codes"])


@pytest.mark.parametrize("precision", ("nearest", "stochastic", "split24", "master"))
def test_bf16_parameters_and_resuming(precision):
    def run(steps, opt=None, params=None, first=0):
        params = params or parameters((70, 45), (33,), dtype=torch.bfloat16)
        opt = opt or fusedopt.MicroAdam(params, **OPTIONS, param_precision=precision)
        train(opt, params, first, steps)
        return params, opt

    whole, opt = run(9)
    params, half = run(5)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    second = fusedopt.MicroAdam(params, **OPTIONS, param_precision=precision)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(9, second, params, 5)
    assert_same_bits(tensors(second, params), tensors(opt, whole))


def test_state_is_nine_tenths_of_a_byte():
    p = torch.nn.Parameter(torch.randn(1 << 20))
    opt = fusedopt.MicroAdam([p])
    p.grad = torch.randn_like(p)
    opt.step()
    assert fusedopt.state_bytes(opt) / p.numel() == pytest.approx(0.9, rel=0.01)


@pytest.mark.parametrize(
    "options,message",
    (
        ({"density": 0.0}, "density is 0.0"),
        ({"block": 65536}, "block is 65536; indices of 16 bits"),
        ({"window": 0}, "window is 0"),
        ({"projection": fusedopt.GaLore(4)}, "its gradients are sparse already"),
    ),
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        fusedopt.MicroAdam(parameters((8, 8)), **options)
