"""What nvcc makes of the CUDA kernels, without a GPU: no spills, register ceilings, full-width accesses."""

import sys
from pathlib import Path

import pytest
from harness import RULES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import gates_cuda as gates  # noqa: E402

pytestmark = pytest.mark.skipif(gates.missing() is not None, reason=f"CUDA kernels are not compiled: {gates.missing()}")

# Registers that leave 4, 3 and 2 CTAs of 256 threads per SM (csrc/cuda/driver.cuh, kMinBlocks).
CEILING = {0: 64, 1: 64, 2: 80, 3: 128}
STATES = {"Sgd": 0, "SgdMomentum": 1, "Lars": 0, "LarsMomentum": 1, "Lion": 1, "Adam": 2, "Lamb": 2, "AdamAmsgrad": 3}


@pytest.fixture(scope="module", params=gates.ARCHS)
def kernels(request):
    return {row["kernel"]: row for row in gates.resources() if row["arch"] == request.param}


def test_every_rule_is_compiled(kernels):
    steps = {name for name in kernels if not name.endswith(" probe")} - {"norm_kernel"}
    assert steps == set(STATES) and len(steps) == len(RULES)
    assert "Lamb probe" in kernels and "norm_kernel" in kernels


def test_no_spills(kernels):
    assert {name: row["spills"] for name, row in kernels.items() if row["spills"]} == {}


def test_register_ceilings(kernels):
    over = {}
    for name, row in kernels.items():
        ceiling = 80 if name == "norm_kernel" else CEILING[STATES[name.removesuffix(" probe")]]
        if row["registers"] > ceiling:
            over[name] = row["registers"]
    assert over == {}


def test_full_width_accesses(kernels):
    for name, row in kernels.items():
        if name == "norm_kernel":
            assert row["loads"][128] >= 8
            continue
        states = STATES[name.removesuffix(" probe")]
        # An octet of fp32 is two 16-byte accesses, of 16-bit values one, of codes one of 8 bytes.
        assert row["loads"][128] >= 2 * (2 + states)
        assert row["loads"].get(64, 0) >= states
        if not name.endswith(" probe"):
            assert row["stores"][128] >= 2 * (1 + states)
            assert row["stores"].get(64, 0) == states


def test_a_probe_stores_no_tensor(kernels):
    assert set(kernels["Lamb probe"]["stores"]) == {32}
    assert set(kernels["norm_kernel"]["stores"]) == {32}


def test_only_counters_are_atomic(kernels):
    for name, row in kernels.items():
        assert row["atomics"] == (["ATOMG.E.ADD"] if name in ("norm_kernel", "Lamb probe") else []), name
