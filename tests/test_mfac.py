"""M-FAC against dense fp64 inverses; its history in every format, restarts, skipped steps and surroundings."""

import copy
import io
import pickle

import pytest
import torch
from configs import BACKENDS, assert_resumes, assert_same_bits, parameters, set_grads, tensors
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_data import one_thread  # noqa: F401

import fusedopt
from fusedopt import formats
from fusedopt.transforms import history as rows_of

SHAPES = ((7, 5), (5,), (3, 4, 2, 2), ())
LARGE = ((70, 65), (33,))  # the first is large enough for blockwise rows
F64 = torch.float64


def flattened(tensors) -> torch.Tensor:
    return torch.cat([x.detach().double().reshape(-1) for x in tensors])


class Dense:
    """The window of gradients as a list, and the inverse of a matrix of the model's size."""

    def __init__(self, window, damping):
        self.window, self.damping, self.rows, self.t = window, damping, None, 0

    def __call__(self, g):
        if self.rows is None:
            self.rows = torch.zeros(self.window, g.numel(), dtype=F64)
        self.rows[self.t % self.window] = g
        self.t += 1
        matrix = self.damping * torch.eye(g.numel(), dtype=F64) + self.rows.T @ self.rows / self.window
        return torch.linalg.inv(matrix) @ g


def sgd(p, b, u, t, *, lr, momentum, weight_decay, decoupled):
    """A step by hand: the new parameters and the new buffer."""
    if decoupled:
        p = p * (1 - lr * weight_decay)
    else:
        u = u + weight_decay * p
    b = u if t == 0 or not momentum else momentum * b + u
    return p - lr * b, b


def history(opt) -> torch.Tensor:
    """The decoded rows of all parameters side by side, fp64 [window, n]."""
    t = opt.gradient_transforms[-1]
    params = [p for group in opt.param_groups for p in group["params"]]
    return torch.cat([torch.cat([c for _, c in t.rows(p, opt.state[p]).chunks()], 1) for p in params], 1)


def products(opt) -> torch.Tensor:
    return next(entry["fisher_products"] for entry in opt.state.values() if "fisher_products" in entry)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype, steps, bound", [(F64, 200, 1e-8), (torch.float32, 10, 1e-5), (torch.float32, 200, 1e-5)]
)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True},
                                     {"momentum": 0.5, "weight_decay": 0.1, "maximize": True}])  # fmt: skip
def test_follows_the_dense_inverse(backend, dtype, steps, bound, options):
    """While the window fills, and when it wraps; g depends on p, so that errors feed back."""
    params = parameters(*SHAPES, dtype=dtype)
    p = flattened(params)
    opt = fusedopt.MFAC(params, lr=0.01, window=7, damping=1e-2, backend=backend if dtype != F64 else None, **options)
    options = {"momentum": 0.0, "weight_decay": 0.0, "decoupled_weight_decay": False, "maximize": False, **options}
    decoupled, sign = options.pop("decoupled_weight_decay"), -1 if options.pop("maximize") else 1
    dense, b, start = Dense(7, 1e-2), None, p
    for step in range(steps):
        gen = torch.Generator().manual_seed(step)
        g = 0.3 * sign * p + torch.randn(p.shape, generator=gen, dtype=F64)
        for q, piece in zip(params, g.split([q.numel() for q in params]), strict=True):
            q.grad = piece.view(q.shape).to(dtype)
        g = flattened([q.grad for q in params])
        opt.step()
        p, b = sgd(p, b, sign * dense(g), step, lr=0.01, decoupled=decoupled, **options)
        moved = float((p - start).abs().max())
        assert float((flattened(params) - p).abs().max()) <= bound * max(1.0, moved)
    K = dense.rows @ dense.rows.T
    assert float((products(opt) - K).abs().max()) <= 1e-13 * float(K.abs().max()) or dtype != F64
    mine = history(opt)
    torch.testing.assert_close(products(opt), mine @ mine.T, rtol=1e-12, atol=1e-12)


