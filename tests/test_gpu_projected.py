"""Projected and factored optimizers on a GPU: against the reference on the same device, overflow, CUDA graphs, no waiting.

The same tests run on the CPU with the interpreter of Triton and with the native backend, for a part of the cases; there what
would make the host wait is found among the dispatched operations.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from test_gpu_matrix import CUDA, NATIVE, SMALL, TRITON
from waits import NoWaiting

import fusedopt
from fusedopt.weights import Int8Weight

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import gpu_checks  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
NEVER = 10**6
SHAPES = ((48, 64), (67, 35), (48,), (6, 64))
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
    "subset_norm": fusedopt.SubsetNorm(),
    "subset_heuristic": fusedopt.SubsetNorm("heuristic"),
    "subspace_momentum": fusedopt.SubspaceMomentum(rank=4, update_every=3),
    "subspace_subset": fusedopt.SubspaceMomentum(rank=4, update_every=3, subset_size=-1),
    "conda": fusedopt.Conda(update_every=3),
}
# The same without refreshes after the first step; a new selection of cosine columns needs no answer from the device
STEADY = {
    "galore": fusedopt.GaLore(8, NEVER, stagger=False),
    "galore_left": fusedopt.GaLore(8, NEVER, stagger=False, side="left"),
    "qgalore": fusedopt.QGaLore(8, NEVER, stagger=False),
    "dct": fusedopt.DCT(8),
    "dct_feedback": fusedopt.DCT(8, NEVER, error_feedback="int4"),
    "frugal": fusedopt.Frugal(0.25, NEVER, stagger=False),
    "frugal_sgd": fusedopt.Frugal(0.25, NEVER, residual="sgd", stagger=False),
    "frugal_columns": fusedopt.Frugal(0.25, NEVER, method="columns", stagger=False),
    "apollo": fusedopt.Apollo(8),
    "apollo_mini": fusedopt.ApolloMini(),
    "subset_norm": fusedopt.SubsetNorm(),
    "subspace_momentum": fusedopt.SubspaceMomentum(rank=4, update_every=NEVER),
    "conda": fusedopt.Conda(update_every=NEVER),
}
ALONE = ("adafactor", "adafactor_momentum", "microadam")
on_each = pytest.mark.parametrize("device, backend", (CUDA, TRITON, SMALL, NATIVE))


def cells(what: str, values, interpreted=None, native=None):
    """Parametrises over `what` and where: all values on a GPU, some (None: all) on the CPU."""
    out = []
    for place, some in ((CUDA, None), (TRITON, None), (SMALL, interpreted), (NATIVE, native)):
        for value in values:
            if some is None or value in some:
                value = value if isinstance(value, tuple) else (value,)
                name = "-".join(map(str, (*value, place.id)))
                out.append(pytest.param(*value, *place.values, marks=place.marks, id=name))
    return pytest.mark.parametrize(f"{what}, device, backend", out)


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def model(device, dtype=F32) -> list[torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype).to(device)) for s in SHAPES]


def gradients(opt, step: int) -> None:
    """The same values on every device, into the same tensors at every step."""
    gen = torch.Generator().manual_seed(1000 + step)
    for p in parameters(opt):
        values = torch.randn(p.shape, generator=gen)
        if p.grad is None:
            p.grad = torch.empty(p.shape, dtype=p.dtype, device=p.device)
        p.grad.copy_(values)


def parameters(opt) -> list[torch.nn.Parameter]:
    return [p for group in opt.param_groups for p in group["params"]]


def advance(opt, first: int, last: int) -> None:
    for step in range(first, last):
        gradients(opt, step)
        opt.step()


def build(name, device, backend, dtype=F32, **options):
    """name: of STEADY, a factored or sparse optimizer, or a projection."""
    params = model(device, dtype)
    if name == "microadam":
        sizes = {"block": 512, "error_block": 128, "density": 0.05}
        return fusedopt.MicroAdam(params, lr=0.01, backend=backend, **sizes, **options)
    if isinstance(name, str) and name.startswith("adafactor"):
        more = {"beta1": 0.9} if name.endswith("momentum") else {}
        return fusedopt.Adafactor(params, backend=backend, weight_decay=0.1, **more, **options)
    projection = STEADY[name] if isinstance(name, str) else name
    options = {"lr": 0.01, "min_quantized_numel": 16, "weight_decay": 0.1, **options}
    return fusedopt.AdamW(params, projection=projection, backend=backend, **options)


def apart(a, b) -> torch.Tensor:
    pairs = zip(parameters(a), parameters(b), strict=True)
    return torch.cat([(x.detach().double() - y.detach().double()).abs().view(-1).cpu() for x, y in pairs])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Also where both are no numbers."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def assert_same(a, b) -> None:
    for x, y in zip(parameters(a), parameters(b), strict=True):
        assert torch.equal(x, y), f"{tuple(x.shape)}: parameters differ"
        for name, value in b.state[y].items():
            assert same_bits(a.state[x][name], value), f"{tuple(x.shape)}: {name} differs"


def steady(device: str, opt):
    """A context in which nothing may wait for the device."""
    if device == "cuda":
        return gpu_checks.no_synchronisation(torch.device(device))
    host = [v for entry in opt.state.values() for k, v in entry.items() if k in ("step", "schedule")]
    return NoWaiting(host)


# Against the reference on the same device


CHANGES = {"plain": {}, "clip": {"clip_grad_norm": 0.5, "maximize": True}, "capturable": {"capturable": True}}


@cells(
    "name, change",
    [(name, change) for name in PROJECTIONS for change in CHANGES],
    [(n, "plain") for n in ("galore_left", "qgalore", "frugal", "frugal_columns", "apollo")],
    [(n, "clip") for n in PROJECTIONS],
)
def test_steps_agree_with_the_reference(name, change, device, backend):
    """Six steps with a refresh in between: a subspace that turns by an fp32 rounding turns the update by as much."""
    projection = PROJECTIONS[name]
    mine, reference = (build(projection, device, b, **CHANGES[change]) for b in (backend, "reference"))
    for opt in (mine, reference):
        advance(opt, 0, 6)
    moved = apart(mine, build(projection, device, backend)).max()
    assert apart(mine, reference).max() < 5e-4 * moved and moved > 1e-2


@cells(
    "name, precision",
    [(name, precision) for name in PROJECTIONS for precision in ("nearest", "stochastic", "split24")],
    [("galore", "stochastic")],
    [(n, "stochastic") for n in ("galore", "frugal", "frugal_columns", "apollo", "conda")],
)
def test_bf16_steps_agree_with_the_reference(name, precision, device, backend):
    """Weights may be a neighbour apart, and rounded directions a little more; of FRUGAL's residuals a few change their sign."""
    projection, options = PROJECTIONS[name], {"param_precision": precision, "state_format": "int8"}
    mine, reference = (build(projection, device, b, BF16, **options) for b in (backend, "reference"))
    for opt in (mine, reference):
        advance(opt, 0, 6)
    off = apart(mine, reference)
    assert off.mean() < 1.5e-3 and off.max() < 0.1
    assert apart(mine, build(projection, device, backend, BF16)).mean() > 5 * off.mean()


