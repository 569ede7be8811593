"""Steps of sharded models (FSDP2, DTensor) in 2 and 4 processes against one process: bit for bit where nothing is summed."""

import pytest
import torch
import torch.distributed as dist
from processes import run
from sharded_models import (
    assert_equal,
    backward,
    build,
    contents,
    mesh,
    set_whole_grads,
    sharded,
    train,
    weights,
    whole,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fusedopt
from fusedopt import distributed

STEPS = 3


def pair(cls, dtype=torch.float32, on=None, **options) -> tuple:
    """(whole model, its optimizer), (sharded model, its optimizer), both trained on the same gradients."""
    out = []
    for model in (build(dtype), sharded(dtype, on)):
        opt = cls(model.parameters(), **options)
        train(model, opt, 0, STEPS)
        out.append((model, opt))
    return tuple(out)


def assert_pairs_equal(cls, dtype=torch.float32, on=None, **options) -> None:
    (model, opt), (model2, opt2) = pair(cls, dtype, on, **options)
    assert_equal(contents(model2, opt2), contents(model, opt), f"{cls.__name__} {dtype} {options}")


def assert_pairs_close(cls, **options) -> None:
    (model, opt), (model2, opt2) = pair(cls, **options)
    for x, y in zip(contents(model2, opt2), contents(model, opt), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-7)
    if opt.grad_norm is not None:
        torch.testing.assert_close(opt2.grad_norm, opt.grad_norm, rtol=1e-6, atol=0)


def elementwise_rules():
    for cls, options in (
        (fusedopt.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
        (fusedopt.Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
        (fusedopt.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
        (fusedopt.Lion, {"lr": 0.01, "weight_decay": 0.1}),
    ):
        assert_pairs_equal(cls, **options)
        assert_pairs_equal(cls, state_format="bf16", backend="reference", **options)


def points_beside_the_parameter():
    """States that start as the shard's share of the parameter, and the way to the average and back."""
    for cls in (fusedopt.MADGRAD, fusedopt.INNAprop, fusedopt.OptAMSGrad, fusedopt.ScheduleFreeAdamW):
        assert_pairs_equal(cls, lr=0.01, weight_decay=0.1)
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"param_precision": "split32"})):
        both = pair(fusedopt.ScheduleFreeSGD, dtype, lr=0.01, **options)
        for _, opt in both:
            opt.eval()
        assert_equal(*(weights(model) for model, _ in both), "at the average")
        for model, opt in both:
            opt.train()
            train(model, opt, STEPS, STEPS + 2)
        assert_equal(*(contents(model, opt) for model, opt in both), "trained on")


def starts_on_octets(p: torch.nn.Parameter, processes: int) -> bool:
    """Whether every shard along the first dimension begins at a multiple of 8 elements."""
    row = p.numel() // p.shape[0]
    return -(-p.shape[0] // processes) * row % 8 == 0 or p.shape[0] == 1


def assert_rounded_alike(on=None, **options) -> None:
    """Random bits are those of the element in the whole tensor, where shards begin at octets."""
    processes = dist.get_world_size() if on is None else on.size(1)
    (model, opt), (model2, opt2) = pair(fusedopt.AdamW, torch.bfloat16, on, lr=0.01, seed=3, **options)
    exact = 0
    for p, q in zip(model.parameters(), model2.parameters(), strict=True):
        if starts_on_octets(p, processes):
            exact += 1
            assert_equal([whole(q)], [p.detach()], f"{options} {tuple(p.shape)}")
            assert_equal(
                [whole(v) for v in opt2.state[q].values()], list(opt.state[p].values()), f"{options} {tuple(p.shape)}"
            )
        torch.testing.assert_close(whole(q), p.detach(), rtol=2**-6, atol=1e-4)
    assert exact >= 5


def precisions():
    """Companions are states like others."""
    for precision in ("nearest", "split32", "master"):
        assert_pairs_equal(fusedopt.AdamW, torch.bfloat16, lr=0.01, param_precision=precision)
    for precision in ("stochastic", "kahan", "split24"):
        for backend in (None, "reference"):
            assert_rounded_alike(param_precision=precision, state_format="bf16_stochastic", backend=backend)


def after_a_real_backward_pass():
    """Gradients of FSDP2's own reduction."""
    models = build(), sharded()
    opts = [fusedopt.AdamW(m.parameters(), lr=0.01, weight_decay=0.1) for m in models]
    for i in range(STEPS):
        for model, opt in zip(models, opts, strict=True):
            backward(model, i)
            opt.step()
    assert_equal(contents(models[1], opts[1]), contents(models[0], opts[0]))


def states_are_dtensors():
    model = sharded(torch.bfloat16)
    opt = fusedopt.AdamW(model.parameters(), state_format="int8", param_precision="split24")
    train(model, opt, 0, 1)
    for p in model.parameters():
        entry = opt.state[p]
        for name, value in entry.items():
            if name != "step" and not name.endswith("_scale"):
                assert isinstance(value, DTensor) and value.shape == p.shape and value.stride() == p.stride(), name
                assert value.device_mesh == p.device_mesh and value.placements == p.placements, name
                assert value.to_local().shape == p.to_local().shape, name
        assert entry["step"] == 1 and entry["step"].shape == ()


def eligibility_is_by_the_whole_size():
    """A tensor of 4615 elements is in codes although no shard has 4096."""
    model = sharded()
    opt = fusedopt.AdamW(model.parameters(), state_format="int8", min_quantized_numel=1500)
    train(model, opt, 0, 1)
    coded = [p.numel() for p in model.parameters() if opt.state[p]["exp_avg"].dtype == torch.uint8]
    assert coded == [p.numel() for p in model.parameters() if p.numel() >= 1500] and 24 * 65 in coded
    assert max(p.to_local().numel() for p in model.parameters() if p.numel() == 24 * 65) < 1500


def coded_states():
    """Where rows hold whole blocks a shard's blocks are the whole tensor's; elsewhere they are the shard's own."""
    for form in ("int8", "int8c", "fp8", "int4"):
        (model, opt), (model2, opt2) = pair(fusedopt.AdamW, lr=0.01, state_format=form, min_quantized_numel=0)
        params, params2 = list(model.parameters()), list(model2.parameters())
        assert params[4].shape == (19, 512)
        assert torch.equal(whole(params2[4]), params[4]), form
        scale = f"exp_avg_{form}_scale"
        assert torch.equal(whole(opt2.state[params2[4]][scale]).view(-1), opt.state[params[4]][scale]), form
        for name in ("exp_avg", "exp_avg_sq"):
            a, b = (o.state_dict(format="torch")["state"][0][name] for o in (opt, opt2))
            largest = float(a.abs().max())
            assert float((whole(b) - a).abs().max()) < 0.3 * largest and not torch.equal(whole(b), torch.zeros_like(a))


def trust_ratios():
    assert_pairs_close(fusedopt.LAMB, lr=0.02, weight_decay=0.1, clip_grad_norm=None)
    assert_pairs_close(fusedopt.LAMB, lr=0.02, weight_decay=0.1, clip_grad_norm=None, backend="reference")
    assert_pairs_close(fusedopt.LARS, lr=0.3, weight_decay=0.01, trust_coefficient=0.05)
    assert_pairs_close(fusedopt.AdamW, lr=0.01, weight_decay=0.1, cautious=True)


def clipping():
    assert_pairs_close(fusedopt.AdamW, lr=0.01, clip_grad_norm=0.5)
    assert_pairs_close(fusedopt.SGD, lr=0.01, clip_grad_norm=0.5, backend="reference")
    assert_pairs_close(fusedopt.LAMB, lr=0.02, clip_grad_norm=0.5)
    assert_pairs_close(fusedopt.LARS, lr=0.3, clip_grad_norm=0.5)


def norms_as_functions():
    model, model2 = build(), sharded()
    for m in (model, model2):
        set_whole_grads(m, 0)
    want = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.testing.assert_close(fusedopt.global_norm(p.grad for p in model2.parameters()), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(fusedopt.clip_grad_norm_(model2.parameters(), 0.5), want, rtol=1e-6, atol=0)
    for p, q in zip(model.parameters(), model2.parameters(), strict=True):
        torch.testing.assert_close(whole(q.grad), p.grad, rtol=1e-5, atol=0)


def hybrid_meshes():
    """Replicas in the first dimension of a mesh, shards in the second: replicas count once."""
    on = mesh(2, dist.get_world_size() // 2)
    assert_pairs_equal(fusedopt.Lion, torch.bfloat16, on, lr=0.01, param_precision="split32")
    assert_rounded_alike(on, param_precision="stochastic", state_format="bf16_stochastic")
    assert_pairs_close(fusedopt.LAMB, lr=0.02, on=on, clip_grad_norm=0.5)


def tensor_parallel():
    """Columns, rows of both dimensions of a mesh, and replicas whose gradients are still sums to be made."""
    size = dist.get_world_size()
    line, plane = mesh(), mesh(2, size // 2)
    gen = torch.Generator().manual_seed(0)
    shapes = [
        ((30, 24), line, [Shard(1)]),
        ((30, 24), line, [Replicate()]),
        ((9, 10, 6), plane, [Shard(0), Shard(2)]),
        ((50, 7), plane, [Shard(0), Shard(0)]),
    ]
    tensors = [torch.randn(shape, generator=gen) for shape, _, _ in shapes]
    for cls, options in ((fusedopt.AdamW, {"lr": 0.01}), (fusedopt.LAMB, {"lr": 0.01, "clip_grad_norm": 0.5})):
        plain = [torch.nn.Parameter(t.clone()) for t in tensors]
        split = [
            torch.nn.Parameter(distribute_tensor(t, on, places))
            for t, (_, on, places) in zip(tensors, shapes, strict=True)
        ]
        opts = cls(plain, **options), cls(split, **options)
        for _ in range(STEPS):
            for p, q, (shape, on, places) in zip(plain, split, shapes, strict=True):
                p.grad = torch.randn(shape, generator=gen)
                if places == [Replicate()]:
                    q.grad = DTensor.from_local(p.grad / size, on, [Partial()], run_check=False)
                else:
                    q.grad = distribute_tensor(p.grad, on, places)
            for opt in opts:
                opt.step()
        for p, q in zip(plain, split, strict=True):
            if cls is fusedopt.AdamW:
                assert torch.equal(whole(q), p.detach()), p.shape
            torch.testing.assert_close(whole(q), p.detach(), rtol=2e-5, atol=1e-7)


def random_bits_differ_between_columns_of_shards():
    """Shards that are not consecutive have random bits of their own, replicas the same."""
    line = mesh()
    p = torch.nn.Parameter(distribute_tensor(torch.ones(64, 8 * dist.get_world_size()).bfloat16(), line, [Shard(1)]))
    q = torch.nn.Parameter(distribute_tensor(torch.ones(64, 16).bfloat16(), line, [Replicate()]))
    opt = fusedopt.SGD([p, q], lr=1e-3, param_precision="stochastic")
    for t in (p, q):
        t.grad = torch.ones_like(t)
    opt.step()
    parts = whole(p).chunk(dist.get_world_size(), 1)
    assert not torch.equal(parts[0], parts[1]) and 0 < float((parts[0] < 1).float().mean()) < 1
    got = [torch.empty_like(q.to_local()) for _ in range(dist.get_world_size())]
    dist.all_gather(got, q.to_local().detach())
    assert all(torch.equal(t, got[0]) for t in got)


def refusals():
    line = mesh()
    weight = torch.nn.Parameter(distribute_tensor(torch.randn(64, 32), line, [Shard(0)]))
    weight.grad = torch.ones_like(weight)
    for opt, message in (
        (
            fusedopt.AdamW([weight], projection=fusedopt.DCT(rank=4)),
            "parameter 0 .*DTensor.*DCT needs the whole tensor",
        ),
        (fusedopt.MicroAdam([weight]), "parameter 0 .*DTensor.*needs the whole tensor"),
    ):
        before = whole(weight).clone()
        with pytest.raises(RuntimeError, match=message):
            opt.step()
        assert torch.equal(whole(weight), before) and not any(opt.state.values())
    partial = torch.nn.Parameter(DTensor.from_local(torch.ones(4), line, [Partial()], run_check=False))
    partial.grad = DTensor.from_local(torch.ones(4), line, [Partial()], run_check=False)
    with pytest.raises(RuntimeError, match="parameter 0 .*Partial"):
        fusedopt.SGD([partial]).step()
    plain = torch.nn.Parameter(torch.ones(4))
    plain.grad = None
    with pytest.raises(RuntimeError, match="parameter 1 .*a plain tensor, its gradient a DTensor"):
        distributed.local_gradients(
            "SGD", [weight, plain], [None, distribute_tensor(torch.ones(4), line, [Replicate()])]
        )
    transposed = torch.nn.Parameter(distribute_tensor(torch.randn(64, 64), line, [Shard(0)]).t())
    transposed.grad = torch.ones_like(transposed)
    with pytest.raises(RuntimeError, match="parameter 0 .*blockwise states need contiguous ones"):
        fusedopt.AdamW([transposed], state_format="int8", min_quantized_numel=0).step()


def scaler_agrees_on_overflow():
    """One infinity, in one process's shard: nobody steps, with torch's GradScaler as it is and with the fused protocol."""
    for fused in (False, True):
        model = sharded()
        opt = fusedopt.AdamW(model.parameters(), lr=0.1, amp_fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        before = weights(model)
        for overflow in (True, False):
            set_whole_grads(model, 0, 8.0)
            last = list(model.parameters())[0].grad
            if overflow and dist.get_rank() == dist.get_world_size() - 1:
                last.to_local()[0, 0] = float("inf")
            scaler.scale(torch.ones(()))
            scaler.step(opt)
            scaler.update()
            moved = [not torch.equal(a, b) for a, b in zip(weights(model), before, strict=True)]
            assert moved == [not overflow] * len(moved), (fused, overflow, moved)
        assert all(entry["step"] == 1 for entry in opt.state.values())


def parameters_switched_before_the_first_step():
    """accelerate makes the optimizer first, shards the model, and puts the new parameters into the groups."""
    model = build()
    opt = fusedopt.AdamW(model.parameters(), lr=0.01, state_format="int8", min_quantized_numel=0)
    opt.load_state_dict(opt.state_dict())
    names = {p: name for name, p in model.named_parameters()}
    fully_shard(model, mesh=mesh())
    mapping = dict(model.named_parameters())
    for group in opt.param_groups:
        group["params"] = [mapping[names[p]] for p in group["params"]]
    train(model, opt, 0, STEPS)
    other = sharded()
    direct = fusedopt.AdamW(other.parameters(), lr=0.01, state_format="int8", min_quantized_numel=0)
    train(other, direct, 0, STEPS)
    assert_equal(contents(model, opt), contents(other, direct))


def plans_are_kept_and_explain():
    model = sharded()
    opt = fusedopt.AdamW(model.parameters(), lr=0.01, clip_grad_norm=1.0)
    assert "AdamW: 2 launches" in opt.plan().explain()
    train(model, opt, 0, 1)
    plan = opt._plan
    train(model, opt, 1, 3)
    assert opt._plan is plan


def fp32_weights():
    model, model2 = build(torch.bfloat16), sharded(torch.bfloat16)
    opts = [fusedopt.AdamW(m.parameters(), lr=0.01, param_precision="split32") for m in (model, model2)]
    for m, opt in zip((model, model2), opts, strict=True):
        train(m, opt, 0, STEPS)
    want, got = opts[0].fp32_state_dict(model), opts[1].fp32_state_dict(model2)
    assert_equal([whole(v) for v in got.values()], list(want.values()))
    changed = {name: v + 1e-4 for name, v in got.items()}
    opts[1].load_fp32_state_dict(model2, changed)
    again = opts[1].fp32_state_dict(model2)
    assert_equal([whole(v) for v in again.values()], [whole(v) for v in changed.values()])


def metrics_are_those_of_the_whole():
    for dtype, options in (
        (torch.float32, {"state_format": "int8", "min_quantized_numel": 0}),
        (torch.bfloat16, {"lr": 1e-3}),
    ):
        both = []
        for model in (build(dtype), sharded(dtype)):
            opt = fusedopt.AdamW(model.parameters(), **options)
            recorder = opt.record_metrics()
            train(model, opt, 0, STEPS)
            assert recorder.steps == STEPS
            both.append(dict(opt.metrics()))
        one, spread = both
        assert one.keys() == spread.keys() and one["grad_norm"] > 0 and one["update_ratio"] > 0
        for name, value in one.items():
            # blocks of codes begin with a shard, so that a few codes differ
            near = 2e-3 if name.startswith(("underflow", "saturated", "update_ratio")) else 1e-6
            assert abs(spread[name] - value) <= near * max(1.0, abs(value)), (name, spread[name], value)


def single_parameters_are_not_stepped():
    model = sharded()
    opt = fusedopt.AdamW(model.parameters())
    set_whole_grads(model, 0)
    first = next(model.parameters())
    with pytest.raises(RuntimeError, match="parameter 0 .*is a DTensor.*Call step"):
        opt.step_parameter(first)
    with pytest.raises(ValueError, match="is a DTensor"):
        fusedopt.offload(opt)
    assert not opt.state


CHECKS = [
    elementwise_rules, precisions, after_a_real_backward_pass, states_are_dtensors, eligibility_is_by_the_whole_size,
    coded_states, trust_ratios, clipping, norms_as_functions, refusals, scaler_agrees_on_overflow,
    parameters_switched_before_the_first_step, plans_are_kept_and_explain, fp32_weights,
    random_bits_differ_between_columns_of_shards, tensor_parallel, metrics_are_those_of_the_whole,
    single_parameters_are_not_stepped, points_beside_the_parameter,
]  # fmt: skip


def test_two_processes():
    run(2, CHECKS)


def test_four_processes():
    """Shards of a quarter: some have no elements."""
    some = (
        elementwise_rules,
        precisions,
        coded_states,
        trust_ratios,
        clipping,
        scaler_agrees_on_overflow,
        metrics_are_those_of_the_whole,
    )
    run(4, [*some, hybrid_meshes, tensor_parallel])