def directions(form, steps, window=6, damping=1e-2, **options):
    """Of each step the direction in fp64 and the rows after it, the gradients fed in being the same for each format."""
    params = parameters(*LARGE)
    opt = fusedopt.MFAC(params, lr=1.0, window=window, damping=damping, history_format=form, **options)
    out = []
    for step in range(steps):
        set_grads(params, step, 0.1)
        for p in params:
            p.data.zero_()
        opt.step()
        out.append((-flattened(params), history(opt), flattened([p.grad for p in params]), products(opt).clone()))
    return out


def dense_direction(rows, g, damping=1e-2):
    """(damping I + rows^T rows / m)^-1 g by an eigendecomposition of rows rows^T, of any g."""
    m = len(rows)
    inner = torch.linalg.solve(m * damping * torch.eye(m, dtype=F64) + rows @ rows.T, rows @ g)
    return (g - rows.T @ inner) / damping


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "int8c", "fp8", "int4"])
def test_formats_are_exact_about_what_they_store_and_close_to_fp32(form):
    rounding = formats.get_format(form)
    for t, ((u, rows, g, K), (v, exact, *_)) in enumerate(zip(directions(form, 9), directions("fp32", 9), strict=True)):
        torch.testing.assert_close(K, rows @ rows.T, rtol=1e-13, atol=1e-13)
        stored = rows[t % 6]
        want = dense_direction(rows, stored)
        assert float((u - want).norm()) <= 1e-6 * float(want.norm())
        relative, absolute = rounding.error_bound(True)
        large = rounding.error_bound(True)[1] * exact[:, : 70 * 65].abs().max()
        assert ((rows - exact).abs() <= relative * exact.abs() + (large if rounding.block else 0) + 1e-12).all()
        # |u - v| <= |A^-1| (|dg| + |dF| |v|), where |A^-1| <= 1 / damping
        change = (rows.T @ (rows @ v) - exact.T @ (exact @ v)) / 6
        assert float((u - v).norm()) <= 1.001 / 1e-2 * float((stored - g).norm() + change.norm()) + 1e-6 * float(
            v.norm()
        )
        if absolute < 0.05:
            assert float((u - v).norm()) <= 0.05 * float(v.norm())


def test_the_stored_gradient_is_the_one_to_precondition():
    """What rounding takes away would be multiplied by 1 / damping."""
    (u, rows, g, _), (v, *_) = directions("int8", 9, damping=1e-5)[-1], directions("fp32", 9, damping=1e-5)[-1]
    other = dense_direction(rows, g, 1e-5)
    assert float((u - v).norm()) < 0.05 * float(v.norm()) and float((other - v).norm()) > 2 * float(v.norm())


@pytest.mark.parametrize("form", ["fp32", "int8", "int4"])
def test_pieces_of_the_history_change_nothing(form, monkeypatch):
    whole = directions(form, 8)
    monkeypatch.setattr(rows_of.Rows, "native", lambda self: None)
    monkeypatch.setattr(rows_of, "CPU_CHUNK", 1)  # 256 columns at a time
    for one, other in zip(whole, directions(form, 8), strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("form", ["fp32", "int8", "int4"])
def test_no_wide_copy_of_the_history(form, native, monkeypatch):
    """The largest tensor that a step makes is a gradient, or a piece of the history."""

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else [out]
            if not function.is_view:
                mine = {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}
                sizes = [
                    x.numel() * x.element_size()
                    for x in made
                    if isinstance(x, torch.Tensor) and x.data_ptr() not in mine
                ]
                self.most = max(self.most, *sizes, 0)
            return out

    if not native:
        monkeypatch.setattr(rows_of.Rows, "native", lambda self: None)
    params = parameters((500, 600))
    opt = fusedopt.MFAC(params, window=32, history_format=form)
    for step in range(2):
        set_grads(params, step)
        with Largest() as seen:
            opt.step()
    history = sum(x.numel() * x.element_size() for n, x in opt.state[params[0]].items() if n.startswith("fisher_rows"))
    assert 4 * 300000 <= seen.most <= max(4 * 300032, 8 * rows_of.CPU_CHUNK) < history / 2


def test_repeated_and_zero_gradients():
    """K is singular then."""
    params = parameters(*SHAPES)
    opt = fusedopt.MFAC(params, lr=0.1, window=4, damping=1e-12)
    for scale in (0.0, 1e3, 1e3, 1e3, 0.0, 1e3, 1e-3):
        set_grads(params, 0, scale)
        opt.step()
    assert all(torch.isfinite(p).all() for p in params)


# States


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "int4"])
def test_resumes_bit_for_bit(form, capturable):
    options = {"window": 4, "momentum": 0.9, "history_format": form, "capturable": capturable}
    assert_resumes(lambda ps: fusedopt.MFAC(ps, lr=0.02, **options), LARGE, 6, 11)


