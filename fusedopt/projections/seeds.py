"""Random generators keyed by (seed, tensor, step): a refresh draws the same numbers whatever ran before it."""

from __future__ import annotations

import torch

_MASK = 2**64 - 1


def mix(*words: int) -> int:
    """A 64-bit hash of integers (splitmix64's finaliser, Steele et al. 2014, after each word)."""
    h = 0x9E3779B97F4A7C15
    for word in words:
        h = (h ^ (word & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        h = (h ^ h >> 27) * 0x94D049BB133111EB & _MASK
        h ^= h >> 31
    return h


def generator(device, seed: int, tensor_id: int, step: int) -> torch.Generator:
    """A torch.Generator of the device's kind. The CPU's uses the low 32 bits of its seed only; the hash spreads over them."""
    return torch.Generator(device=device).manual_seed(mix(seed, tensor_id, step) >> 1)
