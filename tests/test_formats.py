"""State formats: the maps against their definition, nearest codes, error bounds, non-finite, zero and tiny blocks."""

import pytest
import torch
from configs import BY_NAME, WITH_STATES, each_backend, each_config, parameters
from hypothesis import given, settings
from hypothesis import strategies as hs
from oracles import dynamic_map as oracle

import fusedopt
from fusedopt import states
from fusedopt.formats import dynamic_map, get_format, list_formats

SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
CODED = [get_format(name) for name in list_formats() if get_format(name).block]
each_coded = pytest.mark.parametrize("form", CODED, ids=lambda f: f.name)
INT8 = get_format("int8")
TINY = torch.finfo(torch.float32).tiny
# At least one reasonable float32 block of hypothesis's choice; magnitudes are drawn as exponents to reach all decades
FLOATS = hs.builds(lambda m, e: m * 10.0**e, hs.floats(-1, 1), hs.integers(-12, 3))


@SIGNS
def test_map_is_the_published_construction(signed):
    expected = torch.tensor(oracle.dynamic_map(signed), dtype=torch.float64)
    assert len(expected) == 256
    torch.testing.assert_close(dynamic_map(signed), expected, rtol=1e-14, atol=0)


@SIGNS
def test_map_is_that_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)
    theirs = functional.create_dynamic_map(signed)
    assert torch.equal(dynamic_map(signed, dtype=torch.float32), theirs), "in their arithmetic, to the last bit"
    torch.testing.assert_close(dynamic_map(signed), theirs.double(), rtol=0, atol=6e-8)


def test_map_landmarks():
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    assert signed[127] == 0 and unsigned[0] == 0
    assert signed[0] == pytest.approx(-0.99296875, rel=1e-12) and signed[255] == 1 and unsigned[255] == 1
    assert unsigned[1] == pytest.approx(3.25e-7, rel=1e-12)
    assert (signed.diff() > 0).all() and (unsigned.diff() > 0).all()


def test_four_bit_map_is_that_of_torchao():
    utils = pytest.importorskip("torchao.optim.quant_utils", exc_type=ImportError)
    theirs = torch.tensor(sorted(utils.create_dynamic_map(True, 3, 4)), dtype=torch.float64)
    torch.testing.assert_close(dynamic_map(True, 4), theirs, rtol=0, atol=1e-7)


