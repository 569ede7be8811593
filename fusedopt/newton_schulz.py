"""Newton-Schulz iteration: the orthogonal factor U V^T of matrices by odd polynomials, matrix products only.

X <- X / |X|_F, then for each (a, b, c): X <- a X + (b A + c A^2) X with A = X X^T (of tall matrices a X + X (b A + c A^2) with
A = X^T X: nothing is transposed in memory). bf16 operands with fp32 sums, as the iteration forgives rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fusedopt.backends import select

# Jordan et al., "Muon: An optimizer for hidden layers in neural networks": fastest to singular values around 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
# Amsel et al., "The Polar Express" (arXiv 2505.16932), for singular values from 1e-3: the best polynomial for each step, all but
# the last made safe against rounding above 1 by 1.01. Further steps repeat the last.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01

Coefficients = tuple[tuple[float, float, float], ...]


def schedule(coefficients: Sequence[float] | str, steps: int) -> Coefficients:
    """The coefficients of each step. coefficients: (a, b, c) for all, or "polar_express".

    Raises ValueError for others, and for a number of steps below 1.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"Invalid ns_steps value: {steps!r}; it is a positive integer")
    if coefficients == "polar_express":
        chosen = [POLAR_EXPRESS[min(i, len(POLAR_EXPRESS) - 1)] for i in range(steps)]
        return tuple(
            (a, b, c) if i == steps - 1 else (a / SAFETY, b / SAFETY**3, c / SAFETY**5)
            for i, (a, b, c) in enumerate(chosen)
        )
    if isinstance(coefficients, str) or len(coefficients) != 3 or not all(math.isfinite(x) for x in coefficients):
        raise ValueError(f"Invalid ns_coefficients value: {coefficients!r}; it is (a, b, c) or 'polar_express'")
    a, b, c = map(float, coefficients)
    return ((a, b, c),) * steps


def orthogonalize(
    x: torch.Tensor, coefficients: Coefficients, eps: float = 1e-7, backend: str = "reference"
) -> torch.Tensor:
    """The orthogonal factors of a batch of matrices, [..., rows, cols] in their dtype. eps: the least norm.

    backend: whose kernel iterates, where it has one for the dtype; else torch's products.
    """
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=_wide(x.dtype))
    x = x / (norm * (SAFETY if len(set(coefficients)) > 1 else 1.0)).clamp(min=eps).to(x.dtype)
    matrices = x.reshape(-1, *x.shape[-2:])
    if select.get_backend(backend).newton_schulz(matrices, coefficients):
        return matrices.view(x.shape)
    if x.device.type != "cpu":
        return _iterate(matrices, coefficients, torch.baddbmm).view(x.shape)
    for matrix in matrices:  # in the caches; together they take up to a quarter longer
        matrix.copy_(_iterate(matrix, coefficients, torch.addmm))
    return matrices.view(x.shape)


def _iterate(x: torch.Tensor, coefficients: Coefficients, add_product) -> torch.Tensor:
    tall = x.shape[-2] > x.shape[-1]
    for a, b, c in coefficients:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        left, right = (x, polynomial) if tall else (polynomial, x)
        x = add_product(x, left, right, beta=a)
    return x


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
