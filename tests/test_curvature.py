"""Hutchinson's estimate of the Hessian's diagonal, and the steps, restarts and refusals of the rules that read it."""

import copy
import io
import math

import pytest
import torch
from configs import BACKENDS, assert_same_bits, parameters, set_grads, tensors

import fusedopt
from fusedopt.curvature import EstimatesHessian, signs
from fusedopt.rule import optimizers

pytestmark = pytest.mark.own_loss
CLASSES = [
    (fusedopt.AdaHessian, {"lr": 0.05}),
    (fusedopt.OASIS, {"lr": 0.05, "betas": (0.9, 0.7), "truncation": 0.3}),
    (fusedopt.SANIAHessian, {"beta2": 0.7, "eps": 0.3}),
    (fusedopt.DASA, {"initial_rate": 0.05, "beta2": 0.7, "truncation": 0.3}),
]
SHARED = (fusedopt.SANIAHessian, fusedopt.DASA)  # have numbers of the whole model, so no part of it steps by itself
each_class = pytest.mark.parametrize("cls, options", CLASSES, ids=lambda x: getattr(x, "__name__", None))
each_backend = pytest.mark.parametrize("backend", BACKENDS)
F64 = torch.float64


def step(opt, loss=None) -> None:
    opt.step(loss=1.0 if loss is None else loss) if isinstance(opt, fusedopt.SANIAHessian) else opt.step()


def network(dtype=torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).to(dtype)


def loss_of(model, i: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(100 + i)
    x, y = torch.randn(16, 6, generator=gen, dtype=F64), torch.randn(16, 1, generator=gen, dtype=F64)
    p = next(model.parameters())
    return (model(x.to(p.dtype)) - y.to(p.dtype)).square().mean()


def hessian(model, i: int) -> torch.Tensor:
    """The whole Hessian in fp64, over all parameters in a row."""
    shapes = [p.shape for p in model.parameters()]
    names = [n for n, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]

    def of_flat(flat):
        parts = [x.view(s) for x, s in zip(flat.split(sizes), shapes, strict=True)]
        gen = torch.Generator().manual_seed(100 + i)
        x, y = torch.randn(16, 6, generator=gen, dtype=F64), torch.randn(16, 1, generator=gen, dtype=F64)
        out = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,))
        return (out - y).square().mean()

    return torch.autograd.functional.hessian(
        of_flat, torch.cat([p.detach().double().flatten() for p in model.parameters()])
    )


def test_every_class_takes_part():
    assert {c for c in optimizers().values() if issubclass(c, EstimatesHessian)} == {c for c, _ in CLASSES}