@cells(
    "name, change",
    [(name, change) for name in ALONE for change in CHANGES],
    [("adafactor", "plain"), ("microadam", "plain")],
    [(name, "clip") for name in ALONE],
)
def test_factored_and_sparse_steps_agree_with_the_reference(name, change, device, backend):
    mine, reference = (build(name, device, b, **CHANGES[change]) for b in (backend, "reference"))
    for opt in (mine, reference):
        advance(opt, 0, 6)
    assert apart(mine, reference).max() < 3e-5
    assert apart(mine, build(name, device, backend)).max() > 1e-3


@cells("name", ("none", "galore", "qgalore", "dct", "frugal", "apollo"), ("none", "qgalore"))
def test_int8_weights_agree_with_the_reference(name, device, backend):
    opts, projection = [], PROJECTIONS.get(name)
    for who in (backend, "reference"):
        weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).to(device)
        p = torch.nn.Parameter(Int8Weight.from_float(weight))
        opts.append(fusedopt.AdamW([p], lr=0.01, projection=projection, backend=who))
        start = p.detach().dequantize()
        for step in range(6):
            values = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            p.grad = values.to(device)
            opts[-1].step()
    (mine,), (reference,) = map(parameters, opts)
    unit = reference.scale.max()
    off = (mine.dequantize() - reference.dequantize()).abs()
    assert off.max() < 2.5 * unit and (off > 0.1 * unit).float().mean() < 0.05
    assert (reference.dequantize() - start).abs().mean() > 2 * off.mean()


SIDES = [(side, dtype) for side in ("left", "right") for dtype in (F32, BF16)]


@cells("side, dtype", SIDES, SIDES[:1])
def test_projected_linear(side, dtype, device, backend):
    """Gradients that are projected in the backward pass, against the same steps with full ones."""
    results = []
    for early in (True, False):
        layer = torch.nn.Linear(64, 48, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(48, 64, generator=torch.Generator().manual_seed(0)))
        layer = layer.to(device, dtype)
        projection = fusedopt.GaLore(8, NEVER, 1.0, side=side, method="random", stagger=False)
        opt = fusedopt.AdamW(layer.parameters(), lr=0.01, projection=projection, backend=backend)
        if early:
            fusedopt.projected_linear(layer, opt)
        for step in range(4):
            for part in range(2):
                gen = torch.Generator().manual_seed(10 * step + part)
                x, y = torch.randn(2, 16, 64, generator=gen)[:, :, :64].to(device, dtype)
                layer(x).mul(y[:, :48]).sum().backward()
            assert (layer.weight.grad is None) == early
            opt.step()
            opt.zero_grad()
        results.append(layer.weight.detach().double())
    assert (results[0] - results[1]).abs().max() < (1e-4 if dtype == F32 else 0.05)


