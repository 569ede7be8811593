"""EGN against closed forms and dense fp64 Gauss-Newton matrices; its searches, restarts and refusals."""

import copy
import io
import pickle

import pytest
import torch
from configs import BACKENDS, assert_same_bits, tensors
from torch import nn
from torch.nn import functional as F
from trainer_data import one_thread  # noqa: F401

import fusedopt

F64 = torch.float64


def network(dtype=F64, hidden=6, seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 3)).to(dtype)


def batch(i: int, size=7, dtype=F64, kind="cross_entropy"):
    gen = torch.Generator().manual_seed(100 + i)
    x = torch.randn(size, 5, generator=gen, dtype=F64).to(dtype)
    if kind == "cross_entropy":
        return x, torch.randint(3, (size,), generator=gen)
    return x, torch.randn(size, 3, generator=gen, dtype=F64).to(dtype)


def softplus_loss(outputs, target):
    """A loss that is none of the named ones."""
    return F.softplus(outputs * (1 - 2 * target)).sum()


def flattened(tensors) -> torch.Tensor:
    return torch.cat([x.detach().double().reshape(-1) for x in tensors])


def dense_direction(model, x, y, damping, kind):
    """-(J^T Q J / b + damping)^-1 J^T r / b; J row by row, r and Q from the formulas of each loss. damping: by parameter."""
    params = list(model.parameters())
    out = model(x)
    rows = [torch.autograd.grad(f, params, retain_graph=True, allow_unused=True) for f in out.reshape(-1)]
    J = torch.stack(
        [flattened([torch.zeros_like(p) if g is None else g for g, p in zip(r, params, strict=True)]) for r in rows]
    )
    out, b = out.detach().double(), len(x)
    if kind == "cross_entropy":
        s = out.softmax(1)
        r, blocks = s - F.one_hot(y, 3), [torch.diag(q) - torch.outer(q, q) for q in s]
    elif kind == "mse":
        r, blocks = out - y, [torch.eye(3, dtype=F64)] * b
    else:
        sign = 1 - 2 * y
        s = torch.sigmoid(out * sign)
        r, blocks = sign * s, [torch.diag(q * (1 - q)) for q in s]
    Q = torch.block_diag(*blocks)
    return -torch.linalg.inv(J.T @ Q @ J / b + torch.diag(damping)) @ (J.T @ r.reshape(-1)) / b


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["cross_entropy", "mse", "softplus"])
@pytest.mark.parametrize("size", [2, 7, 40], ids=["6 outputs", "21 outputs", "120 outputs: more than parameters"])
def test_follows_dense_gauss_newton(backend, kind, size):
    """8 steps with the errors fed back, in chunks of samples; two groups."""
    dtype = F64 if backend == "reference" else torch.float32
    model, exact = network(dtype), network(dtype).double()
    ps = list(model.parameters())
    loss = {"softplus": softplus_loss}.get(kind, kind)
    groups = [{"params": ps[:2]}, {"params": ps[2:], "damping": 0.5, "lr": 0.2, "weight_decay": 0.1}]
    opt = fusedopt.EGN(groups, lr=0.4, damping=0.05, loss=loss, chunk=3, backend=backend)
    first = sum(p.numel() for p in ps[:2])
    damping = torch.full((57,), 0.5, dtype=F64).index_fill(0, torch.arange(first), 0.05)
    for i in range(8):
        x, y = batch(i, size, F64, kind)
        y = y.sign().clamp(min=0) if kind == "softplus" else y
        d = dense_direction(exact, x, y, damping, kind)
        before = {"cross_entropy": lambda f, y: F.cross_entropy(f, y), "mse": lambda f, y: (f - y).square().sum() / 2 / len(y),
                  "softplus": lambda f, y: torch.stack([softplus_loss(*z) for z in zip(f, y, strict=True)]).mean()}  # fmt: skip
        want = float(before[kind](exact(x), y).detach())
        got = opt.step(model, x.to(dtype), y.to(dtype) if y.is_floating_point() else y)
        assert float(got) == pytest.approx(want, rel=1e-10 if dtype == F64 else 1e-4)
        with torch.no_grad():
            for k, (p, u) in enumerate(zip(exact.parameters(), d.split([p.numel() for p in ps]), strict=True)):
                p.mul_(1.0 if k < 2 else 1 - 0.2 * 0.1).add_(u.view(p.shape), alpha=0.4 if k < 2 else 0.2)
        bound = 1e-10 if dtype == F64 else 1e-4
        torch.testing.assert_close(flattened(ps), flattened(exact.parameters()), rtol=bound, atol=bound)
    assert all(p.grad is None for p in ps)


