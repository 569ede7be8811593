"""The public optimizers on a GPU: against the fp64 reference, clipping, loss scaling, CUDA graphs, launch counts.

The same tests run on the CPU with its backends, so that what is skipped without a GPU is only the device.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import _close, _close_weights, code_numbers

import fusedopt
from fusedopt import masters, states
from fusedopt.backends import cpu
from fusedopt.backends.select import get_backend
from fusedopt.precision import get_precision
from fusedopt.rule import optimizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import gates, gpu_checks  # noqa: E402

LR = 1e-2
SHAPES = ((), (1,), (0,), (7,), (300,), (64, 80), (2048,), (5000,), (3, 41, 50))
RULES = {
    "sgd": {},
    "adam": {},
    "adamw": {"weight_decay": 0.1},
    "lion": {"weight_decay": 0.1, "betas": (0.875, 0.96875)},  # exact in 16 bits: a rounded blend near 0 flips its sign
    "lars": {"momentum": 0.9, "weight_decay": 0.1},
    "lamb": {"weight_decay": 0.1, "clip_grad_norm": None},
    "sgd_sai": {"momentum": 0.9003},  # 0.9 b + 0.1 g of 16-bit numbers lies on many ties
}
RULES |= {
    name: {}
    for name, cls in optimizers().items()
    if name not in (*RULES, "adafactor", "microadam") and not cls.splits_models
}  # matrices: their own tests
STORAGE = (
    *((torch.float32, form, "nearest") for form in fusedopt.list_formats()),
    *((torch.bfloat16, "int8", precision) for precision in fusedopt.list_precisions()),
    (torch.bfloat16, "fp32", "nearest"),
    (torch.bfloat16, "bf16", "nearest"),
    (torch.float16, "fp32", "stochastic"),
    (torch.float16, "int4", "kahan"),
)
HERE = [
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu, id="cuda"),
    pytest.param("cuda", "triton", marks=pytest.mark.gpu, id="triton"),
    pytest.param("cpu", "cpu", marks=pytest.mark.skipif(cpu.native is None, reason="not built"), id="cpu"),
    pytest.param("cpu", "reference", id="reference"),
]
on_each = pytest.mark.parametrize("device, backend", HERE)
on_each_but_the_reference = pytest.mark.parametrize("device, backend", HERE[:-1])


def tensors(seed: int, dtype, device, size: float = 1.0) -> list[torch.Tensor]:
    """The same values on every device; the last is a view that is not 16-byte aligned."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(s, generator=generator).mul(size).to(dtype).to(device) for s in (*SHAPES, (1001,))]
    values[-1] = values[-1][1:]
    return values


def build(device: str, backend: str, rule: str, dtype=torch.float32, **options) -> torch.optim.Optimizer:
    params = [torch.nn.Parameter(t) for t in tensors(0, dtype, device)]
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": LR / 2}]
    return fusedopt.create(
        rule, groups, **{"lr": LR, "backend": backend, "min_quantized_numel": 0, **RULES.get(rule, {}), **options}
    )


def parameters(opt) -> list[torch.nn.Parameter]:
    return [p for group in opt.param_groups for p in group["params"]]


def set_gradients(opt, seed: int, size: float = 0.1) -> None:
    params = parameters(opt)
    for p, g in zip(params, tensors(seed, params[0].dtype, params[0].device, size), strict=True):
        p.grad = g


def advance(opt, steps: int = 1, first: int = 1) -> None:
    for i in range(steps):
        set_gradients(opt, first + i)
        opt.step()


def assert_same(got, want) -> None:
    for a, b in zip(parameters(got), parameters(want), strict=True):
        assert torch.equal(a.cpu(), b.cpu()), f"{tuple(a.shape)}: parameters differ"
        for name, value in want.state[b].items():
            assert torch.equal(got.state[a][name].cpu(), value.cpu()), f"{tuple(a.shape)}: {name} differs"


