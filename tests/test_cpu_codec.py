"""Codes of the CPU driver: those of the reference, the same bits for every instruction set, dtype path and thread count."""

import pytest
import torch
from harness import assert_bitwise, code_numbers

from fusedopt.backends import cpu
from fusedopt.formats import get_format, list_formats

pytestmark = pytest.mark.skipif(cpu.native is None, reason="the native CPU module is not built")

ISAS = [name for name, _ in cpu.native.isa()] if cpu.native else []
FORMATS = [get_format(name) for name in list_formats() if get_format(name).block]
TAILS = (1, 2, 7, 8, 15, 16, 31, 127, 128, 129, 255, 256, 257, 383, 384, 385, 511, 1000, 4096)
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
EACH_FORMAT = pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
TINY = torch.finfo(torch.float32).tiny
HOSTILE = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -1e-40, 1.2e-38, 3e38, 1.0, -float("nan")]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def encode(form, x, signed, isa):
    stored = form.stored_count(x.numel())
    codes = torch.full((stored + 64,), 77, dtype=torch.uint8)
    scales = torch.full((form.scale_count(x.numel()) + 4,), 77.0)
    cpu.CpuBackend(isa).quantize(x, form, signed, codes[:stored], scales[:-4])
    assert (codes[stored:] == 77).all() and (scales[-4:] == 77).all()
    return codes[:stored], scales[:-4]


def decode(form, codes, scales, numel, signed, isa, dtype=torch.float32):
    out = torch.full((numel + 64,), 77.0, dtype=dtype)
    cpu.CpuBackend(isa).dequantize(codes, scales, form, signed, out[:numel])
    assert (out[numel:] == 77).all()
    return out[:numel]


def values_of(form, signed):
    """The value of every code, sorted, fp64."""
    codes = torch.arange(256, dtype=torch.uint8)
    if form.name == "fp8" and signed:
        codes = codes[(codes & 127) != 127]  # e4m3's NaN
    numel = codes.numel() * 8 // form.bits
    values = form.decode(codes, torch.ones(form.scale_count(numel)), signed, torch.float64, numel)
    return values.unique()