@pytest.mark.parametrize("size, width", [(40, 8), (6, 30)], ids=["overdetermined", "underdetermined"])
def test_least_squares_in_one_step(size, width):
    """With damping close to 0 and lr 1: the solution of the normal equations, or the one nearest to the start."""
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(size, width, generator=gen, dtype=F64), torch.randn(size, 2, generator=gen, dtype=F64)
    model = nn.Linear(width, 2, bias=False).double()
    start = model.weight.detach().clone()
    opt = fusedopt.EGN(model.parameters(), damping=1e-10, loss="mse")
    opt.step(model, x, y)
    want = start.T + torch.linalg.lstsq(x, y - x @ start.T, driver="gelsd").solution
    torch.testing.assert_close(model.weight.detach(), want.T, rtol=1e-6, atol=1e-6)


def test_momentum_is_the_debiased_average():
    model, twin = network(), network()
    opt = fusedopt.EGN(model.parameters(), lr=0.3, damping=0.1, momentum=0.8)
    m = 0
    for i in range(12):
        x, y = batch(i)
        d = dense_direction(twin, x, y, torch.full((57,), 0.1, dtype=F64), "cross_entropy")
        opt.step(model, x, y)
        m = 0.8 * m + 0.2 * d
        with torch.no_grad():
            for p, u in zip(twin.parameters(), m.split([p.numel() for p in twin.parameters()]), strict=True):
                p.add_(u.view(p.shape), alpha=0.3 / (1 - 0.8 ** (i + 1)))
        torch.testing.assert_close(flattened(model.parameters()), flattened(twin.parameters()), rtol=1e-10, atol=1e-12)


# What judges steps


def test_line_search_halves_until_the_loss_falls():
    halved = 0
    model = network()
    opt = fusedopt.EGN(model.parameters(), lr=8.0, damping=1e-2, line_search=True)
    for i in range(15):
        x, y = batch(i)
        start, before = flattened(model.parameters()), float(F.cross_entropy(model(x), y).detach())
        d = dense_direction(model, x, y, torch.full((57,), 1e-2, dtype=F64), "cross_entropy")
        slope = 8.0 * float(d @ flattened(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))))
        opt.step(model, x, y)
        step = flattened(model.parameters()) - start
        factor = float(step @ d) / float(d @ d) / 8.0
        k = round(-torch.tensor(factor).log2().item())
        torch.testing.assert_close(step, 8.0 * 0.5**k * d, rtol=1e-6, atol=1e-9)
        assert float(F.cross_entropy(model(x), y).detach()) <= before + 1e-4 * 0.5**k * slope
        halved += k > 0
        if k:  # twice as far would not have done
            with torch.no_grad():
                at = dict(zip([n for n, _ in model.named_parameters()], (start + 8.0 * 0.5 ** (k - 1) * d).split(
                    [p.numel() for p in model.parameters()]), strict=True))  # fmt: skip
                at = {n: v.view(p.shape) for (n, p), v in zip(model.named_parameters(), at.values(), strict=True)}
                assert (
                    float(F.cross_entropy(torch.func.functional_call(model, at, (x,)), y))
                    > before + 1e-4 * 0.5 ** (k - 1) * slope
                )
    assert halved > 2