def encoded(x, signed, form=INT8):
    codes, scale = form.encode(x, signed)
    assert codes.dtype == torch.uint8 and codes.shape == (form.stored_count(len(x)),)
    assert scale.dtype == torch.float32 and scale.shape == (-(-len(x) // form.block),)
    return codes, scale


def decoded(x, signed, form=INT8):
    codes, scale = encoded(x, signed, form)
    return form.decode(codes, scale, signed, torch.float64, len(x))


def values_of(form, signed):
    """Every value the codes of a format stand for, sorted, with a scale of 1."""
    codes = torch.arange(2**form.bits, dtype=torch.uint8)
    if form.bits == 4:
        codes = codes * 16
    n = 2**form.bits * 8 // form.bits
    values = form.decode(codes, torch.ones(form.scale_count(n)), signed, torch.float64, n)[:: 8 // form.bits]
    return values[values.abs() <= 1].unique()  # not fp8's NaN, nor int8c's -128


def largest_in_block(x, form):
    """The scale each element's block must have."""
    finite = torch.where(torch.isfinite(x), x, 0).abs().double()
    largest = torch.stack([b.max() for b in finite.split(form.block)]) if form.block else finite
    largest = torch.where(largest < TINY, 0, largest)
    return largest.repeat_interleave(form.block or 1)[: len(x)]


@each_coded
@SIGNS
@given(values=hs.lists(FLOATS, min_size=1, max_size=40), repeat=hs.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_error_bound_and_scale(form, signed, values, repeat):
    """|decode(encode(x)) - x| <= rel |x| + abs scale, and the scale is the largest magnitude."""
    x = torch.tensor(values * repeat, dtype=torch.float32)
    x = x if signed else x.abs()
    codes, scale = encoded(x, signed, form)
    largest = largest_in_block(x, form)
    assert torch.equal(scale.repeat_interleave(form.block)[: len(x)].double(), largest)
    got = form.decode(codes, scale, signed, torch.float64, len(x))
    relative, absolute = form.error_bound(signed)
    assert ((got - x.double()).abs() <= relative * x.double().abs() + absolute * largest + TINY).all()


@pytest.mark.parametrize("form", [f for f in CODED if f.name != "int8c"], ids=lambda f: f.name)
@SIGNS
@given(values=hs.lists(FLOATS, min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_nearest_value(form, signed, values):
    """No other code is nearer (but a second moment never takes zero). int8c rounds in its companded domain instead."""
    x = torch.tensor(values, dtype=torch.float32)
    x = x if signed else x.abs()
    largest = largest_in_block(x, form)
    usable = (largest > 0) & (signed | (x >= TINY))  # subnormal second moments are zero
    normed, table = x.double()[usable] / largest[usable], values_of(form, signed)
    table = table[table > 0] if not signed else table
    chosen = (normed - (decoded(x, signed, form)[usable] / largest[usable])).abs()
    nearest = (normed[:, None] - table).abs().min(1).values
    assert (chosen <= nearest + 1e-7 * normed.abs() + 1e-12).all()


@SIGNS
def test_companding_rounds_in_its_own_domain(signed):
    """int8c by its formula in double precision: 127 * 2 y / (1 + |y|) and 255 sqrt(y), to the nearest integer."""
    form = get_format("int8c")
    y = torch.linspace(-1 if signed else 1e-9, 1, 4001, dtype=torch.float64).float()
    got = torch.cat([decoded(torch.cat([part, torch.ones(1)]), signed, form)[:-1] for part in y.split(255)])
    exact = 254 * y.double() / (1 + y.double().abs()) if signed else 255 * y.double().sqrt()
    found = 254 * got / (1 + got.abs()) if signed else 255 * got.sqrt()
    torch.testing.assert_close(found, found.round(), rtol=0, atol=1e-9)
    bound = torch.where(exact < 0.5, 1.0, 0.5 + 1e-4) if not signed else 0.5 + 1e-4
    assert ((found - exact).abs() <= bound).all()


@pytest.mark.parametrize("name", list_formats())
@SIGNS
def test_error_bound_holds_over_all_decades(name, signed):
    form = get_format(name)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(256 * 40, generator=gen) * 10.0 ** torch.randint(-9, 5, (256 * 40,), generator=gen)
    x = x if signed else x.abs()
    random16 = torch.randint(0, 65536, (len(x),), generator=gen) if form.stochastic else None
    stored, scale = form.encode(x, signed, random16)
    error = (form.decode(stored, scale, signed, torch.float64, len(x)) - x.double()).abs()
    relative, absolute = form.error_bound(signed)
    bound = relative * x.double().abs() + absolute * largest_in_block(x, form)
    assert (error <= bound).all()
    if name != "fp32":
        assert error.max() > 0 and (error / bound).max() > 0.3, "the bound is not a loose one"


@each_coded
@SIGNS
def test_values_that_have_a_code_keep_it(form, signed):
    """Encoding what the codes decode to changes nothing: convert back and forth as often as you like."""
    table = values_of(form, signed).float()
    assert len(table) >= 2**form.bits - 3
    for part in table.split(form.block - 1):
        x = torch.cat([part, torch.ones(1)])
        assert torch.equal(decoded(x, signed, form).float(), x)
        codes, scale = encoded(x, signed, form)
        again, _ = encoded(form.decode(codes, scale, signed, torch.float32, len(x)), signed, form)
        assert torch.equal(again, codes)


@SIGNS
def test_code_of_every_map_value(signed):
    codes, _ = encoded(dynamic_map(signed).float(), signed)
    assert torch.equal(codes.int(), torch.arange(256, dtype=torch.int32))


def test_signed_fp8_is_that_of_torch():
    x = torch.randn(256)
    codes, scale = encoded(x, True, get_format("fp8"))
    exact = (x / scale * 448).to(torch.float8_e4m3fn)
    same = codes == exact.view(torch.uint8)
    assert same.float().mean() > 0.99, "a quotient may fall on the other side of a tie"
    got = codes.view(torch.float8_e4m3fn).float() * scale / 448
    torch.testing.assert_close(decoded(x, True, get_format("fp8")).float(), got, rtol=1e-6, atol=0)


def test_unsigned_fp8_by_bits():
    """e5m3: value of code c is (1 + (c % 8) / 8) 2^(c // 8 - 31) / 1.875."""
    want = [0.0] + [(1 + c % 8 / 8) * 2.0 ** (c // 8 - 31) / 1.875 for c in range(1, 256)]
    assert values_of(get_format("fp8"), False).tolist() == want


def test_packing_order():
    """The even element in the high half of a byte; the unused half of an odd tail holds the code of zero."""
    form = get_format("int4")
    codes, _ = form.encode(torch.tensor([1.0, 0.0, -0.8875]), True)
    assert codes.tolist() == [0xF7, 0x07]
    codes, _ = form.encode(torch.tensor([1.0, 0.5, 0.0625]), False)
    assert codes.tolist() == [0xF7, 0x00]


@each_coded
@SIGNS
def test_zero_block(form, signed):
    codes, scale = encoded(torch.zeros(300), signed, form)
    assert (codes == form.zero_code(signed)).all() and (scale == 0).all()
    assert (form.decode(codes, scale, signed, torch.float32, 300) == 0).all()


@each_coded
@SIGNS
def test_zeros_stay_zero(form, signed):
    """But for int4's second moment, whose linear map has none: 1/16 of the block's largest is on the safe side."""
    x = torch.linspace(0.1, 1, 256)
    x[::3] = 0
    got = decoded(x, signed, form)
    if form.name == "int4" and not signed:
        torch.testing.assert_close(got[::3], largest_in_block(x, form)[::3] / 16, rtol=1e-6, atol=0)
    else:
        assert (got[::3] == 0).all()


@each_coded
@SIGNS
@pytest.mark.parametrize("magnitude", [1e-30, 1e-35, 1e30, 8e37])
def test_extreme_scales_keep_relative_precision(form, signed, magnitude):
    x = torch.linspace(0.01, 1, 256)
    near = decoded(x, signed, form)
    scaled = decoded(x.double().mul(magnitude).float(), signed, form)
    torch.testing.assert_close(scaled / magnitude, near, rtol=1e-5, atol=1.01 * step_at_ties(form))
    assert (scaled > 0).sum() == (near > 0).sum() and torch.isfinite(scaled).all()


def step_at_ties(form):
    """Rounding may fall on the other side of a tie: the largest distance of neighbouring codes."""
    return max(float(values_of(form, signed).diff().max()) for signed in (True, False))


@each_coded
@SIGNS
def test_what_exceeds_2_126_saturates(form, signed):
    x = torch.linspace(0.1, 1, 256) * 3e38
    codes, scale = encoded(x, signed, form)
    assert (scale[-1] == 2.0**126) and (scale <= 2.0**126).all()
    got = decoded(x, signed, form)
    assert torch.equal(got, decoded(x.clamp(max=2.0**126), signed, form)) and got.max() == 2.0**126


@each_coded
@SIGNS
def test_subnormal_block_is_zero(form, signed):
    codes, scale = encoded(torch.full((form.block,), 1e-39), signed, form)
    assert scale == 0 and (codes == form.zero_code(signed)).all()


@each_coded
@SIGNS
def test_huge_outlier_keeps_its_own_block(form, signed):
    x = torch.full((512,), 1e-3)
    x[5] = 1e30
    got = decoded(x, signed, form)
    assert got[5] == pytest.approx(1e30, rel=1e-6)
    torch.testing.assert_close(got[form.block :], x[form.block :].double(), rtol=1e-6, atol=0)
    assert torch.isfinite(got).all()


@each_coded
@SIGNS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_spoil_nothing_else(form, signed, bad):
    """They take the code of the block's largest value; every other element is encoded as if they were not there."""
    x = torch.linspace(0.1, 0.5, 512)
    want = decoded(x, signed, form)
    x[3] = bad
    got = decoded(x, signed, form)
    assert got[3].abs() == pytest.approx(largest_in_block(x, form)[3].item(), rel=0.13)
    others = torch.arange(512) != 3
    torch.testing.assert_close(got[others], want[others], rtol=1e-6, atol=0)
    alone, scale = encoded(torch.tensor([bad, 0.0]), signed, form)
    assert scale == 0 and (alone == form.zero_code(signed)).all(), "without a finite element there is no scale"


@each_coded
@given(values=hs.lists(hs.floats(0, 1, width=32), min_size=1, max_size=20), outlier=hs.sampled_from([0.0, 1.0, 1e10]))
@settings(max_examples=60, deadline=None)
def test_second_moment_is_zero_only_where_it_was(form, values, outlier):
    x = torch.tensor([*values, outlier], dtype=torch.float32)
    got = decoded(x, False, form)
    if largest_in_block(x, form)[0] > 0:
        zeros = got == 0
        assert torch.equal(zeros, x < TINY) if form.name != "int4" else not zeros.any()


@each_coded
@given(values=hs.lists(hs.floats(-1, 1, width=32), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_signed_codes_never_change_sign(form, values):
    got = decoded(torch.tensor(values, dtype=torch.float32), True, form)
    assert (got * torch.tensor(values, dtype=torch.float64) >= 0).all()


def test_names_and_errors():
    assert list_formats() == ["fp32", "bf16", "bf16_stochastic", "int8", "int8c", "fp8", "int4"]
    assert get_format("8bit").bits == 8 and get_format("4bit").bits == 4
    with pytest.raises(
        ValueError, match="unknown state_format 'int7'; known formats: fp32, bf16, bf16_stochastic, int8"
    ):
        get_format("int7")
    with pytest.raises(ValueError, match="unknown state_format 'int7'"):
        fusedopt.AdamW([torch.zeros(3)], state_format={"exp_avg": "int7"})


# Through the optimizer


@each_backend
@each_config(WITH_STATES)
@pytest.mark.parametrize("form", list_formats())
def test_stored_tensors(config, form, backend):
    """dtype, shape and scales of every state, with a tail that does not fill a block."""
    (p,) = params = parameters((5, 1001))
    opt = config.make(params, backend=backend, state_format=form)
    p.grad = torch.randn_like(p)
    opt.step()
    entry = dict(opt.state[p])
    assert entry.pop("step") == 1
    for state in config.cls.rule_for(opt.param_groups[0]).states:
        stored = entry.pop(state.name)
        known = get_format("fp32" if state.wide else form)
        shape = p.shape if known.bits >= 8 else (known.stored_count(p.numel()),)  # 1001 is odd: packed flat
        assert stored.dtype == known.storage and stored.shape == shape
        if known.block:
            scale = entry.pop(f"{state.name}_{form}_scale")
            assert scale.dtype == torch.float32 and scale.shape == (-(-5005 // known.block),) and (scale > 0).all()
    assert not entry, f"unexpected state {sorted(entry)}"


@each_backend
@each_config(WITH_STATES)
@pytest.mark.parametrize("form", list_formats()[1:])
def test_states_are_the_exact_ones_up_to_the_format(config, form, backend):
    """After one step from zero the only error of a state is the one of its format; the parameter has none."""
    exact, coarse = parameters((30, 200)), parameters((30, 200))
    one, two = config.make(exact, backend=backend), config.make(coarse, backend=backend, state_format=form)
    exact[0].grad = torch.randn_like(exact[0])
    coarse[0].grad = exact[0].grad.clone()
    one.step()
    two.step()
    torch.testing.assert_close(coarse[0], exact[0], rtol=1e-6, atol=1e-7)
    known = get_format(form)
    for state in config.cls.rule_for(one.param_groups[0]).states:
        want = one.state[exact[0]][state.name].double().view(-1)
        got = states.decode(coarse[0], two.state[coarse[0]], state).double().view(-1)
        relative, absolute = known.error_bound(state.signed)
        bound = relative * want.abs() + absolute * largest_in_block(want, known)
        assert ((got - want).abs() <= 1.001 * bound + 1e-12).all(), state.name


def test_format_by_state_name():
    p = torch.nn.Parameter(torch.randn(5000))
    opt = fusedopt.AdamW([p], state_format={"exp_avg": "int8", "exp_avg_sq": "bf16"})
    p.grad = torch.randn_like(p)
    opt.step()
    assert opt.state[p]["exp_avg"].dtype == torch.uint8 and opt.state[p]["exp_avg_sq"].dtype == torch.bfloat16
    assert set(opt.state[p]) == {"step", "exp_avg", "exp_avg_int8_scale", "exp_avg_sq"}


def test_packed_states_keep_the_shape_where_they_can():
    for shape, want in (((64, 90), (64, 45)), ((90, 63), (2835,)), ((5001,), (2501,)), ((8, 4, 4, 64), (8, 4, 4, 32))):
        p = torch.nn.Parameter(torch.randn(shape))
        opt = fusedopt.Lion([p], state_format="int4")
        p.grad = torch.randn(shape)
        opt.step()
        assert opt.state[p]["exp_avg"].shape == want


@each_backend
@pytest.mark.parametrize("form", list_formats())
def test_gradients_of_1e_30(form, backend):
    """First moments of 1e-31 keep their precision; second moments of 1e-60 are zero in fp32 already, and stay so."""
    (p,) = params = parameters((4096,))
    opt = BY_NAME["adamw"].make(params, backend=backend, state_format=form, eps=1e-30, weight_decay=0.0)
    p.grad = torch.randn(4096) * 1e-30
    before = p.detach().clone()
    opt.step()
    state = opt.rule_for(opt.param_groups[0]).states[0]
    want = 0.1 * p.grad.double()
    got = states.decode(p, opt.state[p], state).double()
    relative, absolute = get_format(form).error_bound(True)
    bound = (
        relative * want.abs() + absolute * largest_in_block(want.float(), get_format(form)) + 1e-6 * want.abs() + 1e-37
    )
    assert ((got - want).abs() <= 1.001 * bound).all()
    assert (p.detach() - before).abs().max() > 0.01 and torch.isfinite(p).all()


def adversarial_gradients(kind: str, step: int, gen) -> torch.Tensor:
    """[4096] gradients whose magnitudes differ by up to 12 decades within a block."""
    noise = torch.randn(4096, generator=gen)
    decades = torch.linspace(-10, 2, 4096)[torch.randperm(4096, generator=torch.Generator().manual_seed(1))]
    if kind == "decades":
        return noise * 10.0**decades
    if kind == "outliers":  # a few elements carry spikes that come and go
        g = noise * 1e-6
        g[(step * 7) % 256 :: 256] = 1e4 * (1 if step % 10 == 0 else 0)
        return g
    if kind == "fading":
        return noise * 10.0 ** (-step / 8) * 10.0 ** (decades / 4)
    return torch.where(torch.rand(4096, generator=gen) < 0.02, noise * 100, noise * 1e-7)


@each_backend
@each_coded
@pytest.mark.parametrize("kind", ["decades", "outliers", "fading", "sparse"])
def test_requantised_second_moments_keep_updates_bounded(kind, form, backend):
    """|update| of AdamW stays below 2 lr, or twice the fp32 step's own largest update where that is larger."""
    lr = 1e-3
    coarse, exact = torch.nn.Parameter(torch.zeros(4096)), torch.nn.Parameter(torch.zeros(4096))
    named = {"backend": None if backend == "cpu" else backend, "lr": lr, "weight_decay": 0.0, "eps": 1e-30}
    opt = fusedopt.AdamW([coarse], state_format=form.name, **named)
    reference = fusedopt.AdamW([exact], **named)
    gen = torch.Generator().manual_seed(0)
    for step in range(60):
        g = adversarial_gradients(kind, step, gen)
        moved = []
        for p, o in ((coarse, opt), (exact, reference)):
            p.grad, before = g.clone(), p.detach().clone()
            o.step()
            moved.append(float((p.detach() - before).abs().max()))
        assert moved[0] <= 2 * max(lr, moved[1]), f"step {step}: {moved[0] / lr:.2f} lr against {moved[1] / lr:.2f} lr"
