"""The cosine basis against its formula, the choice of columns against brute force, states carried over against matrices."""

import math

import pytest
import torch

from fusedopt.projections.dct import (
    alignments,
    carry_state,
    dct_basis,
    dct_columns,
    match_indices,
    select_columns,
)

SIZES = [1, 2, 3, 8, 17, 64, 130]


def formula(n):
    """Q by its definition, entry by entry."""
    rows = [[math.sqrt(2 / n) * math.cos(math.pi * i * (2 * j + 1) / (2 * n)) for j in range(n)] for i in range(n)]
    rows[0] = [math.sqrt(0.5) * x for x in rows[0]]
    return torch.tensor(rows, dtype=torch.float64)


def gradient(rows, cols, dtype=torch.float64, seed=0):
    """Without near ties between the norms of its transform's columns: their scales differ by 3 % each, in random order."""
    gen, n = torch.Generator().manual_seed(seed), min(rows, cols)
    scales = 1.03 ** torch.randperm(n, generator=gen).double()
    S = (
        torch.randn(rows, cols, generator=gen, dtype=torch.float64).sign()
        * torch.linspace(0.5, 1.5, max(rows, cols))[
            (slice(None), None) if rows >= cols else (None, slice(None))
        ].double()
    )
    return (S * scales @ formula(n).t() if rows >= cols else formula(n) @ (scales[:, None] * S)).to(dtype)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_basis(n, dtype):
    Q, want = dct_basis(n, dtype=dtype), formula(n)
    ulp = torch.finfo(dtype).eps
    angle = math.pi * n * 2**-52 * math.sqrt(2 / n)  # rounding of the formula's largest angles
    torch.testing.assert_close(Q.double(), want, rtol=0, atol=ulp + angle)
    torch.testing.assert_close(Q.double() @ Q.double().t(), torch.eye(n).double(), rtol=0, atol=16 * ulp)
    assert dct_basis(n, dtype=dtype) is Q and dct_basis(n, dtype=torch.float16) is not Q
    index = torch.randperm(n)[: n // 2 + 1]
    assert torch.equal(dct_columns(n, index, dtype), Q[:, index])


def test_large_basis_is_orthogonal():
    Q = dct_basis(3000)
    rows = Q[[0, 1, 2, 1499, 2999]].double()
    torch.testing.assert_close(
        rows @ Q.double().t(), torch.eye(3000)[[0, 1, 2, 1499, 2999]].double(), rtol=0, atol=2e-7
    )


@pytest.mark.parametrize(
    "shape, side", [((40, 17), "right"), ((17, 40), "left"), ((1, 9), "left"), ((64, 64), "right")]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("fast", [False, True], ids=["product", "fft"])
def test_selection(shape, side, dtype, norm, fast):
    G = gradient(*shape, dtype)
    n = min(shape)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    Q = None if fast else dct_basis(n, dtype=wide)
    S = G.double() @ formula(n) if side == "right" else formula(n).t() @ G.double()
    want = (S.abs() if norm == 1 else S.square()).sum(0 if side == "right" else 1)
    got = alignments(G, Q, side, norm)
    torch.testing.assert_close(got.double(), want, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)
    for rank in {1, n // 3 + 1, n}:
        best = sorted(sorted(range(n), key=lambda j: -want[j].item())[:rank])
        assert select_columns(G, Q, rank, side, norm).tolist() == best


@pytest.mark.parametrize("size", [2, 3, 16, 31])
@pytest.mark.parametrize("side", ["right", "left"])
def test_fast_transform_of_either_side(size, side):
    """Also where the transformed side is the longer one."""
    G = torch.randn((5, size) if side == "right" else (size, 5), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(alignments(G, None, side), alignments(G, dct_basis(size), side), rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_lowest_index():
    Q = torch.eye(6)
    G = torch.diag(torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0, 1.0]))
    assert select_columns(G, Q, 2, "right").tolist() == [1, 2]
    assert select_columns(G, Q, 4, "right").tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("fast", [False, True], ids=["product", "fft"])
def test_useless_gradient_keeps_the_choice(bad, fast):
    G, old = gradient(30, 20, torch.float32), torch.tensor([3, 5, 19])
    if bad == 0:
        G.zero_()
    else:
        G[7, 3] = bad
    Q = None if fast else dct_basis(20)
    assert select_columns(G, Q, 3, "right", old=old).tolist() == [3, 5, 19]
    assert len(set(select_columns(G, Q, 3, "right").tolist())) == 3


@pytest.mark.parametrize("side", ["right", "left"])
def test_states_are_carried_as_by_the_rotation(side):
    gen = torch.Generator().manual_seed(4)
    Q = formula(24)
    for _ in range(5):
        old, new = (torch.randperm(24, generator=gen)[:9].sort().values for _ in range(2))
        state = torch.randn((13, 9) if side == "right" else (9, 13), generator=gen, dtype=torch.float64)
        turn = Q[:, old].t() @ Q[:, new]
        want = state @ turn if side == "right" else turn.t() @ state
        torch.testing.assert_close(carry_state(state, *match_indices(old, new), side), want, rtol=0, atol=1e-13)
    source, kept = match_indices(torch.tensor([1, 4, 6]), torch.tensor([0, 4, 9]))
    assert kept.tolist() == [False, True, False] and source[1] == 1
    nan = torch.full((2, 3), float("nan"))
    assert carry_state(nan, source, kept, "right").isnan().sum() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fast", [False, True], ids=["product", "fft"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_memory_of_a_selection(side, fast, dtype):
    """No temporary above 5 % of G."""
    from torch.profiler import ProfilerActivity, profile

    G = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    Q = None if fast else dct_basis(1000)
    select_columns(G, Q, 10, side)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        select_columns(G, Q, 10, side)
    largest = max(e.self_cpu_memory_usage for e in prof.events())
    assert 0 < largest <= 0.05 * G.numel() * G.element_size()


def test_errors():
    G = torch.randn(20, 30)
    with pytest.raises(ValueError, match="norm"):
        select_columns(G, None, 4, "left", norm=3)
    with pytest.raises(ValueError, match="needs Q"):
        select_columns(G, dct_basis(30), 4, "left")
    with pytest.raises(ValueError, match="rank 21"):
        select_columns(G, None, 21, "left")
