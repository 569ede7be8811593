"""The affine group quantiser of projectors against its formula in plain loops, packing, error bound, rounding on average."""

import pytest
import torch

from fusedopt.backends.base import Int4Matrix
from fusedopt.precision import philox16
from fusedopt.projections.int4 import dequantize_affine, quantize_affine
from fusedopt.projections.subspace import random_basis


def matrix(rows, cols, dtype=torch.float32, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loops(x, bits, group, random16=None):
    """(codes, scales, zeros) by the definition, in fp32 scalars, a group at a time."""
    flat, top = x.float().flatten(), 2**bits - 1
    codes, scales, zeros = [], [], []
    for start in range(0, len(flat), group):
        part = flat[start : start + group]
        scale = max(part.max() - part.min(), torch.tensor(1e-5)) / top
        zero = min(max(-round((part.min() / scale).item()), 0), top)
        for i, value in enumerate(part):
            ratio = (value / scale).item()
            if random16 is None:
                whole = round(ratio)
            else:
                whole = ratio // 1
                whole += (ratio - whole) * 65536 > random16[start + i].item()
            codes.append(int(min(max(whole + zero, 0), top)))
        scales.append(scale.item())
        zeros.append(zero)
    return codes, scales, zeros


def unpack(q):
    if not isinstance(q, Int4Matrix):
        return q.codes.tolist()
    both = [half for byte in q.codes.tolist() for half in (byte >> 4, byte & 15)]
    return both[: q.shape[0] * q.shape[1]]


@pytest.mark.parametrize("shape, group", [((8, 64), 256), ((7, 45), 64), ((3, 5), 256), ((1, 1), 2), ((5, 51), 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits, stochastic", [(4, False), (8, False), (4, True), (8, True)])
def test_codes(shape, group, dtype, bits, stochastic):
    x = matrix(*shape, dtype)
    bits16 = philox16(5, 1, 2, x.numel()) if stochastic else None
    q = quantize_affine(x, bits, group, bits16)
    codes, scales, zeros = loops(x, bits, group, bits16)
    assert unpack(q) == codes and q.zero.tolist() == zeros and q.scale.tolist() == scales
    assert q.shape == shape and q.group == group and q.codes.dtype == q.zero.dtype == torch.uint8
    assert len(q.codes) == ((x.numel() + 1) // 2 if bits == 4 else x.numel())
    spread = torch.tensor(scales).repeat_interleave(group)[: x.numel()]
    offset = torch.tensor(codes) - torch.tensor(zeros).repeat_interleave(group)[: x.numel()]
    assert torch.equal(dequantize_affine(q).flatten(), spread * offset)


def test_packing():
    """The even element is in the high half; an odd last half is 0."""
    x = torch.tensor([[-7.0, 0.0, 8.0], [1.0, -3.0, 5.0], [-1.0, 2.0, 3.0]])
    q = quantize_affine(x, group=256)
    assert q.scale.tolist() == [1.0] and q.zero.tolist() == [7]
    assert [f"{b:02x}" for b in q.codes.tolist()] == ["07", "f8", "4c", "69", "a0"]
    assert torch.equal(dequantize_affine(q), x)


@pytest.mark.parametrize("side, shape", [("left", (300, 32)), ("right", (32, 300))])
def test_projector_error(side, shape):
    """Half a unit where nothing saturates; the rounded zero point moves one end by up to half a unit more."""
    P = random_basis((300, 300), 32, side, seed=0, tensor_id=0, step=0)
    q = quantize_affine(P)
    back = dequantize_affine(q)
    unit = q.scale.repeat_interleave(256)[: P.numel()].view(shape)
    error = (back - P).abs() / unit
    assert error.max() < 1.001 and (error > 0.501).float().mean() < 0.01
    assert error.square().mean() < 1 / 12 * 1.1
    assert dequantize_affine(q, torch.bfloat16).dtype == torch.bfloat16


def test_groups_of_one_sign_lose_their_offset():
    """The clamped zero point of the official quantiser: known, and why only bases and weights are kept so."""
    x = 5 + 0.1 * matrix(1, 256).abs()
    q = quantize_affine(x)
    assert q.zero.item() == 0 and dequantize_affine(q).max() <= 15 * q.scale.item() < 1
    below = quantize_affine(-x)
    assert below.zero.item() == 15 and dequantize_affine(below).min() >= -15 * below.scale.item()


def test_constant_and_zero_groups():
    assert torch.equal(dequantize_affine(quantize_affine(torch.zeros(4, 64))), torch.zeros(4, 64))
    assert quantize_affine(torch.zeros(4, 64)).scale.tolist() == [pytest.approx(1e-5 / 15)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_poisons_its_group(bits, bad):
    x = matrix(4, 128)
    x[1, 3] = bad
    y = dequantize_affine(quantize_affine(x, bits))
    assert not y[:2].isfinite().any() and y[2:].isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
def test_stochastic_rounding_is_right_on_average(bits):
    x = matrix(2, 128)
    x[0, 0], x[0, 1] = -4.0, 4.0
    draws = 1500
    mean = sum(
        dequantize_affine(quantize_affine(x, bits, random16=philox16(0, step, 1, x.numel()))) for step in range(draws)
    )
    unit = quantize_affine(x, bits).scale.item()
    error = (mean / draws - x).abs() / unit
    inside = (x < 4 - unit) & (x > -4 + unit)
    assert error[inside].max() < 6 * 0.5 / draws**0.5
    assert (dequantize_affine(quantize_affine(x, bits)) - x).abs().max() / unit > 0.4


def test_errors():
    with pytest.raises(ValueError, match="bits"):
        quantize_affine(matrix(2, 2), bits=3)
    with pytest.raises(TypeError, match="matrix"):
        quantize_affine(torch.zeros(4))
    with pytest.raises(ValueError, match="group"):
        quantize_affine(matrix(2, 2), group=3)
    with pytest.raises(ValueError, match="random"):
        quantize_affine(matrix(2, 2), random16=philox16(0, 0, 0, 3))
