"""Bases of dominant subspaces against fp64 SVDs, and the index selections against brute force."""

import itertools

import pytest
import torch

from fusedopt.projections import selection, subspace
from fusedopt.projections.matmul import mm
from fusedopt.projections.subspace import (
    energy,
    gaussian_projector,
    project,
    random_basis,
    refresh_basis,
    svd_basis,
)

SIDES = pytest.mark.parametrize("side", ["left", "right"])
KEY = {"seed": 1, "tensor_id": 2, "step": 3}
DECAYS = {
    "exponential": lambda i: torch.exp(-i / 12),
    "power": lambda i: 1 / (1 + i),
    "step": lambda i: torch.where(i < 24, 1.0, 1e-4),
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def factors(rows, cols, decay, seed=0):
    k = min(rows, cols)
    U = torch.linalg.qr(torch.randn(rows, k, generator=rng(seed), dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(cols, k, generator=rng(seed + 1), dtype=torch.float64))[0]
    return U, decay(torch.arange(k, dtype=torch.float64)), V


def spectrum(rows, cols, decay, seed=0):
    U, s, V = factors(rows, cols, decay, seed)
    return (U * s) @ V.t()


def misfit(P, side):
    """Largest entry of P^T P - I."""
    P = P.double() if side == "left" else P.double().t()
    return (P.t() @ P - torch.eye(P.shape[1])).abs().max().item()


def optimum(G, rank):
    s = torch.linalg.svdvals(G.double()).square()
    return (s[:rank].sum() / s.sum()).item()


def back(R, P, side):
    return P @ R if side == "left" else R @ P


@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(90, 210), (210, 90), (128, 128)])
@pytest.mark.parametrize("decay", DECAYS)
def test_refresh_is_near_the_svd(shape, decay, dtype, side):
    """Orthonormal, in descending order, R the projection, the energy of the best basis: cold 0.99, warm 0.999 of it."""
    G = spectrum(*shape, DECAYS[decay]).to(dtype)
    best, wide = optimum(G, 24), torch.float64 if dtype == torch.float64 else torch.float32
    P, R = refresh_basis(G, 24, side, **KEY)
    for share in (0.99, 0.998):
        assert P.dtype == R.dtype == wide and P.is_contiguous() and R.is_contiguous()
        assert misfit(P, side) < 1e-6
        assert share * best < energy(G, P, side).item() < best + 1e-6
        torch.testing.assert_close(R, project(G.to(wide), P, side), rtol=0, atol=2e-6 * G.abs().max().item() * 16)
        lengths = R.norm(dim=1 if side == "left" else 0)
        assert (lengths[:-1] >= lengths[1:] - 1e-6).all()
        P, R = refresh_basis(G, 24, side, P, **KEY)


@SIDES
def test_warm_start_follows_a_slow_subspace(side):
    """Over a rotating subspace under noise a warm start keeps more than a cold start of more products, and its signs."""
    U, s, V = factors(160, 200, lambda i: torch.where(i < 16, 1.0, 0.35))
    turn = torch.randn(160, 160, generator=rng(5), dtype=torch.float64) * 0.002
    turn, P, warm, cold = torch.linalg.matrix_exp(turn - turn.t()), None, [], []
    for step in range(6):
        U = turn @ U
        G = ((U * s) @ V.t()).float()
        key = {"seed": 0, "tensor_id": 0, "step": step}
        old, (P, _) = P, refresh_basis(G, 16, side, P, **key)
        if step > 1:
            warm.append(energy(G, P, side).item() / optimum(G, 16))
            cold.append(energy(G, refresh_basis(G, 16, side, **key)[0], side).item() / optimum(G, 16))
            assert ((old * P).sum(0 if side == "left" else 1) >= 0).all()
    assert min(warm) > 0.99 and sum(warm) > sum(cold)


@SIDES
def test_warm_start_leaves_a_useless_basis(side):
    """The old basis is orthogonal to all of the new gradient (other rows, other columns): most of it is found at once."""
    first, second = torch.zeros(2, 128, 160).unbind()
    first[:64, :80] = spectrum(64, 80, DECAYS["exponential"]).float()
    second[64:, 80:] = spectrum(64, 80, DECAYS["exponential"], 9).float()
    P, _ = refresh_basis(first, 24, side, **KEY)
    P, _ = refresh_basis(second, 24, side, P, **KEY)
    assert misfit(P, side) < 1e-6 and energy(second, P, side).item() > 0.97 * optimum(second, 24)


