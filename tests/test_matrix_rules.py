"""Muon and its kin: long runs against their oracles, storage, skipped and resumed steps; what AdaMuon, MARS-Shampoo, trust regions
and LANTON have of their own."""

import copy
import os

import pytest
import torch
from configs import BACKENDS, assert_resumes, assert_same_bits, parameters, set_grads
from oracles import orthogonal

import fusedopt
from fusedopt.backends.select import get_backend
from fusedopt.noise_rates import NoiseRates, layer_rates

SHAPES = ((32, 48), (48, 32), (32, 48), (6, 4, 3, 3), (48,))
NOISE = (0.3, 0.8)
# name: class, oracle, options of both
FAMILY = {
    "muon": (fusedopt.Muon, orthogonal.Muon, {"lr": 0.02, "adam_lr": 0.01, "weight_decay": 0.1}),
    "adamuon": (fusedopt.AdaMuon, orthogonal.AdaMuon, {"lr": 0.02, "adam_lr": 0.01, "weight_decay": 0.1}),
    "adamuon_first": (
        fusedopt.AdaMuon,
        orthogonal.AdaMuon,
        {"lr": 0.02, "adam_lr": 0.01, "sign_stabilised": False, "beta2": 0.999, "debias": True, "weight_decay": 0.01},
    ),
    "mars_shampoo": (fusedopt.MARSShampoo, orthogonal.MARSShampoo, {"lr": 0.02, "adam_lr": 0.01, "weight_decay": 0.1}),
    "trust_region": (fusedopt.TrustRegion, orthogonal.TrustRegion, {"lr": 0.02, "other_lr": 0.01, "weight_decay": 0.1}),
    "lanton": (
        fusedopt.LANTON,
        orthogonal.LANTON,
        {"lr": 0.02, "other_lr": 0.01, "weight_decay": 0.1, "alpha": 0.3, "beta2": 0.8},
    ),
}
each = pytest.mark.parametrize("name", FAMILY)


def make(name, params, **more):
    cls, _, options = FAMILY[name]
    return cls(params, **{**options, **more})


def test_the_family_is_registered():
    assert {"adamuon", "mars_shampoo", "trust_region", "lanton"} <= set(fusedopt.rule.optimizers())


CASES = [(200, BACKENDS[-1], torch.float32), (10, "reference", torch.float64), (10, "reference", torch.float32)]
if get_backend("triton").reason() is None and os.environ.get("TRITON_INTERPRET") == "1":
    CASES.append((2, "triton", torch.float32))


@each
@pytest.mark.parametrize("steps,backend,dtype", CASES, ids=str)
def test_trajectory(name, steps, backend, dtype):
    """With products in fp32. Newton-Schulz multiplies small differences of what becomes orthogonal by up to a^5 = 485."""
    shapes = SHAPES if backend != "triton" else SHAPES[1:3] + SHAPES[4:]
    mine, exact = parameters(*shapes, dtype=dtype), parameters(*shapes, dtype=torch.float64)
    for p, q in zip(mine, exact, strict=True):
        q.data.copy_(p.data)
    start = [q.detach().clone() for q in exact]
    opt = make(name, mine, ns_dtype="fp32", backend=None if backend == "cpu" else backend)
    _, oracle, options = FAMILY[name]
    other = oracle(exact, **options)
    for step in range(steps):
        set_grads(mine, step)
        for p, q in zip(mine, exact, strict=True):
            q.grad = p.grad.double()
        opt.step()
        other.step()
    for p, q, first in zip(mine, exact, start, strict=True):
        error = float((p.detach().double() - q.detach()).norm() / (q.detach() - first).norm())
        assert error <= (1e-10 if dtype == torch.float64 else 1e-5)


