"""Deterministic sums over rows (tensors) and launches by whichever program finishes last; global norm and clipping.

Every program has stored its partial sums, one pair per grain of 2048 elements. It then counts itself finished with an
acquire-release atomic; barriers before and (inside Triton's scalar atomic) after it extend the order to all its
threads. The program that finds itself last therefore sees every partial sum, and adds them in an order that does not
depend on who is last. Counters are left zero.
"""

import triton
import triton.language as tl

# Pairs per iteration: 8 loads of 8 bytes in flight for each of 256 threads, since one program reads all partial sums of
# a tensor. More would cost registers, so occupancy, in the loop that reads the gradients.
PAIRS = tl.constexpr(2048)
ROWS = tl.constexpr(256)


@triton.jit
def last_of(counter, count):
    """Whether this program is the last of `count` to arrive; resets the counter if so."""
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    last = arrived == count - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def row_sums(partials, count):
    """(2,) sums of the `count` pairs at `partials`."""
    index = tl.arange(0, PAIRS)[:, None]
    side = tl.arange(0, 2)[None, :]
    total = tl.zeros((PAIRS, 2), tl.float32)
    start = count * 0
    while start < count:
        # .cg: not from this SM's L1, which other programs' stores do not reach
        total += tl.load(
            partials + (start + index) * 2 + side, mask=start + index < count, other=0.0, cache_modifier=".cg"
        )
        start += PAIRS
    return tl.sum(total, axis=0)


@triton.jit
def largest(x, axis: tl.constexpr = None):
    """The largest along an axis; NaN where one is NaN."""
    return tl.max(x, axis) + tl.sum(tl.where(x != x, x, 0.0), axis)


@triton.jit
def row_largest(partials, count):
    """(2,) largest of the `count` pairs at `partials`."""
    index = tl.arange(0, PAIRS)[:, None]
    side = tl.arange(0, 2)[None, :]
    most = tl.full((PAIRS, 2), float("-inf"), tl.float32)
    start = count * 0
    while start < count:
        more = tl.load(
            partials + (start + index) * 2 + side, mask=start + index < count, other=float("-inf"), cache_modifier=".cg"
        )
        most = tl.where((more > most) | (more != more), more, most)
        start += PAIRS
    return largest(most, 0)


@triton.jit
def launch_total(table, partials, rows):
    """Sum over rows of |g|^2, which each row's last program left in the second entry of the row's first grain."""
    index = tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    start = rows * 0
    while start < rows:
        row = start + index
        alive = tl.load(table + 10 * rows + row, mask=row < rows, other=0) > 0
        grain = tl.load(table + 12 * rows + row, mask=row < rows, other=0)
        total += tl.load(partials + 2 * grain + 1, mask=alive, other=0.0, cache_modifier=".cg")
        start += ROWS
    return tl.sum(total, axis=0)


@triton.jit
def finish_norm(totals, total, index, count, grad_scale, norm, clip, max_norm):
    """Leaves this launch's total; the last combines all: norm after unscaling, torch's clip_grad_norm_ coefficient."""
    tl.store(totals + index, total)
    if index == count - 1:
        launch = index * 0
        everything = total * 0.0
        while launch < count - 1:
            everything += tl.load(totals + launch)
            launch += 1
        value = tl.sqrt(everything + total)
        if grad_scale is not None:
            value = value / tl.load(grad_scale)
        tl.store(norm, value)
        if clip is not None:
            coefficient = max_norm / (value + 1e-6)
            tl.store(clip, tl.where(coefficient > 1.0, 1.0, coefficient))  # a NaN norm stays NaN