def test_a_search_that_finds_nothing_moves_nothing():
    """The slope of this loss is not its own."""

    class Lies(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x * 1.0

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            return -g

    model = nn.Linear(5, 3).double()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return Lies.apply(self.inner(x))

    outer = Wrapped()
    opt = fusedopt.EGN(outer.parameters(), line_search=True, adaptive_damping=True, damping=0.25, weight_decay=0.1)
    kept = flattened(outer.parameters())
    opt.step(outer, *batch(0))
    assert torch.equal(flattened(outer.parameters()), kept) and opt.param_groups[0]["damping"] == 0.5


def test_adaptive_damping_follows_the_gain():
    """A quadratic loss keeps every promise."""
    x, y = batch(0, 30, kind="mse")
    model = nn.Linear(5, 3).double()
    groups = [{"params": [model.weight]}, {"params": [model.bias], "damping": 1e-3, "lr": 0.7}]
    opt = fusedopt.EGN(groups, lr=1.9, damping=1e-6, loss="mse", adaptive_damping=True)
    opt.step(model, x, y)
    assert [g["damping"] for g in opt.param_groups] == [0.5e-6, 0.5e-3]
    model = network()
    opt = fusedopt.EGN(model.parameters(), damping=1e-3, adaptive_damping=True)
    seen = set()
    for i in range(20):
        x, y = batch(i, 10)
        before = opt.param_groups[0]["damping"]
        start = flattened(model.parameters())
        d = dense_direction(model, x, y, torch.full((57,), before, dtype=F64), "cross_entropy")
        loss = float(F.cross_entropy(model(x), y).detach())
        g = flattened(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())))
        opt.step(model, x, y)
        fall = loss - float(F.cross_entropy(model(x), y).detach())
        promised = -float(g @ d) - 0.5 * (float(-g @ d) - before * float(d @ d))  # d^T G d = -g d - damping |d|^2
        gain = fall / promised
        want = before * (0.5 if gain > 0.75 else 1.0 if gain >= 0.25 else 2.0)
        assert opt.param_groups[0]["damping"] == want and not torch.equal(start, flattened(model.parameters()))
        seen.add(want / before)
    assert seen == {0.5, 1.0, 2.0}


# Models


