"""The low-rank transcriptions of tests/oracles against packages, and, where there is none, against what they reduce to."""

import pytest
import torch
from oracles.adafactor import Adafactor, TorchAdafactor
from oracles.apollo import Apollo
from oracles.compare import STEPS, close, gradient, tensor
from oracles.conda import Conda
from oracles.dct_adamw import DctAdamW, dct_matrix, quantize_rows
from oracles.frugal import Frugal
from oracles.galore import GaLore
from oracles.lowrank import side_of, svd_basis
from oracles.packages import galore_torch
from oracles.subset_norm import SubsetNorm, subset_size
from oracles.subspace_momentum import SubspaceMomentum

MATRICES = ((9, 6), (6, 9), (7, 7))


def against(oracle, package, shape, bound=1e-10, basis_of=None, fp32=False, **group):
    """Steps an oracle beside an optimizer class of a package; basis_of(state) takes over its projector."""
    dtype = torch.float32 if fp32 else torch.float64
    theirs = torch.nn.Parameter(tensor(shape).to(dtype))
    opt = package([{"params": [theirs], **group}])
    start = theirs.detach().double().clone()
    mine = start.clone()
    for step in range(STEPS):
        theirs.grad = gradient(theirs, step).to(dtype)
        g = theirs.grad.double()
        if not fp32:
            close(gradient(mine, step), g, torch.zeros_like(g), 1e-8)
        opt.step()
        if basis_of is None:
            oracle.step(mine, g.clone())
        else:
            oracle.step(mine, g.clone(), basis=basis_of(opt.state[theirs]).double())
    close(mine, theirs.detach().double(), start, bound)


def po():
    return pytest.importorskip("pytorch_optimizer")


# Adafactor

ADAFACTOR = [
    {},
    {"warmup_init": True},
    {"scale_parameter": False},
    {"clip_threshold": 0.5},
    {"decay_rate": -0.5, "weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"relative_step": False, "lr": 0.01},
]


@pytest.mark.parametrize("options", ADAFACTOR, ids=str)
@pytest.mark.parametrize("shape", [(9, 6), (5,), (3, 4, 5)], ids=str)
def test_adafactor_matches_pytorch_optimizer(options, shape):
    """Its averaging weight is capped at betas[1], its relative step counts from 1, its momentum is of lr-scaled updates."""
    theirs = {k: v for k, v in options.items() if k != "momentum"}
    beta1 = options.get("momentum")

    def package(groups):
        settings = {"lr": None, "betas": (beta1, 1 - 1e-15), "momentum_dtype": torch.float64, "foreach": False}
        return po().AdaFactor(groups, **{**settings, **theirs})

    if options.get("relative_step", True) and options.get("weight_decay"):
        theirs["weight_decouple"], theirs["fixed_decay"] = True, False
    against(Adafactor(**options), package, shape, bound=1e-6)


@pytest.mark.parametrize("options", [{}, {"lr": 0.3, "weight_decay": 0.1}, {"d": 1.2, "eps": (1e-1, 1e-2)}], ids=str)
@pytest.mark.parametrize("shape", [(9, 6), (5,), (3, 4, 5)], ids=str)
def test_torch_adafactor(options, shape):
    against(TorchAdafactor(**options), lambda g: torch.optim.Adafactor(g, foreach=False, **options), shape)


# GaLore


GALORE = [{}, {"weight_decay": 0.1, "eps": 1e-3}, {"betas": (0.5, 0.7), "lr": 0.02}]


@pytest.mark.parametrize("options", GALORE, ids=str)
@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("side", ["std", "left", "right"])
def test_galore_matches_galore_torch(options, shape, side):
    oracle = GaLore(3, 4, 0.25, side=None if side == "std" else side, **options)

    def package(groups):
        return galore_torch().GaLoreAdamW(groups, no_deprecation_warning=True, **options)

    against(oracle, package, shape, 1e-12, lambda state: state["projector"].ortho_matrix,
            rank=3, update_proj_gap=4, scale=0.25, proj_type=side)  # fmt: skip


def test_galore_refreshes_when_galore_torch_does():
    """Without a shared basis, in fp32 on both sides: the oracle's own SVD and schedule. Signs cancel in the update, until a
    refresh meets the states of the other basis: so far the comparison is exact."""

    def package(groups):
        return galore_torch().GaLoreAdamW(groups, lr=0.05, no_deprecation_warning=True)

    group = {"rank": 3, "update_proj_gap": STEPS + 1, "scale": 0.25, "proj_type": "std"}
    against(GaLore(3, STEPS + 1, 0.25, lr=0.05), package, (9, 6), 1e-5, fp32=True, **group)
    theirs = torch.nn.Parameter(tensor((9, 6)))
    opt = galore_torch().GaLoreAdamW(
        [{"params": [theirs], "rank": 3, "update_proj_gap": 4, "scale": 1.0, "proj_type": "std"}],
        no_deprecation_warning=True,
    )
    mine, oracle = theirs.detach().clone(), GaLore(3, 4)
    for step in range(STEPS):
        theirs.grad = tensor(theirs.shape, step)
        opt.step()
        oracle.step(mine, theirs.grad.clone())
        basis = opt.state[theirs]["projector"].ortho_matrix
        torch.testing.assert_close(oracle.basis.T @ oracle.basis, basis.T @ basis, rtol=1e-4, atol=1e-5)


# Conda


@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "betas": (0.5, 0.7), "eps": 1e-3}], ids=str)
def test_conda_matches_pytorch_optimizer(shape, options):
    def package(groups):
        return po().Conda(groups, update_proj_gap=3, scale=0.25, foreach=False, **options)

    against(Conda(scale=0.25, **options), package, shape, 1e-9, lambda state: state["projector"].ortho_matrix)


