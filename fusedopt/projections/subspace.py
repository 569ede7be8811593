"""Bases of a gradient's dominant subspace: randomised range finder with warm start (Halko, Martinsson, Tropp 2011, alg. 4.4
and 5.1), full SVD as its oracle, random bases.

A basis spans `rank` directions of one side of G [rows, cols]: side "left" is P [rows, rank] with orthonormal columns and
R = P^T G, side "right" is P [rank, cols] with orthonormal rows and R = G P^T. 16-bit gradients are never copied to fp32 as a
whole. The range finder needs the small symmetric eigenproblem of torch.linalg.eigh, which on a GPU waits for the device.
"""

from __future__ import annotations

import math

import torch

from fusedopt.precision import philox_words
from fusedopt.projections.matmul import AVX512, mm
from fusedopt.projections.seeds import generator

SIDES = ("left", "right")
_STREAM = 0xFE  # of the Philox counter: no parameter or state draws from it, and 0xFF is that of selections
_DRAWN = 1 << 15  # counters of random projectors at a time
_JITTER = (
    1 / 32
)  # Gaussian share of a warm start's columns: finds what is orthogonal to the old basis, costs 1e-3 of accuracy


def _check(shape, rank: int, side: str, what: str) -> None:
    if side not in SIDES:
        raise ValueError(f"{what}: side must be 'left' or 'right', not {side!r}")
    if len(shape) != 2:
        raise ValueError(f"{what}: a projection needs a matrix, not shape {tuple(shape)}; view the parameter as 2-D")
    if not 1 <= rank <= min(shape):
        raise ValueError(f"{what}: rank {rank} of a matrix {tuple(shape)}; it must be between 1 and {min(shape)}")


def _check_gradient(G: torch.Tensor, rank: int, side: str, what: str) -> None:
    _check(G.shape, rank, side, what)
    if not G.dtype.is_floating_point:
        raise TypeError(f"{what}: the gradient is {G.dtype}; it must be fp64, fp32, bf16 or fp16")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for the others: the dtype of bases and projected gradients."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def project(G: torch.Tensor, P: torch.Tensor, side: str) -> torch.Tensor:
    """R = P^T G [r, cols] (left) or G P^T [rows, r] (right) in P's dtype, G in any dtype."""
    if G.dtype == P.dtype:
        return mm(P.t().contiguous(), G) if side == "left" else mm(G, P.t()).contiguous()
    return _multiply(G, P, True).t().contiguous() if side == "left" else _multiply(G, P.t(), False)


@torch.no_grad()
def energy(G: torch.Tensor, P: torch.Tensor, side: str) -> torch.Tensor:
    """Share of |G|_F^2 that the orthonormal basis P keeps, fp64 scalar. Copies G to fp64."""
    G, P = G.double(), P.double()
    R = P.t() @ G if side == "left" else G @ P.t()
    return R.square().sum() / G.square().sum()


@torch.no_grad()
def svd_basis(G: torch.Tensor, rank: int, side: str, old: torch.Tensor | None = None) -> torch.Tensor:
    """The leading singular vectors of G from a full SVD, as galore-torch computes them: the oracle, slow and large.

    An all-zero or non-finite G gives back `old`, or unit vectors where there is none.
    """
    _check_gradient(G, rank, side, "svd_basis")
    _check_old(old, G.shape, rank, side, "svd_basis")
    A = G.to(compute_dtype(G.dtype))
    total = A.abs().sum(dtype=torch.float64)
    valid = torch.isfinite(total) & (total > 0)
    U, _, Vh = torch.linalg.svd(torch.where(valid, A, torch.zeros_like(A)), full_matrices=False)
    P = (U[:, :rank] if side == "left" else Vh[:rank]).contiguous()
    return P if old is None else torch.where(valid, P, old.to(P.dtype))


