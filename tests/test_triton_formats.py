"""Triton codecs, rounding and public quantisation kernels, interpreted, against fusedopt.formats and fusedopt.precision."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from harness import code_numbers, guarded, guards_untouched  # noqa: E402

from fusedopt.backends.triton import TritonBackend, interpreted  # noqa: E402
from fusedopt.formats import get_format, list_formats  # noqa: E402
from fusedopt.kernels.driver import TILE, TILE_ROWS  # noqa: E402
from fusedopt.kernels.precision import load_param, store_param  # noqa: E402
from fusedopt.kernels.states import store_state  # noqa: E402
from fusedopt.precision import get_precision, list_precisions, philox16, round_stochastic  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INF, NAN = float("inf"), float("nan")
CODED = [name for name in list_formats() if get_format(name).block]
BACKEND = TritonBackend()
SEED, STEP, TENSOR = 0x1234567890ABCDEF, 7, (1 << 31) - 5
pytestmark = [
    pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 when Triton is imported"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # numpy on NaN
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]


@triton.jit
def store_kernel(x, p, c, scale, back, numel, seed, step, tensor, PRECISION: tl.constexpr, FORMAT: tl.constexpr):
    """Stores x as a parameter (and loads it into `back`), or as state 2 if FORMAT is not negative."""
    tile = tl.program_id(0).to(tl.int64)
    first = tile * TILE
    left = numel - first
    local = tl.arange(0, TILE_ROWS)[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = local < left
    whole = left >= TILE
    value = tl.load(x + first + local, mask=inside, other=0.0)
    key = tl.load(seed).to(tl.uint64, bitcast=True)
    if FORMAT >= 0:
        store_state(value, p, scale, tile, local, inside, whole, left, key, step, tensor, 0, 3, FORMAT, True)
    else:
        companion = c + first if PRECISION > 1 else c
        store_param(value, p + first, companion, tile, local, inside, whole, key, step, tensor, 0, PRECISION, True)
        loaded = load_param(p + first, companion, local, inside, whole, PRECISION, True)
        tl.store(back + first + local, loaded, mask=inside)


def store(x, dtype, precision: int = 0, companion=None, form: int = -1):
    """(stored, loaded again)."""
    p, back = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    grid = (-(-x.numel() // TILE.value),)
    store_kernel[grid](x, p, companion, x, back, x.numel(), torch.tensor([SEED]), STEP, TENSOR, precision, form)
    return p, back


def wide_numbers(numel: int = 2 * TILE.value + 100) -> torch.Tensor:
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(numel, generator=gen) * 10.0 ** torch.randint(-9, 6, (numel,), generator=gen)
    special = [INF, -INF, NAN, -NAN, 0.0, -0.0, 65519.0, 3.4e38, 1e-40, 2.0**-133, 1.00390625, 1.01171875]
    x[: len(special)] = torch.tensor(special)
    return x


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.equal(got.isnan(), want.isnan())
    kept = ~want.isnan()
    as_int = {1: torch.int8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    assert torch.equal(got[kept].view(as_int), want[kept].view(as_int))


@pytest.mark.parametrize("name", list_precisions())
@pytest.mark.parametrize("dtype", (BF16, F16))
def test_parameter_bits(name, dtype):
    """Any fp32 weight is stored in the bits of ParamPrecision.store, and loaded as ParamPrecision.load has it."""
    precision, x = get_precision(name), wide_numbers()
    if dtype not in precision.dtypes:
        pytest.skip(f"{name} keeps no {dtype}")
    companion = torch.empty_like(x, dtype=precision.companion_dtype(dtype)) if precision.companion else None
    p, back = store(x, dtype, precision.id, companion)
    want, kept = precision.store(x, dtype, philox16(SEED, STEP, TENSOR, x.numel()))
    assert_same_bits(p, want)
    if kept is not None:
        assert_same_bits(companion, kept)
    assert_same_bits(back, precision.load(want, kept, F32))


def test_state_bits():
    """bf16_stochastic draws from the state's own stream."""
    x = wide_numbers()
    got, _ = store(x, BF16, form=get_format("bf16_stochastic").code(True))
    assert_same_bits(got, round_stochastic(x, BF16, philox16(SEED, STEP, TENSOR, x.numel(), stream=3)))


def both(x: torch.Tensor, name: str, signed: bool):
    """(codes, scales) of the Triton kernel, inside guards, and of the reference."""
    form = get_format(name)
    codes = guarded(torch.zeros(form.stored_count(x.numel()), dtype=torch.uint8))
    scale = guarded(torch.zeros(form.scale_count(x.numel())))
    BACKEND.quantize(x, form, signed, codes, scale)
    assert guards_untouched(codes) and guards_untouched(scale)
    return form, codes, scale, *form.encode(x, signed)