def test_copies_and_files_step_on(tmp_path):
    params = parameters(*LARGE)
    opt = fusedopt.MFAC(params, lr=0.02, window=4, history_format="int8", state_format="int8", momentum=0.9)
    for step in range(6):
        set_grads(params, step)
        opt.step()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    others = [parameters(*LARGE) for _ in range(2)]
    loaded, imported = (fusedopt.MFAC(ps, lr=0.02, window=4, history_format="int8", state_format="int8", momentum=0.9)
                        for ps in others)  # fmt: skip
    loaded.load_state_dict(torch.load(file, weights_only=True))
    fusedopt.export_states(opt, tmp_path / "states.safetensors")
    fusedopt.import_states(imported, tmp_path / "states.safetensors")
    runs = [(params, opt), *zip(others, (loaded, imported), strict=True)]
    for ps in others:
        for p, q in zip(ps, params, strict=True):
            p.data.copy_(q.data)
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        runs.append((copied.param_groups[0]["params"], copied))
    for ps, o in runs:
        for step in range(6, 12):
            set_grads(ps, step)
            o.step()
    for ps, o in runs[1:]:
        assert_same_bits(tensors(o, ps), tensors(opt, params))


def test_device_counts_give_the_bits_of_host_counts():
    one, two = parameters(*LARGE), parameters(*LARGE)
    opts = fusedopt.MFAC(one, lr=0.02, window=4), fusedopt.MFAC(two, lr=0.02, window=4, capturable=True)
    for step in range(9):
        for ps, opt in zip((one, two), opts, strict=True):
            set_grads(ps, step)
            opt.step()
    assert_same_bits([p.detach() for p in one], [p.detach() for p in two])


@pytest.mark.parametrize("change", [{"history_format": "bf16"}, {"history_format": "int8c"}, {"window": 5}])
def test_another_history_is_not_loaded(change):
    opts = [fusedopt.MFAC(parameters(*LARGE), **{"window": 4, "history_format": "int8"} | c) for c in ({}, change)]
    set_grads(opts[0].param_groups[0]["params"], 0)
    opts[0].step()
    with pytest.raises(ValueError, match="parameter 0.*(history_format='int8'|fisher_rows)"):
        opts[1].load_state_dict(opts[0].state_dict())
    assert not opts[1].state


def test_a_step_that_only_makes_states():
    """torch.distributed.checkpoint makes them with lr 0 and zero gradients."""
    params = parameters(*SHAPES)
    opt = fusedopt.MFAC(params, lr=0.0, window=4)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert products(opt).shape == (4, 4) and sum("fisher_products" in entry for entry in opt.state.values()) == 1
    assert all(opt.state[p]["fisher_rows"].shape == (4, p.numel()) for p in params)


