"""MicroAdam's step of one tensor (Modoranu et al., arXiv 2405.15593, algorithms 1-3): Adam from the last `window` sparse gradients.

With a = gradient + error: of each block of a, the largest 1 % in magnitude go into a row of a ring buffer and leave a; what is
left is the next error, kept in 4 bits. Adam's moments are summed from the ring buffer anew in each step and never stored.

State, for n elements in memory order, K = sum over blocks of ceil(density * length):
    window_indices int16 [window, K], places within their block   window_values bf16 [window, K]
    error_codes uint8 [ceil(n / 2)], the even element in the high half
    error_min, error_max bf16 [ceil(n / error_block)], of a without what left it; value = min + code * (max - min) / 15
That is 0.5 n + 4 window K bytes: 0.9 bytes an element by default.

All of it is elementwise operations, sums in a fixed order and top-k on the tensor's device: nothing waits for the host, and
equal inputs give equal bits. Blocks are taken some at a time, so that no temporary is as large as the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

LEVELS = 15
NAMES = ("window_indices", "window_values", "error_codes", "error_min", "error_max")
# Temporaries take 10 bytes an element of those in work (measured), top-k of a GPU not counted: of a 128th of the tensor, 2 %
SHARE = 128


@dataclass(frozen=True)
class Options:
    """Of one parameter group. block: elements that a top-k is taken over. error_block: elements that share error bounds."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    window: int = 10
    density: float = 0.01
    block: int = 32768
    error_block: int = 32768

    def __post_init__(self):
        if not 0 < self.density <= 1:
            raise ValueError(f"MicroAdam: density is {self.density}; it must be in (0, 1]")
        if self.window < 1:
            raise ValueError(f"MicroAdam: window is {self.window}; it must be at least 1")
        if not 0 < self.block <= 32768:
            raise ValueError(f"MicroAdam: block is {self.block}; indices of 16 bits reach 32768 elements")
        if self.error_block < 2 or self.error_block % 2 or self.block % self.error_block:
            raise ValueError(
                f"MicroAdam: error_block is {self.error_block}; it must be even and divide block ({self.block})"
            )

    def kept(self, length: int) -> int:
        """How many elements of a block are kept."""
        return math.ceil(round(self.density * length, 9))  # 0.07 * 100 is a little above 7

    def kept_of(self, numel: int) -> int:
        blocks, tail = divmod(numel, self.block)
        return blocks * self.kept(self.block) + self.kept(tail)