@torch.no_grad()
def refresh_basis(
    G: torch.Tensor,
    rank: int,
    side: str,
    old: torch.Tensor | None = None,
    *,
    seed: int,
    tensor_id: int,
    step: int,
    oversample: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, R): the leading singular vectors of G, in descending order, and the projected gradient, fp32 (fp64 for fp64).

    G: [rows, cols], fp64, fp32, bf16 or fp16. old: the last basis of this shape. With it the cost is three products of G and
    rank + oversample columns, the projection included; without it, four (one power iteration more). Temporaries: a few times
    (rows + cols) * (rank + oversample) elements.

    The same inputs and (seed, tensor_id, step) give the same basis; torch's global generators are not used. Each vector
    points the way of the old one with its number; without old its largest entry is positive.
    An all-zero or non-finite G gives back `old` bit for bit, without asking the host; without old, a random basis.
    """
    _check_gradient(G, rank, side, "refresh_basis")
    _check_old(old, G.shape, rank, side, "refresh_basis")
    if oversample < 0:
        raise ValueError(f"refresh_basis: oversample {oversample} is negative")
    dtype, left = compute_dtype(G.dtype), side == "left"
    width = min(rank + oversample, *G.shape)
    size, other = (G.shape[0], G.shape[1]) if left else (G.shape[1], G.shape[0])
    gen = generator(G.device, seed, tensor_id, step)
    noise = _gaussian(size, width, dtype, gen)  # columns of about unit length

    if old is None:
        sketch, valid = _orthonormalise(_multiply(G, _gaussian(other, width, dtype, gen), not left, rough=True), None)
    else:
        basis = (old if left else old.t()).to(dtype)
        sketch, valid = noise.clone(), None
        sketch[:, :rank].mul_(_JITTER).add_(basis)
    Z = _multiply(G, sketch, left, rough=True)
    del sketch
    # Cholesky-QR of Z would cost 8 % of a refresh; a warm start's columns are near singular vectors, so lengths are enough.
    norms = torch.linalg.vector_norm(Z, dim=0, dtype=torch.float64)
    finite = torch.isfinite(norms.sum()) & (norms.sum() > 0)
    valid = finite if valid is None else finite & valid
    if old is None:
        Z, _ = _orthonormalise(Z, None)
    else:
        Z *= torch.where(norms == 0, torch.zeros_like(norms), 1 / norms).to(dtype)
    Y = _multiply(G, Z, not left, rough=True)
    del Z

    # Where G is not to be used, the basis is that of [old | noise], and R = old^T G.
    if old is None:
        Y = torch.where(valid, Y, noise)
    else:
        Y = torch.cat([torch.where(valid, Y[:, :rank], basis), torch.where(valid, Y[:, rank:], noise[:, rank:])], 1)
    Q, _ = _orthonormalise(Y, noise)
    del Y
    B = _multiply(G, Q, left)  # Q^T G, transposed

    # Rayleigh-Ritz in the span of Q, whose Gram matrix is still only near I: the second pass of Cholesky-QR on small matrices.
    Q = Q.double()
    T = _inverse_factor(Q.t() @ Q)[0]
    M = T.t() @ _gram(B) @ T
    M = (M + M.t()) / 2
    usable = valid & torch.isfinite(M).all()
    M = torch.where(usable, M, torch.diag(torch.arange(width, 0, -1, dtype=M.dtype, device=M.device)))
    W = T @ torch.linalg.eigh(M)[1].flip(1)[:, :rank]
    P = Q @ W
    if old is None:
        pivot = P.gather(0, P.abs().argmax(0, keepdim=True))[0]
    else:
        pivot = torch.where(usable, (P * basis).sum(0), 1)
    sign = torch.where(pivot < 0, -1.0, 1.0).to(P.dtype)
    P, W = (P * sign).to(dtype), (W * sign).to(dtype)
    if left:
        R = mm(W.t().contiguous(), B.t())
    else:
        P, R = P.t().contiguous(), mm(B, W).contiguous()
    return (P if old is None else torch.where(usable, P, old.to(dtype))), R


@torch.no_grad()
def random_basis(
    shape: tuple[int, int],
    rank: int,
    side: str,
    *,
    seed: int,
    tensor_id: int,
    step: int,
    device="cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """A uniformly random orthonormal basis (FRUGAL's random projection): [rows, rank] or [rank, cols]."""
    _check(shape, rank, side, "random_basis")
    size = shape[0] if side == "left" else shape[1]
    X = torch.randn(size, rank, generator=generator(device, seed, tensor_id, step), device=device, dtype=torch.float64)
    for _ in range(2):
        X = X @ _inverse_factor(X.t() @ X)[0]
    return (X if side == "left" else X.t().contiguous()).to(dtype)


@torch.no_grad()
def gaussian_projector(
    shape: tuple[int, int],
    rank: int,
    side: str,
    *,
    seed: int,
    tensor_id: int,
    step: int,
    device="cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """APOLLO's random projector N(0, 1) / sqrt(rank), [rows, rank] or [rank, cols]: drawn again from its seed, never stored.

    Number d of component j, along the projected side, is number d % 4 of the Philox counter (d // 4, stream << 24 | j,
    tensor id, step), whose words make two pairs by Box and Muller (1958): r cos(t), r sin(t) with
    r^2 = -2 / rank ln(((w >> 8) + 1) / 2^24) and t = 2 pi (w' >> 8) / 2^24. Kernels compute them in fp32, which changes each by
    at most 4e-7 of itself; fp32 values here are rounded from fp64. 16-bit ones are rounded from fp32.
    """
    _check(shape, rank, side, "gaussian_projector")
    depth = shape[0] if side == "left" else shape[1]
    quads = (depth + 3) // 4
    out = torch.empty(rank, depth, dtype=dtype, device=device)
    block = max(1, _DRAWN // quads)  # components at a time: temporaries of 64-bit words stay small
    for first in range(0, rank, block):
        j = torch.arange(first, min(rank, first + block), dtype=torch.int64, device=device)
        counter = (j[:, None] << 32) + torch.arange(quads, dtype=torch.int64, device=device)
        words = philox_words(seed, step, tensor_id, counter, _STREAM)
        z = []
        for one, other in (words[:2], words[2:]):
            r = (((one >> 8) + 1).double() / 2**24).log_().mul_(-2 / rank).sqrt_()
            turn = (other >> 8).double() * (2 * math.pi / 2**24)
            z += [r * turn.cos(), r * turn.sin()]
        z = torch.stack(z, 2).view(len(j), 4 * quads)[:, :depth]
        out[first : first + len(j)] = z if dtype == torch.float64 else z.float()
    return out.t().contiguous() if side == "left" else out


def _check_old(old: torch.Tensor | None, shape, rank: int, side: str, what: str) -> None:
    if old is None:
        return
    want = (shape[0], rank) if side == "left" else (rank, shape[1])
    if tuple(old.shape) != want:
        raise ValueError(
            f"{what}: the old basis has shape {tuple(old.shape)}, the new one {want}; pass old=None to start afresh"
        )


def _gaussian(size: int, width: int, dtype: torch.dtype, gen: torch.Generator) -> torch.Tensor:
    return torch.randn(size, width, generator=gen, device=gen.device, dtype=dtype).mul_(size**-0.5)


def _multiply(G: torch.Tensor, X: torch.Tensor, transpose: bool, rough: bool = False) -> torch.Tensor:
    """G^T X or G X in X's dtype. 16-bit G: by blocks of rows in X's dtype, no larger than X or the result.

    rough: bf16 throughout where that is fast, for sketches: 4 times faster than blocks on an AVX-512 CPU for 1e-5 of the
    energy; on other CPUs torch's bf16 products are scalar loops. fp16 would overflow.
    """
    if G.dtype == X.dtype:
        return mm(G.t() if transpose else G, X)
    if rough and G.dtype == torch.bfloat16 and (G.is_cuda or AVX512):
        return torch.mm(G.t() if transpose else G, X.to(G.dtype)).to(X.dtype)
    rows, cols = G.shape
    out = X.new_zeros(cols if transpose else rows, X.shape[1])
    block = min(rows, max(64, max(rows, cols) * X.shape[1] // max(cols, 1)))
    buffer = X.new_empty(block, cols)
    for start in range(0, rows, block):
        part = G[start : start + block]
        wide = buffer[: len(part)].copy_(part)
        if transpose:
            out.addmm_(wide.t(), X[start : start + block])
        else:
            torch.mm(wide, X, out=out[start : start + block])
    return out


def _gram(X: torch.Tensor) -> torch.Tensor:
    X = X.double()
    return X.t() @ X


def _orthonormalise(Y: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q, valid): one pass of Cholesky-QR in fp64. Columns that depend on earlier ones become noise (or 0 without it)."""
    wide = Y.double()
    C = wide.t() @ wide
    total = C.diagonal().sum()
    T, dependent = _inverse_factor(C)
    Q = (wide @ T).to(Y.dtype)
    if noise is not None:
        Q.addcmul_(noise, dependent.to(Y.dtype))
    return Q, torch.isfinite(total) & (total > 0)


def _inverse_factor(C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, dependent): fp64 upper triangular T with T^T C T = I for a Gram matrix C, and the columns it depends on, which are 0.

    The columns are brought to unit length and the diagonal is shifted (Fukaya et al. 2020), so that the factorisation of a
    singular C goes through; should it fail nevertheless, a larger shift takes over on the device.
    """
    n = C.shape[0]
    scale = torch.where(C.diagonal() > 0, C.diagonal(), torch.ones_like(C.diagonal())).rsqrt()
    C = C * scale[:, None] * scale
    eye = torch.eye(n, dtype=C.dtype, device=C.device)
    shift = 10 * n * torch.finfo(C.dtype).eps
    L, info = torch.linalg.cholesky_ex(C + shift * eye)
    large = torch.linalg.cholesky_ex(C + 1e-6 * eye)[0]
    L = torch.where(info == 0, L, large)
    threshold = torch.where(info == 0, 100 * shift, 1e-4)
    dependent = ~(L.diagonal().square() > threshold)
    L = torch.where(dependent, torch.zeros_like(eye), L.tril()) + torch.diag(dependent.to(C.dtype))
    T = torch.linalg.solve_triangular(L, eye, upper=False).t() * scale[:, None]
    return torch.where(dependent, torch.zeros_like(T), T), dependent
