"""Parameters kept in 16 bits: exact reconstruction, small decays that act, fp32 import and export, conversion, memory."""

import warnings

import pytest
import torch
from configs import (
    BY_NAME,
    CONFIGS,
    assert_same_bits,
    copies,
    each_backend,
    each_config,
    parameters,
    set_grads,
    tensors,
)
from torch import nn

import fusedopt
from fusedopt import masters
from fusedopt.memory import flat
from fusedopt.precision import get_precision, list_precisions, philox16

KEPT = [name for name in list_precisions() if get_precision(name).companion]
EXACT = ["split32", "master"]
each_kept = pytest.mark.parametrize("precision", KEPT)


def floats(n: int = 20000) -> torch.Tensor:
    """fp32 values of all magnitudes, with the special ones."""
    gen = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (n,), generator=gen).to(torch.int32).view(torch.float32)
    usual = torch.randn(n, generator=gen)
    edges = [0.0, -0.0, 1e-45, -1e-45, 1e-40, float("inf"), -float("inf"), 3.4028235e38, -3.4028235e38, 2.0**-126]
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x3F807FFF, 0x7F7F8000], dtype=torch.int32).view(
        torch.float32
    )
    x = torch.cat([bits, usual, torch.tensor(edges), ties, -ties])
    return x[~x.isnan()]


def test_split32_is_exact():
    x = floats()
    split = get_precision("split32")
    high, low = split.store(x, torch.bfloat16)
    assert torch.equal(split.load(high, low, torch.float32).view(torch.int32), x.view(torch.int32))
    finite = torch.isfinite(high)
    assert torch.equal(high[finite].float().sub(x[finite]).abs() <= x[finite].to(torch.bfloat16).float().sub(x[finite]).abs(),
                       torch.ones(int(finite.sum()), dtype=torch.bool)), "the bf16 half is a nearest bf16"  # fmt: skip


@pytest.mark.parametrize("precision", ["split24", "split32"])
def test_split_keeps_nan(precision):
    x = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -0x3FFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert x.isnan().all()
    split = get_precision(precision)
    high, low = split.store(x, torch.bfloat16, torch.full((5,), 0xFFFF))
    assert high.isnan().all() and split.load(high, low, torch.float32).isnan().all()


def test_split24_takes_a_neighbour_and_is_unbiased():
    x = floats()
    x = x[(x.abs() > 1e-30) & (x.abs() < 1e38)]
    split = get_precision("split24")
    low_values, total = None, torch.zeros(len(x), dtype=torch.float64)
    for i in range(64):
        y = split.load(*split.store(x, torch.bfloat16, philox16(1, i, 0, len(x))), torch.float32)
        bits, got = x.view(torch.int32).long(), y.view(torch.int32).long()
        assert (got % 256 == 0).all() and ((got - bits).abs() < 256).all()
        total += (got - bits).double()
        low_values = got if low_values is None else torch.minimum(low_values, got)
    assert abs(total.mean() / 64) < 0.5, "of a unit of 256"


@pytest.mark.parametrize("precision", ["split24", "split32"])
def test_weights_that_were_zeroed_by_hand_stay_zero(precision):
    """Pruning writes zeros into the parameter; stale low bits must not turn them into NaN."""
    split = get_precision(precision)
    _, low = split.store(torch.linspace(-3, 3, 1001), torch.bfloat16, torch.zeros(1001, dtype=torch.int64))
    for zero in (0.0, -0.0):
        y = split.load(torch.full((1001,), zero, dtype=torch.bfloat16), low, torch.float32)
        assert (y.abs() < 1e-38).all()


