"""State formats: the 8-bit maps against their definition, nearest codes, error bounds, non-finite and tiny blocks."""

import pytest
import torch
from configs import WITH_STATES, each_backend, each_config, parameters
from hypothesis import given, settings
from hypothesis import strategies as hs
from oracles import dynamic_map as oracle

import fusedopt
from fusedopt import states
from fusedopt.abi import BLOCK
from fusedopt.formats import dynamic_map, get_format, list_formats

SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
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
    theirs = functional.create_dynamic_map(signed).double()
    torch.testing.assert_close(dynamic_map(signed), theirs, rtol=0, atol=6e-8)


def test_map_landmarks():
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    assert signed[127] == 0 and unsigned[0] == 0
    assert signed[0] == pytest.approx(-0.99296875, rel=1e-12) and signed[255] == 1 and unsigned[255] == 1
    assert unsigned[1] == pytest.approx(3.25e-7, rel=1e-12)
    assert (signed.diff() > 0).all() and (unsigned.diff() > 0).all()


def encoded(x, signed):
    codes, scale = INT8.encode(x, signed)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape
    assert scale.dtype == torch.float32 and scale.shape == (-(-len(x) // BLOCK),)
    return codes, scale


def decoded(x, signed):
    codes, scale = encoded(x, signed)
    return INT8.decode(codes, scale, signed, torch.float64)


def per_element(scale, n):
    return scale.double().repeat_interleave(BLOCK)[:n]


@SIGNS
@given(values=hs.lists(FLOATS, min_size=1, max_size=40), repeat=hs.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_error_bound_and_nearest_code(signed, values, repeat):
    """|decode(encode(x)) - x| <= rel |x| + abs absmax, and no other code is nearer (a second moment never takes 0)."""
    x = torch.tensor(values * repeat, dtype=torch.float32)
    x = x if signed else x.abs()
    codes, scale = encoded(x, signed)
    absmax = torch.stack([b.abs().max() for b in x.split(BLOCK)])
    assert torch.equal(scale, torch.where(absmax < TINY, 0, absmax))
    got = INT8.decode(codes, scale, signed, torch.float64)
    largest = per_element(scale, len(x))
    relative, absolute = INT8.error_bound
    assert ((got - x.double()).abs() <= relative * x.double().abs() + absolute * largest + TINY).all()
    table = dynamic_map(signed)
    usable = (largest > 0) & (signed | (x >= TINY))  # subnormal second moments are zero
    normed = x.double()[usable] / largest[usable]
    distance = (normed[:, None] - table).abs()
    if not signed:
        distance[:, 0] = 2
    chosen = (normed - table[codes.long()[usable]]).abs()
    assert (chosen <= distance.min(1).values + 1e-7 * normed.abs()).all()


@pytest.mark.parametrize("name", list_formats())
@SIGNS
def test_error_bound_holds_over_all_decades(name, signed):
    form = get_format(name)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(BLOCK * 40, generator=gen) * 10.0 ** torch.randint(-9, 5, (BLOCK * 40,), generator=gen)
    x = x if signed else x.abs()
    stored, scale = form.encode(x, signed)
    error = (form.decode(stored, scale, signed, torch.float64) - x.double()).abs()
    largest = per_element(torch.stack([b.abs().max() for b in x.split(BLOCK)]), len(x))
    bound = form.error_bound[0] * x.double().abs() + form.error_bound[1] * largest
    assert (error <= bound).all()
    if name != "fp32":
        assert error.max() > 0 and (error / bound).max() > 0.3, "the bound is not a loose one"


@SIGNS
def test_code_of_every_map_value(signed):
    table = dynamic_map(signed).float()
    codes, _ = encoded(table, signed)
    assert torch.equal(codes.int(), torch.arange(256, dtype=torch.int32))


@SIGNS
def test_zero_block(signed):
    codes, scale = encoded(torch.zeros(300), signed)
    assert (codes == INT8.zero_code(signed)).all() and (scale == 0).all()
    assert (INT8.decode(codes, scale, signed, torch.float32) == 0).all()


@SIGNS
@pytest.mark.parametrize("magnitude", [1e-30, 1e-35, 1e30, 3e38])
def test_extreme_scales_keep_relative_precision(signed, magnitude):
    x = torch.linspace(0.01, 1, 256)
    near = decoded(x, signed)
    scaled = decoded(x.double().mul(magnitude).float(), signed)
    torch.testing.assert_close(scaled / magnitude, near, rtol=1e-5, atol=0.015)
    assert (scaled > 0).all() and torch.isfinite(scaled).all()


@SIGNS
def test_subnormal_block_is_zero(signed):
    codes, scale = encoded(torch.full((256,), 1e-39), signed)
    assert scale == 0 and (codes == INT8.zero_code(signed)).all()


@SIGNS
def test_huge_outlier_keeps_its_own_block(signed):
    x = torch.full((512,), 1e-3)
    x[5] = 1e30
    got = decoded(x, signed)
    assert got[5] == pytest.approx(1e30, rel=1e-6)
    torch.testing.assert_close(got[256:], x[256:].double(), rtol=1e-6, atol=0)
    assert torch.isfinite(got).all()


@SIGNS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_values_stay_visible_in_their_block(signed, bad):
    x = torch.full((512,), 0.5)
    x[3] = bad
    codes, scale = encoded(x, signed)
    got = INT8.decode(codes, scale, signed, torch.float64)
    assert not torch.isfinite(scale[0]) and not torch.isfinite(got[3])
    assert scale[1] == 0.5 and (got[256:] == 0.5).all()


@given(values=hs.lists(hs.floats(0, 1, width=32), min_size=1, max_size=20), outlier=hs.sampled_from([0.0, 1.0, 1e10]))
@settings(max_examples=100, deadline=None)
def test_second_moment_is_zero_only_where_it_was(values, outlier):
    x = torch.tensor([*values, outlier], dtype=torch.float32)
    codes, scale = encoded(x, False)
    if scale > 0:
        assert torch.equal(codes == 0, x < TINY)


@given(values=hs.lists(hs.floats(-1, 1, width=32), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_signed_codes_never_change_sign(values):
    got = decoded(torch.tensor(values, dtype=torch.float32), True)
    assert (got * torch.tensor(values, dtype=torch.float64) >= 0).all()


def test_names_and_errors():
    assert list_formats() == ["fp32", "bf16", "int8"] and get_format("8bit") is INT8
    with pytest.raises(ValueError, match="unknown state_format 'int7'; known formats: fp32, bf16, int8"):
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
        assert stored.dtype == get_format(form).storage and stored.shape == p.shape
        if form == "int8":
            scale = entry.pop(f"{state.name}_scale")
            assert scale.dtype == torch.float32 and scale.shape == (20,) and (scale > 0).all()
    assert not entry, f"unexpected state {sorted(entry)}"


@each_backend
@each_config(WITH_STATES)
@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_states_are_the_exact_ones_up_to_the_format(config, form, backend):
    """After one step from zero the only error of a state is the one of its format; the parameter has none."""
    exact, coarse = parameters((30, 200)), parameters((30, 200))
    one, two = config.make(exact, backend=backend), config.make(coarse, backend=backend, state_format=form)
    exact[0].grad = torch.randn_like(exact[0])
    coarse[0].grad = exact[0].grad.clone()
    one.step()
    two.step()
    torch.testing.assert_close(coarse[0], exact[0], rtol=1e-6, atol=1e-7)
    bound = get_format(form).error_bound
    for state in config.cls.rule_for(one.param_groups[0]).states:
        want = one.state[exact[0]][state.name].double().view(-1)
        got = states.decode(two.state[coarse[0]], state).double().view(-1)
        largest = per_element(torch.stack([b.abs().max() for b in want.split(BLOCK)]), len(want))
        assert ((got - want).abs() <= bound[0] * want.abs() + bound[1] * largest + 1e-12).all(), state.name


def test_format_by_state_name():
    p = torch.nn.Parameter(torch.randn(5000))
    opt = fusedopt.AdamW([p], state_format={"exp_avg": "int8", "exp_avg_sq": "bf16"})
    p.grad = torch.randn_like(p)
    opt.step()
    assert opt.state[p]["exp_avg"].dtype == torch.uint8 and opt.state[p]["exp_avg_sq"].dtype == torch.bfloat16
    assert "exp_avg_sq_scale" not in opt.state[p]


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
@pytest.mark.parametrize("kind", ["decades", "outliers", "fading", "sparse"])
def test_requantised_second_moments_keep_updates_bounded(kind, backend):
    """|update| of int8 AdamW stays below 2 lr, or twice the fp32 step's own largest update where that is larger."""
    lr = 1e-3
    coarse, exact = torch.nn.Parameter(torch.zeros(4096)), torch.nn.Parameter(torch.zeros(4096))
    named = {"backend": None if backend == "cpu" else backend, "lr": lr, "weight_decay": 0.0, "eps": 1e-30}
    opt = fusedopt.AdamW([coarse], state_format="int8", **named)
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