def test_muon_and_adamuon_take_noise_rates():
    """The calmest matrix keeps the step that it has without them, the others' are shorter by LANTON's factor."""
    for cls in (fusedopt.Muon, fusedopt.AdaMuon):
        one, two = parameters(*SHAPES[:3]), parameters(*SHAPES[:3])
        plain = cls(one, lr=0.02, weight_decay=0.0, ns_dtype="fp32")
        noisy = cls(two, lr=0.02, weight_decay=0.0, ns_dtype="fp32", noise_rates=NOISE)
        oracle = orthogonal.LANTON([p.detach().double() for p in one], 0.02, *NOISE, adjust_lr_fn=None)
        if cls is fusedopt.AdaMuon:
            oracle.adjust_lr_fn = "none"
        oracle.begin(oracle.params)
        for step in range(4):
            before = [[p.detach().clone() for p in ps] for ps in (one, two)]
            for ps, opt in ((one, plain), (two, noisy)):
                set_grads(ps, step)
                opt.step()
            rates = oracle.rates([p.grad.double() for p in one], step + 1)
            assert max(rates) == 1.0 and (step == 0 or min(rates) < 0.999)
            for rate, p, q, a, b in zip(rates, one, two, *before, strict=True):
                torch.testing.assert_close((q - b).detach(), rate * (p - a).detach(), rtol=1e-3, atol=1e-6)
                q.data.copy_(p.data)


def test_rates_of_layers():
    rates = layer_rates(torch.tensor([0.0, 3.0, 15.0]), 1.0)
    torch.testing.assert_close(rates, torch.tensor([1.0, 0.5**0.5, 0.5]))
    for bad in ((0.0, 0.9), (-1.0, 0.9), (1.0, 1.0), 3.0):
        with pytest.raises(ValueError, match="alpha|beta2|noise_rates"):
            fusedopt.Muon(parameters((4, 4)), noise_rates=bad)
    assert (
        NoiseRates(1.0, 0.9)
        == fusedopt.Muon(parameters((4, 4)), noise_rates=(1.0, 0.9)).param_groups[0]["projection"].noise
    )


@each
@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_resumes_bit_for_bit(name, form):
    assert_resumes(lambda ps: make(name, ps, state_format=form, min_quantized_numel=0), SHAPES, 3, 6)


@each
@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_narrow_states(name, form):
    one, two = parameters((64, 96), (96, 64)), parameters((64, 96), (96, 64))
    start = [p.detach().clone() for p in one]
    wide, narrow = make(name, one), make(name, two, state_format=form, min_quantized_numel=0)
    for step in range(10):
        for ps, opt in ((one, wide), (two, narrow)):
            set_grads(ps, step)
            opt.step()
    for p, q, first in zip(one, two, start, strict=True):
        error = float((p - q).detach().norm() / (p.detach() - first).norm())
        assert error < (0.1 if name.startswith("adamuon") else 0.06 if form == "bf16" else 0.1), error
    share = {"bf16": 0.51, "int8": 0.27}[form]
    assert fusedopt.state_bytes(narrow) < fusedopt.state_bytes(wide) * share


@each
@pytest.mark.parametrize("capturable", [False, True])
def test_skipped_steps_change_nothing(name, capturable):
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    skipping = make(name, one, amp_fused=True, capturable=capturable, clip_grad_norm=1.0)
    plain = make(name, two, capturable=capturable, clip_grad_norm=1.0)
    for step in range(6):
        overflow = step in (0, 3)
        set_grads(one, step)
        kept = [p.detach().clone() for p in one]
        held = copy.deepcopy(
            [v for p in one for k, v in skipping.state[p].items() if torch.is_tensor(v) and k != "step"]
        )
        for p in one:
            p.grad.mul_(8.0)
        if overflow:
            one[0].grad[0] = float("inf")
        skipping.grad_scale, skipping.found_inf = torch.tensor(8.0), torch.tensor(float(overflow))
        skipping.step()
        if overflow:
            assert_same_bits([p.detach() for p in one], kept)
            if held:
                now = [v for p in one for k, v in skipping.state[p].items() if torch.is_tensor(v) and k != "step"]
                assert_same_bits(now, held)
        else:
            set_grads(two, step)
            plain.step()
            assert torch.allclose(plain.grad_norm, torch.stack([p.grad.norm() for p in two]).norm())
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)


