"""What nvcc makes of the CUDA kernels, without a GPU: no spills, register ceilings, full-width accesses."""

import re
import sys
from pathlib import Path

import pytest
from harness import RULES

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import gates_cuda as gates  # noqa: E402
from bench import gates_cuda_modes as modes  # noqa: E402

pytestmark = pytest.mark.skipif(gates.missing() is not None, reason=f"CUDA kernels are not compiled: {gates.missing()}")

# Registers that leave 4, 3 and 2 CTAs of 256 threads per SM (csrc/cuda/driver.cuh, kMinBlocks).
CEILING = {0: 64, 1: 64, 2: 80, 3: 128, 4: 128}
SQUARES = [f"squares {dtype}{weighted}" for dtype in ("fp32", "bf16", "fp16") for weighted in ("", " weighted")]
OTHERS = {
    "norm_kernel": 80,
    "encode": 80,
    "decode": 80,
    "finish_squares": 64,
    "finish_total": 64,
    **dict.fromkeys(SQUARES, 80),
}


def state_counts() -> dict[str, int]:
    """States of each rule type, from the headers."""
    found = {}
    for header in (ROOT / "csrc" / "rules").glob("*.h"):
        for name, states in re.findall(
            r"struct (\w+)[^{]*\{(?:(?!struct ).)*?FO_STATES\((.*?)\)", header.read_text(), re.DOTALL
        ):
            found[name] = len([s for s in states.split(",") if s.strip()])
    for header in (ROOT / "csrc" / "rules").glob("*.h"):  # rules that are another one under other numbers
        for name, base in re.findall(r"struct (\w+) : (\w+) \{\n  FO_NAME\(.*?\)\n\};", header.read_text()):
            found[name] = found[base]
    return found


STATES = state_counts()
WRITTEN_ONLY = {"Dasa": 2}  # states that a step replaces without reading them


@pytest.fixture(scope="module", params=gates.ARCHS)
def kernels(request):
    return {row["kernel"]: row for row in gates.resources() if row["arch"] == request.param}


def test_every_rule_is_compiled(kernels):
    steps = {name for name in kernels if not name.endswith(" probe")} - OTHERS.keys()
    assert steps == set(STATES) and len(steps) == len(RULES)
    assert "Lamb probe" in kernels and OTHERS.keys() <= kernels.keys()


def test_no_spills(kernels):
    assert {name: row["spills"] for name, row in kernels.items() if row["spills"]} == {}


def test_register_ceilings(kernels):
    over = {}
    for name, row in kernels.items():
        ceiling = OTHERS[name] if name in OTHERS else CEILING[STATES[name.removesuffix(" probe")]]
        if row["registers"] > ceiling:
            over[name] = row["registers"]
    assert over == {}


def test_full_width_accesses(kernels):
    for name in ("norm_kernel", "encode", "decode"):
        assert kernels[name]["loads"].get(128, 0) >= {"norm_kernel": 8, "encode": 3, "decode": 0}[name]
    assert kernels["encode"]["stores"][64] == kernels["decode"]["loads"][64] == 1
    assert kernels["decode"]["stores"][128] == 3
    for name, row in kernels.items():
        if name in OTHERS or name.endswith(" probe") and name != "Lamb probe":  # terms need not read everything
            continue
        states = STATES[name.removesuffix(" probe")]
        # An octet of fp32 is two 16-byte accesses, of 16-bit values one, of codes and of split24's low bits one of 8 bytes.
        # The companion is one stream more; ptxas makes one load of the first half of fp32 and the 16-bit octet.
        read = states - WRITTEN_ONLY.get(name, 0)
        assert row["loads"][128] >= 2 * (3 + read), name
        assert row["loads"].get(64, 0) >= 1 + read, name
        if not name.endswith(" probe"):
            assert row["stores"][128] >= 3 * (2 + states)
            assert row["stores"].get(64, 0) == 1 + states


def test_sums_of_squares_load_octets(kernels):
    for name in SQUARES:  # of four rows at once
        assert kernels[name]["loads"][128] >= 4 * (2 if "fp32" in name else 1), name
        assert set(kernels[name]["stores"]) == {32}, name


def test_a_probe_stores_no_tensor(kernels):
    assert all(set(row["stores"]) == {32} for name, row in kernels.items() if name.endswith(" probe"))
    assert set(kernels["norm_kernel"]["stores"]) == {32}


def test_only_counters_are_atomic(kernels):
    for name, row in kernels.items():
        assert row["atomics"] == (["ATOMG.E.ADD"] if name == "norm_kernel" or name.endswith(" probe") else []), name


@pytest.fixture(scope="module")
def by_mode():
    return modes.compiled()


def test_a_mode_moves_its_streams_and_nothing_else(by_mode):
    assert {(row["mode"], row["arch"]) for row in by_mode} == {(m, arch) for m in modes.MODES for arch in gates.ARCHS}
    for row in by_mode:
        loads, stores = modes.expected(row["mode"])
        assert {b: n for b, n in row["loads"].items() if b >= 64} == loads, row
        assert {b: n for b, n in row["stores"].items() if b >= 64} == stores, row
        coded = modes.get_format(row["mode"][0]).block > 0
        assert row["loads"].get(32, 0) == row["stores"].get(32, 0) == 2 * coded, row  # scales


def test_a_mode_keeps_within_the_budget_without_a_search(by_mode):
    for row in by_mode:
        assert 0.8 * modes.INSTRUCTIONS.get(row["mode"][:2], 0) < row["instructions"] <= modes.budget(row["mode"]), row
        assert row["spills"] == 0 and row["loops"] == 1, row
