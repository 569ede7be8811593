"""Bases of a gradient's dominant subspace: randomised range finder with warm start (Halko, Martinsson, Tropp 2011, alg. 4.4
and 5.1), full SVD as its oracle, random bases.

A basis spans `rank` directions of one side of G [rows, cols]: side "left" is P [rows, rank] with orthonormal columns and
R = P^T G, side "right" is P [rank, cols] with orthonormal rows and R = G P^T. 16-bit gradients are never copied to fp32 as a
whole. The range finder needs the small symmetric eigenproblem of torch.linalg.eigh, which on a GPU waits for the device.
"""

from __future__ import annotations

import math

import torch

from fusedopt.backends.select import get_backend
from fusedopt.precision import philox_words
from fusedopt.projections.matmul import FAST, mm
from fusedopt.projections.seeds import generator

SIDES = ("left", "right")
_STREAM = 0xFE  # of the Philox counter: no parameter or state draws from it, and 0xFF is that of selections
_DRAWN = 1 << 15  # counters of random projectors at a time
_JITTER = (
    1 / 32
)  # random share of a warm start's columns: finds what is orthogonal to the old basis, for 1e-3 of accuracy
_BLOCK = 512


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
    return _product(G, P, side)


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
    basis_out: torch.Tensor | None = None,
    projected_out: torch.Tensor | None = None,
    with_projected: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(P, R): the leading singular vectors of G, in descending order, and the projected gradient, fp32 (fp64 for fp64).

    G: [rows, cols], fp64, fp32, bf16 or fp16. old: the last basis of this shape. With it the cost is three products of G and
    rank + oversample columns, the projection included; without it, four (one power iteration more).
    basis_out takes P in its own dtype and may be `old` itself; projected_out takes R; both contiguous. R is None without
    with_projected. Temporaries beside those that are returned: about (rows + cols) * (rank + oversample) fp32 numbers, a byte
    for each of side's, some hundred rows of one of them in fp64 and a few squares of rank + oversample.

    The same inputs and (seed, tensor_id, step) give the same basis; torch's global generators are not used. Each vector
    points the way of the old one with its number; without old its largest entry is positive.
    An all-zero or non-finite G gives back `old` bit for bit, without asking the host; without old, a random basis.
    """
    _check_gradient(G, rank, side, "refresh_basis")
    _check_old(old, G.shape, rank, side, "refresh_basis")
    if oversample < 0:
        raise ValueError(f"refresh_basis: oversample {oversample} is negative")
    dtype, left = compute_dtype(G.dtype), side == "left"
    width, opposite = min(rank + oversample, *G.shape), "right" if left else "left"
    gen = generator(G.device, seed, tensor_id, step)

    def shape(of: str, vectors: int) -> tuple[int, int]:
        return (G.shape[0], vectors) if of == "left" else (vectors, G.shape[1])

    noise = _noise(shape(side, width), gen)
    filling = _columns(noise, side)
    before = None if old is None else _columns(old, side)
    if old is None:
        omega = _scaled(_noise(shape(opposite, width), gen), opposite, dtype)
        sketch = _product(G, omega, opposite, rough=True)
        del omega
        valid = _orthonormalise(_columns(sketch, side))
    else:
        sketch, valid = _scaled(noise, side, dtype), True
        _columns(sketch, side)[:, :rank].mul_(_JITTER).add_(before)
    Z = _product(G, sketch, side, rough=True)
    del sketch
    if old is None:
        valid = _orthonormalise(_columns(Z, opposite)) & valid
    else:
        # Cholesky-QR of Z would cost 8 % of a refresh; a warm start's columns are near singular vectors, so that their lengths
        # differ as those of Y do, which are dealt with there. The largest entry is taken out against over- and underflow.
        low, high = torch.aminmax(Z)
        largest = torch.maximum(high, -low)
        valid = torch.isfinite(largest) & (largest > 0)
        Z.div_(largest)
    Q = _product(G, Z, opposite, exact_range=True)
    del Z
    basis = _columns(Q, side)

    # Where G is not to be used, the basis is that of [old | noise], and R = old^T G.
    def fill(rows: slice) -> torch.Tensor:
        block = _scale_noise(filling[rows].to(dtype), len(filling))
        if before is not None:
            block[:, :rank] = torch.where(valid, block[:, :rank], before[rows])
        return block

    valid = _orthonormalise(basis, valid, fill) & valid
    B = _product(G, Q, side)

    # Rayleigh-Ritz in the span of Q, whose Gram matrix is still only near I: the second pass of Cholesky-QR on small matrices.
    T = _inverse_factor(_gram(basis))[0]
    M = T.t() @ _rough_gram(_columns(B, opposite)) @ T
    M = (M + M.t()) / 2
    usable = valid & torch.isfinite(M).all()
    M = torch.where(usable, M, torch.diag(torch.arange(width, 0, -1, dtype=M.dtype, device=M.device)))
    W = T @ torch.linalg.eigh(M)[1].flip(1)[:, :rank]
    del T, M

    # P = Q W takes the place of Q.
    rotation, pivot = W.to(dtype), torch.zeros(rank, dtype=W.dtype, device=W.device)
    for rows in _row_slices(basis):
        block = _times(_block(basis, rows, dtype), rotation)
        basis[rows, :rank] = block
        if before is not None:
            pivot += (block * before[rows]).sum(0)
    new = basis[:, :rank]
    pivot = new.amax(0) + new.amin(0) if before is None else torch.where(usable, pivot, 1)
    sign = torch.where(pivot < 0, -1.0, 1.0).to(dtype)
    if basis_out is None:
        basis_out = Q.new_empty(shape(side, rank))
    target = _columns(basis_out, side)
    for rows in _row_slices(new):
        block = new[rows] * sign
        target[rows] = block if before is None else torch.where(usable, block, before[rows].to(dtype))
    del Q, basis, new
    if not with_projected:
        return basis_out, None
    rotation *= sign
    if projected_out is None:
        projected_out = B.new_empty(shape(opposite, rank))
    # R = W^T B (left) or B W (right): the projection of B by W
    _product(B, rotation if left else rotation.t().contiguous(), side, out=projected_out)
    return basis_out, projected_out


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


def gaussian_numbers(counter: torch.Tensor, scale: float, seed: int, tensor_id: int, step) -> torch.Tensor:
    """fp64 [*counter.shape, 4]: four numbers of each Philox counter, N(0, -scale / 2); see `gaussian_projector`."""
    words = philox_words(seed, step, tensor_id, counter, _STREAM)
    z = []
    for one, other in (words[:2], words[2:]):
        r = (((one >> 8) + 1).double() / 2**24).log_().mul_(scale).sqrt_()
        turn = (other >> 8).double() * (2 * math.pi / 2**24)
        z += [r * turn.cos(), r * turn.sin()]
    return torch.stack(z, -1)


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
    span: tuple[int, int] | None = None,
) -> torch.Tensor:
    """APOLLO's random projector N(0, 1) / sqrt(rank), [rows, rank] or [rank, cols]: drawn again from its seed, never stored.

    Number d of component j, along the projected side, is number d % 4 of the Philox counter (d // 4, stream << 24 | j,
    tensor id, step), whose words make two pairs by Box and Muller (1958): r cos(t), r sin(t) with
    r^2 = -2 / rank ln(((w >> 8) + 1) / 2^24) and t = 2 pi (w' >> 8) / 2^24. Kernels compute them in fp32, which changes each by
    at most 4e-7 of itself; fp32 values here are rounded from fp64. 16-bit ones are rounded from fp32.

    span: (first, end) of the numbers d that are drawn, for a part of the matrix; None: all.
    """
    _check(shape, rank, side, "gaussian_projector")
    start, end = (0, shape[0] if side == "left" else shape[1]) if span is None else span
    depth, skipped = end - start, start // 4
    quads = (end + 3) // 4 - skipped
    out = torch.empty(rank, depth, dtype=dtype, device=device)
    block = max(1, _DRAWN // quads)  # components at a time: temporaries of 64-bit words stay small
    for first in range(0, rank, block):
        j = torch.arange(first, min(rank, first + block), dtype=torch.int64, device=device)
        counter = (j[:, None] << 32) + torch.arange(skipped, skipped + quads, dtype=torch.int64, device=device)
        z = gaussian_numbers(counter, -2 / rank, seed, tensor_id, step).view(len(j), 4 * quads)
        z = z[:, start - 4 * skipped : end - 4 * skipped]
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


def _noise(shape: tuple[int, int], gen: torch.Generator) -> torch.Tensor:
    """Evenly distributed int8: a quarter of a Gaussian sketch's memory and a third of the time to draw it."""
    numel = shape[0] * shape[1]
    words = torch.randint(-(2**31), 2**31 - 1, (-(-numel // 4),), generator=gen, dtype=torch.int32, device=gen.device)
    return words.view(torch.int8)[:numel].view(shape)


def _scale_noise(x: torch.Tensor, size: int) -> torch.Tensor:
    """In place: columns of about unit length from `size` integers each."""
    return x.add_(0.5).mul_((size * (2**16 - 1) / 12) ** -0.5)


def _scaled(noise: torch.Tensor, side: str, dtype: torch.dtype) -> torch.Tensor:
    return _scale_noise(noise.to(dtype), len(_columns(noise, side)))


def _columns(X: torch.Tensor, side: str) -> torch.Tensor:
    """The vectors of a matrix that is shaped as a basis of a side, as columns."""
    return X if side == "left" else X.t()


def _row_slices(V: torch.Tensor) -> list[slice]:
    """Blocks of rows whose temporaries are small; no more than 16, for the sake of a GPU's launches."""
    block = max(_BLOCK, -(-len(V) // 16))
    return [slice(i, i + block) for i in range(0, len(V), block)]


def _native(G: torch.Tensor, X: torch.Tensor):
    """The CPU backend where it takes the product: no torch product of these shapes is faster but oneDNN's, by little."""
    if G.device.type != "cpu" or torch.float64 in (G.dtype, X.dtype) or not G.is_contiguous():
        return None
    backend = get_backend("cpu")
    return backend if backend.reason() is None else None


def _product(
    G: torch.Tensor, X: torch.Tensor, side: str, *, rough=False, exact_range=False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """X^T G [n, cols] (left; X [rows, n]) or G X^T [rows, n] (right; X [n, cols]) in X's dtype.

    rough: in bf16 where that is faster, for the first products of a range finder, which have noise in them anyway.
    exact_range: only X may be rounded, so that the result's columns (left: rows) are combinations of G's to fp32's precision.
    """
    onednn = FAST and side == "right" and G.dtype == torch.float32 and not rough and out is None  # a sixth faster
    if not onednn and (backend := _native(G, X)) is not None:
        out = (
            X.new_empty((X.shape[1], G.shape[1]) if side == "left" else (G.shape[0], X.shape[0]))
            if out is None
            else out
        )
        factor = X.to(G.dtype) if G.dtype == torch.bfloat16 and (rough or exact_range) else X
        backend.project(G, factor, side, out, rough=rough and G.dtype != torch.float16)
        return out
    left = side == "left"
    if G.dtype == X.dtype:
        result = mm(X.t(), G) if left else mm(G, X.t())
    elif (rough or exact_range) and G.is_cuda and G.dtype == torch.bfloat16:
        factor = X.to(G.dtype)
        result = (torch.mm(factor.t(), G) if left else torch.mm(G, factor.t())).to(X.dtype)
    else:
        return _by_blocks(G, X, side, out)
    return result.contiguous() if out is None else out.copy_(result)


def _by_blocks(G: torch.Tensor, X: torch.Tensor, side: str, out: torch.Tensor | None) -> torch.Tensor:
    """_product of a G of another dtype, some rows of which are converted at a time."""
    rows, cols = G.shape
    if out is None:
        out = X.new_empty((X.shape[1], cols) if side == "left" else (rows, X.shape[0]))
    if side == "left":
        out.zero_()
    size = max(64, rows // 64) if G.is_cuda else max(1, min(rows, _BLOCK * 128 // cols))
    buffer = X.new_empty(min(size, rows), cols)
    for first in range(0, rows, size):
        part = slice(first, min(first + size, rows))
        wide = buffer[: part.stop - first].copy_(G[part])
        if side == "left":
            out.addmm_(X[part].t(), wide)
        else:
            torch.mm(wide, X.t(), out=out[part])
    return out


def _block(V: torch.Tensor, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Some rows of V in a dtype, in V's order of memory. (Tensor.to would transpose a part of wide rows seen as columns.)"""
    return V[rows].to(dtype) if V.stride(1) == 1 else V.t()[:, rows].to(dtype).contiguous().t()


def _times(block: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """block W in the block's order of memory."""
    return mm(block, W) if block.stride(1) == 1 else mm(W.t(), block.t()).t()


def _gram(V: torch.Tensor) -> torch.Tensor:
    """V^T V, added up in fp64."""
    C = torch.zeros(V.shape[1], V.shape[1], dtype=torch.float64, device=V.device)
    for rows in _row_slices(V):
        block = _block(V, rows, torch.float64)
        C.addmm_(block.t(), block)
        del block  # before the next one is made
    return C


def _rough_gram(V: torch.Tensor) -> torch.Tensor:
    """The same with products in fp32 of columns of unit length: each element has an error of 1e-7 of its two columns' lengths,
    as V has where it is a product in fp32."""
    C = torch.zeros(V.shape[1], V.shape[1], dtype=torch.float64, device=V.device)
    parts = [torch.linalg.vector_norm(V[rows], dim=0, dtype=torch.float64).square() for rows in _row_slices(V)]
    lengths = sum(parts).sqrt()
    unit = torch.where(lengths > 0, 1 / lengths, 0).to(V.dtype)
    for rows in _row_slices(V):
        block = _block(V, rows, V.dtype) * unit
        C += mm(block.t(), block)
        del block
    return C * lengths[:, None] * lengths


def _orthonormalise(V: torch.Tensor, valid=None, fill=None) -> torch.Tensor:
    """One pass of Cholesky-QR of V's columns, in place, in fp64. Returns whether V was finite and not 0.

    Columns that depend on earlier ones become those of fill(rows), or 0 without it; all of them where V is not valid.
    """
    C = _gram(V)
    total = C.diagonal().sum()
    finite = torch.isfinite(total) & (total > 0)
    valid = finite if valid is None else finite & valid
    T, dependent = _inverse_factor(torch.where(valid, C, torch.zeros_like(C)))
    dependent = dependent.to(V.dtype)
    for rows in _row_slices(V):
        block = _times(_block(V, rows, torch.float64).masked_fill_(~valid, 0), T)
        V[rows] = block if fill is None else block.addcmul_(fill(rows), dependent)
        del block
    return finite


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