@each
def test_bf16_parameters_and_convolutions(name):
    wide, narrow = parameters(*SHAPES), parameters(*SHAPES, dtype=torch.bfloat16)
    for p, q in zip(wide, narrow, strict=True):
        p.data.copy_(q.data)
    one, two = make(name, wide), make(name, narrow, param_precision="split32")
    for step in range(5):
        set_grads(narrow, step)
        for p, q in zip(wide, narrow, strict=True):
            p.grad = q.grad.float()
        one.step()
        two.step()
    kept = two.fp32_state_dict(torch.nn.ParameterList(narrow))
    for i, p in enumerate(wide):
        torch.testing.assert_close(kept[str(i)], p.detach(), rtol=1e-5, atol=1e-5)


def test_trust_region_splits_a_model():
    model = torch.nn.ModuleDict({
        "wte": torch.nn.Embedding(11, 8), "block": torch.nn.Linear(8, 8), "conv": torch.nn.Conv1d(8, 4, 3),
        "norm": torch.nn.LayerNorm(8), "lm_head": torch.nn.Linear(8, 11, bias=False),
    })  # fmt: skip
    for params in (model, model.named_parameters()):
        opt = fusedopt.TrustRegion(params, lr=0.02, other_lr=0.001)
        names = {group["ball"]: set(group["param_names"]) for group in opt.param_groups}
        assert names == {
            "spectral": {"block.weight", "conv.weight"},
            "linf": {"wte.weight", "lm_head.weight"},
            "rms": {"block.bias", "conv.bias", "norm.weight", "norm.bias"},
        }
        assert {g["ball"]: g["lr"] for g in opt.param_groups} == {"spectral": 0.02, "linf": 0.001, "rms": 0.001}
    vector = parameters((5,))
    for bad in ({"ball": "l1"}, {"ball": "spectral"}, {"scope": "layer"}, {"momentum": 1.0}, {"adjust_lr_fn": "best"},
                {"ball": "l2", "scope": "optimizer", "noise_rates": NOISE}, {"projection": fusedopt.GaLore(rank=2)}):  # fmt: skip
        with pytest.raises(ValueError):
            fusedopt.TrustRegion(vector, **bad)
    opt = fusedopt.TrustRegion([{"params": parameters((5, 3)), "ball": "l2"}, {"params": parameters((3,))}])
    assert [g["ball"] for g in opt.param_groups] == ["l2", "rms"]


def test_steps_have_the_length_of_their_ball():
    for ball, norm in (
        ("spectral", lambda d: torch.linalg.svdvals(d).max()),
        ("linf", lambda d: d.abs().max()),
        ("l2", torch.linalg.vector_norm),
        ("rms", lambda d: d.square().mean().sqrt()),
    ):
        (p,) = parameters((40, 30), dtype=torch.float64)
        before = p.detach().clone()
        opt = fusedopt.TrustRegion([p], lr=0.3, ball=ball, ns_coefficients="polar_express", ns_steps=8)
        set_grads([p], 0)
        opt.step()
        assert float(norm(p.detach() - before)) == pytest.approx(0.3, rel=0.02 if ball == "spectral" else 1e-9)


