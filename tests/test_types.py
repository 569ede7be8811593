"""mypy on the package, with the settings of pyproject.toml, and on code that uses it: right calls pass and wrong ones do not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mypy")
ROOT = Path(__file__).resolve().parents[1]
NEW = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 13)

USE = """
import torch

import fusedopt

model = torch.nn.Linear(4, 4)
opt: torch.optim.Optimizer = fusedopt.AdamW(model.parameters(), lr=1e-3, state_format="int8", clip_grad_norm=1.0)
made: fusedopt.FusedOptimizer = fusedopt.create("adamw8bit", model, lr=1e-3)
text: str = made.plan().explain()
low = fusedopt.Lion(model.parameters(), projection=fusedopt.GaLore(rank=2))
fusedopt.AdmW(model.parameters())  # wrong
number: int = fusedopt.list_formats()  # wrong
made.pln()  # wrong
fusedopt.AdamW()  # wrong
"""


@pytest.mark.skipif(not NEW, reason="torch's own types change with its versions; these are of 2.13")
def test_types(tmp_path):
    use = tmp_path / "use.py"
    use.write_text(USE)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "fusedopt", str(use)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, preexec_fn=lambda: os.nice(10)
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert not done.stderr, done.stderr
    assert [line for line in errors if "use.py" not in line] == []
    wrong = [i for i, line in enumerate(USE.splitlines(), 1) if "# wrong" in line]
    assert [int(re.search(r"use\.py:(\d+):", line)[1]) for line in errors] == wrong, done.stdout


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "fusedopt" / "py.typed").exists()
    assert 'fusedopt = ["py.typed", "*.pyi"]' in (ROOT / "pyproject.toml").read_text()
