"""Learning rates of layers from the noise of their gradients: "Noise-Adaptive Layerwise Learning Rates" (LANTON).

H = beta2 H + (1 - beta2) |g_t - g_(t-1)|_*^2 estimates the variance of a layer's gradient in the dual norm of the ball that its
steps lie in, from the second step on; a = alpha / sqrt(alpha^2 + H); a layer's rate is lr sqrt(a / max a), the largest a of
the layers of its group with the same ball. The calmest layer keeps lr.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedopt.options import check_fraction


@dataclass(frozen=True)
class NoiseRates:
    """alpha: below which noise does not matter, in units of the dual norms. beta2: of the average H."""

    alpha: float
    beta2: float

    def __post_init__(self):
        check_fraction(self.beta2, "beta2 value of noise_rates")
        if not self.alpha > 0.0:
            raise ValueError(f"Invalid alpha value: {self.alpha}; it is above 0, as layers without noise divide by it")


def noise_rates(given) -> NoiseRates | None:
    """NoiseRates of a pair (alpha, beta2) or None. Raises ValueError for anything else."""
    if given is None or isinstance(given, NoiseRates):
        return given
    try:
        alpha, beta2 = given
    except (TypeError, ValueError):
        raise ValueError(f"Invalid noise_rates value: {given!r}; it is (alpha, beta2) or None") from None
    return NoiseRates(alpha, beta2)


def layer_rates(noise: torch.Tensor, alpha) -> torch.Tensor:
    """sqrt(a / max a) of the layers' H, [layers]."""
    floor = noise + alpha**2
    return (floor.amin() / floor) ** 0.25
