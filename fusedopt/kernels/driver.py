"""The multi-tensor optimizer step: one kernel for every rule, format, parameter type and phase (csrc/fusedopt.h).

Grid: one program per chunk, `chunk` consecutive elements of one row. A program walks its chunk in tiles of 2048
elements and owns the tail: tiles inside the tensor are read and written without masks in 16-byte pieces, the last one
of a row with masks.
"""

import triton
import triton.language as tl

from fusedopt.kernels.access import load_stream, row_pointer
from fusedopt.kernels.bits import widen
from fusedopt.kernels.normal import noise16
from fusedopt.kernels.precision import companion_pointer, load_param, store_param
from fusedopt.kernels.reductions import finish_norm, largest, last_of, launch_total, row_largest, row_sums
from fusedopt.kernels.states import BF16_STOCHASTIC, INT4, INT8, load_state, state_pointer, store_state

# 2048 elements are one grain of the partial sums, and 8 elements for each of 256 threads: one 16-byte piece of a 16-bit
# stream, two of an fp32 stream. On NVIDIA a warp then owns one 256-element block, whose absmax needs no shared memory.
TILE_ROWS = tl.constexpr(8)
TILE = tl.constexpr(2048)
FUSED = tl.constexpr(0)
PROBE = tl.constexpr(1)
APPLY = tl.constexpr(2)
NORM = tl.constexpr(3)
DIRECTION_ONLY = tl.constexpr(4)
HEAD = tl.constexpr(8)


def launch_options(fixed: dict, nvidia: bool, heavy: tuple[str, ...] = ()) -> dict:
    """Compile options for the compile-time arguments `fixed`. fp fusion is pinned: its default changes in Triton 3.10.

    256 threads, so that each holds 8 elements. Limits on registers: left alone, ptxas takes 150 for two int8 states and
    one program fills an NVIDIA SM. 128 let 2 programs share it: the leanest step (AdamW with int8 states, 6 bytes read
    an element) then has 24 KB in flight. 80 let 3, for steps with one simple state or none. Three int8 or int4 states
    and unaligned rows need more. heavy: kinds of states ("plain", "coded") with which a rule would spill under its limit
    (Rule.heavy): it gets the next. Nothing spills then (bench gates).
    """
    options = {"num_warps": 8 if nvidia else 4, "enable_fp_fusion": True}
    if not nvidia:
        return options
    codes = [fixed[f"F{i}"] & 0xFF for i in range(4) if fixed[f"F{i}"] >= 0]
    coded = sum(code in (INT8.value, INT4.value) for code in codes)
    if coded > 2 or not fixed["ALIGNED"]:
        return options | {"maxnreg": 192}
    simple = coded == 0 and len(codes) <= 1 and BF16_STOCHASTIC.value not in codes and fixed["PHASE"] != NORM.value
    more = ("coded" if coded else "plain") in heavy and fixed["PHASE"] == FUSED.value
    return options | {"maxnreg": (80, 128, 192)[(not simple) + more]}


