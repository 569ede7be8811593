"""What torch's tests expect on a GPU: graphs, the fused AMP protocol under a graph, states that cross devices, CPU against
GPU, no memory for a step, a tensor of 2^32 elements. None of it runs without a GPU."""

import copy

import pytest
import torch
from configs import CONFIGS, EVERY, assert_same_bits, each_config, parameters, train

import fusedopt

pytestmark = pytest.mark.gpu
SHAPES = ((40, 130), (7,), (3, 2, 2), ())


def on_gpu(params) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().cuda()) for p in params]


def ready(params, factor: float = 1.0) -> None:
    """The same gradients on both devices: drawn on the CPU."""
    gen = torch.Generator().manual_seed(11)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=gen) * factor).to(p.device, p.dtype)


def warmed_up(opt, steps: int = 3) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(steps):
            opt.step()
    torch.cuda.current_stream().wait_stream(stream)


@each_config(EVERY)
@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_graph_of_a_step_equals_steps(config, form):
    """Parameters (i + 5)^2 and one of 0 dimensions; 3 steps before the capture, 2 replays after it."""
    runs = []
    for captured in (False, True):
        params = [torch.nn.Parameter(torch.full((i + 5, i + 5), 0.5, device="cuda")) for i in range(2)]
        params.append(torch.nn.Parameter(torch.tensor(0.25, device="cuda")))
        opt = config.make(params, capturable=True, lr=0.1, state_format=form)
        ready(params)
        warmed_up(opt)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                opt.step()
            for _ in range(2):
                graph.replay()
        else:
            for _ in range(2):
                opt.step()
        torch.cuda.synchronize()
        runs.append([p.detach() for p in params])
    assert_same_bits(runs[1], runs[0])


@each_config(EVERY)
def test_a_group_that_is_not_capturable_refuses_a_graph(config):
    first, second = (on_gpu(parameters((5, 4))) for _ in range(2))
    opt = config.make([{"params": first, "capturable": True}, {"params": second, "capturable": False}])
    ready([*first, *second])
    warmed_up(opt)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(graph):
        opt.step()
    torch.cuda.synchronize()


@each_config(EVERY)
def test_amp_protocol_under_a_graph(config):
    """found_inf and grad_scale are read on the device: one graph skips, steps, and unscales by what they hold."""
    params, plain = on_gpu(parameters(*SHAPES)), on_gpu(parameters(*SHAPES))
    opt = config.make(params, amp_fused=True, capturable=True)
    other = config.make(plain, capturable=True)
    opt.grad_scale, opt.found_inf = torch.full((1,), 4.0, device="cuda"), torch.ones(1, device="cuda")
    ready(params, 4.0)
    ready(plain)
    warmed_up(opt)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for skipped in (1, 0, 1, 0):
        opt.found_inf.fill_(skipped)
        graph.replay()
        if not skipped:
            other.step()
    torch.cuda.synchronize()
    assert all(int(entry["step"]) == 2 for entry in opt.state.values())
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=3e-6, atol=3e-7)


@each_config(EVERY)
@pytest.mark.parametrize("separate_unscale", [False, True])
def test_scaler_and_autocast(config, separate_unscale):
    """Autocast fp16 with a scaler: the fused protocol trains as the scaler's own unscaling does."""
    losses = []
    for amp_fused in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, 4)).cuda()
        opt = config.make(model.parameters(), amp_fused=amp_fused)
        scaler = torch.amp.GradScaler("cuda", init_scale=128.0)
        x, y = torch.randn(16, 32, device="cuda"), torch.randn(16, 4, device="cuda")
        for step in range(5):
            opt.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = torch.nn.functional.mse_loss(model(x).float(), y)
            scaler.scale(loss * float("inf") if step == 2 else loss).backward()
            if separate_unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            losses.append(loss.item())
        assert scaler.get_scale() == 64.0
    torch.testing.assert_close(torch.tensor(losses[5:]), torch.tensor(losses[:5]), rtol=1e-3, atol=1e-4)
    assert losses[4] < losses[0]


