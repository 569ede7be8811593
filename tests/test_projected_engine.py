"""The engine around projections: backends, formats, precisions, layouts, checkpoints, schedules, launches, errors."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from configs import BACKENDS, assert_same_bits, backend_argument, set_grads, tensors, train

import fusedopt
from fusedopt.formats import list_formats
from fusedopt.precision import list_precisions

F32, BF16 = torch.float32, torch.bfloat16
PROJECTIONS = {
    "galore": fusedopt.GaLore(8, 4, 1.0),
    "galore_left": fusedopt.GaLore(8, 4, 1.0, side="left"),
    "galore_svd": fusedopt.GaLore(8, 4, 1.0, method="svd"),
    "qgalore": fusedopt.QGaLore(8, 4, 1.0),
    "dct": fusedopt.DCT(8),
    "dct_feedback": fusedopt.DCT(8, 3, error_feedback="int8"),
    "frugal": fusedopt.Frugal(0.25, 4),
    "frugal_sgd": fusedopt.Frugal(0.25, 4, residual="sgd", method="random"),
    "frugal_columns": fusedopt.Frugal(0.25, 4, method="columns"),
    "frugal_rows": fusedopt.Frugal(0.25, 4, method="top_columns", side="left"),
    "apollo": fusedopt.Apollo(8, 4),
    "apollo_mini": fusedopt.ApolloMini(update_every=4),
}
each_projection = pytest.mark.parametrize("projection", PROJECTIONS.values(), ids=PROJECTIONS.keys())
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def model(dtype=F32, seed: int = 0) -> list[torch.nn.Parameter]:
    """Two matrices that are projected, one with odd sides, and two tensors that are not."""
    gen = torch.Generator().manual_seed(seed)
    shapes = ((48, 64), (67, 35), (48,), (6, 64))
    return [torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in shapes]


def adamw(params, projection, backend=None, **options):
    options = {"lr": 0.01, "min_quantized_numel": 16, "weight_decay": 0.1, **options}
    return fusedopt.AdamW(params, projection=projection, backend=backend_argument(backend), **options)


def run(projection, backend, steps: int = 6, dtype=F32, **options):
    params = model(dtype)
    opt = adamw(params, projection, backend, **options)
    train(opt, params, 0, steps)
    return params, opt


def distance(a, b) -> float:
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native extension is not built")
@each_projection
@pytest.mark.parametrize(
    "options",
    ({}, {"clip_grad_norm": 0.5}, {"maximize": True}, {"dtype": torch.float16}, {"capturable": True}),
    ids=str,
)
def test_native_steps_agree_with_the_reference(projection, options):
    mine, _ = run(projection, "cpu", 6, **options)
    reference, _ = run(projection, "reference", 6, **options)
    half = options.get("dtype") == torch.float16
    # a subspace that turns by an fp32 rounding turns the update by as much; fp16 weights then tip over to a neighbour
    assert distance(mine, reference) < (5e-3 if half else 3e-5)


@each_projection
@each_backend
@pytest.mark.parametrize("form", list_formats())
def test_every_format(projection, backend, form):
    params, opt = run(projection, backend, 5, state_format=form)
    wide, _ = run(projection, backend, 5)
    assert distance(params, wide) < 0.03
    decoded = opt.state[params[0]]["exp_avg"]
    assert decoded.dtype == fusedopt.formats.get_format(form).storage


@each_projection
@each_backend
@pytest.mark.parametrize("precision", list_precisions())
def test_every_precision(projection, backend, precision):
    """The fp32 weight that bf16 and its companion stand for is near that of an fp32 run; the others are within bf16."""
    params, opt = run(projection, backend, 5, dtype=BF16, param_precision=precision)
    module = torch.nn.ParameterList(params)
    kept = opt.fp32_state_dict(module)
    starts = [p.to(BF16).float() for p in model()]
    wide = [torch.nn.Parameter(s) for s in starts]
    other = adamw(wide, projection, backend)
    for step in range(5):
        set_grads(params, step)
        for p, w in zip(params, wide, strict=True):
            w.grad = p.grad.float()
        other.step()
    # bf16 bases and directions are within 2^-9 of fp32's; of FRUGAL's residuals a few change their sign
    apart = torch.cat([(a - b).abs().view(-1) for a, b in zip(kept.values(), wide, strict=True)])
    assert apart.mean() < (5e-3 if precision in ("nearest", "stochastic") else 1.5e-3)


@each_projection
@each_backend
def test_resuming_keeps_every_bit(projection, backend):
    whole, opt = run(projection, backend, 11, state_format="int8")
    want = tensors(opt, whole)
    params, first = run(projection, backend, 6, state_format="int8")
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = adamw(params, projection, backend, state_format="int8")
    second.load_state_dict(torch.load(file, weights_only=True))
    train(second, params, 6, 11)
    assert_same_bits(tensors(second, params), want)


@each_projection
def test_copies_and_pickles_go_on_as_the_original(projection):
    params, opt = run(projection, None, 5)
    twins, twin = pickle.loads(pickle.dumps((params, opt)))
    others, other = copy.deepcopy((params, opt))
    for p, o in ((params, opt), (twins, twin), (others, other)):
        train(o, p, 5, 8)
    assert_same_bits(tensors(twin, twins), tensors(opt, params))
    assert_same_bits(tensors(other, others), tensors(opt, params))


@each_projection
def test_threads_change_nothing(projection):
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            params, opt = run(projection, None, 5, dtype=BF16, param_precision="stochastic", state_format="int8")
            results.append(tensors(opt, params))
    finally:
        torch.set_num_threads(before)
    if isinstance(projection, (fusedopt.Frugal, fusedopt.Apollo)) or projection.name in ("galore", "qgalore", "dct"):
        # torch.mm may sum in another order; what it gives may differ in its last bits, and bf16 weights then by one value
        assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(*results, strict=True))
        assert distance(results[0][:4], results[1][:4]) < 0.1


@each_projection
@each_backend
def test_transposed_and_sliced_parameters(projection, backend):
    """A transposed parameter is the matrix of its storage: it steps as its transpose does."""
    base = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    straight, turned = torch.nn.Parameter(base.clone()), torch.nn.Parameter(base.clone().t())
    gapped = torch.nn.Parameter(torch.cat([base, base], 1)[:, :64])
    opts = [adamw([p], projection, backend) for p in (straight, turned, gapped)]
    for step in range(5):
        g = torch.randn(48, 64, generator=torch.Generator().manual_seed(step))
        straight.grad, turned.grad, gapped.grad = g, g.t().contiguous(), g.clone()
        for opt in opts:
            opt.step()
    assert torch.equal(straight, turned.t()) and torch.equal(straight, gapped)


def test_convolutions_are_matrices_of_their_outputs():
    gen = torch.Generator().manual_seed(0)
    values = torch.randn(16, 8, 3, 3, generator=gen)
    conv, flat = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone().view(16, 72))
    for p in (conv, flat):
        opt = adamw([p], fusedopt.GaLore(4, 3))
        for step in range(4):
            p.grad = torch.randn(16, 72, generator=torch.Generator().manual_seed(step)).view(p.shape)
            opt.step()
    assert torch.equal(conv.view(16, 72), flat)
    last = torch.nn.Parameter(values.clone().contiguous(memory_format=torch.channels_last))
    opt = adamw([last], fusedopt.GaLore(4, 3))
    last.grad = torch.randn_like(last)
    opt.step()
    assert opt.state[last]["exp_avg"].shape == (4, 72)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_one_launch_for_all_projected_tensors(backend):
    params = [torch.nn.Parameter(torch.randn(40, 32 + 8 * i)) for i in range(9)] + [torch.nn.Parameter(torch.ones(40))]
    opt = adamw(params, fusedopt.GaLore(4), backend, min_quantized_numel=4096)
    train(opt, params, 0, 1)
    buckets = opt.plan().buckets
    assert [(b["tensors"], b["phases"]) for b in buckets] == [(9, ["direction"]), (1, ["fused"])]
    report = opt.plan().explain()
    assert (
        "projected by galore" in report and "parameter 9 (40,): not projected, 1-D tensors are not projected" in report
    )


@each_projection
@pytest.mark.parametrize("poison", (0.0, float("nan"), float("inf")))
def test_useless_gradients_refresh_nothing(projection, poison):
    if getattr(projection, "error_feedback", None) and poison == 0:
        pytest.skip("the error that is fed back is no useless gradient")
    if projection.name in ("apollo", "apollo_mini") or getattr(projection, "method", "") in ("random", "columns"):
        pytest.skip("its subspace does not come from the gradient")
    p = torch.nn.Parameter(torch.randn(48, 64, generator=torch.Generator().manual_seed(0)))
    opt = adamw([p], projection)
    train(opt, [p], 0, 3)
    kept = {k: v.clone() for k, v in opt.state[p].items() if k.startswith(("projector", "indices", "leading", "simil"))}
    assert kept
    for _ in range(4):  # one of these steps is due for a refresh
        p.grad = torch.full_like(p, poison)
        opt.step()
    changed = [k for k, v in kept.items() if not torch.equal(v.nan_to_num(-9.0), opt.state[p][k].nan_to_num(-9.0))]
    assert not changed


def refreshes(opt, params, steps: int) -> list[list[int]]:
    """Which parameters' projectors change at each step."""
    out, last = [], {}
    for step in range(steps):
        set_grads(params, step)
        opt.step()
        now = {i: opt.state[p]["projector"].clone() for i, p in enumerate(params)}
        out.append([i for i in now if i not in last or not torch.equal(now[i], last[i])])
        last = now
    return out


