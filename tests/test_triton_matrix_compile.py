"""Resource gates of the compiled Triton kernels on matrices: no spills, matrix units in use, 16-byte accesses, registers.

They are compiled in a process without TRITON_INTERPRET, and need no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

NEW = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
ROOT = Path(__file__).parent.parent


def outside(*arguments: str) -> str:
    """Output of Python without the interpreter of Triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="module")
def rows():
    lines = outside("-m", "bench.gates_matrix").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def cases():
    from bench.gates_matrix import CASES

    return {str(case): case for case in CASES}


def test_every_kind_compiles_for_every_target(rows):
    from bench.gates_matrix import CASES, TARGETS
    from fusedopt.precision import list_precisions

    compiled = {(row["kernel"], row["target"]) for row in rows}
    assert compiled == {(str(c), t) for c in CASES for t in TARGETS if t == "sm_90" or c.common}
    kinds = {(case.kind, case.residual, case.packed) for case in CASES}
    assert {(c.kind, c.residual, c.packed) for c in CASES if c.common} == kinds
    assert {case.precision for case in CASES} == set(list_precisions())


def test_nothing_spills(rows):
    assert not {(row["kernel"], row["target"]): row["spills"] for row in rows if row["spills"]}


@pytest.mark.skipif(not NEW, reason="measured with Triton 3.9")
def test_registers(rows):
    from bench.gates_matrix import register_ceiling

    over = [
        (row["kernel"], row["target"], row["registers"])
        for row in rows
        if row["registers"] > register_ceiling(cases()[row["kernel"]], row["target"])
    ]
    assert not over


def test_matrix_units_and_shared_memory(rows):
    """wgmma on sm_90 and tcgen05 on sm_100, not mma.sync; operands by 16-byte copies; blocks that fit a consumer GPU."""
    from bench.gates_matrix import limits

    checked, wrong = set(), []
    for row in rows:
        for what, value, low, high in limits(cases()[row["kernel"]], row):
            checked.add(what)
            if not low <= value <= high:
                wrong.append((row["kernel"], row["target"], what, value))
    assert not wrong
    units = {f"matrix instructions ({name})" for name in ("HMMA", "HGMMA", "UTCHMMA", "v_mfma")}
    others = {"shared memory", "16-byte copies to shared memory", "int4 codes unpacked by a thread"}
    assert checked == units | others | {"percent of the tiles of X X^T, 4096 rows"}


def test_only_packed_projectors_are_unpacked(rows):
    """Their codes are decoded between memory and the matrix unit, as many as the operand's tile has."""
    dense = [row["nibbles"] for row in rows if not cases()[row["kernel"]].packed]
    packed = [row["nibbles"] for row in rows if cases()[row["kernel"]].packed and row["target"] != "gfx942"]
    assert max(dense) < 8 < 16 <= min(packed)  # a few masks of thread numbers look the same


def test_wide_accesses(rows):
    """Whole tiles through masks that are the same for 8 columns: each stream in 16-byte pieces, 8-bit companions in 8."""
    narrow = []
    for row in rows:
        for kind in ("loads", "stores"):
            full, half = row["needs"][kind]
            counts = {int(width): count for width, count in row[kind].items()}
            if counts.get(128, 0) < full or counts.get(128, 0) + counts.get(64, 0) < full + half:
                narrow.append((row["kernel"], row["target"], kind, counts, row["needs"][kind]))
    assert not narrow


NUMBERS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from fusedopt.kernels.matrix import product_kernel, scaled_kernel
from fusedopt.kernels.seeded import draw_kernel, seeded_kernel, single_kernel

backend = make_backend(GPUTarget("cuda", 90, 32))

def specialization(kernel, offset, n, scale):
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    numbers = {"scale": scale, "residual_scale": scale}
    names = ("rows", "cols", "rank", "grad_rank", "tensor", "depth", "step", "seed_low", "seed_high")
    numbers |= {name: n for name in names}
    matrix, one = torch.zeros(64), torch.zeros(64)[offset:]
    views = dict.fromkeys(("scalars", "grad_scale", "clip", "found_inf"), one)
    given = {p.name: 1 if p.is_constexpr else numbers.get(p.name, views.get(p.name, matrix)) for p in kernel.params}
    return bind(**given)[1]

for kernel in (product_kernel, scaled_kernel, draw_kernel, seeded_kernel, single_kernel):
    first = specialization(kernel, 0, 1, 1.0)
    assert first == specialization(kernel, 1, 16, 0.25) == specialization(kernel, 3, 17, 2.0)
"""


def test_numbers_and_rows_of_scalars_do_not_recompile():
    outside("-c", NUMBERS)


def test_constants_follow_the_matrices():
    """fp32 products take tensor cores where torch's would; a rank of 20 has no 16-byte rows; a shared projector is seen."""
    from matrix_harness import make_matrix_problem

    from fusedopt.backends.triton_matrix import product_constants

    work = make_matrix_problem((16, 24), 20, source="sign", shared="right", operand_dtype=torch.float32).work
    before = torch.get_float32_matmul_precision()
    try:
        for setting, nvidia, expected in (("highest", True, "ieee"), ("high", True, "tf32"), ("high", False, "ieee")):
            torch.set_float32_matmul_precision(setting)
            constants = product_constants(work, nvidia)
            assert constants["INPUT_PRECISION"] == expected
            assert (constants["COLS8"], constants["RANK8"], constants["SHARED"]) == (True, False, 2)
    finally:
        torch.set_float32_matmul_precision(before)
    work.grad_right = work.right.clone()
    assert product_constants(work, True)["SHARED"] == 0
