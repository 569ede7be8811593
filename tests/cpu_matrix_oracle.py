"""MatrixWork in fp64, with a bound of what fp32 arithmetic may change, derived below; independent of the native code.

A sum of K products in fp32, in any order, fused or not, is off by at most gamma(K) * sum |a b|, gamma(n) = n u / (1 - n u),
u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). Subnormals may count as 0.
"""

from __future__ import annotations

import torch

U = 2.0**-24
TINY = 2.0**-126

# Spacing of a format relative to its values, and of its subnormals.
SPACING = {torch.bfloat16: (2.0**-7, 2.0**-133), torch.float16: (2.0**-10, 2.0**-24)}


def gamma(n: int) -> float:
    return n * U / (1 - n * U)


def product(left: torch.Tensor, right: torch.Tensor, medium: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """left @ right and its bound. medium: fp32 factors may have been rounded to bf16 (unit roundoff 2^-8)."""
    a, b = left.double(), right.double()
    size = a.abs() @ b.abs()
    rounded = sum(2.0**-8 for x in (left, right) if medium and x.dtype == torch.float32)
    depth = a.shape[1]
    # (1 + 2^-8)^2 of the size at most; 1.01 covers it
    return a @ b, size * (1.01 * rounded + 1.02 * gamma(depth + 1)) + depth * TINY


def stored_bound(x: torch.Tensor, dtype: torch.dtype, precision: str) -> torch.Tensor:
    """How far the weights that a precision keeps may lie from x."""
    if dtype == torch.float32 or precision in ("master", "split32"):
        return torch.zeros_like(x)
    if precision == "split24":
        return x.abs() * 2.0**-15 + TINY
    relative, absolute = SPACING[dtype]
    one = x.abs() * relative + absolute
    if precision == "nearest":
        return one / 2
    if precision == "stochastic":
        return one
    return (
        one / 2 * relative + absolute + x.abs() * U
    )  # kahan: the rest, rounded stochastically, and the sum of both in fp32


def reference_apply_matrix(work, medium: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, bound) after the update of a MatrixWork; `work` stays as it is."""
    lr, decay, _, grad_sign = (float(x) for x in work.scalars[:4])
    shape = work.param.shape
    companion = None if work.companion is None else work.companion.flatten()
    p = work.precision.load(work.param.flatten(), companion, torch.float64).view(shape)
    if work.left is not None:
        back, error = product(work.left, work.right, medium)
        u = work.scale * back
        off = abs(work.scale) * error + u.abs() * U
    else:
        u = work.grad.double() * work.scale
        if work.row_factor is not None:
            u = u * work.row_factor.double()[:, None]
        if work.col_factor is not None:
            u = u * work.col_factor.double()[None, :]
        off = u.abs() * gamma(3)
    if work.residual is not None:
        back, error = product(work.grad_left, work.grad_right, medium)
        e = work.grad.double() - back
        error = error + e.abs() * U
        if work.residual == "sign":
            by = work.residual_scale * grad_sign
            part, unsure = by * e.sign(), 2 * abs(by) * (e.abs() <= error)
        else:
            scale = 1.0 if work.grad_scale is None else float(work.grad_scale)
            clip = 1.0 if work.clip is None else float(work.clip)
            by = work.residual_scale * grad_sign / scale * clip
            part, unsure = by * e, abs(by) * error
        u = u + part
        off = off + unsure + part.abs() * gamma(5) + u.abs() * U
    change = lr * u + decay * p
    want = p - change
    size = (lr * u).abs() + (decay * p).abs()
    off = lr * off + size * gamma(3) + (want.abs() + lr * off) * U + 8 * TINY
    return want, off + stored_bound(want.abs() + off, work.param.dtype, work.precision.name)