def test_conda_takes_the_basis_of_the_momentum():
    """With no basis handed in: that of m, at its own schedule; the package's comes a step early, hence `due`."""
    oracle = Conda(due=lambda t: t == 1 or t % 3 == 0)
    theirs = torch.nn.Parameter(tensor((9, 6)))
    opt = po().Conda([theirs], update_proj_gap=3, foreach=False)
    mine = theirs.detach().clone()
    for step in range(STEPS):
        theirs.grad = tensor(theirs.shape, step)
        opt.step()
        oracle.step(mine, theirs.grad.clone())
        overlap = (oracle.basis @ opt.state[theirs]["projector"].ortho_matrix.T).abs()
        torch.testing.assert_close(overlap, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-4)
    assert [t for t in range(1, 9) if Conda(update_every=3).due(t)] == [1, 4, 7]


# Subset-Norm and Subspace-Momentum


@pytest.mark.parametrize("shape, size", [((9, 6), -1), ((12,), 4), ((3, 4, 5), 7), ((7,), 3)], ids=str)
def test_subset_norm_matches_pytorch_optimizer(shape, size):
    options = {"eps": 1e-6, "weight_decay": 0.1, "lr": 0.01}

    def package(groups):
        return po().AdamWSN(groups, subset_size=size, foreach=False, **options)

    against(SubsetNorm(size, **options), package, shape, sn=True)


def test_subset_sizes():
    sizes = [subset_size(54, -1), subset_size(54, -2), subset_size(7, 3), subset_size(12, 100), subset_size(1, -2)]
    assert sizes == [6, 3, 1, 12, 1]


def test_rows_are_chunks_of_a_row():
    g, p, q = tensor((8, 6)), tensor((8, 6), 1), tensor((8, 6), 1)
    a, b = SubsetNorm(6, by="chunk"), SubsetNorm(by="row")
    for _ in range(4):
        a.step(p, g)
        b.step(q, g)
    close(p, q, tensor((8, 6), 1))


def test_subset_norm_without_forgetting_is_adagrad():
    p, total = tensor((6,)), torch.zeros(3, dtype=torch.float64)
    oracle = SubsetNorm(2, betas=(0.0, 1.0), lr=0.1, eps=1e-12)
    for step in range(5):
        g, before = tensor((6,), step), p.clone()
        oracle.step(p, g)
        total += (g.view(3, 2) ** 2).sum(1)
        close(p, before - 0.1 * (g.view(3, 2) / total.sqrt()[:, None]).view(-1), before)


def adamw(shape, steps=STEPS, **options):
    """torch.optim.AdamW on the gradients of `gradient`, decay before the update: the parameter after each step."""
    p = torch.nn.Parameter(tensor(shape))
    opt = torch.optim.AdamW([p], **options)
    out = []
    for step in range(steps):
        p.grad = tensor(shape, step)
        opt.step()
        out.append(p.detach().clone())
    return out


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_subspace_momentum_of_full_rank_is_adam(shape):
    """In a subspace that is all of the space; eps so small that its place in the denominator does not matter."""
    oracle, p = SubspaceMomentum(min(shape), 100, lr=0.01, eps=1e-15), tensor(shape)
    for step, expected in enumerate(adamw(shape, lr=0.01, eps=1e-15, weight_decay=0.0)):
        oracle.step(p, tensor(shape, step))
        close(p, expected, tensor(shape))


