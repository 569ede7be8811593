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
import torch

triton = pytest.importorskip("triton")

NEW = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
ROOT = Path(__file__).parent.parent


def compiled(*command: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def rows():
    return compiled("-m", "bench.gates_triton")


OTHERS = """
import json
from bench.gates_triton import OTHERS, resources
if __name__ == "__main__":
    for row in resources(("sm_90",), OTHERS):
        print(json.dumps(row))
"""


def test_every_other_rule_compiles(tmp_path):
    from bench.gates_triton import CASES, Case, register_ceiling
    from bench.gates_triton import OTHERS as others
    from fusedopt.rule import list_rules

    script = tmp_path / "others.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{OTHERS}")
    found = {row["kernel"]: row for row in compiled(str(script))}
    assert found.keys() == {str(case) for case in others}
    assert {case.rule for case in (*CASES, *others) if isinstance(case, Case)} == set(list_rules()) | {"sgd"}
    limits = {str(case): register_ceiling(case, "sm_90") for case in others}
    assert {name for name, row in found.items() if row["registers"] > limits[name]} == set()
    spilling = {name: row["spills"] for name, row in found.items() if row["spills"]}
    assert not NEW or not spilling


def test_every_storage_compiles_for_every_target(rows):
    from bench.gates_triton import CASES, TARGETS, Case
    from fusedopt.formats import list_formats
    from fusedopt.precision import list_precisions

    steps = [case for case in CASES if isinstance(case, Case)]
    assert {name for case in steps for name in case.names} == set(list_formats())
    assert {case.precision for case in steps} == set(list_precisions())
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
    """On the path of full tiles a thread has 8 elements: one 16-byte access of a 16-bit stream, two of an fp32 stream, 8
    bytes of 8-bit and 4 bytes of 4-bit codes."""
    narrow = [
        (row["kernel"], row["target"], kind, width, count)
        for row in rows
        for kind in ("loads", "stores")
        for width, count in row["needs"][kind].items()
        if row[kind].get(width, 0) < count
    ]
    assert not narrow


def widths(case) -> set[bool]:
    """Whether streams are fp32, True and False where there are both."""
    from fusedopt.formats import get_format
    from fusedopt.precision import get_precision

    companion = get_precision(case.precision).companion_dtype(case.param)
    streams = {case.param, case.grad, companion, *(get_format(name).storage for name in case.names)}
    return {dtype == torch.float32 for dtype in streams}


def test_streams_of_all_widths_meet_in_registers(rows):
    """A warp owns whole blocks and a thread the same 8 elements of every stream, so scales, random numbers, nibbles and
    mixtures of fp32 and narrower tensors need neither barriers nor shared memory."""
    from bench.gates_triton import CASES, Blockwise

    for case in CASES:
        elementwise = isinstance(case, Blockwise) or (case.aligned and case.phase.name in ("FUSED", "APPLY"))
        if not NEW and not isinstance(case, Blockwise) and len(widths(case)) > 1:
            continue  # Triton 3.6 converts between the layouts of fp32 and narrower streams through shared memory
        for row in rows:
            if elementwise and row["kernel"] == str(case):
                assert (row["barriers"], row["shared"]) == (0, 0), (row["kernel"], row["target"])


@pytest.mark.skipif(not NEW, reason="measured with Triton 3.9")
def test_instructions_per_parameter(rows):
    from bench.gates_triton import CASES, budget

    limits = {(str(case), target): budget(case, target) for case in CASES for target in ("sm_80", "sm_90")}
    limits = {key: limit for key, limit in limits.items() if limit is not None}
    assert len(limits) == 4
    for row in rows:
        limit = limits.get((row["kernel"], row["target"]))
        assert limit is None or 0.5 * limit < row["per_parameter"] <= limit, (row["kernel"], row["per_parameter"])


def test_the_loop_of_a_listing():
    """The way around a masked access, 5 instructions of 7; the code before and after the loop does not count."""
    from bench.sass import hot_path, main_loop

    listing = """
        /*0000*/ MOV R1, c[0x0][0x28] ;
        /*0010*/ ISETP.GE.AND P0, PT, R3, RZ, PT ;
        /*0020*/ @P0 BRA 0x50 ;
        /*0030*/ @P1 LDG.E R4, desc[UR6][R2.64] ;
        /*0040*/ @P2 LDG.E R5, desc[UR6][R2.64] ;
        /*0050*/ FADD R4, R4, R5 ;
        /*0060*/ FMUL R4, R4, R5 ;
        /*0070*/ @!P3 BRA 0x10 ;
        /*0080*/ EXIT ;
    """
    assert hot_path(listing) == (["ISETP.GE.AND", "BRA", "FADD", "FMUL", "BRA"], 1)
    loop = main_loop(listing)
    assert (loop["instructions"], loop["read"]) == (5, 0)
    assert (loop["units"]["float"], loop["units"]["integer"], loop["units"]["load/store"]) == (2, 1, 0)
    assert hot_path("/*0000*/ EXIT ;") == ([], 0)
    # code behind the kernel jumps back to its beginning, from where it is not reached within these addresses
    outlined = """
        /*0000*/ @P0 BRA 0x50 ;
        /*0010*/ FADD R0, R0, R1 ;
        /*0020*/ @P1 BRA 0x10 ;
        /*0030*/ EXIT ;
        /*0040*/ BRA 0x10 ;
        /*0050*/ BRA 0x60 ;
        /*0060*/ BRA 0x40 ;
    """
    assert hot_path(outlined) == (["FADD", "BRA"], 3)


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
    constants = [None, None, False, False, None, 0, -1, -1, -1, -1, 1, 2, False, 0, True]
    return bind(*pointers, n, n, n * 2048, float(n), n - 1, n, *constants)[1]

assert specialization(0, 1) == specialization(1, 16) == specialization(3, 17)
"""


def test_numbers_and_addresses_do_not_recompile():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", NUMBERS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
