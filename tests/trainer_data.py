"""Real text for tests that run trainers: windows of the bytes of a file of Python's standard library, the same every time."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

import fusedopt
import fusedopt.integrations

WINDOW = 32


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower on two threads, much slower where other processes want them too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text_windows(count: int = 64) -> torch.Tensor:
    """[count, WINDOW] bytes of argparse.py as int64 tokens."""
    data = Path(argparse.__file__).read_bytes()[: count * WINDOW]
    return torch.tensor(list(data)).view(count, WINDOW)


def recipe(title: str) -> str:
    """The code of a recipe of README, by the bold words it begins with."""
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    section = text[text.index("## Recipes") :].split("\n**" + title, 1)[1]
    return section.split("```", 2)[1].split("\n", 1)[1]


def run_recipe(title: str, **names) -> dict:
    """Runs a recipe of README with some names defined; returns all names afterwards."""
    names = {"torch": torch, "fusedopt": fusedopt, **names}
    exec(compile(recipe(title), f"README: {title}", "exec"), names)
    return names


class Windows(torch.utils.data.Dataset):
    """Items as language models of transformers take them."""

    def __init__(self, count: int = 64):
        self.tokens = text_windows(count)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


def assert_same_weights(got: dict, want: dict) -> None:
    """Two state dicts of a model, bit for bit."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


class TinyLM(torch.nn.Module):
    """Predicts a byte from the two before it: an embedding, two linear layers, a norm; 27 thousand parameters."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(256, 32)
        self.hidden = torch.nn.Linear(64, 64)
        self.norm = torch.nn.LayerNorm(64)
        self.head = torch.nn.Linear(64, 256)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean loss of [batch, time] tokens."""
        x = self.table(tokens[:, :-1])
        pairs = torch.cat([x[:, :-1], x[:, 1:]], -1)
        logits = self.head(self.norm(torch.nn.functional.gelu(self.hidden(pairs))))
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 2:].flatten())