def test_signs():
    p = torch.zeros(100, 1000)
    z = signs(p, 1, 2, 3, 0)
    assert z.shape == p.shape and set(z.unique().tolist()) == {-1.0, 1.0} and abs(float(z.mean())) < 0.01
    others = [signs(p, *key) for key in ((2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1))]
    for other in others:
        assert abs(float((z * other).mean())) < 0.01
    assert abs(float((z.view(-1)[1:] * z.view(-1)[:-1]).mean())) < 0.01
    assert torch.equal(signs(p.view(1000, 100).t(), 1, 2, 3, 0), z)  # the layout in memory does not matter
    assert torch.equal(signs(p, 1, 2, torch.tensor(3.0), 0), z)
    assert signs(torch.zeros(()), 1, 2, 3, 0).shape == () and signs(torch.zeros(0), 1, 2, 3, 0).numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_exact_where_the_hessian_is_diagonal(dtype):
    (x, y) = parameters((7, 5), (4,), dtype=dtype)
    opt = fusedopt.OASIS([x, y])
    loss = (x.pow(4)).sum() - y.cos().sum()
    opt.estimate_hessian(loss)
    torch.testing.assert_close(opt.state[x]["hessian"], 12 * x.detach().square(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(opt.state[y]["hessian"], y.detach().cos(), rtol=1e-6, atol=1e-6)
    assert opt.state[x]["hessian"].dtype == dtype


def test_the_mean_of_samples_nears_the_diagonal():
    model = network(F64)
    opt = fusedopt.OASIS(model.parameters())
    whole = hessian(model, 0)
    far = []
    for samples in (1, 256):
        opt.load_state_dict(fusedopt.OASIS(model.parameters()).state_dict())
        opt.state.clear()
        opt.estimate_hessian(loss_of(model, 0), samples)
        got = torch.cat([opt.state[p]["hessian"].flatten() for p in model.parameters()])
        far.append(float((got - whole.diag()).norm()))
    spread = math.sqrt(2) * float((whole - whole.diag().diag()).norm())  # of one sample, at most
    assert far[1] < 2 * spread / math.sqrt(256) < far[0]


@pytest.mark.parametrize("samples", [1, 3])
def test_an_estimate_is_z_times_hz(samples):
    model = network(F64)
    opt = fusedopt.OASIS(model.parameters(), seed=7)
    whole, params = hessian(model, 0), list(model.parameters())
    opt.estimate_hessian(loss_of(model, 0), samples)
    want = 0
    for sample in range(samples):
        z = torch.cat([signs(p, 7, i, 1, sample).flatten() for i, p in enumerate(params)])
        want = want + z * (whole @ z) / samples
    got = torch.cat([opt.state[p]["hessian"].flatten() for p in params])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_gradients_as_backward_leaves_them():
    one, two = network(), network()
    opt = fusedopt.AdaHessian(one.parameters())
    for i in range(2):  # the second is added
        opt.estimate_hessian(loss_of(one, i))
        loss_of(two, i).backward()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
        assert not p.grad.requires_grad and p.grad.grad_fn is None and not opt.state[p]["hessian"].requires_grad
    a, frozen, unused = parameters((3,), (3,), (2,))
    frozen.requires_grad_(False)
    opt = fusedopt.AdaHessian([a, frozen, unused])
    opt.estimate_hessian((a * a * frozen.detach()).sum())
    assert frozen.grad is None and unused.grad is None and unused not in opt.state
    opt.step()


def test_strided_parameters():
    base = torch.randn(6, 4).t()
    p = torch.nn.Parameter(base)
    opt = fusedopt.OASIS([p])
    opt.estimate_hessian((p**3).sum())
    assert p.grad.stride() == p.stride()
    torch.testing.assert_close(opt.state[p]["hessian"], 6 * p.detach())
    opt.step()


def test_convolutions_are_averaged_over_their_window():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 8, 8)
    found = []
    for averaging in (True, False):
        opt = fusedopt.AdaHessian(conv.parameters(), spatial_averaging=averaging)
        opt.estimate_hessian(conv(x).tanh().square().mean())
        found.append([opt.state[p]["hessian"].clone() for p in conv.parameters()])
    (mean, bias), (each, same) = found
    torch.testing.assert_close(mean, each.abs().mean((2, 3), keepdim=True).expand_as(each))
    assert torch.equal(bias, same) and (mean >= 0).all() and float(each.std((2, 3)).min()) > 0


def by_hand(cls, options, model, i: int, t: int, kept: dict) -> None:
    """One step in fp64 from the papers, with the whole Hessian and the signs of the package."""
    params = list(model.parameters())
    z = torch.cat([signs(p, 0, k, t, 0).flatten() for k, p in enumerate(params)])
    new = z * (hessian(model, i) @ z)
    loss = loss_of(model, i)
    g = torch.cat([x.flatten() for x in torch.autograd.grad(loss, params)])
    b1, b2 = options.get("betas", (0.9, 0.999))
    if cls is fusedopt.AdaHessian:
        kept["v"] = b2 * kept.get("v", 0) + (1 - b2) * new**2
        kept["m"] = b1 * kept.get("m", 0) + (1 - b1) * g
        u = kept["m"] / (1 - b1**t) / ((kept["v"] / (1 - b2**t)).sqrt() + 1e-4)
    else:
        b2 = options.get("beta2", b2)
        kept["D"] = new if "D" not in kept else b2 * kept["D"] + (1 - b2) * new
        if cls is fusedopt.OASIS:
            kept["m"] = b1 * kept.get("m", 0) + (1 - b1) * g
            u = kept["m"] / kept["D"].abs().clamp(min=options["truncation"])
        elif cls is fusedopt.DASA:
            d, flat = (
                kept["D"].abs().clamp(min=options["truncation"]),
                torch.cat([p.detach().flatten() for p in params]),
            )
            if t == 1:
                kept["rate"], kept["ratio"] = options["initial_rate"], math.inf
            else:
                moved, changed = flat - kept["p"], g - kept["g"]
                local = math.sqrt(float(d @ moved**2) / float((1 / d) @ changed**2)) / 2
                rate = min(math.sqrt(1 + kept["ratio"]) * kept["rate"], local)
                kept["rate"], kept["ratio"] = rate, rate / kept["rate"]
            kept["p"], kept["g"] = flat, g
            u = kept["rate"] * g / d
        else:
            d = g / kept["D"].abs().clamp(min=options["eps"])
            q, height = float(d @ g), 2 * float(loss)
            u = d * (1 - math.sqrt(1 - height / q) if height <= q else 1.0)
    with torch.no_grad():
        for p, x in zip(params, u.split([p.numel() for p in params]), strict=True):
            p -= options.get("lr", 1.0) * x.view(p.shape)


@each_class
@pytest.mark.parametrize("dtype, steps, bound", [(F64, 10, 1e-9), (torch.float32, 10, 1e-4)])
@each_backend
def test_trajectory(cls, options, dtype, steps, bound, backend):
    """With real estimates: each step's errors feed the next Hessian."""
    mine, exact, kept = network(dtype), network(F64), {}
    opt = cls(mine.parameters(), backend=backend if dtype != F64 else None, **options)
    start = torch.cat([p.detach().flatten() for p in exact.parameters()])
    for i in range(steps):
        opt.zero_grad()
        loss = loss_of(mine, i)
        opt.estimate_hessian(loss)
        step(opt, loss)
        by_hand(cls, options, exact, i, i + 1, kept)
    got, want = (torch.cat([p.detach().double().flatten() for p in m.parameters()]) for m in (mine, exact))
    assert float((want - start).abs().max()) > 0.01
    assert float((got - want).abs().max()) <= bound * float((want - start).abs().max())


@each_class
def test_between_estimates_the_last_one_stays(cls, options):
    model = network()
    opt = cls(model.parameters(), **options)
    for i in range(6):
        opt.zero_grad()
        loss = loss_of(model, i)
        if i % 3 == 0:
            opt.estimate_hessian(loss)
            before = [opt.state[p]["hessian"].clone() for p in model.parameters()]
        else:
            loss.backward()
        step(opt, loss)
        assert_same_bits([opt.state[p]["hessian"] for p in model.parameters()], before)


@each_class
def test_no_step_without_an_estimate(cls, options):
    params = parameters((6, 5), (4,))
    opt = cls(params, **options)
    set_grads(params, 0)
    start = [p.detach().clone() for p in params]
    for made in (False, True):
        if made:
            opt.plan()  # states are there, and no estimate
        before = tensors(opt, params)
        with pytest.raises(RuntimeError, match=rf"{cls.__name__}: parameter 0 .* Call estimate_hessian\(loss\)"):
            step(opt)
        if cls not in SHARED:
            with pytest.raises(RuntimeError, match="estimate_hessian"):
                opt.step_parameter(params[0])
            before = before if made else []
        if before:
            assert_same_bits(tensors(opt, params), before)
    assert_same_bits([p.detach() for p in params], start)
    opt.zero_grad()
    opt.estimate_hessian(params[0].square().sum())
    step(opt)
    set_grads(params, 1)
    with pytest.raises(RuntimeError, match="parameter 1"):
        step(opt)
    opt.estimate_hessian(params[1].sum())  # of a linear loss: zero, and an estimate
    assert not opt.state[params[1]]["hessian"].any()
    step(opt)
    assert all(torch.isfinite(p).all() for p in params)


@each_class
def test_states_are_made_without_an_estimate(cls, options):
    params = parameters((6, 5), (4,))
    opt = cls(params, **{**options, "lr": 0.0})
    for p in params:
        p.grad = torch.zeros_like(p)
    step(opt)
    assert all(int(opt.state[p]["step"]) == 0 for p in params)


@each_class
@pytest.mark.parametrize("way", ["state dict", "copy"])
def test_resumed_bit_for_bit(cls, options, way):
    one = network()
    first = cls(one.parameters(), seed=3, **options)

    def trained(model, opt, begin, end):
        for i in range(begin, end):
            opt.zero_grad()
            loss = loss_of(model, i)
            opt.estimate_hessian(loss, samples=2) if i % 2 == 0 else loss.backward()
            step(opt, loss.detach())

    trained(one, first, 0, 5)
    if way == "copy":
        two, second = copy.deepcopy((one, first))
    else:
        two = copy.deepcopy(one)
        second = cls(two.parameters(), seed=3, **options)
        buffer = io.BytesIO()
        torch.save(first.state_dict(), buffer)
        buffer.seek(0)
        second.load_state_dict(torch.load(buffer))
    trained(two, second, 5, 9)
    trained(one, first, 5, 9)
    assert_same_bits(tensors(second, list(two.parameters())), tensors(first, list(one.parameters())))


@each_class
def test_counts_on_the_device_and_coded_states(cls, options):
    models = [network() for _ in range(3)]
    plain = cls(models[0].parameters(), **options)
    other = cls(models[1].parameters(), capturable=True, **options)
    coded = cls(models[2].parameters(), state_format="int8", min_quantized_numel=0, **options)
    for i in range(4):
        for model, opt in zip(models, (plain, other, coded), strict=True):
            opt.zero_grad()
            loss = loss_of(model, i)
            opt.estimate_hessian(loss)
            step(opt, loss.detach())
    for p, q, r in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
        assert coded.state[r]["hessian"].dtype == torch.float32
        torch.testing.assert_close(r, p, rtol=0.05, atol=0.05)


@each_class
def test_bf16_parameters(cls, options):
    model = network(torch.bfloat16)
    opt = cls(model.parameters(), param_precision="kahan", **options)
    first = float(loss_of(model, 0))
    for _ in range(20):
        opt.zero_grad()
        loss = loss_of(model, 0)
        opt.estimate_hessian(loss)
        step(opt, loss.detach())
    assert float(loss_of(model, 0)) < first


@each_class
def test_refusals(cls, options):
    p = parameters((8, 8))
    with pytest.raises(ValueError, match="takes no projection"):
        cls(p, projection=fusedopt.GaLore(rank=2), **options)
    opt = cls(p, **options)
    loss = p[0].square().sum()
    for samples in (0, 1.5, True):
        with pytest.raises(ValueError, match="samples"):
            opt.estimate_hessian(loss, samples)
    for bad in (1.0, loss.detach(), p[0].square()):
        with pytest.raises(ValueError, match="wants the loss"):
            opt.estimate_hessian(bad)
    assert not opt.state and p[0].grad is None
    if cls not in SHARED:
        fusedopt.offload(opt)
        with pytest.raises(RuntimeError, match="offloaded"):
            opt.estimate_hessian(loss)
        model = network()
        opt = cls(model.parameters(), **options)
        fusedopt.release_gradients(model, opt)
        with pytest.raises(RuntimeError, match="released"):
            opt.estimate_hessian(loss_of(model, 0))
    (q,) = parameters((8, 8))
    fusedopt.override(q, projection=fusedopt.GaLore(rank=2))
    opt = cls([q], **options)
    with pytest.raises((RuntimeError, ValueError), match="projected|projection"):
        opt.estimate_hessian(q.square().sum())
        step(opt)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}], ids=str)
