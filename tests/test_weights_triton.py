"""The Triton step of int8 weights, interpreted, against the torch operations of fusedopt.weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fusedopt.abi import SCALAR_STRIDE, pack_scalar_row  # noqa: E402
from fusedopt.backends.base import RowNumbers  # noqa: E402
from fusedopt.backends.triton import interpreted  # noqa: E402
from fusedopt.weights import Int8Weight, row_blocks, update_rows  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 when Triton is imported"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
]
SHAPES = [(16, 256), (7, 5), (100, 60), (3, 1024), (1, 1), (1, 2048), (9, 257)]


def row(lr=0.05, decay=0.01, seed=0x1234567890ABCDEF, step=7):
    numbers = RowNumbers(lr, decay, 0.0, 1.0, seed, step, ())
    image = bytearray(4 * SCALAR_STRIDE)
    pack_scalar_row(image, 0, (lr, decay, 0.0, 1.0), seed, step, ())
    return numbers, torch.frombuffer(image, dtype=torch.float32)


def values(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(weight, u, triton, elements=None, **kwargs):
    for first, last in row_blocks(weight, elements):
        update_rows(weight, first, last, u[first:last], *row(), tensor_id=5, triton=triton, **kwargs)


def compare(a, b):
    """Scales and zeros to rounding, codes equal but for sums that round differently in a fused multiply-add."""
    torch.testing.assert_close(a.scale, b.scale, rtol=1e-5, atol=0, equal_nan=True)
    assert (a.zero.int() - b.zero.int()).abs().max() <= 1
    moved = a.zero != b.zero
    difference = (a.codes.int() - b.codes.int()).abs()
    assert difference.max() <= 1
    if not moved.any():
        assert (difference > 0).float().mean() <= 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("elements", [1, None])
def test_kernel_matches_torch(shape, stochastic, elements):
    one, two = (Int8Weight.from_float(values(shape)) for _ in range(2))
    before = one.codes.clone()
    for k in range(3):
        u = values(shape, 10 + k)
        step(one, u, False, elements, scale=0.5, stochastic=stochastic)
        step(two, u, True, elements, scale=0.5, stochastic=stochastic)
        compare(two, one)
    if before.numel() > 1:
        assert not torch.equal(before, one.codes)


@pytest.mark.parametrize("shift", [5.0, -5.0])
def test_groups_of_one_sign(shift):
    """Zero counts as a value of theirs, in both."""
    start = values((16, 256)).clamp(-1, 1) + shift
    one, two = (Int8Weight.from_float(start) for _ in range(2))
    u = values((16, 256), 1)
    step(one, u, False, stochastic=False)
    step(two, u, True, stochastic=False)
    compare(two, one)
    assert (two.dequantize() - (0.99 * start - 0.05 * u)).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_updates(dtype):
    one, two = (Int8Weight.from_float(values((16, 256))) for _ in range(2))
    u = values((16, 256), 1).to(dtype)
    step(one, u, False)
    step(two, u, True)
    compare(two, one)


def test_the_step_is_the_formula():
    for triton in (False, True):
        weight = Int8Weight.from_float(values((16, 256)))
        p, u = weight.dequantize(), values((16, 256), 1)
        step(weight, u, triton, scale=0.5, stochastic=False)
        expected = Int8Weight.from_float(p - (0.05 * 0.5 * u + 0.01 * p))
        assert (weight.codes.int() - expected.codes.int()).abs().max() <= 1
        assert (weight.codes != expected.codes).float().mean() < 2e-3


@pytest.mark.parametrize("triton", [False, True])
def test_an_overflow_skips(triton):
    weight = Int8Weight.from_float(values((16, 256)))
    before = weight.clone()
    step(weight, values((16, 256), 1), triton, found_inf=torch.ones(1))
    assert torch.equal(weight.codes, before.codes) and torch.equal(weight.scale, before.scale)
    step(weight, values((16, 256), 1), triton, found_inf=torch.zeros(1))
    assert not torch.equal(weight.codes, before.codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_spoils_its_group_only(bad):
    for triton in (False, True):
        weight = Int8Weight.from_float(values((16, 256)))
        u = values((16, 256), 1)
        u[3, 7] = bad
        step(weight, u, triton)
        broken = weight.dequantize().isnan().all(1)
        assert broken[3] and broken.sum() == 1 and not weight.dequantize()[:3].isnan().any()


def test_what_does_not_fit_is_refused():
    weight = Int8Weight.from_float(values((16, 256)))
    with pytest.raises(ValueError, match="contiguous update of 4096"):
        update_rows(weight, 0, 16, values((256, 16)).t(), *row(), tensor_id=0)
    with pytest.raises(ValueError, match="groups of 256"):
        update_rows(
            Int8Weight.from_float(values((16, 256)), 64), 0, 16, values((16, 256)), *row(), tensor_id=0, triton=True
        )


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fusedopt.kernels.weights import update_kernel

types = {"codes": "*u8", "scale": "*fp32", "zero": "*u8", "u": "*bf16", "scalars": "*fp32", "found_inf": "*fp32",
         "first": "i32", "numel": "i32", "tensor": "i32", "factor": "fp32", "STOCHASTIC": "constexpr", "ALIGNED": "constexpr"}
source = ASTSource(update_kernel, types, {(10,): True, (11,): True}, {(i,): [["tt.divisibility", 16]] for i in range(6)})
for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    kernel = triton.compile(source, target=target, options={"num_warps": 8 if target.backend == "cuda" else 4})
    if target.backend == "cuda":
        assert "ld.global.v4.b32" in kernel.asm["ptx"], "16 bytes of u at a time"
        assert "st.global.v2.b32" in kernel.asm["ptx"], "8 codes at a time"
        assert ".local" not in kernel.asm["ptx"]
    print(target.arch)
"""


def test_the_kernel_compiles_with_wide_accesses():
    """Without a GPU, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=Path(__file__).parent.parent, env=environment,
                         capture_output=True, text=True, timeout=300)  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["80", "90", "gfx942"]
