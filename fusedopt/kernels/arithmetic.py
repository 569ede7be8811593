"""Division and powers of two in few instructions: within 2 ulp, subnormals as zero, like csrc/scalar.h on a GPU.

Triton's own handle subnormals and the ends of the range, which takes six and three instructions more. An interpreter has no
libdevice and computes exactly.
"""

from typing import Any

from fusedopt.kernels.language import jit, missing, tl

libdevice: Any = None
INTERPRETED: Any = None
if not missing:
    from triton.language.extra import libdevice as library

    from fusedopt.kernels.bits import INTERPRETED

    libdevice = library


@jit
def div(a, b):
    """a / b for |b| below 2^126."""
    if INTERPRETED:
        return a / b
    else:
        return libdevice.fast_dividef(a, b)


@jit
def exp2(x):
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return libdevice.exp2(x)
