"""Row and column sums of squares of the Triton backend, interpreted, against fp64 torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from harness import guarded, guards_untouched  # noqa: E402

from fusedopt.backends.triton import TritonBackend, interpreted  # noqa: E402

BACKEND = TritonBackend()
pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 when Triton is imported")


def sums(grad, rows=True, cols=True, total=True, **options):
    """The three sums as fp32 (None where not asked for), checked for writes outside."""
    sizes = ((rows, grad.shape[0]), (cols, grad.shape[1]), (total, 1))
    outs = [guarded(torch.full((n,), float("nan"))) if wanted else None for wanted, n in sizes]
    assert BACKEND.row_col_sums(grad, *outs[:2], total_out=outs[2], **options)
    assert all(out is None or guards_untouched(out) for out in outs)
    return outs


def exact(grad, mul=1.0, eps=0.0, row_weight=None, col_weight=None):
    q = (grad.double() * mul) ** 2 + eps
    a = torch.ones(grad.shape[0]).double() if row_weight is None else row_weight.double()
    b = torch.ones(grad.shape[1]).double() if col_weight is None else col_weight.double()
    return q @ b, a @ q, (a @ q @ b).view(1)


def random_grad(shape, dtype, seed=0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return guarded((x * 10.0 ** torch.arange(shape[1]).remainder(3).neg()).to(dtype).view(-1)).view(shape)


@pytest.mark.parametrize("shape", ((1, 1), (7, 5), (128, 256), (129, 257), (3, 1000)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_sums(shape, dtype):
    grad = random_grad(shape, dtype)
    for got, want in zip(sums(grad), exact(grad), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)


def test_more_tiles_than_are_added_at_a_time():
    grad = random_grad((17 * 128 - 1, 9), torch.bfloat16)
    for got, want in zip(sums(grad), exact(grad), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)


@pytest.mark.parametrize("row,col", ((True, False), (False, True), (True, True)))
def test_weights(row, col):
    """Weights of either sign: the total is that of Adafactor's update, the sum of g^2 a_i b_j."""
    grad, gen = random_grad((140, 300), torch.bfloat16), torch.Generator().manual_seed(1)
    weights = {
        "row_weight": torch.rand(140, generator=gen) + 0.1 if row else None,
        "col_weight": torch.randn(300, generator=gen) if col else None,
    }
    got, want = sums(grad, **weights), exact(grad, **weights)
    scale = exact(grad, **{k: v if v is None else v.abs() for k, v in weights.items()})
    for x, y, size in zip(got, want, scale, strict=True):
        assert ((x.double() - y).abs() <= 2e-6 * size).all()


def test_mul_and_eps():
    grad = random_grad((50, 90), torch.float16)
    mul = torch.tensor([0.3 / 64])
    for got, want in zip(sums(grad, mul=mul, eps=1e-3), exact(grad, float(mul), 1e-3), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)


def test_eps_counts_every_element_once():
    """Of zeros, only eps is left; outside the matrix not even that."""
    rows, cols, total = sums(torch.zeros(131, 259), eps=1e-30)
    torch.testing.assert_close(rows, torch.full((131,), 259e-30), rtol=1e-6, atol=0)
    torch.testing.assert_close(cols, torch.full((259,), 131e-30), rtol=1e-6, atol=0)
    torch.testing.assert_close(total, torch.tensor([131 * 259e-30]), rtol=1e-6, atol=0)


def test_the_sum_of_the_squares_of_an_update():
    grad, gen = random_grad((33, 48), torch.float32), torch.Generator().manual_seed(2)
    a, b, out = torch.rand(33, generator=gen), torch.rand(48, generator=gen), torch.zeros(1)
    assert BACKEND.weighted_square_sum(grad, a, b, out)
    update = grad.double() * a.double().sqrt()[:, None] * b.double().sqrt()
    torch.testing.assert_close(out.double(), update.square().sum().view(1), rtol=2e-6, atol=0)


def test_what_kernels_cannot_read_is_left_alone():
    out = torch.full((4,), 7.0)
    for grad in (torch.zeros(4, 6, dtype=torch.float64), torch.zeros(6, 4).t()):
        assert not BACKEND.row_col_sums(grad, out)
    assert (out == 7).all()


@pytest.mark.parametrize("wanted", ((True, False, False), (False, True, False), (False, False, True)))
def test_each_alone_has_the_same_bits(wanted):
    grad = random_grad((150, 280), torch.bfloat16)
    for all_of_them, alone in zip(sums(grad), sums(grad, *wanted), strict=True):
        assert alone is None or torch.equal(alone, all_of_them)


def test_a_nan_spoils_its_row_and_column():
    grad = random_grad((140, 300), torch.float32)
    grad[130, 270] = float("nan")
    rows, cols, total = sums(grad)
    assert rows.isnan().nonzero().tolist() == [[130]] and cols.isnan().nonzero().tolist() == [[270]]
    assert total.isnan().all()


def test_empty():
    rows, cols, total = sums(torch.zeros(0, 5))
    assert rows.numel() == 0 and cols.tolist() == [0.0] * 5 and total.tolist() == [0.0]


def test_vectors_that_do_not_fit():
    with pytest.raises(ValueError, match=r"row_out must be 4 contiguous fp32 elements .* \(4, 6\), not 5 of"):
        BACKEND.row_col_sums(torch.zeros(4, 6), torch.zeros(5))
    with pytest.raises(ValueError, match="col_weight must be 6"):
        BACKEND.row_col_sums(torch.zeros(4, 6), torch.zeros(4), col_weight=torch.zeros(6, dtype=torch.float64))