def allocate(entry: dict, numel: int, device: torch.device | str, options: Options) -> None:
    """Puts an all-zero state of a tensor of `numel` elements into its state dict."""
    row = (options.window, options.kept_of(numel))
    bounds = -(-numel // options.error_block)
    entry["window_indices"] = torch.zeros(row, dtype=torch.int16, device=device)
    entry["window_values"] = torch.zeros(row, dtype=torch.bfloat16, device=device)
    entry["error_codes"] = torch.zeros((numel + 1) // 2, dtype=torch.uint8, device=device)
    entry["error_min"] = torch.zeros(bounds, dtype=torch.bfloat16, device=device)
    entry["error_max"] = torch.zeros(bounds, dtype=torch.bfloat16, device=device)


def _pieces(numel: int, options: Options) -> Iterator[tuple[int, int, int]]:
    """(first element, blocks, their length) of what is worked on at a time; the shorter last block is alone."""
    whole = numel // options.block
    at_once = max(1, numel // SHARE // options.block)
    for first in range(0, whole, at_once):
        yield first * options.block, min(at_once, whole - first), options.block
    if numel % options.block:
        yield whole * options.block, 1, numel % options.block


def _decode_error(entry: dict, first: int, last: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """The error of elements first .. last, flat. first is even and begins an error block of `size`."""
    codes = entry["error_codes"][first // 2 : (last + 1) // 2]
    out = torch.stack((codes >> 4, codes & LEVELS), 1).view(-1)[: last - first].to(dtype)
    index = slice(first // size, -(-last // size))
    low, high = entry["error_min"][index].to(dtype), entry["error_max"][index].to(dtype)
    unit = (high - low) / LEVELS
    for values, group in _error_blocks(out, size):
        values.mul_(unit[group, None]).add_(low[group, None])
    return out


def _error_blocks(x: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, slice]]:
    """Flat x as rows that share bounds, and their numbers: the whole ones, then a shorter last one."""
    whole = x.numel() // size
    if whole:
        yield x[: whole * size].view(whole, size), slice(0, whole)
    if x.numel() % size:
        yield x[whole * size :].view(1, -1), slice(whole, whole + 1)


def _encode_error(entry: dict, first: int, a: torch.Tensor, size: int, skip: torch.Tensor | None) -> None:
    """Stores flat a as the error from element `first` on; a is spent."""
    start = first // size
    for values, group in _error_blocks(a, size):
        low, high = values.amin(1).bfloat16(), values.amax(1).bfloat16()
        at = slice(start + group.start, start + group.stop)
        _store(entry["error_min"][at], low, skip)
        _store(entry["error_max"][at], high, skip)
        unit = (high.to(a.dtype) - low.to(a.dtype)) / LEVELS
        # Equal bounds: all codes are 0. bf16 bounds may lie inside the values, whose codes are cut off then.
        inverse_of = torch.where(unit > 0, unit, torch.full_like(unit, float("inf")))
        values.sub_(low.to(a.dtype)[:, None]).div_(inverse_of[:, None]).add_(0.5).floor_()
        values.nan_to_num_(0.0).clamp_(0, LEVELS)
    codes = a.to(torch.uint8)
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    pairs = codes.view(-1, 2)
    packed = pairs[:, 0] << 4 | pairs[:, 1]
    _store(entry["error_codes"][first // 2 : first // 2 + packed.numel()], packed, skip)


def _store(target: torch.Tensor, value: torch.Tensor, skip: torch.Tensor | None) -> None:
    target.copy_(value if skip is None else torch.where(skip.view(()) != 0, target, value))


def _weights(step, options: Options, device, dtype: torch.dtype) -> torch.Tensor:
    """[2, window]: what each row of the ring buffer counts for in m and in v, bias corrections included."""
    if isinstance(step, torch.Tensor):
        step = step.to(device=device, dtype=torch.float64)
    age = torch.remainder(step - 1 - torch.arange(options.window, device=device, dtype=torch.float64), options.window)
    return torch.stack([(1 - beta) / (1 - beta**step) * beta**age for beta in options.betas]).to(dtype)


@torch.no_grad()
def update(
    entry: dict,
    grad: torch.Tensor,
    step: int | torch.Tensor,
    options: Options,
    apply: Callable[[int, int, torch.Tensor], None],
    grad_mul: float | torch.Tensor = 1.0,
    skip: torch.Tensor | None = None,
) -> None:
    """One step: takes a gradient into the state and hands out the update u, a range of elements at a time.

    Args:
        entry: the state, see `allocate`; changed in place.
        grad: flat, in memory order, any floating dtype. fp64 gradients are worked on in fp64, others in fp32.
        step: of this step, from 1; an int, or a 0-dim tensor on the device.
        apply: apply(first, last, u) is called once for each range, in order; u is a fresh flat tensor, which it may spend.
            The step is p <- p - lr * u, with decay as the caller has it.
        grad_mul: what the gradient is multiplied by: sign, 1 / loss scale, clip coefficient. A float or a 1-element tensor.
        skip: fp32 [1]; where not zero, the state stays as it is. u is then not meant to be used, and may not be finite.
    """
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    numel, window, device = grad.numel(), options.window, grad.device
    if not numel:
        return
    if isinstance(grad_mul, torch.Tensor):
        grad_mul = grad_mul.to(dtype).view(())
    weights = _weights(step, options, device, dtype)
    on_device = isinstance(step, torch.Tensor)
    slot = torch.remainder(step.to(device).long() - 1, window).view(1) if on_device else (step - 1) % window
    column = 0
    for first, blocks, length in _pieces(numel, options):
        last, k = first + blocks * length, options.kept(length)
        columns = slice(column, column + blocks * k)
        column = columns.stop
        a = _decode_error(entry, first, last, options.error_block, dtype)
        a.add_(grad[first:last].to(dtype) * grad_mul)
        rows = a.view(blocks, length)
        chosen = rows.abs().topk(k, dim=1, sorted=False).indices
        values = rows.gather(1, chosen)
        rows.scatter_(1, chosen, 0.0)
        _encode_error(entry, first, a, options.error_block, skip)
        del a, rows
        for name, new in (("window_indices", chosen.view(1, -1)), ("window_values", values.view(1, -1))):
            kept = entry[name][:, columns]
            new = new.to(kept.dtype)
            if on_device:
                if skip is not None:
                    new = torch.where(skip.view(()) != 0, kept.index_select(0, slot), new)
                kept.index_copy_(0, slot, new)
            else:
                _store(kept[slot : slot + 1], new, skip)
        apply(first, last, _direction(entry, columns, blocks, length, weights, options, dtype))


def _direction(
    entry: dict, columns: slice, blocks: int, length: int, weights: torch.Tensor, options: Options, dtype: torch.dtype
) -> torch.Tensor:
    """m_hat / (sqrt(v_hat) + eps) of some blocks, flat, from the ring buffer; 0 where it has no entry."""
    window = options.window
    indices = entry["window_indices"][:, columns].view(window, 1, blocks, -1).long()
    values = entry["window_values"][:, columns].view(window, blocks, -1).to(dtype)
    moments = torch.stack((values, values * values), 1).mul_(weights.t().reshape(window, 2, 1, 1))
    m, v = total = torch.zeros(2, blocks, length, dtype=dtype, device=values.device)
    for row in range(window):  # one at a time: within a row no index comes twice, so the order of sums is fixed
        total.scatter_add_(2, indices[row].expand(2, -1, -1), moments[row])
    denominator = v.sqrt_().add_(options.eps)
    if options.eps == 0:
        denominator.masked_fill_(denominator == 0, 1.0)
    return m.div_(denominator).view(-1)