def test_refreshes_are_spread_over_the_steps():
    params = [torch.nn.Parameter(torch.randn(24, 20)) for _ in range(4)]
    opt = adamw(params, fusedopt.GaLore(4, 8, method="random"))
    assert refreshes(opt, params, 17) == [[0, 1, 2, 3], [], [1], [], [2], [], [3], []] + [
        [0],
        [],
        [1],
        [],
        [2],
        [],
        [3],
        [],
        [0],
    ]
    opt = adamw(params, fusedopt.GaLore(4, 8, method="random", stagger=False))
    assert refreshes(opt, params, 9) == [[0, 1, 2, 3]] + [[]] * 7 + [[0, 1, 2, 3]]


def test_qgalore_refreshes_less_and_less_where_the_subspace_has_settled():
    gen = torch.Generator().manual_seed(0)
    settled = torch.randn(48, 8, generator=gen) @ torch.randn(8, 64, generator=gen)
    for still, want in ((True, [0, 4, 8, 12, 16, 20, 24, 32]), (False, list(range(0, 52, 4)))):
        p = torch.nn.Parameter(torch.randn(48, 64, generator=gen))
        opt = adamw([p], fusedopt.QGaLore(8, 4, method="svd", cos_threshold=0.9, queue=5))
        found, last = [], None
        for step in range(52):
            noise = torch.randn(48, 64, generator=gen)
            p.grad = settled + 1e-3 * noise if still else noise
            opt.step()
            now = opt.state[p]["leading_vector"].clone()
            if last is None or not torch.equal(now, last):
                found.append(step)
            last = now
        assert found == want, still


