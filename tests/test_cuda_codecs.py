"""The quantise and dequantise kernels of the CUDA sources, run on the CPU (tests/simt), against the encoders of formats.py."""

import pytest
import torch
from harness import assert_bitwise, code_numbers, guarded, guards_untouched
from simt import build as simt

from fusedopt.backends.cuda import CudaBackend
from fusedopt.formats import get_format, list_formats

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CODED = [name for name in list_formats() if get_format(name).block]
NUMELS = (1, 7, 128, 255, 256, 257, 8192, 9001)

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="needs g++ or clang++ for the CUDA shim")
each_code = pytest.mark.parametrize("form", [get_format(name) for name in CODED], ids=CODED)
each_sign = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@pytest.fixture(scope="module")
def cuda():
    backend = CudaBackend(simt.library(), on_cpu=True)
    assert backend.reason() is None
    return backend


def wide(numel: int, signed: bool, dtype=F32) -> torch.Tensor:
    """Eight decades; in larger tensors zeros, a block of zeros, a tiny and a huge block, NaN and infinities of both signs."""
    gen = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=gen) * 10.0 ** (torch.rand(numel, generator=gen) * 8 - 7)
    if numel > 100:
        x[::17] = 0.0
    if numel > 8000:
        x[256:512] = 0.0
        x[512:768] *= 1e-30
        x[1024:1280] *= 1e30
        x[1300] = 3e38
        x[1536:1792] = 0.0
        nan = torch.tensor([float("nan"), -float("nan")])
        for first in (300, 700, 800, 1600):  # in a block of zeros, a tiny one, an ordinary one, again among zeros
            x[first : first + 2], x[first + 2], x[first + 3] = nan, float("inf"), -float("inf")
    return (x if signed else x.abs()).to(dtype)


def quantized(cuda, x, form, signed, offset=0):
    codes = guarded(torch.empty(form.stored_count(x.numel()), dtype=torch.uint8), offset)
    scale = guarded(torch.empty(form.scale_count(x.numel())), 1)
    cuda.quantize(x, form, signed, codes, scale)
    assert guards_untouched(codes) and guards_untouched(scale)
    return codes, scale


@each_code
@each_sign
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_quantize(cuda, form, signed, dtype):
    for numel in NUMELS:
        x = wide(numel, signed, dtype)
        want, want_scale = form.encode(x, signed)
        for offset in (0, 1):
            codes, scale = quantized(cuda, guarded(x, offset), form, signed, offset)
            assert torch.equal(scale, want_scale)
            difference = (code_numbers(form, signed, codes) - code_numbers(form, signed, want)).abs()
            assert difference.max() <= 1  # at a tie between two values; bf16 values are few and meet more of them
            assert (difference > 0).sum() <= max(1, numel * (1e-3 if dtype == F32 else 2e-2))


@each_code
@each_sign
def test_special_values(cuda, form, signed):
    """Signs, zeros, non-finite values and the largest value have the codes of the reference exactly."""
    x = wide(9001, signed)
    want, _ = form.encode(x, signed)
    codes, _ = quantized(cuda, x, form, signed)
    got, want = (code_numbers(form, signed, c)[:9001] for c in (codes, want))
    special = ~x.isfinite() | (x == 0)
    if not signed and form.bits == 8:
        # Whatever is not zero has a code that is not, even where it underflows beside 3e38; int8 may keep subnormals.
        normal = ~(x.abs() < torch.finfo(F32).tiny) | (x == 0)
        assert torch.equal((got > 0)[normal], (want > 0)[normal])
    for first in range(0, 9001, form.block):
        part = x[first : first + form.block].abs()
        special[first + int(torch.where(part.isfinite(), part, -torch.ones_like(part)).argmax())] = True
    assert torch.equal(got[special], want[special])


