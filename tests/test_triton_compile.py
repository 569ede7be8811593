"""Resource gates of the compiled Triton step kernel: no spills, a register ceiling, 16-byte loads and stores.

Compiling needs neither a GPU nor its driver, but no interpreter either: the gates run in a process without
TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

NEW = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rows():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "bench.gates_triton"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def test_every_rule_compiles_for_every_target(rows):
    from bench.gates_triton import CASES, TARGETS
    from fusedopt.rule import list_rules

    assert {case.rule for case in CASES} >= set(list_rules())
    assert {(row["kernel"], row["target"]) for row in rows} == {(str(c), t) for c in CASES for t in TARGETS}


def test_nothing_spills(rows):
    """With Triton 3.9. Version 3.6 spills a few words in steps that mix fp32 parameters with codes."""
    allowed = 0 if NEW else 128
    spilled = {(row["kernel"], row["target"]): row["spills"] for row in rows if row["spills"] > allowed}
    assert not spilled


def test_registers_leave_room_for_two_programs(rows):
    from bench.gates_triton import CASES, register_ceiling

    cases = {str(case): case for case in CASES}
    over = [row for row in rows if row["registers"] > register_ceiling(cases[row["kernel"]], row["target"])]
    assert not over


def test_wide_accesses(rows):
    """On the path of full tiles a thread has 8 elements: one 16-byte access of a 16-bit stream, two of an fp32 stream,
    and
    8 bytes of codes."""
    narrow = [
        (row["kernel"], row["target"], kind, width, count)
        for row in rows
        for kind in ("loads", "stores")
        for width, count in row["needs"][kind].items()
        if row[kind].get(width, 0) < count
    ]
    assert not narrow


def test_codes_need_no_barrier(rows):
    """A warp owns whole blocks of 256, so absmax, scales and random numbers stay in registers."""
    for row in rows:
        if "int8 p:bf16" in row["kernel"] and "unaligned" not in row["kernel"]:
            assert row["barriers"] == 0, (row["kernel"], row["target"])


NUMBERS = """
import torch, fusedopt
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from fusedopt.kernels.driver import step_kernel as kernel

bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))

def specialization(offset, n):
    words, floats = torch.zeros(64, dtype=torch.int64)[offset:], torch.zeros(64)[offset:]
    pointers = [words, words, *[floats] * 8, words.int()]
    constants = [None, None, 0, -1, -1, -1, -1, 1, 2, False, 0, True]
    return bind(*pointers, n, n, n * 2048, float(n), n - 1, n, *constants)[1]

assert specialization(0, 1) == specialization(1, 16) == specialization(3, 17)
"""


def test_numbers_and_addresses_do_not_recompile():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", NUMBERS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