@triton.jit
def step_tile(
    p_row, c_row, g_row, p0, p1, p2, p3, a0, a1, a2, a3, c, tile, numel, grain,
    mul, l2, q, lr, decay, seed, step, tensor, first_octet,
    DIRECTION: tl.constexpr, TERMS: tl.constexpr, LARGEST: tl.constexpr, NOISE: tl.constexpr,
    F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr, F3: tl.constexpr,
    PRECISION: tl.constexpr, PHASE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Prologue, direction, epilogue and stores of one tile (or its two sums, in phase PROBE)."""
    first = tile * TILE
    left = tl.minimum(numel - first, TILE).to(tl.int32)
    local = tl.arange(0, TILE_ROWS)[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = local < left
    whole = left == TILE
    p_at = p_row + first
    c_at = None if c_row is None else c_row + first
    if PHASE == DIRECTION_ONLY:
        p = tl.zeros((TILE_ROWS, 256), tl.float32)
    else:
        p = load_param(p_at, c_at, local, inside, whole, PRECISION, ALIGNED)
    g = widen(load_stream(g_row + first, local, inside, whole, 0.0, ALIGNED))
    if F0 >= 0:
        s0 = load_state(p0, a0, tile, local, inside, whole, left, F0, ALIGNED)
    if F1 >= 0:
        s1 = load_state(p1, a1, tile, local, inside, whole, left, F1, ALIGNED)
    if F2 >= 0:
        s2 = load_state(p2, a2, tile, local, inside, whole, left, F2, ALIGNED)
    if F3 >= 0:
        s3 = load_state(p3, a3, tile, local, inside, whole, left, F3, ALIGNED)

    g = g * mul if PHASE == DIRECTION_ONLY else (g * mul + l2 * p) * q
    if TERMS is not None:  # a probe's
        if F3 >= 0:
            a, b = TERMS(g, p, s0, s1, s2, s3, c)
        elif F2 >= 0:
            a, b = TERMS(g, p, s0, s1, s2, c)
        elif F1 >= 0:
            a, b = TERMS(g, p, s0, s1, c)
        elif F0 >= 0:
            a, b = TERMS(g, p, s0, c)
        else:
            a, b = TERMS(g, p, c)
    elif NOISE:
        z = noise16(seed, step, tensor, first_octet, tile, TILE_ROWS)
        if F3 >= 0:
            u, s0, s1, s2, s3 = DIRECTION(g, p, z, s0, s1, s2, s3, c)
        elif F2 >= 0:
            u, s0, s1, s2 = DIRECTION(g, p, z, s0, s1, s2, c)
        elif F1 >= 0:
            u, s0, s1 = DIRECTION(g, p, z, s0, s1, c)
        elif F0 >= 0:
            u, s0 = DIRECTION(g, p, z, s0, c)
        else:
            u = DIRECTION(g, p, z, c)
    elif F3 >= 0:
        u, s0, s1, s2, s3 = DIRECTION(g, p, s0, s1, s2, s3, c)
    elif F2 >= 0:
        u, s0, s1, s2 = DIRECTION(g, p, s0, s1, s2, c)
    elif F1 >= 0:
        u, s0, s1 = DIRECTION(g, p, s0, s1, c)
    elif F0 >= 0:
        u, s0 = DIRECTION(g, p, s0, c)
    else:
        u = DIRECTION(g, p, c)

    if LARGEST:
        tl.store(grain + 2 * tile, largest(tl.where(inside, a, float("-inf"))))
        tl.store(grain + 2 * tile + 1, largest(tl.where(inside, b, float("-inf"))))
    elif TERMS is not None:
        tl.store(grain + 2 * tile, tl.sum(tl.where(inside, a, 0.0)))
        tl.store(grain + 2 * tile + 1, tl.sum(tl.where(inside, b, 0.0)))
    elif PHASE == PROBE:
        u = tl.where(inside, u, 0.0)
        tl.store(grain + 2 * tile, tl.sum(p * p))
        tl.store(grain + 2 * tile + 1, tl.sum(u * u))
    else:
        if F0 >= 0:
            store_state(
                s0, p0, a0, tile, local, inside, whole, left, seed, step, tensor, first_octet, 1, F0, ALIGNED
            )  # fmt: skip
        if F1 >= 0:
            store_state(
                s1, p1, a1, tile, local, inside, whole, left, seed, step, tensor, first_octet, 2, F1, ALIGNED
            )  # fmt: skip
        if F2 >= 0:
            store_state(
                s2, p2, a2, tile, local, inside, whole, left, seed, step, tensor, first_octet, 3, F2, ALIGNED
            )  # fmt: skip
        if F3 >= 0:
            store_state(
                s3, p3, a3, tile, local, inside, whole, left, seed, step, tensor, first_octet, 4, F3, ALIGNED
            )  # fmt: skip
        if PHASE == DIRECTION_ONLY:
            p = u
        else:  # one rounding of p: a decay below half an ulp is not lost on its own
            p = p - (lr * u + decay * p)
        store_param(p, p_at, c_at, tile, local, inside, whole, seed, step, tensor, first_octet, PRECISION, ALIGNED)


@triton.jit
def square_sums(p, tile, stop, ALIGNED: tl.constexpr):
    """(8,) sums of squares of the grains from `tile` on, 512 elements of each at a time: one reduction for all."""
    row = tl.arange(0, TILE_ROWS)[:, None]
    local = row * TILE + tl.arange(0, 512)[None, :]
    first = tile * TILE
    last = stop - first
    total = tl.zeros((TILE_ROWS, 512), tl.float32)
    at = tile * 0
    while at < 4:
        piece = at * 512
        if ALIGNED:
            if last % TILE == 0:  # a mask that is the same for all of a grain leaves 16-byte loads
                x = tl.load(p + (first + piece) + local, mask=row * TILE < last, other=0.0)
            else:
                x = tl.load(p + (first + piece) + local, mask=piece + local < last, other=0.0)
        else:
            x = tl.load(p + (first + piece) + local, mask=piece + local < last, other=0.0)
        wide = x.to(tl.float32)  # not x: Triton 3.2 wants it to keep its dtype in the loop
        total += wide * wide
        at += 1
    return tl.sum(total, axis=1)


@triton.jit
def norm_grains(p_row, g_row, tile, stop, grain, WITH_PARAM: tl.constexpr, ALIGNED: tl.constexpr):
    """Stores the sums of up to 8 grains, a pair a grain."""
    index = tile + tl.arange(0, TILE_ROWS)
    live = index * TILE < stop
    if WITH_PARAM:
        tl.store(grain + 2 * index, square_sums(p_row, tile, stop, ALIGNED), mask=live)
    tl.store(grain + 2 * index + 1, square_sums(g_row, tile, stop, ALIGNED), mask=live)


@triton.jit(do_not_specialize=[
    "table", "chunks", "scalars", "grad_scale", "found_inf", "clip", "partials", "sums", "totals", "norm", "counters",
    "rows", "live_rows", "chunk", "max_norm", "total_index", "total_count",
])  # fmt: skip
def step_kernel(
    table, chunks, scalars, grad_scale, found_inf, clip, partials, sums, totals, norm, counters,
    rows, live_rows, chunk, max_norm, total_index, total_count,
    DIRECTION: tl.constexpr, TERMS: tl.constexpr, LARGEST: tl.constexpr, NOISE: tl.constexpr,
    TRUST: tl.constexpr, TRUST_ON: tl.constexpr,
    F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr, F3: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr, PHASE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Steps one chunk. Pointers that do not apply are None. TRUST_ON: 0 no trust ratio, 1 gradient, 2 update.

    F0..F3: format word of each state, -1 for none. All numbers are data: nothing here is specialised on their values.
    """
    entry = tl.load(chunks + tl.program_id(0))
    row = entry >> 32
    tiles = chunk // TILE
    tile = (entry & 0xFFFFFFFF) * tiles
    numel = tl.load(table + 10 * rows + row)
    meta = tl.load(table + 11 * rows + row)
    tensor = meta >> 32
    first_octet = tl.load(table + 14 * rows + row)
    head = scalars + (meta & 0xFFFFFFFF) * 32
    p_row = row_pointer(table, 1, rows, row, PARAM, 16 if ALIGNED else 1)
    g_row = row_pointer(table, 0, rows, row, GRAD, 16 if ALIGNED else 1)
    stop = tl.minimum((tile + tiles) * TILE, numel)
    if found_inf is not None and (PHASE != PROBE and PHASE != NORM):
        stop = tl.where(tl.load(found_inf) != 0.0, 0, stop)
    if PHASE == PROBE or PHASE == NORM:
        grain = partials + tl.load(table + 12 * rows + row) * 2
    else:
        grain = None

    if PHASE != NORM:
        c = head + HEAD
        mul = tl.load(head + 3)
        if grad_scale is not None:
            mul = mul / tl.load(grad_scale)
        if clip is not None:
            mul = mul * tl.load(clip)
        lr = tl.load(head)
        decay = tl.load(head + 1)
        l2 = tl.load(head + 2)
        q = 1.0
        if TRUST_ON == 1:
            q = TRUST(tl.load(sums + 2 * tensor), tl.load(sums + 2 * tensor + 1) * mul * mul, c)
        elif TRUST_ON == 2 and PHASE == APPLY:
            lr = lr * TRUST(tl.load(sums + 2 * tensor), tl.load(sums + 2 * tensor + 1), c)
        words = head.to(tl.pointer_type(tl.uint32), bitcast=True)
        seed = (tl.load(words + 5).to(tl.uint64) << 32) | tl.load(words + 4).to(tl.uint64)
        step = tl.load(words + 6)
        c_row = None
        if PRECISION > 1:
            c_row = companion_pointer(table, rows, row, PARAM, PRECISION, ALIGNED)
        p0 = None
        p1 = None
        p2 = None
        p3 = None
        a0 = None
        a1 = None
        a2 = None
        a3 = None
        if F0 >= 0:
            p0 = state_pointer(table, 0, rows, row, F0, ALIGNED)
            a0 = row_pointer(table, 6, rows, row, tl.float32, 1)
        if F1 >= 0:
            p1 = state_pointer(table, 1, rows, row, F1, ALIGNED)
            a1 = row_pointer(table, 7, rows, row, tl.float32, 1)
        if F2 >= 0:
            p2 = state_pointer(table, 2, rows, row, F2, ALIGNED)
            a2 = row_pointer(table, 8, rows, row, tl.float32, 1)
        if F3 >= 0:
            p3 = state_pointer(table, 3, rows, row, F3, ALIGNED)
            a3 = row_pointer(table, 9, rows, row, tl.float32, 1)

    while tile * TILE < stop:
        if PHASE == NORM:
            norm_grains(p_row, g_row, tile, stop, grain, sums is not None, ALIGNED)
            tile += TILE_ROWS
        else:
            step_tile(
                p_row, c_row, g_row, p0, p1, p2, p3, a0, a1, a2, a3, c, tile, numel, grain,
                mul, l2, q, lr, decay, seed, step, tensor, first_octet,
                DIRECTION, TERMS, LARGEST, NOISE, F0, F1, F2, F3, PRECISION, PHASE, ALIGNED,
            )  # fmt: skip
            tile += 1

    if PHASE == PROBE or PHASE == NORM:
        if last_of(counters + row, (numel + chunk - 1) // chunk):
            if LARGEST:
                pairs = row_largest(grain, (numel + TILE - 1) // TILE)
            else:
                pairs = row_sums(grain, (numel + TILE - 1) // TILE)
            side = tl.arange(0, 2)
            if sums is not None:
                tl.store(sums + 2 * tensor + side, pairs)
            if PHASE == NORM:
                tl.store(grain + side, pairs)
                if last_of(counters + rows, live_rows):
                    total = launch_total(table, partials, rows)
                    finish_norm(totals, total, total_index, total_count, grad_scale, norm, clip, max_norm)