@SIDES
@pytest.mark.parametrize("true_rank", [1, 7, 20])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_low_rank_is_recovered(true_rank, warm, side):
    """A matrix of rank up to 20 comes back from 20 directions, which are orthonormal although there are fewer to find."""
    gen = rng(3)
    G = torch.randn(100, true_rank, generator=gen) @ torch.randn(true_rank, 140, generator=gen)
    old = random_basis((100, 140), 20, side, **KEY) if warm else None
    P, R = refresh_basis(G, 20, side, old, **KEY)
    assert misfit(P, side) < 1e-6
    torch.testing.assert_close(back(R, P, side), G, rtol=0, atol=1e-5 * G.abs().max().item())


@SIDES
def test_one_entry(side):
    """Exact zeros everywhere else: nothing but the added noise fills the other directions."""
    G = torch.zeros(60, 40)
    G[7, 5] = 3.0
    for old in (None, random_basis((60, 40), 10, side, **KEY)):
        P, R = refresh_basis(G, 10, side, old, **KEY)
        assert misfit(P, side) < 1e-6
        torch.testing.assert_close(back(R, P, side), G, rtol=0, atol=1e-6)


@SIDES
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (12, 12), (1, 9), (9, 1), (1, 1)])
def test_full_rank(shape, side):
    G = torch.randn(shape, generator=rng())
    P, R = refresh_basis(G, min(shape), side, **KEY)
    P, R = refresh_basis(G, min(shape), side, P, **KEY)
    assert misfit(P, side) < 1e-6
    torch.testing.assert_close(back(R, P, side), G, rtol=0, atol=1e-5)


@SIDES
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale(scale, side):
    """No square of G over- or underflows fp32."""
    G = spectrum(80, 60, DECAYS["exponential"])
    P = want = None
    for _ in range(2):
        P, _ = refresh_basis((G * scale).float(), 16, side, P, **KEY)
        want, _ = refresh_basis(G.float(), 16, side, want, **KEY)
        assert abs(energy(G, P, side) - energy(G, want, side)).item() < 1e-5
    half = (G * 6e4 / G.abs().max()).half()  # a scaled loss
    P, R = refresh_basis(half, 16, side, P, **KEY)
    assert R.isfinite().all() and energy(half, P, side).item() > 0.99 * optimum(half, 16)


@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), -float("inf")])
def test_useless_gradient_keeps_the_basis(bad, dtype, side):
    """Zero, NaN and Inf: the old basis bit for bit; without one a random orthonormal one, the same each time."""
    G = torch.randn(70, 50, generator=rng()).to(dtype)
    old, _ = refresh_basis(G, 8, side, **KEY)
    if bad == 0:
        G.zero_()
    else:
        G[33, 21] = bad
    for method in (refresh_basis, svd_basis):
        P = method(G, 8, side, old, **KEY)[0] if method is refresh_basis else method(G, 8, side, old)
        assert torch.equal(P, old), method.__name__
    R = refresh_basis(G, 8, side, old, **KEY)[1]
    want = project(G, old, side)
    assert torch.equal(R.isfinite(), want.isfinite())
    torch.testing.assert_close(R[R.isfinite()], want[R.isfinite()], rtol=0, atol=1e-4)
    fresh = refresh_basis(G, 8, side, **KEY)[0]
    assert misfit(fresh, side) < 1e-6 and torch.equal(fresh, refresh_basis(G, 8, side, **KEY)[0])
    assert misfit(svd_basis(G, 8, side), side) < 1e-6


@SIDES
def test_deterministic_and_apart_from_the_global_generator(side):
    G = torch.randn(64, 96, generator=rng())
    state = torch.get_rng_state()
    P, R = refresh_basis(G, 8, side, **KEY)
    again = refresh_basis(G, 8, side, **KEY)
    assert torch.equal(P, again[0]) and torch.equal(R, again[1])
    warm = refresh_basis(G, 8, side, P, **KEY)[0]
    assert torch.equal(warm, refresh_basis(G, 8, side, P, **KEY)[0])
    for other in ({"seed": 2}, {"tensor_id": 3}, {"step": 4}):
        assert not torch.equal(P, refresh_basis(G, 8, side, **(KEY | other))[0])
        for draw in (random_basis, gaussian_projector):
            assert not torch.equal(draw((64, 96), 8, side, **KEY), draw((64, 96), 8, side, **(KEY | other)))
    assert torch.equal(torch.get_rng_state(), state)
    vectors = P if side == "left" else P.t()
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


@SIDES
def test_svd_basis_is_torchs(side):
    G = torch.randn(30, 50, generator=rng())
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    for dtype in (torch.float32, torch.bfloat16):
        A = G.to(dtype)
        U, _, Vh = torch.linalg.svd(A.float(), full_matrices=False)
        assert torch.equal(svd_basis(A, 6, side), U[:, :6] if side == "left" else Vh[:6])


