"""Adds random numbers from a seed to a tensor, x += factor z with z of kernels/normal.py: SPSA's perturbations, privacy noise."""

import triton
import triton.language as tl

from fusedopt.kernels.bits import nearest, widen
from fusedopt.kernels.normal import normals

BLOCK = 1024


@triton.jit(do_not_specialize=["numel", "seed_low", "seed_high", "tensor", "step"])
def perturb_kernel(x, factor, numel, seed_low, seed_high, tensor, step, BLOCK: tl.constexpr):
    """x [numel], in memory order; factor: fp32 [1] on the device. Grid: one program per BLOCK elements, the last one masks
    its tail; the others have no mask, which would keep accesses narrow."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    quad = first // 4 + tl.arange(0, BLOCK // 4)[None, :]
    z = normals(tl.arange(0, 1)[:, None], quad, (seed_low, seed_high, tensor, step), -2.0) * tl.load(factor)
    place = first + tl.arange(0, BLOCK)[None, :]
    if first + BLOCK <= numel:
        tl.store(x + place, nearest(widen(tl.load(x + place)) + z, x.dtype.element_ty))
    else:
        inside = place < numel
        moved = widen(tl.load(x + place, mask=inside, other=0.0)) + z
        tl.store(x + place, nearest(moved, x.dtype.element_ty), mask=inside)
