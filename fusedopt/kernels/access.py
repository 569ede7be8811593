"""Addresses from the row table, and loads and stores of a tile: 16-byte pieces in full tiles, masks at the tail."""

import triton
import triton.language as tl


@triton.jit
def row_pointer(table, column, rows, row, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """A tensor's address from the row table, as a pointer to TYPE, promised to be a multiple of ALIGN bytes.

    The promise is made on the cast itself: made on the result of a call, it is lost when the call is inlined (Triton
    3.6).
    """
    p = tl.load(table + column * rows + row).to(tl.pointer_type(TYPE))
    if ALIGN > 1:
        p = tl.multiple_of(p, ALIGN)
    return p


@triton.jit
def load_stream(p, local, inside, whole, other, ALIGNED: tl.constexpr):
    """A tile's elements: without masks, in 16-byte pieces, where the whole tile is inside an aligned tensor.

    The branch is around each access, not around the whole step: a second copy of the arithmetic needs twice the
    registers.
    """
    if ALIGNED:
        if whole:
            x = tl.load(p + local)
        else:
            x = tl.load(p + local, mask=inside, other=other)
    else:
        x = tl.load(p + local, mask=inside, other=other)
    return x


@triton.jit
def halves(x):
    """(ROWS, 256) to elements 0-3 and elements 4-7 of each 8, (ROWS, 32, 4) both."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 32, 2, 4)), (0, 1, 3, 2)))


@triton.jit
def store_stream(p, x, local, inside, whole, ALIGNED: tl.constexpr):
    """ALIGNED: 0 no, 1 yes, 2 yes and a thread has 8 consecutive elements of each stream.

    Triton gives a store of fp32 4 elements a thread. Where a narrower stream has 8, that would move every state through
    shared memory: it is stored in two halves instead.
    """
    if ALIGNED == 2 and x.dtype == tl.float32:
        first, second = halves(x)
        at = tl.arange(0, x.shape[0])[:, None, None] * 256 + tl.arange(0, 32)[None, :, None] * 8
        at += tl.arange(0, 4)[None, None, :]
        if whole:
            tl.store(p + at, first)
            tl.store(p + at + 4, second)
        else:
            inside_first, inside_second = halves(inside)
            tl.store(p + at, first, mask=inside_first)
            tl.store(p + at + 4, second, mask=inside_second)
    elif ALIGNED:
        if whole:
            tl.store(p + local, x)
        else:
            tl.store(p + local, x, mask=inside)
    else:
        tl.store(p + local, x, mask=inside)


@triton.jit
def spread(x, ROWS: tl.constexpr):
    """(ROWS * 32,) to (ROWS, 256): each value for 8 consecutive elements, in the lane that has it."""
    x = tl.reshape(x, (ROWS, 32))
    x = tl.join(x, x)
    x = tl.join(x, x)
    return tl.reshape(tl.join(x, x), (ROWS, 256))
