"""Models with LoRA adapters for tests: linear layers whose weights are frozen, with factors A, B of their own."""

from __future__ import annotations

import torch
from torch import nn

import fusedopt


class Adapted(nn.Module):
    """x W^T + s x A^T B^T. The full weight's gradient is that of `shift`, which stays zero."""

    def __init__(self, n: int, m: int, rank: int, alpha: float, zero: bool, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, n, dtype=torch.float64).to(dtype) / n**0.5, requires_grad=False)
        self.lora_A = nn.Linear(n, rank, bias=False, dtype=dtype)
        self.lora_B = nn.Linear(rank, m, bias=False, dtype=dtype)
        self.alpha = alpha
        with torch.no_grad():
            self.lora_A.weight.copy_(torch.randn(rank, n, dtype=torch.float64) / n**0.5)
            self.lora_B.weight.copy_(torch.zeros(m, rank) if zero else torch.randn(m, rank, dtype=torch.float64) / 2)
        self.shift: torch.Tensor | None = None

    def forward(self, x):
        delta = self.lora_B.weight @ self.lora_A.weight * (self.alpha / self.lora_A.weight.shape[0])
        if self.shift is not None:
            delta = delta + self.shift
        return x @ (self.weight + delta).t()


def model(dtype: torch.dtype = torch.float64, zero: bool = True, seed: int = 0) -> nn.Sequential:
    """Three adapters, of ranks 3, 3 and 2, and a layer that is trained as it is."""
    torch.manual_seed(seed)
    layers = [Adapted(9, 8, 3, 6.0, zero, dtype), nn.Tanh(), Adapted(8, 7, 3, 1.5, zero, dtype), nn.Tanh(),
              Adapted(7, 6, 2, 4.0, zero, dtype)]  # fmt: skip
    last = nn.Linear(6, 4, dtype=torch.float64).to(dtype)
    return nn.Sequential(*layers, last)


def backward(net: nn.Module, step: int, scale: float = 1.0) -> torch.Tensor:
    """New gradients, from data of the step; also those of each layer's `shift`, where it has one."""
    net.zero_grad()
    dtype = next(net.parameters()).dtype
    gen = torch.Generator().manual_seed(step)
    x, y = (torch.randn(16, k, generator=gen, dtype=torch.float64).to(dtype) for k in (9, 4))
    loss = (net(x) - y).square().mean()
    (loss * scale).backward()
    return loss.detach()


def full_gradients(net: nn.Module, step: int) -> list[torch.Tensor]:
    """Gradients of the adapted weights themselves, by the layers' shifts; factors get theirs too."""
    layers = [m for m in net if isinstance(m, Adapted)]
    for layer in layers:
        layer.shift = torch.zeros_like(layer.weight, requires_grad=True)
    backward(net, step)
    grads = [layer.shift.grad for layer in layers]
    for layer in layers:
        layer.shift = None
    return grads


def factors(net: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Copies of A and B of each pair, with s."""
    return [(p.A.detach().clone(), p.B.detach().clone(), p.scale) for p in fusedopt.lora_pairs(net)]