# Steps that are left out, and tensors without gradients


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"momentum": 0.9, "history_format": "int8"}])
def test_gradients_that_are_not_finite_change_nothing(options, bad):
    one, two = parameters(*LARGE), parameters(*LARGE)
    opts = [fusedopt.MFAC(ps, lr=0.02, window=4, weight_decay=0.1, **options) for ps in (one, two)]
    for step in range(8):
        for ps, opt in zip((one, two), opts, strict=True):
            set_grads(ps, step)
            opt.step()
            if ps is two and step in (0, 3, 6):
                kept = tensors(opt, ps)
                set_grads(ps, 50)
                ps[step % 2].grad.view(-1)[7] = bad
                opt.step()
                assert_same_bits(tensors(opt, ps), kept)
    assert_same_bits(tensors(opts[1], two), tensors(opts[0], one))


@pytest.mark.parametrize("options", [{}, {"amp_fused": True}, {"amp_fused": True, "capturable": True}])
def test_grad_scaler(options):
    one, two = parameters(*LARGE), parameters(*LARGE)
    plain, scaled = fusedopt.MFAC(one, lr=0.02, window=4), fusedopt.MFAC(two, lr=0.02, window=4, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for step in range(9):
        overflow = step in (0, 5)
        weights = [torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) for p in two]
        scaled.zero_grad()
        loss = sum((w * p).sum() for w, p in zip(weights, two, strict=True))
        scaler.scale(loss * (float("inf") if overflow else 1.0)).backward()
        kept = tensors(scaled, two) if step else None
        scaler.step(scaled)
        scaler.update()
        if overflow:
            assert kept is None or not assert_same_bits(tensors(scaled, two), kept)
        else:
            for p, w in zip(one, weights, strict=True):
                p.grad = w
            plain.step()
    assert_same_bits([p.detach() for p in two], [p.detach() for p in one])


def test_metrics_count_what_was_left_out():
    params = parameters(*SHAPES)
    opt = fusedopt.MFAC(params, lr=0.02, window=4)
    opt.record_metrics()
    for step in range(3):
        set_grads(params, step)
        if step == 1:
            params[0].grad[0, 0] = float("nan")
        opt.step()
    assert opt.metrics()["skipped_steps"] == 1


def test_tensors_without_gradients_have_rows_of_zeros():
    params = parameters(*SHAPES, dtype=F64)
    opt = fusedopt.MFAC([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], lr=0.01, window=3, damping=0.1)
    late = parameters((4,), dtype=F64, seed=3)
    dense = Dense(3, 0.1)
    p = flattened([*params, *late])
    for step in range(10):
        if step == 6:
            opt.add_param_group({"params": late, "lr": 0.02})
        live = [not (step in (0, 1, 5) and i == 0 or step in (4, 5, 6) and i == 2) for i in range(4)] + [step >= 6]
        set_grads([*params, *late], step)
        for q, alive in zip([*params, *late], live, strict=True):
            q.grad = q.grad if alive else None
        opt.step()
        g = flattened([torch.zeros_like(q) if q.grad is None else q.grad for q in (*params, *late)])
        rate = [lr * alive for lr, alive in zip((0.01, 0.01, 0.05, 0.05, 0.02), live, strict=True)]
        p = p - torch.cat(
            [torch.full((q.numel(),), r, dtype=F64) for q, r in zip((*params, *late), rate, strict=True)]
        ) * dense(g)
        torch.testing.assert_close(flattened([*params, *late]), p, rtol=1e-10, atol=1e-12)


def test_groups_may_stay_outside():
    params = parameters(*SHAPES)
    inside, outside = params[:2], params[2:]
    opt = fusedopt.MFAC([{"params": inside}, {"params": outside, "transform_gradients": False}], lr=0.01, window=3)
    alone = parameters(*SHAPES)
    other = fusedopt.MFAC(alone[:2], lr=0.01, window=3)
    plain = fusedopt.SGD(alone[2:], lr=0.01)
    for step in range(5):
        set_grads(params, step)
        set_grads(alone, step)
        for o in (opt, other, plain):
            o.step()
    assert_same_bits([p.detach() for p in params], [p.detach() for p in alone])