def test_a_trust_region_with_decay_is_muon():
    """beta = lr weight_decay, without Nesterov; fixed_decay is beta itself."""
    one, two, three = (parameters(*SHAPES[:3]) for _ in range(3))
    muon = fusedopt.Muon(one, lr=0.02, weight_decay=0.1, nesterov=False, adjust_lr_fn="none")
    region = fusedopt.TrustRegion(two, lr=0.02, weight_decay=0.1)
    fixed = fusedopt.TrustRegion(three, lr=0.02, weight_decay=0.002, fixed_decay=True)
    for step in range(4):
        for ps, opt in ((one, muon), (two, region), (three, fixed)):
            set_grads(ps, step)
            opt.step()
    assert_same_bits([p.detach() for p in two], [p.detach() for p in one])
    for p, q in zip(three, one, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_lanton_steps_all_layers_or_none():
    """Rates are those of all layers of a ball, whatever shapes they have, and cannot be had one tensor at a time."""
    for ball in (None, "linf", "rms"):
        params = parameters(*(SHAPES[:3] if ball is None else SHAPES))
        opt = fusedopt.LANTON(params, lr=0.02, ball=ball)
        set_grads(params, 0)
        with pytest.raises(RuntimeError, match="needs all gradients"):
            opt.step_parameter(params[0])
    for quiet in range(2):
        one, other = parameters((24, 40), (40, 24), (24, 40)), []
        opt = fusedopt.LANTON(one, lr=0.02, alpha=1e-3)
        for step in range(3):
            set_grads(one, step)
            for i, p in enumerate(one):
                p.grad.mul_(0.1 if i == quiet else 1.0)
            other = [p.detach().clone() for p in one]
            opt.step()
        lengths = [
            float((p.detach() - q).norm()) / opt._plan.slots[i].site.scale
            for i, (p, q) in enumerate(zip(one, other, strict=True))
        ]
        assert max(lengths) == lengths[quiet] and min(lengths) < 0.6 * lengths[quiet]


def test_mars_shampoo_clips_each_matrix():
    """A gradient a thousand times larger changes nothing beyond the first step's clip; others go by AdamW with their own decay."""
    one, two = parameters((24, 16)), parameters((24, 16))
    opts = [fusedopt.MARSShampoo(ps, lr=0.02, gamma=0.0, ns_dtype="fp32") for ps in (one, two)]
    for step in range(3):
        for ps, opt, size in zip((one, two), opts, (1.0, 1000.0), strict=True):
            set_grads(ps, step)
            assert float(ps[0].grad.norm()) > 1
            ps[0].grad.mul_(size)
            opt.step()
    torch.testing.assert_close(one[0], two[0], rtol=1e-4, atol=1e-6)
    opt = fusedopt.MARSShampoo(parameters((24, 16), (16,)), weight_decay=0.3, adam_weight_decay=0.05, adam_lr=0.01)
    assert [(g["weight_decay"], g["lr"], g["betas"]) for g in opt.param_groups] == [
        (0.3, 3e-3, (0.95, 0.99)),
        (0.05, 0.01, (0.9, 0.95)),
    ]
    with pytest.raises(ValueError, match="gamma"):
        fusedopt.MARSShampoo(parameters((4, 4)), gamma=-1.0)


def test_installed_adamuon():
    """pytorch_optimizer's, of the paper's first version. Both iterate in bf16, and divide by roots of what comes of it."""
    theirs = getattr(pytest.importorskip("pytorch_optimizer"), "AdaMuon", None)
    if theirs is None:
        pytest.skip("its AdaMuon came with a later version")
    one, two = parameters((48, 32)), parameters((48, 32))
    start = one[0].detach().clone()
    opt = fusedopt.AdaMuon(one, lr=0.02, weight_decay=0.0, momentum=0.95, nesterov=False, sign_stabilised=False, beta2=0.95,
                           debias=True)  # fmt: skip
    other = theirs(
        [{"params": two, "use_muon": True}], lr=0.02, weight_decay=0.0, momentum=0.95, nesterov=False, betas=(0.9, 0.95)
    )
    for step in range(5):
        for ps, o in ((one, opt), (two, other)):
            set_grads(ps, step)
            o.step()
    assert float((one[0] - two[0]).detach().norm() / (two[0].detach() - start).norm()) < 0.1
