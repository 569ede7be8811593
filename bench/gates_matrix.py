"""Registers, spills, tensor-core instructions and access widths of the Triton kernels on matrices, compiled without a GPU."""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from bench.gates_triton import TARGETS, cuda_listing, cuda_resources, hip_resources
from fusedopt.backends import triton_matrix
from fusedopt.backends.base import Int4Matrix, MatrixWork, RowNumbers
from fusedopt.precision import get_precision

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZE = 64  # of the matrices whose dtypes and alignment choose the constants; a kernel is the same for every size
# Threads of a program times registers of a thread: 65536 on an NVIDIA SM, 512 for each AMD lane.
REGISTERS = {"product": 255, "scaled": 128, "project": 255, "sums": 128}
# Dynamic shared memory of a block on consumer GPUs (compute capability 8.6, 8.9 and 12.0); 64 KB of LDS on gfx942.
SHARED = {"nvidia": 99 * 1024, "amd": 64 * 1024}
# Instructions of the matrix units: HMMA is mma.sync, HGMMA wgmma, UTCHMMA tcgen05.mma (UTCQMMA for 8 bits).
UNITS = {
    "sm_80": r"\bHMMA\.",
    "sm_90": r"\bHGMMA\.",
    "sm_100": r"\bUTC[HQ]?MMA\b",
    "gfx942": r"\bv_mfma_",
}


class MatrixCase(NamedTuple):
    """kind: product, scaled, project or sums. operands: their dtype. packed: the projector is int4."""

    kind: str = "product"
    operands: torch.dtype = BF16
    param: torch.dtype = BF16
    precision: str = "nearest"
    residual: str | None = None
    packed: bool = False
    side: str = "left"
    tf32: bool = False

    def __str__(self) -> str:
        short = {F32: "f32", BF16: "bf16", F16: "f16"}
        text = f"{self.kind} p:{short[self.param]} {short[self.operands]}{' tf32' if self.tf32 else ''}"
        text += "" if self.kind in ("sums", "project") else f" {self.precision}"
        text += f" {self.residual}" if self.residual else ""
        text += f" int4 {self.side}" if self.packed else f" {self.side}" if self.residual else ""
        return text

    @property
    def uses_tensor_cores(self) -> bool:
        return self.kind in ("product", "project") and (self.operands != F32 or self.tf32)


# Every kind in its cheapest form; precisions, residuals, sides and packed operands where they take other code.
CASES = (
    *(MatrixCase(precision=name) for name in ("nearest", "stochastic", "kahan", "split24", "split32", "master")),
    MatrixCase(operands=F16, param=F16, precision="stochastic"),
    MatrixCase(param=F32),
    MatrixCase(operands=F32, param=F32),
    MatrixCase(operands=F32, param=F32, tf32=True),
    *(MatrixCase(precision="stochastic", residual="sign", side=side) for side in ("left", "right")),
    MatrixCase(precision="kahan", residual="gradient"),
    MatrixCase(precision="split24", residual="sign"),
    MatrixCase(operands=F32, param=BF16, precision="stochastic", residual="sign", tf32=True),
    MatrixCase(operands=F32, param=F32, residual="sign"),
    *(MatrixCase(precision="stochastic", packed=True, side=side) for side in ("left", "right")),
    *(MatrixCase("project", packed=True, side=side) for side in ("left", "right")),
    MatrixCase("scaled", precision="stochastic"),
    MatrixCase("scaled", precision="kahan"),
    MatrixCase("scaled", operands=F32, param=F32),
    MatrixCase("sums"),
    MatrixCase("sums", operands=F32),
)