# Surroundings


def test_layouts_and_bf16_weights():
    """channels_last rows are those of contiguous ones; 16-bit weights keep what they cannot hold beside them."""
    runs = []
    for form in (torch.contiguous_format, torch.channels_last):
        params = parameters((6, 4, 3, 3), dtype=torch.bfloat16)
        params[0].data = params[0].data.to(memory_format=form)
        opt = fusedopt.MFAC(params, lr=0.01, window=3, param_precision="split32", history_format="bf16")
        for step in range(6):
            set_grads(params, step)
            opt.step()
        runs.append(opt.state[params[0]]["fisher_rows"].clone())
        model = torch.nn.ParameterList(params)
        runs.append(opt.fp32_state_dict(model)["0"])
    assert torch.equal(runs[0], runs[2])
    torch.testing.assert_close(runs[1], runs[3], rtol=1e-6, atol=1e-7)


def test_schedules_and_explanations():
    params = parameters(*LARGE)
    opt = fusedopt.MFAC(params, lr=0.1, window=4, history_format="int8")
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    for step in range(3):
        set_grads(params, step)
        opt.step()
        schedule.step()
    assert opt.param_groups[0]["lr"] == 0.1 * 0.5**3
    assert fusedopt.state_bytes(opt) == 4 * (4608 + 4 * 18) + 4 * 33 * 4 + 8 * 16 + 4
    assert "InverseFisher(window=4" in opt.plan().explain() and "their states take 0.019 MB" in opt.plan().explain()


def test_another_rule_takes_natural_gradients():
    params = parameters(*SHAPES)
    opt = fusedopt.AdamW(params, lr=0.01, gradient_transforms=[fusedopt.Normalize(), fusedopt.InverseFisher(window=3)])
    for step in range(4):
        set_grads(params, step)
        opt.step()
    assert int(opt.state[params[0]]["fisher_steps"]) == 4


def test_trains_faster_than_sgd():
    """The loss of a small network after 60 steps on inputs of very different sizes; SGD at the best of its settings."""
    z = torch.randn(512, 20, generator=torch.Generator().manual_seed(0))
    x, y = z * torch.logspace(0, -2, 20), torch.tanh(z @ torch.linspace(-1, 1, 60).view(20, 3) / 3)

    def run(make, **options):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(20, 256), torch.nn.Tanh(), torch.nn.Linear(256, 3))
        opt = make(model.parameters(), momentum=0.9, **options)
        for _ in range(60):
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            opt.step()
        return float((model(x) - y).square().mean().detach())

    best = min(run(fusedopt.SGD, lr=lr) for lr in (0.03, 0.1, 0.3, 1.0))
    for form in ("fp32", "int8"):
        assert run(fusedopt.MFAC, lr=0.003, window=32, damping=1e-3, history_format=form) < 0.7 * best


def test_refusals():
    params = parameters(*SHAPES)
    for options in ({"window": 0}, {"window": 2.0}, {"damping": 0.0}, {"momentum": -1.0}, {"lr": -1.0},
                    {"history_format": "bf16_stochastic"}, {"history_format": "int3"}):  # fmt: skip
        with pytest.raises(ValueError, match="nvalid|unknown"):
            fusedopt.MFAC(params, **options)
    with pytest.raises(ValueError, match="InverseFisher of this MFAC needs all gradients"):
        fusedopt.release_gradients(torch.nn.ParameterList(params), fusedopt.MFAC(params))
    with pytest.raises(ValueError, match="InverseFisher"):
        fusedopt.offload(fusedopt.MFAC(params))


def test_sharded_parameters_are_refused():
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh))
        p.grad = torch.ones_like(p)
        with pytest.raises(
            RuntimeError, match="parameter 0 .* is a DTensor, and it needs the whole tensor: InverseFisher"
        ):
            fusedopt.MFAC([p], window=3).step()
    finally:
        dist.destroy_process_group()