@each_backend
@each_kept
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_config(CONFIGS)
def test_weights_follow_fp32_training(config, dtype, precision, backend):
    """5 steps against fp32 parameters with the same gradients: exact precisions stay within fp32 rounding of them."""
    if dtype not in get_precision(precision).dtypes:
        pytest.skip(f"{precision} does not keep {dtype}")
    params = parameters((40, 130), (7,), dtype=dtype)
    exact = [nn.Parameter(p.detach().float()) for p in params]
    opt = config.make(params, backend=backend, param_precision=precision)
    reference = config.make(exact, backend="reference")
    for step in range(5):
        set_grads(params, step)
        for p, q in zip(params, exact, strict=True):
            q.grad = p.grad.float()
        opt.step()
        reference.step()
    for p, q, start in zip(params, exact, parameters((40, 130), (7,), dtype=dtype), strict=True):
        got = masters.weights(p, opt.state[p])
        bound = {"split24": 5 * 2.0**-16, "kahan": 5 * 2.0**-15 if dtype == torch.bfloat16 else 5 * 2.0**-18}.get(
            precision, 1e-5
        )
        loose = 1e-4 if precision not in EXACT else 2e-6
        if config.optimizer == "lars":  # its trust ratio takes the norm of the stored parameter, half an ulp off
            loose += torch.finfo(dtype).eps / 2 * (q.detach() - start.detach()).abs().max()
        torch.testing.assert_close(got, q.detach(), rtol=bound, atol=loose)
        stored = get_precision(precision).companion
        assert opt.state[p][stored].dtype == get_precision(precision).companion_dtype(dtype)
        assert (p.detach().float() - got).abs().max() <= torch.finfo(dtype).eps * got.abs().max(), (
            "p is the rounded weight"
        )


@each_backend
@pytest.mark.parametrize("precision", [p for p in list_precisions() if p != "nearest"])
def test_small_weight_decay_acts(precision, backend):
    """bf16 parameters, lr * weight_decay = 1e-5: after 2000 steps the mean decay is right within 2 %."""
    gen = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(8192, generator=gen).bfloat16())
    start = p.detach().double()
    opt = BY_NAME["adamw"].cls([p], lr=1e-3, weight_decay=1e-2, param_precision=precision,
                               backend=None if backend == "cpu" else backend)  # fmt: skip
    p.grad = torch.zeros_like(p)
    for _ in range(2000):
        opt.step()
    now = masters.weights(p, opt.state[p]).double()
    decay = 1 - (now * start).sum() / (start * start).sum()
    expected = 1 - (1 - 1e-5) ** 2000
    assert abs(decay / expected - 1) < 0.02, f"{decay:.6f} instead of {expected:.6f}"


def test_small_weight_decay_is_lost_by_nearest():
    p = nn.Parameter(torch.randn(4096).bfloat16())
    start = p.detach().clone()
    opt = BY_NAME["adamw"].cls([p], lr=1e-3, weight_decay=1e-2)
    p.grad = torch.zeros_like(p)
    for _ in range(20):
        opt.step()
    assert torch.equal(p, start)


@each_backend
@each_kept
def test_resume_is_bit_exact(precision, backend):
    """Save after 3 steps, load into a new optimizer on copies, go on: the same bits, and without saving too."""
    config = BY_NAME["adamw"]
    params = parameters((40, 130), (7,), dtype=torch.bfloat16)
    options = {"backend": backend, "param_precision": precision, "state_format": "int8"}
    opt = config.make(params, **options)
    for step in range(3):
        set_grads(params, step)
        opt.step()
    other = copies(params)
    loaded = config.make(other, **options)
    loaded.load_state_dict(opt.state_dict())
    for o, ps in ((opt, params), (loaded, other)):
        for step in range(3, 6):
            set_grads(ps, step)
            o.step()
    assert_same_bits(tensors(loaded, other), tensors(opt, params))