@each_config(EVERY)
@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_states_of_the_cpu_load_on_the_gpu(config, flags):
    """Values move, step counts stay on the CPU unless they are counted on the device; the source stays as it was."""
    params = parameters(*SHAPES)
    opt = config.make(params)
    train(opt, params, 0, 3)
    saved, moved = opt.state_dict(), on_gpu(params)
    kept = copy.deepcopy(saved)
    saved = {**saved, "param_groups": [{**g, **flags} for g in saved["param_groups"]]}
    loaded = config.make(moved, **flags)
    loaded.load_state_dict(saved)
    for p, entry in loaded.state.items():
        for name, value in entry.items():
            where = "cpu" if name == "step" and not flags.get("capturable") else p.device.type
            assert value.device.type == where, name
    for index, entry in kept["state"].items():
        for name, value in entry.items():
            assert torch.equal(saved["state"][index][name], value) and saved["state"][index][name].device.type == "cpu"
    for _ in range(2):
        ready(params)
        ready(moved)
        opt.step()
        loaded.step()
    for p, q in zip(params, moved, strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=1e-4, atol=1e-5)


@each_config(EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gpu_equals_cpu(config, dtype):
    here = parameters(*SHAPES, dtype=dtype)
    there = on_gpu(here)
    scalar_eps = isinstance(config.cls([torch.zeros(1)]).defaults.get("eps"), float)
    changes = {"eps": 0.1} if dtype == torch.float16 and scalar_eps else {}
    one, two = config.make(here, **changes), config.make(there, **changes)
    for _ in range(5):
        ready(here)
        ready(there)
        one.step()
        two.step()
    bound = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for p, q in zip(here, there, strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=bound, atol=bound / 10)


@each_config(EVERY)
def test_dtypes_mixed_in_a_group(config):
    """fp64, fp32, fp16, bf16 and an int64 parameter without a gradient."""
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    params = [torch.nn.Parameter(torch.ones(6, 5, dtype=dtype, device="cuda")) for dtype in kinds]
    counts = torch.nn.Parameter(torch.arange(4, device="cuda"), requires_grad=False)
    opt = config.make([*params, counts])
    for _ in range(3):
        set_grads_on_gpu(params)
        opt.step()
    assert all((p != 1).any() for p in params) and torch.equal(counts.cpu(), torch.arange(4))


def set_grads_on_gpu(params) -> None:
    for p in params:
        p.grad = torch.linspace(-1, 1, p.numel(), device="cuda").view(p.shape).to(p.dtype)


@each_config(CONFIGS)
@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_a_step_needs_no_memory(config, form):
    params = on_gpu(parameters((1200, 500), (300, 1000)))
    opt = config.make(params, state_format=form)
    for _ in range(2):
        ready(params)
        opt.step()
    ready(params)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    opt.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 0.01 * sum(p.nbytes for p in params)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_config(EVERY)
def test_parameters_on_two_gpus(config):
    weight = torch.nn.Parameter(torch.randn(10, 5, device="cuda:0"))
    bias = torch.nn.Parameter(torch.randn(10, device="cuda:1"))
    opt = config.make([weight, bias], lr=config.options["lr"] / 10)
    x = torch.randn(5, device="cuda:0")
    losses = []
    for _ in range(20):
        opt.zero_grad()
        loss = ((weight @ x).to("cuda:1") + bias).square().sum()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 60 * 2**30,
    reason="needs 60 GB of GPU memory",
)
@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_a_tensor_of_more_than_2_to_the_32_elements(form):
    """Every part of it is stepped, and stepped alike: sizes and offsets are 64 bits."""
    n = 2**32 + 8
    p = torch.nn.Parameter(torch.ones(n, dtype=torch.float16, device="cuda"))
    p.grad = torch.full_like(p, 0.5)
    opt = fusedopt.AdamW([p], lr=0.25, weight_decay=0.0, eps=1e-4, state_format=form)
    opt.step()
    torch.cuda.synchronize()
    for place in (0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, n - 1):
        assert abs(p[place].item() - 0.75) < 2e-3, place
    low = min(chunk.min().item() for chunk in p.detach().split(2**28))
    high = max(chunk.max().item() for chunk in p.detach().split(2**28))
    assert low == high == p[0].item()