# Overflow, graphs, waiting


@cells("name", (*STEADY, *ALONE), ("galore", "frugal", "microadam"))
def test_overflow_is_skipped_on_the_device(name, device, backend):
    opt = build(name, device, backend, amp_fused=True, capturable=True)
    opt.grad_scale, opt.found_inf = torch.full((1,), 8.0, device=device), torch.zeros(1, device=device)
    advance(opt, 0, 3)
    kept = [[p.detach().clone(), *(v.clone() for v in opt.state[p].values())] for p in parameters(opt)]
    for p in parameters(opt):
        p.grad.fill_(float("inf"))
    opt.found_inf.fill_(1.0)
    with steady(device, opt) if backend != "cpu" else contextlib.nullcontext():
        opt.step()
    for p, old in zip(parameters(opt), kept, strict=True):
        now = [p.detach(), *opt.state[p].values()]
        names = ["parameter", *opt.state[p]]
        for what, a, b in zip(names, now, old, strict=True):
            assert same_bits(a, b), f"{tuple(p.shape)}: {what}"
    opt.found_inf.zero_()
    advance(opt, 9, 10)
    assert not torch.equal(parameters(opt)[0], kept[0][0])


@cells(
    "name, dtype, capturable",
    [(n, dtype, capturable) for n in (*STEADY, *ALONE) for dtype in (F32, BF16) for capturable in (False, True)],
    [(n, BF16, False) for n in ("galore", "qgalore", "frugal")],
    [(n, dtype, dtype == F32) for n in (*STEADY, *ALONE) for dtype in (F32, BF16)],
)
def test_nothing_waits_in_a_steady_step(name, dtype, capturable, device, backend):
    opt = build(name, device, backend, dtype, capturable=capturable, clip_grad_norm=0.5)
    advance(opt, 0, 3)
    gradients(opt, 3)
    with steady(device, opt):
        opt.step()


@pytest.mark.parametrize(
    "work", (lambda t: t.sum().item(), lambda t: t[t > 0], lambda t: t.clone().__setitem__(t > 0, 1))
)
def test_the_watch_sees_what_waits(work):
    t = torch.ones(3)
    with pytest.raises(RuntimeError, match="waits for the device"), NoWaiting():
        work(t)
    with NoWaiting([t]):
        assert t[0].item() == 1


CAPTURED = [n for n in (*STEADY, *ALONE) if not n.startswith("apollo")]


@cells("name, dtype", [(n, dtype) for n in CAPTURED for dtype in (F32, BF16)], [("galore", BF16)],
       [(n, BF16) for n in CAPTURED])  # fmt: skip
def test_graph_replay_equals_eager(name, dtype, device, backend):
    """The first step, with its refresh, is eager; gradients change between replays, and steps are counted on the device.
    APOLLO draws its projector in every step, which CUDA refuses to capture."""
    where, options = torch.device(device), {"param_precision": "stochastic"}
    eager, captured = (build(name, device, backend, dtype, capturable=True, **options) for _ in range(2))
    for opt in (eager, captured):
        gradients(opt, 0)
        gpu_checks.warm_up(opt, where)
    replay = gpu_checks.Replay(captured, where)
    for i in range(4):
        for opt, step in ((eager, eager.step), (captured, replay)):
            gradients(opt, 5 + i)
            step()
    assert_same(captured, eager)
    assert {float(entry["step"]) for entry in captured.state.values()} == {gpu_checks.WARM_UP + 4.0}


@pytest.mark.parametrize("device, backend", (CUDA, TRITON, NATIVE))
def test_one_launch_of_directions_and_no_waiting_for_many(device, backend):
    """The 291 tensors of Llama 2 7B, scaled down."""
    where, projection = torch.device(device), fusedopt.GaLore(4, NEVER, method="random")
    opt = gpu_checks.optimizer(backend, "adamw", where, 1 << 16, projection=projection)
    for _ in range(2):
        opt.step()
    with steady(device, opt):
        opt.step()
    if device == "cpu":
        assert sorted(gpu_checks.kernels_of_step(opt, where)) == ["direction", "fused"]
    assert [b["phases"] for b in opt.plan().buckets] == [["direction"], ["fused"]]