@pytest.mark.parametrize("source", KEPT)
@pytest.mark.parametrize("target", list_precisions())
def test_precision_changes_on_load(source, target):
    """The weights are taken over: to 24 bits at least where the target keeps them, to bf16 elsewhere."""
    config = BY_NAME["adamw"]
    params = parameters((40, 130), dtype=torch.bfloat16)
    opt = config.make(params, param_precision=source, backend="reference")
    for step in range(3):
        set_grads(params, step)
        opt.step()
    want = masters.weights(params[0], opt.state[params[0]])
    other = copies(params)
    loaded = config.make(other, param_precision=target, backend="reference")
    loaded.load_state_dict(opt.state_dict())
    got = masters.weights(other[0], loaded.state[other[0]])
    kept = get_precision(target).companion
    assert {k for k in loaded.state[other[0]] if k in ("kahan_comp", "low_bits", "master_param")} == (
        {kept} if kept else set()
    )
    assert torch.equal(other[0], params[0])
    exact = 0.0 if source != "kahan" else 2.0**-22  # p + comp may be more than half a bf16 ulp from p
    tolerance = exact if target in EXACT else 2.0**-15 if kept else 2.0**-8
    assert ((got - want).abs() <= tolerance * want.abs() + 2.0**-133).all()
    set_grads(other, 3)
    loaded.step()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.body = nn.Linear(16, 16)
        self.to(torch.bfloat16)
        self.body.weight.data = self.body.weight.data.t().contiguous().t()


@each_backend
@pytest.mark.parametrize("precision", list_precisions())
def test_fp32_state_dict(precision, backend):
    """Names, tied weights, buffers and layouts survive; exact precisions return exactly what was put in."""
    model = Tied()
    opt = BY_NAME["adamw"].make(list(model.parameters()), backend=backend, param_precision=precision)
    gen = torch.Generator().manual_seed(1)
    wanted = {
        k: torch.randn(v.shape, generator=gen) if v.is_floating_point() else v for k, v in model.state_dict().items()
    }
    wanted["head.weight"] = wanted["embed.weight"]
    opt.load_fp32_state_dict(model, wanted)
    out = opt.fp32_state_dict(model)
    assert out.keys() == model.state_dict().keys()
    for name, value in out.items():
        if not value.is_floating_point() or "running" in name:
            continue
        assert value.dtype == torch.float32 and value.shape == wanted[name].shape
        if precision in EXACT:
            assert torch.equal(value, wanted[name]), name
        else:
            step = 2.0**-15 if get_precision(precision).companion else 2.0**-8
            assert ((value - wanted[name]).abs() <= step * wanted[name].abs()).all(), name
    before = {k: v.clone() for k, v in out.items()}
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
    opt.step()
    moved = opt.fp32_state_dict(model)
    assert (moved["body.weight"] - before["body.weight"]).abs().max() > 1e-3
    assert torch.equal(moved["head.weight"], moved["embed.weight"])


def test_fp32_errors():
    model, other = nn.Linear(3, 2).bfloat16(), nn.Linear(3, 2)
    opt = fusedopt.AdamW(model.parameters(), param_precision="master")
    with pytest.raises(ValueError, match="none of the model's parameters belongs to this AdamW"):
        opt.fp32_state_dict(other)
    with pytest.raises(ValueError, match=r"'weight' has shape \(2, 2\), the parameter \(2, 3\)"):
        opt.load_fp32_state_dict(model, {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})
    with pytest.raises(RuntimeError, match="Missing key"):
        opt.load_fp32_state_dict(model, {"weight": torch.zeros(2, 3)})


@pytest.mark.parametrize("precision", ["split24", "split32"])
def test_fp16_parameters_are_not_split(precision):
    params = parameters((3, 4), (5,), dtype=torch.float16)
    opt = fusedopt.SGD(params, lr=0.1, param_precision=precision)
    before = [p.detach().clone() for p in params]
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match=rf"parameter 0 .*'{precision}' keeps bfloat16 .* use 'master' or 'kahan'"):
        opt.step()
    assert_same_bits([p.detach() for p in params], before)
    assert not opt.state
    saved = fusedopt.SGD(parameters((3, 4), (5,), dtype=torch.float16), lr=0.1)
    set_grads(saved.param_groups[0]["params"], 0)
    saved.step()
    with pytest.raises(ValueError, match=rf"parameter 0 .*'{precision}' keeps bfloat16"):
        opt.load_state_dict(saved.state_dict())


