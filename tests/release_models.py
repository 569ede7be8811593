"""Models and training loops of the gradient-release tests: tied weights, a part that is not always used, several dtypes."""

import torch
from configs import assert_same_bits
from torch import nn

import fusedopt


class Tied(nn.Module):
    """An embedding that is the output head too, a matrix used twice, and a branch that odd steps do not use."""

    def __init__(self, dtype=torch.float32, width=24, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(50, width)
        self.twice = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.branch = nn.Linear(width, width, bias=False)
        self.wide = nn.Linear(width, 3 * width)
        self.narrow = nn.Linear(3 * width, width)
        self.scale = nn.Parameter(torch.ones(()))
        self.to(dtype)

    def forward(self, tokens, step=0):
        x = self.embed(tokens)
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        if step % 2 == 0:
            x = x + self.branch(x)
        x = x + self.narrow(torch.relu(self.wide(self.norm(x)))) * self.scale
        return x @ self.embed.weight.t()


def tokens(step: int, count: int = 12) -> torch.Tensor:
    return torch.randint(0, 50, (count,), generator=torch.Generator().manual_seed(100 + step))


def loss_of(model, step: int, data=None) -> torch.Tensor:
    data = tokens(step) if data is None else data
    return nn.functional.cross_entropy(model(data, step).float(), data.roll(1))


def train(model, opt, first: int, last: int, scheduler=None) -> None:
    for step in range(first, last):
        loss_of(model, step).backward()
        opt.step()
        opt.zero_grad()
        if scheduler is not None:
            scheduler.step()


def everything(model, opt) -> list[torch.Tensor]:
    """Every parameter and every state, by name."""
    params = list(model.parameters())
    out = [p.codes.clone() if hasattr(p, "codes") else p.detach().clone() for p in params]
    for p in params:
        out += [v.clone() for _, v in sorted(opt.state.get(p, {}).items())]
    return out


def assert_equal(one, two) -> None:
    """(model, optimizer) pairs that have gone the same way, bit for bit."""
    for p, q in zip(one[0].parameters(), two[0].parameters(), strict=True):
        assert one[1].state.get(p, {}).keys() == two[1].state.get(q, {}).keys()
    assert_same_bits(everything(*one), everything(*two))


def pair(make, dtype=torch.float32, **release):
    """(model, optimizer) stepped as usual, the same released, and the handle."""
    one, two = Tied(dtype), Tied(dtype)
    plain, released = make(one), make(two)
    handle = fusedopt.release_gradients(two, released, **release)
    return (one, plain), (two, released), handle


def alive(model) -> int:
    return sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