@pytest.mark.parametrize("official", [False, True])
def test_subspace_momentum_splits_the_gradient(official):
    """Against the definition written with projection matrices, a refresh in between included."""
    shape, rank, every = (5, 4), 2, 3
    oracle, p = SubspaceMomentum(rank, every, lr=0.1, betas=(0.9, 0.99), official_refresh=official), tensor(shape)
    m_full, v = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    carried = None
    for step in range(1, 8):
        g, before = tensor(shape, step), p.clone()
        oracle.step(p, g)
        basis = oracle.basis
        projector = basis.T @ basis
        refresh = step == 1 or step % every == 0
        old = torch.zeros(shape[0], rank, dtype=torch.float64) if carried is None else carried
        if refresh and not official:
            old = torch.zeros_like(old)
        current = 0.9 * old + 0.1 * g @ basis.T
        carried = torch.zeros_like(current) if refresh and official and step > 1 else current
        m_full = current @ basis
        v = 0.99 * v + 0.01 * g**2
        u = (m_full + g - g @ projector) / (v.sqrt() + 1e-6) * (1 - 0.99**step) ** 0.5 / (1 - 0.9**step)
        close(p, before - 0.1 * u, before)


# APOLLO


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)], ids=str)
def test_apollo_matches_pytorch_optimizer_in_a_full_basis(per, shape):
    """The package takes the scaled low-rank gradient back instead of scaling the gradient itself: with an orthogonal square
    basis, put in its projector's place, that is the same. scale=1: it would apply others twice."""
    theirs = torch.nn.Parameter(tensor(shape))
    small = min(shape)
    opt = po().APOLLO([{"params": [theirs], "rank": small, "update_proj_gap": 1000, "scale": 1.0,
                        "projection_type": "std"}], lr=0.05, scale_type=per, foreach=False)  # fmt: skip
    theirs.grad = torch.zeros(shape, dtype=torch.float64)
    opt.step()  # makes the state; a zero gradient moves nothing
    state = opt.state[theirs]
    basis = torch.linalg.qr(tensor((small, small), 5)).Q
    state["projector"].ortho_matrix = basis
    state.pop("scaling_grad")
    opt.param_groups[0]["step"] = 0
    start = theirs.detach().clone()
    mine, oracle = start.clone(), Apollo(per=per, lr=0.05)
    limited = False
    for step in range(STEPS):
        theirs.grad = gradient(theirs, step)
        g, norm = theirs.grad.clone(), oracle.last_norm
        opt.step()
        oracle.step(mine, g, basis=basis)
        limited |= norm is not None and bool((g * oracle.s).norm() > 1.01 * norm)
        close(mine, theirs.detach(), start, 1e-9)
    assert limited


def test_apollo_scales_the_gradient_itself():
    """From the definition, with fewer directions than columns; the sum over the kept dimension by hand."""
    shape, rank = (5, 4), 2
    g, p = tensor(shape, 1), tensor(shape)
    basis = tensor((rank, 4), 2) / rank**0.5
    oracle = Apollo(scale=4.0, per="channel", lr=0.1, eps=0.0, tiny=0.0, limit=False)
    before = p.clone()
    oracle.step(p, g, basis=basis)
    r = g @ basis.T
    n = r.sign()  # the first step of Adam
    s = n.norm(dim=1) / r.norm(dim=1)
    close(p, before - 0.1 * 2.0 * s[:, None] * g, before)
    assert (n.norm(dim=1) - rank**0.5).abs().max() < 1e-12


def test_apollo_limits_growth():
    """The projection sees the same gradient every step while what it does not see grows tenfold: the step may grow by 1 % a
    step, counted from the limited one before; when the gradient shrinks again, nothing holds it."""
    basis = torch.eye(4, dtype=torch.float64)[:2]
    seen, unseen = tensor((5, 4), 1), tensor((5, 4), 3)
    seen[:, 2:], unseen[:, :2] = 0, 0
    p, oracle = tensor((5, 4)), Apollo(per="tensor", lr=1.0, betas=(0.0, 0.0), tiny=0.0, form="D1")
    norms = []
    for size in (0.1, 1.0, 1.0, 1.0, 0.05):
        before = p.clone()
        oracle.step(p, seen + size * unseen, basis=basis)
        norms.append(float((p - before).norm()))
    growth = [b / a for a, b in zip(norms, norms[1:], strict=False)]
    assert growth[:3] == pytest.approx([1.01] * 3, rel=1e-9) and growth[3] < 1


# FRUGAL


def test_frugal_of_full_density_is_adamw_with_restarts():
    shape, every = (9, 6), 4
    p, oracle = tensor(shape), Frugal(1.0, every, lr=0.01, weight_decay=0.1, inactive="no", subspace="columns")
    q = torch.nn.Parameter(tensor(shape))
    for step in range(STEPS):
        if step % every == 0:
            opt = torch.optim.AdamW([q], lr=0.01, weight_decay=0.1)
        q.grad = gradient(q, step)
        oracle.step(p, q.grad.clone(), basis=torch.arange(6))
        opt.step()
        close(p, q.detach(), tensor(shape), 1e-10)