def test_frugal_resets_states_and_their_step_count():
    p = torch.nn.Parameter(torch.randn(24, 20))
    opt = adamw([p], fusedopt.Frugal(0.25, 3, method="random", residual="none"))
    for step in range(4):
        set_grads([p], step)
        opt.step()
    beta1 = 0.9
    projected = opt._plan.slots[0].site.projected
    torch.testing.assert_close(opt.state[p]["exp_avg"], (1 - beta1) * projected)
    assert opt.state[p]["step"] == 4


def test_names():
    layers = torch.nn.Sequential(torch.nn.Embedding(50, 32), torch.nn.Linear(32, 48))
    opt = fusedopt.create("galore_adamw8bit", layers, rank=4, update_every=7, scale=0.5, lr=1e-3)
    assert opt.defaults["projection"] == fusedopt.GaLore(4, 7, 0.5) and opt.defaults["state_format"] == "int8"
    for p in layers.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    shapes = [tuple(opt.state[p]["exp_avg"].shape) for p in layers.parameters()]
    assert shapes == [(50, 32), (48, 4), (48,)]
    assert type(fusedopt.create("apollo_mini_adamw", layers).defaults["projection"]) is fusedopt.ApolloMini
    assert type(fusedopt.create("dct_lion", layers, rank=4).defaults["projection"]) is fusedopt.DCT
    with pytest.raises(ValueError, match="names a projection, and projection="):
        fusedopt.create("dct_lion", layers, projection=fusedopt.GaLore(4))
    with pytest.raises(ValueError, match="unknown optimizer 'svd_adamw'"):
        fusedopt.create("svd_adamw", layers)
    assert set(fusedopt.list_projections()) >= {"galore", "qgalore", "dct", "frugal", "apollo", "apollo_mini"}