class Odd(nn.Module):
    """Tied weights, a frozen tensor, a buffer, one that nothing depends on, and two inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 0.5, 1.0]), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, tokens, offset):
        return self.head(self.norm(self.table(tokens).mean(1) * self.scale + offset))


def test_models_with_tied_frozen_and_unused_tensors():
    model = Odd().double().eval()
    model.norm.running_var.fill_(0.7)
    gen = torch.Generator().manual_seed(0)
    tokens, offset = torch.randint(6, (5, 3), generator=gen), torch.randn(5, 4, generator=gen, dtype=F64)
    y = torch.randint(6, (5,), generator=gen)
    opt = fusedopt.EGN(model.parameters(), lr=0.5, damping=0.1)
    live = [p for p in model.parameters() if p.requires_grad]
    rows = [
        torch.autograd.grad(f, live, retain_graph=True, allow_unused=True) for f in model(tokens, offset).reshape(-1)
    ]
    J = torch.stack(
        [flattened([torch.zeros_like(p) if g is None else g for g, p in zip(r, live, strict=True)]) for r in rows]
    )
    s = model(tokens, offset).detach().softmax(1)
    Q = torch.block_diag(*[torch.diag(q) - torch.outer(q, q) for q in s])
    r = (s - F.one_hot(y, 6)).reshape(-1)
    d = -torch.linalg.inv(J.T @ Q @ J / 5 + 0.1 * torch.eye(J.shape[1], dtype=F64)) @ (J.T @ r) / 5
    want = flattened(live) + 0.5 * d
    opt.step(model, (tokens, offset), y)
    torch.testing.assert_close(flattened(live), want, rtol=1e-10, atol=1e-12)
    assert torch.equal(model.unused, torch.ones(3, dtype=F64)) and model.head.weight is model.table.weight
    assert torch.equal(model.scale, torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=F64))
    assert int(model.norm.num_batches_tracked) == 0
    model.train()
    with pytest.raises(ValueError, match="'norm' is batch normalisation in training mode"):
        opt.step(model, (tokens, offset), y)


def test_dropout_draws_for_each_sample():
    model = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    opt = fusedopt.EGN(model.parameters(), lr=0.1, damping=0.1)
    assert float(opt.step(model, *batch(0, dtype=torch.float32))) > 0
    searching = fusedopt.EGN(model.parameters(), line_search=True)
    with pytest.raises(ValueError, match="'1' is dropout in training mode"):
        searching.step(model, *batch(0, dtype=torch.float32))
    searching.step(model.eval(), *batch(0, dtype=torch.float32))


def test_convolutions_and_attention():
    torch.manual_seed(0)
    image = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )
    text = nn.Sequential(
        nn.Embedding(9, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.Flatten(), nn.Linear(32, 3)
    )
    for model, x in ((image, torch.randn(12, 1, 8, 8)), (text, torch.randint(9, (12, 4)))):
        opt, y = fusedopt.EGN(model.parameters(), damping=1e-2, line_search=True), torch.randint(3, (12,))
        losses = []
        for i in range(8):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=i % 2 == 1):
                losses.append(float(opt.step(model, x, y)))
        assert losses[-1] < 0.1 * losses[0]


def test_models_that_cannot_be_vectorised():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.GRU(5, 3, batch_first=True)

        def forward(self, x):
            return self.cells(x)[0][:, -1]

    model = Recurrent()
    kept = flattened(model.parameters())
    with pytest.raises(RuntimeError, match="torch.func takes no Jacobian of Recurrent"):
        fusedopt.EGN(model.parameters()).step(model, torch.randn(4, 6, 5), torch.tensor([0, 1, 2, 0]))
    assert torch.equal(flattened(model.parameters()), kept)


@pytest.mark.parametrize("precision", ["nearest", "stochastic", "split32"])
def test_bf16_models(precision):
    model = network(torch.bfloat16)
    x, y = batch(0, 30, torch.bfloat16)
    opt = fusedopt.EGN(model.parameters(), lr=0.3, damping=0.1, momentum=0.5, param_precision=precision)
    losses = [float(opt.step(model, x, y)) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0] and all(p.dtype == torch.bfloat16 for p in model.parameters())


# Surroundings


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"line_search": True, "adaptive_damping": True}])
def test_resumes_copies_and_schedules(options):
    def step(model, opt, schedule, i):
        opt.step(model, *batch(i, dtype=torch.float32))
        schedule.step()

    def scheduled(opt):
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 0.9**i)

    model, other = network(torch.float32), network(torch.float32)
    opt = fusedopt.EGN(model.parameters(), lr=1.5, damping=0.01, **options)
    schedule = scheduled(opt)
    for i in range(5):
        step(model, opt, schedule, i)
    other.load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save([opt.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    resumed = fusedopt.EGN(other.parameters(), lr=7.0, damping=3.0, **options)
    again = scheduled(resumed)
    for target, saved in zip((resumed, again), torch.load(file, weights_only=True), strict=True):
        target.load_state_dict(saved)
    deep, deep_opt = copy.deepcopy((model, opt))
    pickled, pickled_opt = pickle.loads(pickle.dumps((model, opt)))
    for i in range(5, 9):
        rate = opt.param_groups[0]["lr"]
        step(model, opt, schedule, i)
        step(other, resumed, again, i)
        for net, copied in ((deep, deep_opt), (pickled, pickled_opt)):
            copied.param_groups[0]["lr"] = rate
            copied.step(net, *batch(i, dtype=torch.float32))
    for net, o in ((other, resumed), (deep, deep_opt), (pickled, pickled_opt)):
        assert_same_bits(tensors(o, list(net.parameters())), tensors(opt, list(model.parameters())))
        assert o.param_groups[0]["damping"] == opt.param_groups[0]["damping"]


def test_what_cannot_be_stepped_changes_nothing():
    model = network(torch.float32)
    opt = fusedopt.EGN(model.parameters(), momentum=0.9)
    x, y = batch(0, dtype=torch.float32)
    opt.step(model, x, y)
    kept = tensors(opt, list(model.parameters()))
    bad = x.clone()
    bad[2, 1] = float("nan")
    with pytest.raises(RuntimeError, match="not finite.*Nothing has been changed"):
        opt.step(model, bad, y)
    with pytest.raises(ValueError, match="no parameter of the model"):
        opt.step(network(torch.float32), x, y)
    for arguments in ((), (lambda: None,), (x,)):
        with pytest.raises(ValueError, match="needs all three"):
            opt.step(*arguments)
    with pytest.raises(ValueError, match="needs all three"):
        opt.step(model, x, y, closure=lambda: None)
    for inputs, targets in ((x, None), (x[:3], y), (x[:0], y[:0]), (x, torch.tensor(1))):
        with pytest.raises(ValueError, match="as many samples"):
            opt.step(model, inputs, targets)
    with pytest.raises(RuntimeError, match="no parameter steps alone"):
        opt.step_parameter(model[0].weight)
    with pytest.raises(RuntimeError, match="no parameter steps alone"):
        opt.step_param(model[0].weight)
    assert_same_bits(tensors(opt, list(model.parameters())), kept)


def test_refused_options():
    params = list(network().parameters())
    for options in (
        {"damping": 0.0},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"chunk": 0},
        {"loss": "l1"},
        {"lr": -1.0},
    ):
        with pytest.raises(ValueError, match="nvalid"):
            fusedopt.EGN(params, **options)
    for name in ("amp_fused", "capturable", "maximize", "differentiable"):
        with pytest.raises(ValueError, match=f"EGN: {name}=True"):
            fusedopt.EGN(params, **{name: True})
    with pytest.raises(ValueError, match="momentum goes elsewhere"):
        fusedopt.EGN(params, momentum=0.5, line_search=True)
    opt = fusedopt.EGN(params, adaptive_damping=True)
    with pytest.raises(ValueError, match="momentum goes elsewhere"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "momentum": 0.5})


def test_a_step_that_only_makes_states():
    """torch.distributed.checkpoint makes them with lr 0, zero gradients and no arguments."""
    model = network(torch.float32)
    opt = fusedopt.EGN(model.parameters(), lr=0.0, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step(closure=None)
    assert all(float(opt.state[p]["step"]) == 0 and "momentum_buffer" in opt.state[p] for p in model.parameters())


def test_trains_faster_than_sgd():
    """Losses of all samples after 25 steps of mini-batches, and of the whole; SGD at the best of its rates."""
    gen = torch.Generator().manual_seed(0)
    z = torch.randn(256, 10, generator=gen)
    x, y = z * torch.logspace(0, -1.5, 10), (z @ torch.randn(10, 3, generator=gen)).argmax(1)

    def run(make, step, size):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 3))
        opt = make(model.parameters())
        for i in range(25):
            pick = torch.randperm(256, generator=torch.Generator().manual_seed(i))[:size]
            step(opt, model, x[pick], y[pick])
        return float(F.cross_entropy(model(x), y).detach())

    def sgd_step(opt, model, x, y):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()

    for size, many in (
        (64, [{"lr": 0.5}, {"lr": 0.5, "momentum": 0.5}]),
        (256, [{"line_search": True, "adaptive_damping": True}]),
    ):
        rates = (0.01, 0.03, 0.1, 0.3, 1.0)
        best = min(run(lambda ps, lr=lr: fusedopt.SGD(ps, lr=lr, momentum=0.9), sgd_step, size) for lr in rates)
        for options in many:
            mine = run(lambda ps, o=options: fusedopt.EGN(ps, damping=1e-2, chunk=64, **o), fusedopt.EGN.step, size)
            assert mine < 0.7 * best, (options, mine, best)


def test_sharded_parameters_are_refused():
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Linear(4, 4)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model.weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh))
        with pytest.raises(RuntimeError, match="parameter 0 'weight' .* is a DTensor"):
            fusedopt.EGN(model.parameters(), loss="mse").step(model, torch.ones(2, 4), torch.ones(2, 4))
    finally:
        dist.destroy_process_group()