@each_backend
def test_override_and_changed_group(backend):
    """Precision by parameter, and another one in the middle of training: the weights are taken over."""
    params = parameters((40, 130), (40, 130), dtype=torch.bfloat16)
    fusedopt.override(params[1], param_precision="master")
    opt = BY_NAME["adamw"].make(params, backend=backend, param_precision="split24")
    set_grads(params, 0)
    opt.step()
    assert opt.state[params[0]]["low_bits"].dtype == torch.int8 and "master_param" in opt.state[params[1]]
    want = masters.weights(params[0], opt.state[params[0]])
    opt.param_groups[0]["param_precision"] = "split32"
    opt.plan()
    assert opt.state[params[0]]["low_bits"].dtype == torch.int16
    assert torch.equal(masters.weights(params[0], opt.state[params[0]]), want)
    text = opt.plan().explain()
    assert "bfloat16 (split32)" in text and "bfloat16 (master)" in text
    assert "parameter 1 (40, 130): overridden, param_precision='master'" in text


@pytest.mark.parametrize(
    "form, precision, limit",
    [("int8", "nearest", 2.04), ("int4", "nearest", 1.07), ("int8c", "nearest", 2.04), ("int8", "split24", 3.04)],
)
def test_state_bytes_on_real_tensors(form, precision, limit):
    model = nn.Sequential(
        nn.Embedding(5000, 64), nn.Linear(64, 1000, bias=False), nn.Linear(1000, 64, bias=False)
    ).bfloat16()
    opt = fusedopt.AdamW(model.parameters(), state_format=form, param_precision=precision)
    n = sum(p.numel() for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    assert fusedopt.state_bytes(opt) / n <= limit
    resident = sum(p.numel() * p.element_size() for p in model.parameters()) + fusedopt.state_bytes(opt)
    assert precision != "split24" or resident / n <= 5.1


# The warning


def warned(opt, params, steps: int = 12) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            set_grads(params, step)
            opt.step()
    return [str(w.message) for w in caught if "round to nothing" in str(w.message)]


@each_backend
def test_lost_updates_are_reported_once(backend):
    params = parameters((64, 64), (9,), dtype=torch.bfloat16)
    opt = BY_NAME["adamw"].make(params, backend=backend, lr=1e-5, weight_decay=0.0)
    found = warned(opt, params)
    assert len(found) == 1 and "AdamW" in found[0] and "at step 10" in found[0] and "'stochastic'" in found[0]
    assert not warned(opt, params, 100), "only once"


@pytest.mark.parametrize(
    "changes",
    [{"lr": 0.05}, {"param_precision": "stochastic"}, {"param_precision": "split24"}, {"lr": 0.0}],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_no_warning_without_cause(changes):
    params = parameters((64, 64), dtype=torch.bfloat16)
    opt = BY_NAME["adamw"].make(params, backend="reference", **{"lr": 1e-5, "weight_decay": 0.0, **changes})
    assert not warned(opt, params)


def test_steps_that_found_inf_skips_lose_nothing():
    """Weights that a skipped step leaves alone are not reported."""
    params = parameters((64, 64), dtype=torch.bfloat16)
    opt = BY_NAME["adamw"].make(params, backend="reference", lr=0.05, amp_fused=True)
    opt.grad_scale, opt.found_inf = torch.ones(()), torch.ones(())
    assert not warned(opt, params)
    opt._lost_updates.calls, opt.found_inf = 98, torch.zeros(())
    opt.param_groups[0]["lr"] = 1e-6
    assert warned(opt, params), "a step that is taken is looked at"


def test_no_warning_for_fp32():
    params = parameters((64, 64))
    assert not warned(BY_NAME["adamw"].make(params, backend="reference", lr=1e-9), params)


def test_companion_of_a_view_with_gaps():
    """Stepped through a dense copy, neighbours untouched; the weights come back in the view's shape."""
    buffer = torch.randn(64, 40).bfloat16()
    kept = buffer.clone()
    p = nn.Parameter(buffer[:, ::2])
    opt = fusedopt.AdamW([p], lr=1e-2, param_precision="split32")
    p.grad = torch.randn(64, 20).bfloat16()
    opt.step()
    assert torch.equal(buffer[:, 1::2], kept[:, 1::2]) and not torch.equal(buffer[:, ::2], kept[:, ::2])
    assert masters.weights(p, opt.state[p]).shape == (64, 20)
    assert flat(opt.state[p]["low_bits"]).numel() == 64 * 20