def test_overrides_and_groups():
    params = [torch.nn.Parameter(torch.randn(24, 20)) for _ in range(3)]
    fusedopt.override(params[0], projection=None)
    groups = [{"params": params[:2]}, {"params": params[2:], "projection": fusedopt.GaLore(2)}]
    opt = adamw(groups, fusedopt.GaLore(4))
    train(opt, params, 0, 1)
    assert [tuple(opt.state[p]["exp_avg"].shape) for p in params] == [(24, 20), (24, 4), (24, 2)]
    with pytest.raises(ValueError, match="projection='galore' is no projection"):
        fusedopt.override(params[0], projection="galore")


@pytest.mark.parametrize(
    "make,message",
    (
        (lambda p: adamw(p, "galore"), "projection='galore' is no projection; use e.g. fusedopt.GaLore"),
        (lambda p: fusedopt.LAMB(p, projection=fusedopt.GaLore(4)), "LAMB: its trust ratio needs the full update"),
        (
            lambda p: fusedopt.LARS(p, lr=1, projection=fusedopt.GaLore(4)),
            "LARS: its trust ratio needs the full update",
        ),
        (lambda p: fusedopt.GaLore(0), "Invalid rank: 0; it must be a positive integer"),
        (lambda p: fusedopt.GaLore(4, update_every=1.5), "Invalid update_every: 1.5"),
        (lambda p: fusedopt.GaLore(4, side="up"), "Invalid projection side: 'up'"),
        (lambda p: fusedopt.GaLore(4, method="qr"), "Invalid projection method: 'qr'"),
        (lambda p: fusedopt.Frugal(density=1.5), "Invalid density: 1.5"),
        (lambda p: fusedopt.Frugal(residual="adam"), "Invalid residual: 'adam'"),
        (lambda p: fusedopt.DCT(4, error_feedback="fp8"), "Invalid error_feedback: 'fp8'"),
        (lambda p: fusedopt.Apollo(4, scope="row"), "Invalid APOLLO scope: 'row'"),
        (lambda p: fusedopt.Apollo(4, norm_growth=0.5), "Invalid norm_growth: 0.5"),
    ),
)
def test_options_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make([torch.nn.Parameter(torch.randn(24, 20))])


def test_l2_decay_is_refused_before_anything_changes():
    p = torch.nn.Parameter(torch.randn(24, 20))
    opt = fusedopt.Adam([p], weight_decay=0.1, projection=fusedopt.GaLore(4))
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="parameter 0 .* is projected, and L2 weight decay would be projected"):
        opt.step()
    assert torch.equal(p, before)


def test_states_of_another_projection_are_refused():
    params, opt = run(fusedopt.GaLore(8, 4), None, 2)
    saved = opt.state_dict()
    other = adamw(params, fusedopt.GaLore(4, 4))
    with pytest.raises(ValueError, match=r"parameter 0 .*'exp_avg' has shape \(8, 64\)"):
        other.load_state_dict(saved)
    with pytest.raises(ValueError, match="the loaded 'indices' is missing, the projection keeps one of shape"):
        adamw(params, fusedopt.DCT(8)).load_state_dict({**saved, "state": {
            i: {k: v for k, v in e.items() if k != "projector"} for i, e in saved["state"].items()}})  # fmt: skip
    with pytest.raises(ValueError, match="the loaded state holds"):
        fusedopt.AdamW(params).load_state_dict(saved)
    with pytest.raises(ValueError, match="are projected and have no torch.optim form"):
        opt.state_dict(format="torch")


