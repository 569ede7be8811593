"""A mixed model (fp32 norms, bf16 matrices, fp32 states of an embedding, a transposed view) on every backend; exact resuming."""

from __future__ import annotations

import io

import pytest
import torch
from simt import build as simt

import fusedopt
from fusedopt.backends import select
from fusedopt.backends.cuda import CudaBackend
from fusedopt.formats import list_formats
from fusedopt.precision import list_precisions

BACKENDS = ("reference", "cpu", "triton", "cuda")
OPTIMIZERS = ("adamw8bit", "lion8bit", "lamb8bit")


def parameters() -> list[torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(3)

    def make(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=gen).mul(0.1).to(dtype)

    norm, matrix = make(48), make(96, 48, dtype=torch.bfloat16)
    embedding, transposed = make(90, 48), make(48, 96, dtype=torch.bfloat16).t()
    params = [torch.nn.Parameter(t) for t in (norm, matrix, embedding, transposed)]
    fusedopt.override(params[2], state_format="fp32")
    return params


def dense(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """The same values in the plainest layout: no strides to get wrong."""
    plain = [torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
    fusedopt.override(plain[2], state_format="fp32")
    return plain


def run(name: str, backend: str, steps: int, plain: bool = False) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    params = dense(parameters()) if plain else parameters()
    opt = fusedopt.create(name, params, lr=1e-2, backend=backend, clip_grad_norm=1.0)
    train(opt, params, 0, steps)
    return [p.detach() for p in params], opt


def train(opt, params: list[torch.nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        gen = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
        opt.step()


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    """The name of a backend; "cuda" is the CUDA sources run by the shim."""
    if request.param == "cuda":
        shim = CudaBackend(simt.library(), on_cpu=True)
        original = select.get_backend
        monkeypatch.setattr(select, "get_backend", lambda asked: shim if asked == "cuda" else original(asked))
    elif why := select.get_backend(request.param).reason():
        pytest.skip(why)
    return request.param


@pytest.mark.parametrize("form", list_formats())
@pytest.mark.parametrize("precision", list_precisions())
def test_resume_is_bit_exact(form, precision, backend):
    """2 steps, a saved and loaded state dict, 2 more: the bits of an uninterrupted run, on every backend."""

    def build(params):
        options = {"state_format": form, "param_precision": precision, "backend": backend, "min_quantized_numel": 0}
        return fusedopt.AdamW(params, lr=1e-2, **options)

    values = torch.randn(300, generator=torch.Generator().manual_seed(0)).bfloat16()
    straight, first = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
    one, two = build([straight]), build([first])
    train(one, [straight], 0, 4)
    train(two, [first], 0, 2)
    file = io.BytesIO()
    torch.save({"p": first.detach(), "opt": two.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = torch.nn.Parameter(saved["p"])
    three = build([resumed])
    three.load_state_dict(saved["opt"])
    train(three, [resumed], 2, 4)
    assert torch.equal(resumed.view(torch.int16), straight.view(torch.int16))
    for key, value in one.state[straight].items():
        assert torch.equal(three.state[resumed][key].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_mixed_model(name, backend):
    # From zero states the first update does not depend on how states are stored, so contiguous copies are an oracle that
    # shares neither strides nor blocks with what is tested.
    want, _ = run(name, "reference", 1, plain=True)
    got, opt = run(name, backend, 1)
    assert {b["backend"] for b in opt.plan().buckets} == {backend}
    kinds = [opt.state[p]["exp_avg"].dtype for group in opt.param_groups for p in group["params"]]
    assert kinds == [torch.float32, torch.uint8, torch.float32, torch.uint8]
    assert [p.is_contiguous() for p in got] == [True, True, True, False]
    for a, b in zip(got, want, strict=True):
        difference = (a.double() - b.double()).abs()
        if a.dtype == torch.float32:
            assert difference.max() <= 1e-6
        else:  # the neighbouring bf16 value, where a sum of fp32 numbers crossed a tie
            assert difference.max() <= 2**-8 * b.double().abs().max() and (difference > 0).double().mean() <= 0.01
    # Later steps read codes; the few that rounded the other way move their own elements by a share of lr, and no others.
    for a, b in zip(run(name, backend, 3)[0], run(name, "reference", 3)[0], strict=True):
        difference = (a.double() - b.double()).abs()
        assert difference.max() <= 1e-2 and (difference > 1e-5).double().mean() <= 0.01