def int4_matrix(rows: int, cols: int) -> Int4Matrix:
    groups = -(-rows * cols // 256)
    codes = torch.zeros((rows * cols + 1) // 2, dtype=torch.uint8)
    return Int4Matrix(codes, torch.ones(groups), torch.zeros(groups, dtype=torch.uint8), (rows, cols))


def matrix_work(case: MatrixCase) -> MatrixWork:
    """Matrices of the case's dtypes: only these, and where memory is shared, choose constants."""

    def matrix(dtype=case.operands):
        return torch.zeros(SIZE, SIZE, dtype=dtype)

    precision = get_precision(case.precision).for_dtype(case.param)
    companion = matrix(precision.companion_dtype(case.param)) if precision.companion else None
    sides = [matrix(), matrix()]
    if case.packed:
        sides[case.side == "right"] = int4_matrix(SIZE, SIZE)
    work = MatrixWork(
        matrix(case.param), companion, precision, *sides, torch.zeros(32), RowNumbers(0, 0, 0, 1, 0, 0, ()), 0,
        grad=matrix(), residual=case.residual,
    )  # fmt: skip
    if case.residual:
        work.grad_left = work.left if case.side == "left" else matrix()
        work.grad_right = work.right if case.side == "right" else matrix()
    return work


def arguments(case: MatrixCase, nvidia: bool):
    """(kernel, compile-time arguments and options, dtypes of the pointers that are given)."""
    from fusedopt.kernels import matrix, matrix_sums, project

    work = matrix_work(case)
    types = {"p": case.param, "grad": case.operands, "grad_scale": F32, "clip": F32, "scalars": F32, "found_inf": F32}
    if work.companion is not None:
        types["c"] = work.companion.dtype
    if case.kind == "scaled":
        types |= {"row_factor": F32, "col_factor": F32}
        return matrix.scaled_kernel, triton_matrix.scaled_constants(work, nvidia), types
    if case.kind == "sums":
        parts = ("row_part", "col_part", "total_part", "row_weight", "col_weight")
        types |= dict.fromkeys(parts, F32)
        return matrix_sums.partial_kernel, triton_matrix.sums_constants(work.grad, nvidia), types
    packed = {"": torch.uint8, "_scale": F32, "_zero": torch.uint8}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
    try:
        if case.kind == "project":
            types |= {f"code{part or 's'}": dtype for part, dtype in packed.items()} | {"out": case.operands}
            constants = triton_matrix.project_constants(work.grad, int4_matrix(SIZE, SIZE), case.side, nvidia)
            return project.project_kernel, constants, types
        for side in ("left", "right"):
            is_packed = case.packed and case.side == side
            types |= {f"{side}{part}": dtype for part, dtype in packed.items()} if is_packed else {side: case.operands}
        if case.residual is None:
            del types["grad"]
        else:
            types["grad_right" if case.side == "left" else "grad_left"] = case.operands
        return matrix.product_kernel, triton_matrix.product_constants(work, nvidia), types
    finally:
        torch.set_float32_matmul_precision(before)


def compile_case(case: MatrixCase, target: str):
    """The compiled kernel of a case; `asm` holds every stage."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    hip = target.startswith("gfx")
    kernel, constants, types = arguments(case, not hip)
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion") if k in constants}
    names = {F32: "*fp32", BF16: "*bf16", F16: "*fp16", torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16"}
    numbers = {"scale": "fp32", "residual_scale": "fp32", "eps": "fp32"}
    numbers |= dict.fromkeys(("rows", "cols", "rank", "grad_rank", "tensor"), "i32")
    signature, divisible = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in types:
            signature[name] = names[types[name]]
            if not kernel.params[i].do_not_specialize:
                divisible[(i,)] = [["tt.divisibility", 16]]
        elif name in numbers:
            signature[name] = numbers[name]
        else:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
    machine = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return triton.compile(ASTSource(kernel, signature, constants, divisible), target=machine, options=options)


def _needs(case: MatrixCase) -> dict:
    """The fewest 16-byte and 8-byte accesses of full tiles: one for each stream of p, companion and gradient, and of the
    operands, which may go through asynchronous copies instead. {"loads": (16 bytes, 8 bytes), "stores": ...}."""
    streams = [case.param]
    precision = get_precision(case.precision).for_dtype(case.param)
    narrow = 0
    if case.kind == "sums":
        return {"loads": (1, 0), "stores": (0, 0)}
    if case.kind == "project":
        return {"loads": (1, 0), "stores": (1, 0)}
    if precision.companion and precision.companion_dtype(case.param) == torch.int8:
        narrow = 1
    elif precision.companion:
        streams.append(precision.companion_dtype(case.param))
    stores = len(streams)
    loads = stores - (precision.name == "master") + (case.residual is not None or case.kind == "scaled")
    return {"loads": (loads, narrow), "stores": (stores, narrow)}


def _resources(job: tuple[MatrixCase, str]) -> dict:
    case, target = job
    kernel = compile_case(case, target)
    hip = target.startswith("gfx")
    text = kernel.asm["amdgcn"] if hip else cuda_listing(kernel)
    use = hip_resources(kernel) if hip else cuda_resources(kernel)
    return {
        "kernel": str(case),
        "target": target,
        **use,
        "shared": kernel.metadata.shared,
        "tensor_cores": len(re.findall(UNITS[target], text)) if target in UNITS else 0,
        "wide_copies": len(re.findall(r"\bLDGSTS\.E\S*128", text)),
        "needs": _needs(case),
    }


def resources(targets=TARGETS, cases=CASES, workers: int = 2) -> list[dict]:
    """One dict per case and target: kernel, target, registers, spills, shared (bytes), loads and stores ({bits: count}),
    tensor_cores (instructions), wide_copies (16-byte copies to shared memory), needs. Not under TRITON_INTERPRET=1."""
    jobs = [(case, target) for case in cases for target in targets]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_resources, jobs, chunksize=1))


if __name__ == "__main__":
    import json
    import sys

    for row in resources(tuple(sys.argv[1:]) or TARGETS):
        print(json.dumps(row))
