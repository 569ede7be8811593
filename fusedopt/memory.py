"""Memory layouts: flat views in memory order of dense tensors, and the test for density."""

from __future__ import annotations

import torch


def strides_match(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same shape and the same place in memory for every index (strides of empty tensors and of size 1 are ignored)."""
    if a.shape != b.shape:
        return False
    return not a.numel() or all(x == y for x, y, n in zip(a.stride(), b.stride(), a.shape, strict=True) if n != 1)


def _sorted_dims(t: torch.Tensor) -> list[tuple[int, int]]:
    return sorted((stride, n) for stride, n in zip(t.stride(), t.shape, strict=True) if n != 1)


def is_dense(t: torch.Tensor) -> bool:
    """Whether the elements fill numel() consecutive places in memory, each once (contiguous, transposed, channels_last)."""
    if t.is_contiguous() or t.numel() == 0:
        return True
    expected = 1
    for stride, n in _sorted_dims(t):
        if stride != expected:
            return False
        expected *= n
    return True


def overlaps(t: torch.Tensor) -> bool:
    """Whether two indices may share a place in memory (an expanded tensor); exact for views made by slicing and permuting."""
    if t.numel() == 0:
        return False
    reach = 0
    for stride, n in _sorted_dims(t):
        if stride <= reach:
            return True
        reach += stride * (n - 1)
    return False


def flat(t: torch.Tensor) -> torch.Tensor:
    """1-D view of a dense tensor in memory order."""
    if t.is_contiguous():
        return t.view(-1)
    return t.as_strided((t.numel(),), (1,), t.storage_offset())


def empty_like(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised tensor of another dtype with the memory layout of a dense tensor (contiguous for others)."""
    if is_dense(t) and not t.is_contiguous():
        return torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=t.device)
    return torch.empty(t.shape, dtype=dtype, device=t.device)
