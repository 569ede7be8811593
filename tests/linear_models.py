"""The model, batches and loops that the tests of projected_linear share."""

from collections import OrderedDict

import pytest
import torch
from torch.nn import functional


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(dtype=torch.float64, bias=True):
    torch.manual_seed(1)
    layers = OrderedDict(
        wide=torch.nn.Linear(24, 40, bias=bias), act=torch.nn.Tanh(), narrow=torch.nn.Linear(40, 20, bias=bias),
        norm=torch.nn.LayerNorm(20), last=torch.nn.Linear(20, 30, bias=bias),
    )  # fmt: skip
    return torch.nn.Sequential(layers).to(dtype)


def batches(steps, dtype=torch.float64, micro=2):
    torch.manual_seed(2)
    target = torch.randn(24, 30, dtype=dtype)
    for _ in range(steps):
        xs = [torch.randn(3, 5, 24, dtype=dtype) for _ in range(micro)]
        yield [(x, x @ target) for x in xs]


def backward(model, data, times=1.0):
    for x, y in data:
        (functional.mse_loss(model(x), y) * times).backward()


def train(model, opt, steps=30, dtype=torch.float64, skip=0):
    for i, data in enumerate(batches(steps, dtype)):
        if i >= skip:
            backward(model, data)
            opt.step()
            opt.zero_grad()


def distance(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(((p - q).abs().max() / q.abs().max()).item() for p, q in pairs)
