"""quantize_blockwise and dequantize_blockwise on every backend: the codes of the formats, layouts, dtypes, errors."""

import pytest
import torch
from configs import BACKENDS

import fusedopt
from fusedopt.formats import get_format, list_formats

CODED = [name for name in list_formats() if get_format(name).block]
each_coded = pytest.mark.parametrize("form", CODED)
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with fusedopt.use_backend(request.param):
        yield request.param


def values(*shape, signed=True, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=gen) * torch.rand(shape, generator=gen) ** 5
    return (x if signed else x.square()).to(dtype)


@each_coded
@SIGNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 100), (3,), (5, 1001), (40000,)])
def test_round_trip(form, signed, dtype, shape):
    """The reference's codes and scales, up to ties, and within the format's error of the input."""
    x = values(*shape, signed=signed, dtype=dtype)
    codes, scale = fusedopt.quantize_blockwise(x, form, signed=signed)
    known = get_format(form)
    want, largest = known.encode(x.float().view(-1), signed)
    assert torch.equal(scale, largest) and codes.dtype == torch.uint8
    assert (codes.view(-1) != want).float().mean() < 0.01
    y = fusedopt.dequantize_blockwise(codes, scale, form, signed=signed, shape=shape)
    relative, absolute = known.error_bound(signed)
    per_element = scale.repeat_interleave(known.block)[: x.numel()].view(shape)
    exact = x.float()
    assert (
        y.shape == x.shape
        and ((y - exact).abs() <= 1.001 * (relative * exact.abs() + absolute * per_element) + 1e-37).all()
    )
    narrow = fusedopt.dequantize_blockwise(codes, scale, form, signed=signed, shape=shape, dtype=dtype)
    torch.testing.assert_close(narrow, y.to(dtype), rtol=1e-6, atol=0)


@each_coded
@SIGNS
def test_the_whole_range(form, signed):
    """Blocks from subnormal to the largest numbers, beside NaN and infinity: the reference's codes and scales."""
    known = get_format(form)
    base = values(known.block, signed=signed)
    scales = [1e-42, 2e-38, 1e-30, 1.0, 1e20, 8e37, 1e38, 3e38 / base.abs().max().item()]
    x = torch.cat([(base.double() * s).float() for s in scales] * 2)
    x[3 :: known.block // 2], x[7 :: known.block] = float("inf"), float("nan")
    codes, scale = fusedopt.quantize_blockwise(x, form, signed=signed)
    want, largest = known.encode(x, signed)
    assert torch.equal(scale, largest)
    per_byte = 8 // known.bits
    different = (codes != want).view(len(scales) * 2, -1).float().mean(1)
    assert different.max() <= 0.02 * per_byte + 1e-6, f"share of codes that differ by block: {different.tolist()}"


@each_coded
def test_fp64_goes_through_the_reference(form, backend):
    x = values(3, 300, dtype=torch.float64)
    with fusedopt.use_backend("reference"):
        codes, scale = fusedopt.quantize_blockwise(x, form)
        narrow = fusedopt.quantize_blockwise(x.float(), form)
        assert (
            fusedopt.dequantize_blockwise(codes, scale, form, dtype=torch.float64, shape=x.shape).dtype == torch.float64
        )
    assert torch.equal(codes, narrow[0]) and torch.equal(scale, narrow[1])
    if backend == "cpu":
        with pytest.raises(RuntimeError, match="float64"):
            fusedopt.quantize_blockwise(x, form)


@each_coded
def test_layouts_and_out(form):
    """A transposed tensor keeps its layout; a view with gaps is copied; `out` is written."""
    x = values(64, 48).t()
    codes, scale = fusedopt.quantize_blockwise(x, form)
    packed = get_format(form).bits < 8
    assert packed or codes.stride() == x.stride()
    y = torch.empty_like(x)
    assert fusedopt.dequantize_blockwise(codes, scale, form, out=y) is y
    torch.testing.assert_close(y, x, rtol=0, atol=float(0.13 * x.abs().max()))
    again = torch.zeros_like(codes), torch.zeros_like(scale)
    out = fusedopt.quantize_blockwise(x, form, out=again)
    assert out[0] is again[0] and torch.equal(again[0], codes) and torch.equal(again[1], scale)
    gapped = values(64, 96)[:, ::2]
    a, b = fusedopt.quantize_blockwise(gapped, form), fusedopt.quantize_blockwise(gapped.contiguous(), form)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    empty = fusedopt.quantize_blockwise(torch.empty(0, 4), form)
    assert empty[0].numel() == 0 and fusedopt.dequantize_blockwise(*empty, form).numel() == 0


@each_coded
@SIGNS
def test_default_shape(form, signed):
    x = values(8, 6, 64, signed=signed)
    assert (
        fusedopt.dequantize_blockwise(*fusedopt.quantize_blockwise(x, form, signed=signed), form, signed=signed).shape
        == x.shape
    )


def test_errors():
    x = values(64, 64)
    codes, scale = fusedopt.quantize_blockwise(x, "int8")
    with pytest.raises(ValueError, match="format 'bf16' has no blocks; formats with blocks are int8, int8c"):
        fusedopt.quantize_blockwise(x, "bf16")
    with pytest.raises(ValueError, match="unknown state_format 'int3'"):
        fusedopt.quantize_blockwise(x, "int3")
    with pytest.raises(TypeError, match="torch.int64"):
        fusedopt.quantize_blockwise(torch.arange(5), "int8")
    with pytest.raises(ValueError, match=r"out codes is torch.float32"):
        fusedopt.quantize_blockwise(x, "int8", out=(x, scale))
    with pytest.raises(ValueError, match=r"4096 elements in int8 are 4096 codes .* and 16 scales, not 4096 .* and 15"):
        fusedopt.dequantize_blockwise(codes, scale[:-1], "int8")
    with pytest.raises(ValueError, match=r"100 elements in int4"):
        fusedopt.dequantize_blockwise(codes, scale, "int4", shape=(10, 10))