def hard_values(form, signed):
    """Blocks of absmax 1 with the 4 neighbours of each midpoint, value of a code, power of two and power of ten."""
    table = values_of(form, signed)
    powers = [2.0 ** -torch.arange(40), 10.0 ** -torch.arange(13)]
    points = torch.cat([table, (table[:-1] + table[1:]) / 2, *powers]).clamp(-1, 1)
    bits = points.double().abs().float().view(torch.int32)[:, None] + torch.arange(-4, 5, dtype=torch.int32)
    values = bits.clamp(min=0).view(torch.float32).flatten().clamp(max=1)
    values = torch.cat([values, -values]) if signed else values
    padded = torch.ones(-(-values.numel() // (form.block - 1)), form.block)  # each block holds a 1
    room = padded[:, 1:].numel()
    padded[:, 1:] = torch.nn.functional.pad(values, (0, room - values.numel())).view(-1, form.block - 1)
    return padded.flatten()


def spread(n, signed, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=gen) * torch.rand(n, generator=gen) ** 12
    return x if signed else x.abs()


def cases(form, signed):
    hostile = torch.tensor(HOSTILE * 30)
    yield from (hard_values(form, signed), spread(1 << 16, signed), hostile[:256], hostile[3:10].repeat(40))
    yield from (spread(n, signed, n) for n in TAILS)
    yield from (torch.zeros(300), torch.full((256,), 1e-39), torch.full((256,), 2e-38))
    yield torch.cat([torch.zeros(256), hostile[:128], torch.zeros(128), torch.full((3,), float("inf"))])


@SIGNS
@EACH_FORMAT
@pytest.mark.parametrize("isa", ISAS[1:])
def test_codec_is_the_baseline_bit_for_bit(isa, form, signed):
    for x in cases(form, signed):
        codes, scales = encode(form, x, signed, isa)
        assert_bitwise([codes, scales], list(encode(form, x, signed, "baseline")))
        both = [decode(form, codes, scales, x.numel(), signed, i) for i in (isa, "baseline")]
        assert_bitwise([both[0]], [both[1]])


@SIGNS
@EACH_FORMAT
@pytest.mark.parametrize("isa", ISAS)
def test_codec_is_the_reference(isa, form, signed):
    """Codes but for rounding at ties; values to fp32 accuracy."""
    for n in (*TAILS, 1 << 16):
        x = spread(n, signed, n)
        codes, scales = encode(form, x, signed, isa)
        want, want_scales = form.encode(x, signed)
        assert torch.equal(scales, want_scales)
        off = (code_numbers(form, signed, codes) - code_numbers(form, signed, want)).abs()
        assert (off > 0).sum() <= max(1, 1e-4 * n) and off.max() <= 1
        torch.testing.assert_close(
            decode(form, want, want_scales, n, signed, isa).double(),
            form.decode(want, want_scales, signed, torch.float64, n),
            rtol=5e-7,
            atol=0,
        )
    every = torch.arange(256, dtype=torch.uint8)
    every = every[(every & 127) != 127] if form.name == "fp8" and signed else every
    numel = every.numel() * 8 // form.bits
    for scale in (0.5, 3.0, 1e30, 1e-19, 1e-30, 2e-38):
        scales = torch.linspace(scale, 1.5 * scale, form.scale_count(numel))
        want = form.decode(every, scales, signed, torch.float64, numel)
        got = decode(form, every, scales, numel, signed, isa).double()
        torch.testing.assert_close(got, want, rtol=5e-7, atol=TINY)  # what is smaller is flushed


@SIGNS
@EACH_FORMAT
@pytest.mark.parametrize("isa", ISAS)
def test_nonfinite_values_and_zeros(isa, form, signed):
    """Exactly the reference's codes and scales: a NaN or an infinity takes the largest code and leaves its block alone."""
    one = torch.tensor([1.0, 0.25, -0.25, 0.0, 0.5])
    one = one if signed else one.abs()
    for bad in HOSTILE[:3] + HOSTILE[-1:]:
        for at in (0, 130, 200, 255, 256, 299):
            x = one.repeat(80)[:300].clone()
            x[at] = bad
            got, want = encode(form, x, signed, isa), form.encode(x, signed)
            assert torch.equal(got[1], want[1]) and torch.equal(got[0], want[0])
            assert torch.isfinite(decode(form, *got, 300, signed, isa)).all()
    for x in (torch.zeros(600), torch.full((600,), -0.0), torch.full((513,), float("nan")), torch.full((300,), 1e-39)):
        got = encode(form, x, signed, isa)
        assert (got[1] == 0).all() and torch.equal(got[0], form.encode(x, signed)[0])
        assert (decode(form, *got, x.numel(), signed, isa) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EACH_FORMAT
@pytest.mark.parametrize("isa", ISAS)
def test_sixteen_bit_values(isa, form, dtype):
    for n in (5, 300, 5001):
        x = spread(n, True, n).to(dtype)
        got, want = encode(form, x, True, isa), encode(form, x.float(), True, isa)
        assert_bitwise(list(got), list(want))
        values = decode(form, *got, n, True, isa, dtype)
        assert_bitwise([values], [decode(form, *got, n, True, isa).to(dtype)])


@EACH_FORMAT
def test_threads_have_no_influence(form, threads):
    x = spread(100003, True)
    results = []
    for count in (1, 2):
        threads(count)
        codes, scales = encode(form, x, True, ISAS[-1])
        results.append([codes, scales, decode(form, codes, scales, x.numel(), True, ISAS[-1])])
    assert_bitwise(*results)
    assert encode(form, torch.empty(0), True, ISAS[-1])[0].numel() == 0


def test_bad_calls_are_refused():
    x, codes, scales = torch.ones(256), torch.zeros(256, dtype=torch.uint8), torch.zeros(1)
    good = [x.data_ptr(), 0, 256, 2, codes.data_ptr(), scales.data_ptr(), 0, 1]
    cpu.native.encode(*good)
    for at, value in ((1, 3), (2, -1), (3, 1), (3, 9), (6, 77), (7, 0)):
        with pytest.raises(ValueError):
            cpu.native.encode(*good[:at], value, *good[at + 1 :])
    with pytest.raises(ValueError):
        cpu.native.decode(codes.data_ptr(), scales.data_ptr(), 256, 0, x.data_ptr(), 0, 0, 1)
