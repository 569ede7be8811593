"""APOLLO's random projector from its seed (arXiv 2412.05270, algorithm 1): N(0, 1) / sqrt(rank) by Box and Muller (1958).

Number d of component j is number d % 4 of the Philox counter (d // 4, 0xFE << 24 | j, tensor id, step); its words make two
pairs r cos(t), r sin(t) with r^2 = -2 / rank ln(((w >> 8) + 1) / 2^24) and t = 2 pi (w' >> 8) / 2^24.

Polynomials: tl.cos goes through local memory, and a hardware logarithm is off by more than all of r near 1.
"""

import triton
import triton.language as tl

from fusedopt.kernels.bits import bits, from_bits
from fusedopt.kernels.rounding import philox

STREAM = tl.constexpr(0xFE)  # no parameter or state draws from it
NOISE_STREAM = tl.constexpr(0xFD)  # of the noise that a rule takes


@triton.jit
def radius(word, scale):
    """sqrt(scale ln(((word >> 8) + 1) / 2^24)), scale < 0: the logarithm of m 2^e with m in [sqrt(1/2), sqrt(2))."""
    u = bits(((word >> 8).to(tl.int32) + 1).to(tl.float32)).to(tl.int32, bitcast=True)
    e = (u - 0x3F3504F3) >> 23
    f = from_bits((u - (e << 23)).to(tl.uint32, bitcast=True)) - 1.0
    q = f * -0.0785962492 + 0.128816664
    q = q * f - 0.13128759
    q = q * f + 0.141811892
    q = q * f - 0.166245535
    q = q * f + 0.200022861
    q = q * f - 0.250008106
    q = q * f + 0.333333164
    e = (e - 24).to(tl.float32)
    log = e * 0.693359375 + (f + (f * f * (q * f - 0.5) - e * 2.12194440e-4))
    return tl.sqrt(tl.maximum(scale * log, 0.0))


@triton.jit
def turned(word, r):
    """r times cosine and sine of 2 pi (word >> 8) / 2^24: those of the rest to the nearest quarter, exchanged and with signs."""
    a = (word >> 8).to(tl.int32)
    quarter = (a + (1 << 21)) >> 22
    x = (a - (quarter << 22)).to(tl.float32) * 3.74507028e-7
    t = x * x
    s = (x + x * t * (-0.166666552 + t * (0.008332178 + t * -0.00019517265))) * r
    c = (1.0 + t * (-0.5 + t * (0.0416666456 + t * (-0.0013887367 + t * 2.44384155e-5)))) * r
    odd = quarter % 2 == 1
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where((quarter + 1) % 4 >= 2, -cosine, cosine), tl.where(quarter % 4 >= 2, -sine, sine)


@triton.jit
def normals(component, quad, key, scale):
    """fp32 (R, 4 N): four numbers of each component (R, 1) for each quad (1, N) of places, in the lane that drew them.

    key: (low and high word of the seed, tensor id, step), int32. scale: -2 / rank.
    """
    low, high, tensor, step = key
    seed = (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.uint64)
    counter = (component.to(tl.int64) << 32) + quad.to(tl.int64)
    w0, w1, w2, w3 = philox(seed, step, tensor, counter, STREAM)
    z0, z1 = turned(w1, radius(w0, scale))
    z2, z3 = turned(w3, radius(w2, scale))
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (z0.shape[0], 4 * z0.shape[1]))


@triton.jit
def noise16(seed, step, tensor, first_octet, tile, ROWS: tl.constexpr):
    """fp32 (ROWS, 256) numbers N(0, 1) for the elements of a tile (csrc/gauss.h): one Philox call per 8 elements."""
    octet = first_octet + tile * (ROWS * 32) + tl.arange(0, ROWS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    c0, c1, c2, c3 = philox(seed, step, tensor, octet, NOISE_STREAM)
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    even, odd = turned((words & 0xFFFF0000) | 0x8000, radius((words << 16) | 0x8000, -2.0))
    return tl.reshape(tl.join(even, odd), (ROWS, 256))
