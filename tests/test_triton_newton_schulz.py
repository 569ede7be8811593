"""Triton kernels of Newton-Schulz iterations, interpreted on the CPU: symmetric products, the iteration, a step of Muon."""

from __future__ import annotations

import pytest
import torch
from configs import parameters, set_grads

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from harness import guarded, guards_untouched  # noqa: E402

import fusedopt  # noqa: E402
from fusedopt.backends import triton_newton_schulz  # noqa: E402
from fusedopt.backends.triton import TritonBackend, interpreted  # noqa: E402
from fusedopt.kernels.newton_schulz import triangular  # noqa: E402
from fusedopt.newton_schulz import QUINTIC, orthogonalize, schedule  # noqa: E402

BACKEND = TritonBackend()
pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 when Triton is imported")


def matrices(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@triton.jit
def places_kernel(out, first, N: tl.constexpr):
    index = first + tl.arange(0, N)
    row, col = triangular(index)
    tl.store(out + tl.arange(0, N), row)
    tl.store(out + N + tl.arange(0, N), col)


@pytest.mark.parametrize("first", [0, 4096, 1 << 20, 8000 * 8001 // 2 - 2048, (1 << 25) - 4096])
def test_triangular_places(first):
    """Every tile on or below the diagonal once, also where the root of its number is rounded."""
    out = torch.zeros(2, 4096, dtype=torch.int32)
    places_kernel[(1,)](out, first, N=4096)
    row, col = out.long()
    assert torch.equal(row * (row + 1) // 2 + col, torch.arange(first, first + 4096))
    assert (col >= 0).all() and (col <= row).all()


@pytest.mark.parametrize("shape", [(1, 70, 24), (2, 24, 70), (1, 130, 200), (1, 1, 9)], ids=str)
@pytest.mark.parametrize("added", [False, True])
def test_symmetric_products(shape, added):
    """Equal to the bit on both sides of the diagonal, nothing written beside it, and within bf16's rounding of fp64."""
    x, size = matrices(*shape), min(shape[1:])
    half = matrices(shape[0], size, size, seed=1)
    addend = half + half.mT if added else None
    inner = guarded(torch.zeros(shape[0] * size * size, dtype=torch.bfloat16))
    out = inner.view(shape[0], size, size)
    triton_newton_schulz.symmetric(x, addend, out, 0.5, -2.0)
    assert guards_untouched(inner)
    assert torch.equal(out, out.mT)
    y = x.double() if shape[1] <= shape[2] else x.double().mT
    want = 0.5 * y @ y.mT + (-2.0 * addend.double() if added else 0.0)
    assert (out.double() - want).abs().max() <= 2.0**-8 * want.abs().max()


def test_half_of_the_products():
    """Programs, each a tile of multiplications, against those of a plain product."""
    for size, block in ((4096, 128), (768, 128), (3072, 128)):
        tiles = size // block
        assert triton_newton_schulz.symmetric_programs(size, block) / tiles**2 == (1 + 1 / tiles) / 2
    assert triton_newton_schulz.symmetric_programs(130, 128) == 3


@pytest.mark.parametrize("shape", [(2, 40, 70), (1, 70, 40), (1, 130, 66), (1, 64, 64), (1, 5, 7)], ids=str)
@pytest.mark.parametrize("name", ["quintic", "polar_express"])
def test_iteration(shape, name):
    """Within bf16's error of fp64, and no further from it than torch's products are; singular values near 1."""
    coefficients = schedule(QUINTIC, 5) if name == "quintic" else schedule("polar_express", 5)
    x = matrices(*shape)
    want = orthogonalize(x.double(), coefficients)
    got = orthogonalize(x, coefficients, backend="triton")
    plain = orthogonalize(x, coefficients)
    assert got.dtype == torch.bfloat16 and got.shape == x.shape
    error, other = (float((y.double() - want).norm() / want.norm()) for y in (got, plain))
    assert error < (0.03 if name == "quintic" else 0.06) and error < 1.2 * other
    if shape[1] != shape[2]:
        values = torch.linalg.svdvals(got.float())
        assert float(values.min()) > 0.64 and float(values.max()) < 1.21


def test_what_it_leaves_to_torch():
    x = torch.randn(1, 8, 8)
    assert not BACKEND.newton_schulz(x, schedule(QUINTIC, 5))
    assert not BACKEND.newton_schulz(matrices(1, 8, 8).mT, schedule(QUINTIC, 5))
    assert BACKEND.newton_schulz(matrices(1, 0, 8), schedule(QUINTIC, 5))


def test_muon_steps_with_it(monkeypatch):
    """Two matrices of a shape in one batch, against torch's products; the kernel is what made the step."""
    shapes = ((48, 24), (48, 24), (24, 40))
    one, two = parameters(*shapes), parameters(*shapes)
    start = [p.detach().clone() for p in one]
    seen = []
    whole = triton_newton_schulz.newton_schulz
    monkeypatch.setattr(triton_newton_schulz, "newton_schulz", lambda x, c: seen.append(tuple(x.shape)) or whole(x, c))
    from fusedopt.projections import orthogonal

    monkeypatch.setattr(orthogonal, "CPU_TOGETHER", 1 << 20)
    opt, other = fusedopt.Muon(one, lr=0.02, backend="triton"), fusedopt.Muon(two, lr=0.02, backend="reference")
    for step in range(2):
        for ps, o in ((one, opt), (two, other)):
            set_grads(ps, step)
            o.step()
    assert seen == [(2, 48, 24), (1, 24, 40)] * 2
    for p, q, first in zip(one, two, start, strict=True):
        assert float((p - q).detach().norm() / (q - first).detach().norm()) < 0.02