def allocations(work) -> int:
    """By how many bytes allocations rise while work() runs, by torch's own account."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        work()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("shape", [(3000, 2000), (2000, 3000)])
def test_memory_of_a_refresh(shape, warm, dtype, side):
    """Beside the new basis, a sketch and its product with the gradient: less than 5 % of the gradient.

    R is made when the sketch is gone. fp64's copies of either sketch or product would be 7 % and more.
    """
    G = torch.randn(shape, generator=rng()).to(dtype)
    old = refresh_basis(G, 64, side, **KEY)[0]  # this also makes the native kernels' buffers, which stay
    size, other = shape if side == "left" else shape[::-1]
    low_rank, allowed = 4 * 72 * (size + other), 0.05 * G.numel() * G.element_size()
    peak = allocations(lambda: refresh_basis(G, 64, side, old if warm else None, **KEY))
    assert low_rank < peak < low_rank + 4 * 64 * size + allowed
    # Into buffers, the basis of another dtype and its own predecessor: not even the basis.
    basis, R = old.bfloat16(), torch.empty((64, other) if side == "left" else (other, 64))
    keys = {"basis_out": basis, "projected_out": R, **KEY}
    peak = allocations(lambda: refresh_basis(G, 64, side, basis if warm else None, **keys))
    assert low_rank < peak < low_rank + 1.4 * allowed


@SIDES
@pytest.mark.parametrize("useless", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_into_buffers(out_dtype, useless, side):
    """The same numbers into given buffers, the first of which is the old basis."""
    G = torch.randn(300, 200, generator=rng())
    old = random_basis((300, 200), 24, side, dtype=out_dtype, **KEY)
    if useless:
        G[3, 4] = float("nan")
    P, R = refresh_basis(G, 24, side, old, **KEY)
    basis, into = old.clone(), torch.empty_like(R)
    results = refresh_basis(G, 24, side, basis, basis_out=basis, projected_out=into, **KEY)
    assert results[0] is basis and results[1] is into
    assert torch.equal(basis, P.to(out_dtype)) and torch.equal(into.nan_to_num(), R.nan_to_num())
    assert torch.equal(basis, old) == useless
    basis = old.clone()
    assert refresh_basis(G, 24, side, old, basis_out=basis, with_projected=False, **KEY)[1] is None
    assert torch.equal(basis, P.to(out_dtype))


@SIDES
@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_sign_of_many_rows(flip, side):
    """The old vector decides the sign as a whole, though the new one points away from it in the last block of rows."""
    G = torch.ones(1500, 1500) + 0.01 * torch.randn(1500, 1500, generator=rng())
    old = torch.where(torch.arange(1500) < 1024, flip, -flip) / 1500**0.5
    P, R = refresh_basis(G, 1, side, old.view((1500, 1) if side == "left" else (1, 1500)), **KEY)
    assert P.sum() * flip > 38
    torch.testing.assert_close(R, project(G, P, side), rtol=1e-5, atol=0)


@SIDES
def test_without_native_kernels(side, monkeypatch):
    """torch's products give the same subspace and projection."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        G = spectrum(150, 230, DECAYS["exponential"]).to(dtype)
        old = random_basis((150, 230), 24, side, **KEY)
        want = [refresh_basis(G, 24, side, before, **KEY) for before in (None, old)]
        with monkeypatch.context() as patch:
            patch.setattr(subspace, "_native", lambda G, X: None)
            found = [refresh_basis(G, 24, side, before, **KEY) for before in (None, old)]
        for (P, R), (Q, S) in zip(found, want, strict=True):
            assert misfit(P, side) < 1e-6
            assert abs(energy(G, P, side) - energy(G, Q, side)) < 1e-5
            torch.testing.assert_close(R, project(G, P, side), rtol=0, atol=1e-5)
            torch.testing.assert_close(R.norm(), S.norm(), rtol=1e-5, atol=0)


@SIDES
def test_random_bases(side):
    P = random_basis((120, 80), 16, side, **KEY)
    assert P.shape == ((120, 16) if side == "left" else (16, 80)) and misfit(P, side) < 1e-6
    X = gaussian_projector((4000, 3000), 16, side, **KEY)
    assert X.shape == ((4000, 16) if side == "left" else (16, 3000))
    assert abs(X.mean().item()) < 0.005 and abs(X.var().item() * 16 - 1) < 0.05


def test_errors():
    G = torch.randn(20, 30)
    for args, what in (
        ((G, 21, "left"), "rank 21"),
        ((G, 0, "left"), "rank 0"),
        ((G, 4, "up"), "side"),
        ((G[0], 4, "left"), "matrix"),
        ((G, 4, "left", torch.zeros(20, 5)), "old basis"),
    ):
        with pytest.raises(ValueError, match=what):
            refresh_basis(*args, **KEY)
    with pytest.raises(TypeError, match="int64"):
        refresh_basis(G.long(), 4, "left", **KEY)


# ---- selections