def assert_codes(form, signed, got, want, ties: float = 1e-3) -> None:
    difference = (code_numbers(form, signed, got) - code_numbers(form, signed, want)).abs()
    assert difference.max() <= 1 and (difference > 0).sum() <= max(1, ties * got.numel())


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("signed", (True, False))
def test_every_code_survives_a_round_trip(name, signed):
    form = get_format(name)
    codes = torch.arange(256, dtype=torch.uint8)
    unused = {("int8c", True): [128], ("fp8", True): [127, 128, 255]}.get((name, signed), [])  # -128 / 126, NaN, -0
    codes[unused] = form.zero_code(signed)
    numel = 256 * 8 // form.bits
    scale = torch.full((form.scale_count(numel),), 3.0)
    values = torch.empty(numel)
    BACKEND.dequantize(codes, scale, form, signed, values)
    want = form.decode(codes, scale, signed, torch.float64, numel)
    torch.testing.assert_close(values.double(), want, rtol=1e-6, atol=0)
    values.view(-1, form.block)[:, 0] = 3.0  # every block holds its scale
    back, largest = torch.empty_like(codes), torch.empty_like(scale)
    BACKEND.quantize(values, form, signed, back, largest)
    torch.testing.assert_close(largest, scale, rtol=1e-6, atol=0)
    kept = torch.arange(256) % (form.block * form.bits // 8) > 0
    assert torch.equal(back[kept], codes[kept])


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("signed", (True, False))
@pytest.mark.parametrize("dtype", (F32, BF16, F16))
def test_quantize_matches_reference(name, signed, dtype):
    """Blocks of numbers of all sizes, with a tail; decoding, too."""
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(5001, generator=gen) * 10.0 ** (-8 * torch.rand(5001, generator=gen))
    x[1024:1280] *= 1e-30  # a gradient of 1e-15 squared
    x = x if signed else x.square()
    x[1300], x[1600:1792] = 3e38 if dtype != F16 else 6e4, 1e-39  # more than a scale can be; what counts as zero
    x = x.to(dtype)
    form, codes, scale, want, largest = both(x, name, signed)
    assert torch.equal(scale, largest)
    assert_codes(form, signed, codes, want)
    if not signed:
        decoded = form.decode(codes, scale, signed, torch.float64, x.numel())
        assert (decoded > 0)[x.float() >= 2.0**-126].all(), "a second moment became zero"
    out = guarded(torch.zeros(x.numel(), dtype=dtype))
    BACKEND.dequantize(codes, scale, form, signed, out)
    assert guards_untouched(out)
    exact = form.decode(codes, scale, signed, torch.float64, x.numel())
    info = torch.finfo(dtype)
    torch.testing.assert_close(out.double(), exact, rtol=max(1e-6, 0.51 * info.eps), atol=0.51 * info.tiny * info.eps)


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("numel", (1, 2, 127, 129, 255, 257, 2049))
@pytest.mark.parametrize("offset", (0, 3))
def test_quantize_tails_and_unaligned_tensors(name, numel, offset):
    x = guarded(torch.randn(numel, generator=torch.Generator().manual_seed(numel)), offset)
    form, codes, scale, want, largest = both(x, name, True)
    assert torch.equal(scale, largest)
    assert_codes(form, True, codes, want)


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("signed", (True, False))
def test_non_finite_values_spoil_themselves_only(name, signed):
    """In a block with other values, in one of zeros, in one without anything finite; the sign is kept."""
    x = torch.rand(5 * 256, generator=torch.Generator().manual_seed(2)) * (2 * signed * (torch.arange(1280) % 2) - 1)
    x = x if signed else x.abs()
    clean = x.clone()
    places = [3, 9, 11, 200, 300]
    x[places] = torch.tensor([NAN, -NAN, INF, -INF, NAN])
    x[512:1024] = 0.0
    x[[600, 601, 602]] = torch.tensor([NAN, INF, -INF])
    x[768:1024] = -INF
    form, codes, scale, want, largest = both(x, name, signed)
    assert torch.equal(scale, largest) and (scale[512 // form.block : 1024 // form.block] == 0).all()
    assert_codes(form, signed, codes, want)
    zero = torch.full_like(codes, form.zero_code(signed))
    dead = slice(512 * form.bits // 8, 1024 * form.bits // 8)
    assert torch.equal(codes[dead], zero[dead]), "scale 0 means zero codes"
    values = form.decode(codes, scale, signed, F32, x.numel())
    full = scale.repeat_interleave(form.block)[places]
    share = values[places] / full
    assert (share.abs() > 0.88).all()
    if signed:
        assert torch.equal(share < 0, torch.tensor([False, True, False, True, False]))
    others = torch.ones(512, dtype=torch.bool)
    others[places] = False
    relative, absolute = form.error_bound(signed)
    bound = relative * clean.abs() + absolute * scale.repeat_interleave(form.block) + 1e-6
    assert ((values - clean).abs() <= bound)[:512][others].all()


@pytest.mark.parametrize("name", CODED)
def test_quantize_of_nothing(name):
    empty = torch.empty(0)
    BACKEND.quantize(empty, get_format(name), True, empty.to(torch.uint8), empty)
    BACKEND.dequantize(empty.to(torch.uint8), empty, get_format(name), True, empty)