def test_formats_are_converted_on_loading():
    params, opt = run(fusedopt.GaLore(8, 4), None, 4)
    narrow = adamw(params, fusedopt.GaLore(8, 4), state_format="int8")
    narrow.load_state_dict(opt.state_dict())
    assert narrow.state[params[0]]["exp_avg"].dtype == torch.uint8
    assert torch.equal(narrow.state[params[0]]["projector"], opt.state[params[0]]["projector"])


@each_projection
def test_nothing_happens_with_lr_zero_and_zero_gradients(projection):
    """The dummy step with which distributed checkpoints initialise an optimizer."""
    params = model()
    before = [p.detach().clone() for p in params]
    opt = adamw(params, projection, lr=0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert_same_bits([p.detach() for p in params], before)


def test_a_skipped_step_changes_nothing():
    params, opt = run(fusedopt.GaLore(8, 4), None, 3, amp_fused=True)
    before = tensors(opt, params)
    for p in params:
        p.grad.fill_(float("inf"))
    opt.grad_scale, opt.found_inf = torch.tensor([2.0]), torch.tensor([1.0])
    opt.step()
    assert_same_bits(tensors(opt, params), before)


@each_projection
def test_the_loss_scale_is_taken_out(projection):
    """A power of two: everything but APOLLO's guarded quotient scales exactly."""
    results = []
    for scale in (1.0, 1024.0):
        params = model()
        opt = adamw(params, projection, amp_fused=True, clip_grad_norm=0.5)
        for step in range(5):
            set_grads(params, step, scale)
            opt.grad_scale, opt.found_inf = torch.tensor([scale]), torch.tensor([0.0])
            opt.step()
        results.append(params)
    assert distance(*results) < 1e-5


@each_projection
def test_a_refresh_waits_for_the_first_step_that_is_not_skipped(projection):
    """Steps that overflow are skipped on the device and counted on the host: what a device-side counter would do."""
    params = model()
    opt = adamw(params, projection, amp_fused=True)
    for step in range(3):
        set_grads(params, step)
        opt.grad_scale, opt.found_inf = torch.ones(1), torch.zeros(1)
        if step == 0:  # the plan of a device runs, and every launch sees the flag
            for p in params:
                p.grad.fill_(float("inf"))
            with torch.no_grad():
                plan = opt._current_plan(params, [p.grad for p in params])
                device = plan.devices[0]
                device.advance(opt.param_groups)
                device.set_amp(torch.ones(1), torch.ones(1))
                grads = [p.grad for p in params]
                for bucket in device.buckets:
                    bucket.set_gradients(grads, [g.data_ptr() for g in grads], device.upload)
                device.step(grads)
                for counter in device.counters:
                    counter.sub_(1)
                device.versions = [c._version for c in device.counters]
            assert_same_bits([p.detach() for p in params], [p.detach() for p in model()])
            continue
        opt.step()
    for p in params:
        assert torch.isfinite(p).all() and all(
            torch.isfinite(v.float()).all() for k, v in opt.state[p].items() if k != "similarities"
        )
    moved = [float((p - q).detach().abs().max()) for p, q in zip(params, model(), strict=True)]
    assert min(moved) > 1e-3


def test_refreshes_on_demand():
    params = [torch.nn.Parameter(torch.randn(24, 20)) for _ in range(2)]
    opt = adamw(params, fusedopt.GaLore(4, 100, method="random", stagger=False))
    assert refreshes(opt, params, 3) == [[0, 1], [], []]
    last = [opt.state[p]["projector"].clone() for p in params]
    opt.refresh_projections()
    train(opt, params, 3, 4)
    assert not any(torch.equal(opt.state[p]["projector"], old) for p, old in zip(params, last, strict=True))