def test_dasa_compares_gradients_of_one_batch(options):
    """The rate by hand: a step's batch at the parameters of before the last step and at the present ones."""
    gen = torch.Generator().manual_seed(3)
    p = torch.nn.Parameter(torch.randn(5, 3, generator=gen, dtype=torch.float64))
    opt = fusedopt.DASA([p], truncation=0.05, initial_rate=0.02, **options)
    batches = [torch.randn(6, 5, generator=gen, dtype=torch.float64) for _ in range(8)]
    sign, decay = -1 if options.get("maximize") else 1, options.get("weight_decay", 0.0)

    def loss(x, at):
        return (torch.tanh(x @ at).square().sum() + 0.1 * at.square().sum()) * sign

    def gradient(x, at):
        at = at.detach().clone().requires_grad_()
        return sign * torch.autograd.grad(loss(x, at), at)[0] + decay * at.detach()

    rate, ratio, last = 0.02, float("inf"), None
    for step, x in enumerate(batches):
        before = p.detach().clone()
        p.grad = None
        opt.last_gradients(lambda x=x: loss(x, p))
        assert p.grad is None and torch.equal(p.detach(), before)
        opt.estimate_hessian(loss(x, p))
        d = opt.state[p]["hessian"].abs().clamp(min=0.05)
        g = gradient(x, before)
        if step:
            s, y = before - last, g - gradient(x, last)
            new = min((1 + ratio) ** 0.5 * rate, float((d * s * s).sum() ** 0.5 / (2 * (y * y / d).sum() ** 0.5)))
            rate, ratio = new, new / rate
        opt.step()
        torch.testing.assert_close(p.detach(), before - rate * g / d, rtol=1e-9, atol=1e-12)
        last = before
    with pytest.raises(RuntimeError, match="clip"):
        fusedopt.DASA([p], clip_grad_norm=1.0).last_gradients(lambda: loss(batches[0], p))