@each_sign
def test_int8_turns_at_every_boundary(cuda, signed):
    """On both sides of the middle between any two values, and along eight decades, each value takes the nearest code."""
    form = get_format("int8")
    codes = torch.arange(256, dtype=torch.uint8)
    values = form.decode(codes, torch.ones(1), signed, torch.float64, 256).sort().values
    middles = (values[1:] + values[:-1]) / 2
    middles = middles if signed else middles[1:]  # nothing but 0 becomes 0
    tried = torch.cat(
        [middles * (1 - 3e-5), middles * (1 + 3e-5), torch.logspace(-6.5 if signed else -12, -1e-9, 5000)]
    )
    tried = torch.cat([tried, -tried[-5000:]]) if signed else tried
    x = torch.ones(-(-len(tried) // 255), 256)
    padded = torch.ones(x.shape[0] * 255)
    padded[: len(tried)] = tried.float()
    x[:, 1:] = padded.view(-1, 255)
    want = torch.bucketize(x.double(), middles) + (0 if signed else 1)
    near = ((x.double()[..., None] - middles).abs() <= 1e-5 * x.double().abs()[..., None]).any(-1)
    got = quantized(cuda, x.flatten(), form, signed)[0].view_as(x).long()
    assert torch.equal(got[~near], want[~near]) and near.sum() < 40


@each_code
@each_sign
def test_the_unused_half_of_an_odd_tail(cuda, form, signed):
    if form.bits != 4:
        assert form.stored_count(9001) == 9001
        return
    x = wide(9001, signed)
    codes, _ = quantized(cuda, x, form, signed)
    assert int(codes[-1]) & 15 == int(form.encode(torch.zeros(1), signed)[0][0]) & 15


@each_code
@each_sign
def test_dequantize_every_code(cuda, form, signed):
    values = torch.arange(256)
    if form.name == "fp8" and signed:
        values[[127, 255]] = 0  # e4m3's NaN, which is never stored
    codes = values.repeat(36)[: form.stored_count(9001)].to(torch.uint8)
    scale = 10.0 ** torch.linspace(-36, 36, form.scale_count(9001))
    scale[3] = 0.0
    want = form.decode(codes, scale, signed, torch.float64, 9001)
    for dtype in (F32, BF16, F16):
        for offset in (0, 1):
            out = guarded(torch.empty(9001, dtype=dtype), offset)
            cuda.dequantize(guarded(codes, offset), scale, form, signed, out)
            assert guards_untouched(out)
            if dtype == F32:
                torch.testing.assert_close(out.double(), want, rtol=5e-7, atol=1e-44)
            else:
                exact = want.float().to(dtype)
                torch.testing.assert_close(out, exact, rtol=2 * torch.finfo(dtype).eps, atol=6e-8)
                assert (out != exact).sum() <= 9


@each_code
@each_sign
def test_sizes_of_dequantize(cuda, form, signed):
    for numel in NUMELS:
        x = wide(numel, signed)
        codes, scale = form.encode(x, signed)
        for offset in (0, 1):
            out = guarded(torch.empty(numel), offset)
            cuda.dequantize(guarded(codes, offset), scale, form, signed, out)
            assert guards_untouched(out)
            torch.testing.assert_close(
                out.double(), form.decode(codes, scale, signed, torch.float64, numel), rtol=5e-7, atol=1e-44
            )


@each_code
def test_aligned_and_misaligned_give_the_same_bits(cuda, form):
    x = wide(9001, True)
    assert_bitwise(quantized(cuda, x, form, True), quantized(cuda, guarded(x, 1), form, True, 1))


def test_what_the_kernels_refuse(cuda):
    x, empty = torch.ones(8), torch.empty(0)
    with pytest.raises(RuntimeError, match="blockwise"):
        cuda.quantize(x, get_format("bf16"), True, torch.empty(8, dtype=torch.bfloat16), empty)
    with pytest.raises(RuntimeError, match="blockwise"):
        cuda.dequantize(x, empty, get_format("fp32"), True, x)
    cuda.quantize(empty, get_format("int8"), True, empty.byte(), empty)  # nothing to do