@pytest.mark.parametrize("n, k", [(10, 10), (10, 0), (1000, 250), (1, 1)])
def test_random_indices(n, k):
    index = selection.random_indices(n, k, **KEY)
    assert index.dtype == torch.int64 and len(index) == k and (index[1:] > index[:-1]).all()
    assert k == 0 or (0 <= index[0] and index[-1] < n)
    assert torch.equal(index, selection.random_indices(n, k, **KEY))


def test_random_indices_are_uniform():
    hits = torch.zeros(40)
    for step in range(500):
        hits[selection.random_indices(40, 10, seed=0, tensor_id=1, step=step)] += 1
    assert ((hits - 125).abs() < 5 * (500 * 0.25 * 0.75) ** 0.5).all()


@pytest.mark.parametrize("shape", [(40, 50), (300, 400), (2, 20000), (257, 1031)])
def test_random_elements(shape):
    """Distinct, keyed, spread evenly over rows and columns; all of them is a permutation of all."""
    n = shape[0] * shape[1]
    index = selection.random_elements(shape, n // 4, **KEY)
    assert len(index) == n // 4 and (index[1:] > index[:-1]).all() and 0 <= index[0] and index[-1] < n
    assert not torch.equal(index, selection.random_elements(shape, n // 4, **(KEY | {"step": 4})))
    assert torch.equal(selection.random_elements(shape, n, **KEY), torch.arange(n))
    for along, number in ((index // shape[1], shape[0]), (index % shape[1], shape[1])):
        hits, mean = torch.bincount(along, minlength=number).double(), len(index) / number
        assert (hits - mean).abs().max() < 6 * mean**0.5
        if number > 100:  # sampling without replacement has 3/4 of a Poisson count's variance
            assert 0.5 < hits.var() / (0.75 * mean) < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_top_indices(dtype):
    G = torch.randn(60, 80, generator=rng()).to(dtype)
    for side, dim in (("right", 0), ("left", 1)):
        norms = selection.squared_norms(G, side)
        torch.testing.assert_close(norms.double(), G.double().square().sum(dim), rtol=1e-6, atol=0)
        chosen = selection.top_indices(norms, 20)
        rest = torch.ones_like(norms, dtype=torch.bool).index_fill(0, chosen, False)
        assert norms[chosen].min() >= norms[rest].max() and (chosen[1:] > chosen[:-1]).all()
    assert selection.top_indices(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2).tolist() == [1, 2]


@pytest.mark.parametrize("n, density", [(10, 0.25), (7, 0.3), (5, 1.0), (9, 0.01), (4, 0.0), (1, 0.5), (6, 0.99)])
def test_active_blocks(n, density):
    k = 0 if density == 0 else max(1, int(density * n + 0.5))
    for order in selection.BLOCK_ORDERS:
        periods = [selection.active_blocks(n, density, p, order, seed=3) for p in range(4 * n)]
        assert all(len(set(b)) == k and b == sorted(b) for b in periods)
        assert set(itertools.chain(*periods)) == (set(range(n)) if k else set())
        assert periods == [selection.active_blocks(n, density, p, order, seed=3) for p in range(4 * n)]


def test_block_orders():
    def blocks(order):
        return [selection.active_blocks(4, 0.25, p, order)[0] for p in range(9)]

    assert blocks("ascending") == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert blocks("descending") == [3, 2, 1, 0, 3, 2, 1, 0, 3]
    assert blocks("mirror") == [0, 1, 2, 3, 3, 2, 1, 0, 0]
    assert selection.active_blocks(5, 0.4, 2, "ascending") == [0, 4]
    hits = [0] * 8
    for p in range(4000):
        for i in selection.active_blocks(8, 0.25, p, "random"):
            hits[i] += 1
    assert all(abs(h - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for h in hits)
    with pytest.raises(ValueError, match="order"):
        selection.active_blocks(4, 0.5, 0, "sideways")
    with pytest.raises(ValueError, match="density"):
        selection.active_blocks(4, 1.5, 0)


@pytest.mark.parametrize("shape", [(40, 70, 9), (70, 40, 16), (1, 30, 4), (30, 1, 4), (33, 20, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("turned", list(itertools.product([False, True], repeat=2)))
def test_mm(shape, dtype, turned):
    """Any layout of either operand, as in fp64."""
    m, k, n = shape
    A = torch.randn(m, k, generator=rng()).to(dtype)
    B = torch.randn(k, n, generator=rng(1)).to(dtype)
    want = A.double() @ B.double()
    A, B = (x.t().contiguous().t() if t else x for x, t in zip((A, B), turned, strict=True))
    atol = 8 * torch.finfo(dtype).eps * want.abs().max().item()
    torch.testing.assert_close(mm(A, B).double(), want, rtol=0, atol=atol)