@pytest.mark.parametrize("inactive", ["sign_sgd", "sgd"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_frugal_columns(inactive, side):
    """Active columns by torch.optim.AdamW, the others by sign descent or descent, each on its own."""
    shape = (9, 6)
    p, active = tensor(shape), torch.tensor([0, 3, 5])
    pick = (slice(None), active) if side == "right" else (active, slice(None))
    oracle = Frugal(0.5, 100, "columns", inactive, 0.5, lr=0.01, weight_decay=0.1, side=side)
    kept = torch.nn.Parameter(p[pick].clone())
    opt = torch.optim.AdamW([kept], lr=0.01, weight_decay=0.1)
    rest = p.clone()
    for step in range(STEPS):
        g = gradient(p, step)
        oracle.step(p, g, basis=active)
        kept.grad = g[pick].clone()
        opt.step()
        rest = rest * (1 - 0.01 * 0.1) - 0.01 * 0.5 * (g.sign() if inactive == "sign_sgd" else g)
        expected = rest.clone()
        expected[pick] = kept.detach()
        close(p, expected, tensor(shape))


def test_frugal_svd_leaves_small_directions_to_the_sign():
    """The gradient has rank 1 at the refresh: all of it is in the subspace and nothing is left to the sign descent."""
    g = tensor((9, 1), 1) @ tensor((1, 6), 2)
    p = tensor((9, 6))
    oracle = Frugal(0.17, 5, "svd", "sgd", lr=0.1, weight_decay=0.0)
    before = p.clone()
    oracle.step(p, g)
    assert oracle.basis.shape == (1, 6)
    change = (p - before) / 0.1
    basis = svd_basis(g, 1, side_of(g.shape))
    close(change, -(g @ basis.T).sign() @ basis, torch.zeros_like(g), 1e-6)


# DCT-AdamW


@pytest.mark.parametrize("d", [1, 2, 5, 8, 33])
def test_dct_matrix_is_orthogonal(d):
    q = dct_matrix(d)
    assert (q @ q.T - torch.eye(d, dtype=torch.float64)).abs().max() < 1e-13
    x = torch.cat([tensor((d,)), tensor((d,)).flip(0)])
    fourier = torch.fft.fft(x)[:d] * torch.exp(-1j * torch.pi * torch.arange(d, dtype=torch.float64) / (2 * d))
    expected = fourier.real / 2 * (2 / d) ** 0.5  # DCT-II of x[:d] by the transform of its mirror extension
    expected[0] *= 0.5**0.5
    torch.testing.assert_close(q @ x[:d], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("mode", ["matmul", "fft"])
@pytest.mark.parametrize("feedback", [None, "fp32", 8])
def test_dct_of_full_rank_is_adamw_in_its_basis(shape, mode, feedback):
    """Every direction chosen: AdamW on the coordinates. The order of the indices changes from step to step, so a state that
    did not follow its index would show; nothing is left for the error feedback."""
    d = min(shape)
    q = dct_matrix(d) if mode == "matmul" else dct_matrix(d).T
    oracle = DctAdamW(d, 1, feedback, True, mode, lr=0.01, weight_decay=0.1)
    p = tensor(shape)
    right = shape[0] >= shape[1]
    turned = torch.nn.Parameter(p @ q if right else q.T @ p)
    opt = torch.optim.AdamW([turned], lr=0.01, weight_decay=0.1)
    for step in range(STEPS):
        g = gradient(p, step)
        oracle.step(p, g)
        turned.grad = g @ q if right else q.T @ g
        opt.step()
        close(p, turned.detach() @ q.T if right else q @ turned.detach(), tensor(shape), 1e-9)


def test_dct_keeps_what_it_leaves_out():
    """Error feedback: what was projected plus what is kept is the gradient plus what was kept before."""
    oracle, p = DctAdamW(2, 2, "fp32"), tensor((9, 6))
    kept = torch.zeros(9, 6, dtype=torch.float64)
    for step in range(6):
        g = tensor((9, 6), step)
        oracle.step(p, g)
        basis = dct_matrix(6)[:, oracle.indices]
        assert ((g + kept) @ basis @ basis.T + oracle.error - g - kept).abs().max() < 1e-12
        assert (oracle.error @ basis).abs().max() < 1e-12
        sizes = ((g + kept) @ dct_matrix(6)).abs().sum(0)
        if step == 0 or (step + 1) % 2 == 0:
            assert set(oracle.indices.tolist()) == set(sizes.topk(2).indices.tolist())
        kept = oracle.error


@pytest.mark.parametrize("bits", [4, 8])
def test_dct_error_codes(bits):
    x = tensor((5, 33))
    x[2] = 0.7
    codes, low, unit = quantize_rows(x, bits)
    assert codes.min() == 0 and codes.max() == 2**bits - 1 and codes[2].max() == 0
    back = codes * unit + low
    assert ((back - x).abs() <= unit / 2 * (1 + 1e-9)).all() and torch.equal(back[2], x[2])