def _flat(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.cpu().view(-1)


def assert_near(got, want) -> None:
    """Bounds of the harness: 4 ulp in fp32, a neighbour in 16 bits, a neighbouring code in 1 % of the elements."""
    pairs = list(zip(parameters(got), parameters(want), strict=True))
    largest: dict[str, float] = {}
    for _, b in pairs:
        for name, value in want.state[b].items():
            if value.is_floating_point() and value.numel():
                largest[name] = max(largest.get(name, 0.0), float(value.double().abs().max()))
    for a, b in pairs:
        if not b.numel():
            continue
        precision = masters.stored_precision(b, want.state[b])
        kept = [
            SimpleNamespace(param=p.detach().cpu().view(-1), companion=_flat(o.state[p].get(precision.companion)))
            for p, o in ((a, got), (b, want))
        ]
        _close_weights(precision, *kept, 2e-5 * LR)
        signed = {s.name: s.signed for s in want.rule_for(want.param_groups[0]).states}
        for name, value in want.state[b].items():
            if name in want.rule_for(want.param_groups[0]).memory:  # a sum over tensors, whose terms cancel
                torch.testing.assert_close(got.state[a][name].cpu(), value.cpu(), rtol=1e-4, atol=0)
                continue
            mine, value = got.state[a][name].cpu().view(-1), value.cpu().view(-1)
            if name == precision.companion:
                continue
            if value.dtype == torch.uint8:
                form = states.stored_format(want.state[b], name)
                off = code_numbers(form, signed[name], mine) - code_numbers(form, signed[name], value)
                off = off.abs()
                assert off.max() <= 1 and (off > 0).sum() <= max(1, 0.01 * off.numel()), name
            else:
                squares = name.endswith("_sq")
                top = (value.double() * largest[name]).sqrt() if squares else largest[name]
                if name.startswith("critical") and want.state[b]["exp_avg"].dtype != torch.float32:
                    top = (
                        largest.get("exp_avg", largest[name]) * 2.0**-8 / 4.8e-7
                    )  # means of momenta as they are stored: a neighbour of one
                _close(mine, value, 1e-5 * value.double().abs() + 4.8e-7 * top, name)


@pytest.fixture
def exact():
    """The reference backend in fp64 for the length of a test."""
    reference = get_backend("reference")
    reference.dtype = torch.float64
    yield
    reference.dtype = None


@on_each_but_the_reference
@pytest.mark.parametrize("dtype, form, precision", STORAGE, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("rule", RULES)
def test_one_step_against_fp64(rule, dtype, form, precision, device, backend, exact):
    """From the state after two steps, one step with the backend and one with the reference in fp64."""
    start = build("cpu", "reference", rule, dtype, state_format=form, param_precision=precision)
    advance(start, 2)
    pair = []
    for where, who in ((device, backend), ("cpu", "reference")):
        opt = build(where, who, rule, dtype, state_format=form, param_precision=precision)
        with torch.no_grad():
            for p, q in zip(parameters(opt), parameters(start), strict=True):
                p.copy_(q)
        opt.load_state_dict(start.state_dict())
        advance(opt, first=9)
        pair.append(opt)
    assert_near(*pair)


@on_each_but_the_reference
@pytest.mark.parametrize("rule", ["adamw", "lamb"])
def test_clipping(rule, device, backend, exact):
    got, want = (build(d, b, rule, clip_grad_norm=0.5) for d, b in ((device, backend), ("cpu", "reference")))
    advance(got)
    advance(want)
    torch.testing.assert_close(got.grad_norm.cpu().double(), want.grad_norm.double(), rtol=1e-5, atol=0)
    norm = torch.cat([p.grad.double().view(-1).cpu() for p in parameters(got)]).norm()
    assert norm > 0.5
    torch.testing.assert_close(got.grad_norm.cpu().double().view(()), norm, rtol=1e-5, atol=0)
    assert_near(got, want)


@on_each
def test_overflow_skips_the_step(device, backend):
    opt = build(device, backend, "adamw", amp_fused=True, state_format="int8")
    advance(opt, 2)
    before = [p.detach().clone() for p in parameters(opt)]
    states = [{k: v.clone() for k, v in opt.state[p].items()} for p in parameters(opt)]
    set_gradients(opt, 3)
    opt.grad_scale, opt.found_inf = torch.full((1,), 8.0, device=device), torch.ones(1, device=device)
    opt.step()
    for p, old, state in zip(parameters(opt), before, states, strict=True):
        assert torch.equal(p, old)
        for name, value in state.items():
            assert torch.equal(opt.state[p][name].cpu(), value.cpu()), name


@on_each
def test_loss_scale_is_taken_out(device, backend):
    plain = build(device, backend, "adamw")
    scaled = build(device, backend, "adamw", amp_fused=True)
    set_gradients(plain, 1)
    set_gradients(scaled, 1)
    for p in parameters(scaled):
        p.grad = p.grad * 1024
    scaled.grad_scale, scaled.found_inf = torch.full((1,), 1024.0, device=device), torch.zeros(1, device=device)
    plain.step()
    scaled.step()
    for a, b in zip(parameters(scaled), parameters(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * LR)


@on_each
@pytest.mark.parametrize("rule", ["adamw", "lion", "lamb"])
def test_graph_replay_equals_eager(rule, device, backend):
    """Gradients and a tensor learning rate change between replays; steps counted on the device go on."""
    device = torch.device(device)
    options = {"capturable": True, "state_format": "int8", "param_precision": "stochastic"}
    eager, captured = (build(device, backend, rule, torch.bfloat16, **options) for _ in range(2))
    for opt in (eager, captured):
        for group in opt.param_groups:
            group["lr"] = torch.tensor(LR, device=device)
        set_gradients(opt, 1)
        gpu_checks.warm_up(opt, device)
    replay = gpu_checks.Replay(captured, device)
    for i in range(3):
        for opt, step in ((eager, eager.step), (captured, replay)):
            for group in opt.param_groups:
                group["lr"].fill_(LR / (i + 1))
            for p, g in zip(parameters(opt), tensors(5 + i, torch.bfloat16, device, 0.1), strict=True):
                p.grad.copy_(g)
            step()
    assert_same(captured, eager)
    assert all(float(entry["step"]) == 6 for entry in captured.state.values())


@on_each
def test_numbers_live_in_a_graph(device, backend):
    """Learning rate, betas, clip limit and loss scale change between replays without a new capture."""
    device = torch.device(device)
    pair = []
    for _ in range(2):
        betas = tuple(torch.tensor(b, device=device) for b in (0.9, 0.999))
        limit = torch.ones(1, device=device)
        opt = build(device, backend, "adamw", capturable=True, amp_fused=True, betas=betas, clip_grad_norm=limit)
        opt.grad_scale, opt.found_inf = torch.ones(1, device=device), torch.zeros(1, device=device)
        for group in opt.param_groups:
            group["lr"] = torch.tensor(LR, device=device)
        set_gradients(opt, 1)
        gpu_checks.warm_up(opt, device)
        pair.append(opt)
    eager, captured = pair
    replay = gpu_checks.Replay(captured, device)
    for i in range(4):
        for opt, step in ((eager, eager.step), (captured, replay)):
            for group in opt.param_groups:
                group["lr"].fill_(LR / (i + 1))
                group["betas"][0].fill_(0.9 - 0.1 * i)
            opt.clip_grad_norm.fill_(0.1 * (i + 1))
            opt.grad_scale.fill_(2.0**i)
            opt.found_inf.fill_(float(i == 2))
            for p, g in zip(parameters(opt), tensors(5 + i, torch.float32, device, 0.1), strict=True):
                p.grad.copy_(g)
            step()
    assert_same(captured, eager)


@on_each
def test_compiled_step(device, backend):
    """torch.compile around the step, with its CUDA graphs: the bits of an eager step."""
    eager, graph = (build(device, backend, "adamw", capturable=True, state_format="int8") for _ in range(2))
    step = torch.compile(lambda: graph.step(), fullgraph=True, mode="reduce-overhead")
    for i in range(5):
        for opt, do in ((eager, eager.step), (graph, step)):
            set_gradients(opt, 1 + i)
            do()
    assert_same(graph, eager)


@on_each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", fusedopt.list_precisions())
def test_rounding_has_the_same_bits_everywhere(precision, dtype, device, backend):
    """SGD with a power of two as learning rate is the same in fp32 with and without fused multiply-add."""
    if dtype not in get_precision(precision).dtypes:
        pytest.skip(f"{precision} does not keep {dtype}")
    options = {"lr": 2.0**-9, "param_precision": precision, "seed": 0x1234567890ABCDEF}
    got, want = (build(d, b, "sgd", dtype, **options) for d, b in ((device, backend), ("cpu", "reference")))
    for opt in (got, want):
        opt.param_groups[1]["lr"] = 2.0**-7
        advance(opt, 3)
    assert_same(got, want)


@on_each
@pytest.mark.parametrize("clip", gates.CLIPS)
@pytest.mark.parametrize("rule", gates.LAUNCHES)
def test_launches_for_291_tensors(rule, clip, device, backend):
    device = torch.device(device)
    opt = gpu_checks.optimizer(backend, rule, device, 1 << 16, clip_grad_norm=clip)
    assert len(parameters(opt)) == 291
    for _ in range(2):
        opt.step()
    with gpu_checks.no_synchronisation(device):
        opt.step()
    try:
        names = gpu_checks.kernels_of_step(opt, device)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert len(names) == gates.LAUNCHES[rule] + (clip is not None), names


@on_each
def test_gradients_may_move_between_steps(device, backend):
    """New addresses each step reach the device's table before the launch that reads them."""
    moving, still = build(device, backend, "adamw"), build(device, backend, "adamw")
    set_gradients(still, 1)
    kept = []
    for i in range(4):
        set_gradients(moving, 1 + i)
        kept.append([p.grad for p in parameters(moving)])  # keeps addresses from being taken again
        for p, g in zip(parameters(still), tensors(1 + i, torch.float32, device, 0.1), strict=True):
            p.grad.copy_(g)
        moving.step()
        still.step()
    assert_same(moving, still)


@pytest.mark.gpu
def test_other_streams():
    """A step runs on the current stream: gradients written on it just before are seen."""
    stream = torch.cuda.Stream()
    for backend in ("cuda", "triton"):
        got, want = build("cuda", backend, "adamw"), build("cpu", "reference", "adamw")
        set_gradients(got, 1)
        advance(want)
        for p in parameters(got):
            p.grad.mul_(0.5)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            for p in parameters(got):
                p.grad.mul_(2.0)
            got.step()
        stream.synchronize()
        for a, b in zip(parameters(got), parameters(want), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-5 * LR)
