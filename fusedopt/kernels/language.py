"""`triton`, `tl` and `jit`, or stand-ins where Triton is not installed, so that rule files import everywhere."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    missing: str | None = None
except Exception as error:  # a broken Triton must not break `import fusedopt`
    triton = tl = None
    missing = f"Triton cannot be imported ({type(error).__name__}: {error})"

    def jit(function):
        return function
