"""Registers, spills, tensor-core instructions and access widths of the Triton kernels on matrices, compiled without a GPU.

Among them the step of int8 weights, whose matrix is the block of rows that it updates.
"""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from bench.gates_triton import TARGETS, WORKERS, cuda_listing, cuda_resources, hip_resources
from fusedopt.backends import triton_matrix, triton_newton_schulz, triton_seeded
from fusedopt.backends.base import Int4Matrix, MatrixWork, RowNumbers
from fusedopt.precision import get_precision

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZE = 64  # of the matrices whose dtypes and alignment choose the constants; a kernel is the same for every size
# Shared memory that a block can have on consumer GPUs (compute capability 8.6, 8.9 and 12.0); the LDS of gfx942.
SHARED = {"sm": 99 * 1024, "gf": 64 * 1024}
# Instructions of the matrix units: mma.sync, wgmma, tcgen05.mma, MFMA.
UNITS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


MATMULS = ("product", "project", "seeded", "symmetric", "add_product")
WIDE = 4096
NEWTON_SCHULZ = {"left": (128, 256), "right": (256, 128)}  # shapes of wide and tall matrices: whole tiles


class MatrixCase(NamedTuple):
    """kind: product, scaled, project, sums or weights (int8, updated from fp32 or 16-bit operands), or of a random projector:
    seeded, draw (into memory) or single (rank 1), or of Newton-Schulz: symmetric or add_product, of wide matrices (side left)
    or tall ones (right). operands: their dtype. packed: the projector is int4. rank: of a random projector."""

    kind: str = "product"
    operands: torch.dtype = BF16
    param: torch.dtype = BF16
    precision: str = "nearest"
    residual: str | None = None
    packed: bool = False
    side: str = "left"
    tf32: bool = False
    rank: int = 0

    def __str__(self) -> str:
        short = {F32: "f32", BF16: "bf16", F16: "f16", torch.uint8: "u8"}
        text = f"{self.kind} p:{short[self.param]} {short[self.operands]}{' tf32' if self.tf32 else ''}"
        text += f" {self.precision}" if self.kind in ("product", "scaled") else ""
        text += f" {self.residual}" if self.residual else ""
        text += f" int4 {self.side}" if self.packed else f" {self.side}" if self.residual or self.rank else ""
        text += {"left": " wide", "right": " tall"}[self.side] if self.newton_schulz else ""
        return text + (f" rank {self.rank}" if self.rank else "")

    @property
    def newton_schulz(self) -> bool:
        return self.kind in ("symmetric", "add_product")

    def uses_matrix_units(self, target: str) -> bool:
        """AMD's multiply fp32 as well."""
        multiplies = self.kind in MATMULS
        return multiplies and (self.operands != F32 or self.tf32 or target.startswith("gfx"))

    @property
    def common(self) -> bool:
        """Whether to compile it for every target, not only for sm_90."""
        return self in COMMON


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
    MatrixCase("weights", operands=F32, param=torch.uint8),
    MatrixCase("weights", param=torch.uint8),
    *(MatrixCase("seeded", side=side, rank=rank) for side in ("left", "right") for rank in (16, 128)),
    *(MatrixCase("seeded", operands=F32, param=F32, side=side, rank=128) for side in ("left", "right")),
    MatrixCase("seeded", operands=F32, param=F32, side="right", rank=128, tf32=True),
    *(MatrixCase("single", side=side, rank=1) for side in ("left", "right")),
    MatrixCase("single", operands=F32, param=F32, side="left", rank=1),
    MatrixCase("draw", rank=128),
    *(MatrixCase(kind, side=side) for kind in ("symmetric", "add_product") for side in NEWTON_SCHULZ),
)

COMMON = tuple(
    case
    for case in CASES
    if (case.residual or case.packed or case.kind != "product" or case.precision in ("nearest", "kahan"))
    and (case.kind, case.precision, case.residual) != ("product", "split24", "sign")
    and not (case.operands == F32 and case.param == BF16)
)


def register_ceiling(case: MatrixCase, target: str) -> int:
    """128 registers of 256 threads let two programs share an SM of sm_90 and sm_100: one multiplies, the other updates.

    On sm_80 operands are in registers too; int4 operands are everywhere until they are decoded. Three streams of p and its
    master weights, one fp32 and one not, need 6 more. Elementwise kernels run 4 programs of 256 threads an SM, sums 3.
    """
    if target.startswith("gfx"):
        return 256
    if case.kind in ("scaled", "weights", "draw", "sums", "single"):
        return 80 if case.kind in ("sums", "single") else 64
    if target == "sm_80" or case.packed or case.precision in ("kahan", "master"):
        return 255 if target == "sm_80" or case.packed else 136
    return 128


def limits(case: MatrixCase, row: dict) -> list[tuple[str, int, int, int]]:
    """(what, value, at least, at most) of a row of `resources` beyond registers, spills and widths."""
    out = [("shared memory", row["shared"], 0, SHARED[row["target"][:2]])]
    if case.uses_matrix_units(row["target"]):
        out.append((f"matrix instructions ({row['unit']})", row["matrix_instructions"], 1, 1 << 30))
    if case.packed and row["target"].startswith("sm_"):  # of each byte the program masks one code and shifts the other
        out.append(("int4 codes unpacked by a thread", 2 * row["nibbles"], row["packed"], 1 << 30))
    if row["target"].startswith("sm_") and case.kind in MATMULS:
        out.append(("16-byte copies to shared memory", row["wide_copies"], 1, 1 << 30))
    if case.kind == "symmetric":
        out.append((f"percent of the tiles of X X^T, {WIDE} rows", triangle_percent(case), 0, 53))
    return out


def triangle_percent(case: MatrixCase) -> float:
    """Programs that a symmetric product of WIDE rows launches, each one tile of multiplications, in percent of its tiles."""
    block = arguments(case, True)[1]["BM"]
    return 100 * triton_newton_schulz.symmetric_programs(WIDE, block) / (WIDE // block) ** 2


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
    from fusedopt.kernels import matrix, matrix_sums, newton_schulz, project, seeded, weights

    if case.kind == "weights":
        types = {
            "codes": torch.uint8,
            "scale": F32,
            "zero": torch.uint8,
            "u": case.operands,
            "scalars": F32,
            "found_inf": F32,
        }
        constants = {"STOCHASTIC": True, "ALIGNED": True, "num_warps": 8 if nvidia else 4, "enable_fp_fusion": True}
        return weights.update_kernel, constants, types
    work = matrix_work(case)
    types = {"p": case.param, "grad": case.operands, "grad_scale": F32, "clip": F32, "scalars": F32, "found_inf": F32}
    if work.companion is not None:
        types["c"] = work.companion.dtype
    if case.kind == "scaled":
        types |= {"row_factor": F32, "col_factor": F32}
        return matrix.scaled_kernel, triton_matrix.scaled_constants(work, nvidia), types
    if case.kind == "sums":
        parts = ("row_part", "col_part", "total_part", "row_weight", "col_weight", "mul")
        types |= dict.fromkeys(parts, F32)
        return matrix_sums.partial_kernel, triton_matrix.sums_constants(work.grad, nvidia), types
    if case.kind == "single":
        types |= {"part": F32, "square_part": F32}
        return seeded.single_kernel, triton_seeded.single_constants(case.operands, SIZE, case.side, nvidia), types
    if case.kind == "draw":
        return seeded.draw_kernel, triton_seeded.draw_constants(SIZE), {"out": case.operands}
    if case.newton_schulz:
        x = torch.zeros(NEWTON_SCHULZ[case.side], dtype=case.operands)
        if case.kind == "symmetric":
            types = dict.fromkeys(("x", "addend", "out"), case.operands)
            return newton_schulz.symmetric_kernel, triton_newton_schulz.symmetric_constants(x, nvidia), types
        types = dict.fromkeys(("x", "polynomial", "out"), case.operands)
        return newton_schulz.add_product_kernel, triton_newton_schulz.add_product_constants(x, nvidia), types
    packed = {"": torch.uint8, "_scale": F32, "_zero": torch.uint8}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
    try:
        if case.kind == "seeded":
            types |= {"out": case.operands, "squares": F32}
            types |= {"stored": case.operands} if case.rank > triton_seeded.DRAWN_RANK else {}
            constants = triton_seeded.seeded_constants(case.operands, SIZE, SIZE, case.rank, case.side, nvidia)
            return seeded.seeded_kernel, constants, types
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
    numbers = dict.fromkeys(("scale", "residual_scale", "eps", "factor", "alpha", "beta"), "fp32")
    numbers |= dict.fromkeys(
        ("rows", "cols", "rank", "grad_rank", "tensor", "first", "numel", "depth", "seed_low", "seed_high", "step"),
        "i32",
    )
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


def _needs(case: MatrixCase, target: str) -> dict:
    """The fewest accesses of a full tile, {"loads": (16 bytes, 8 bytes), "stores": ...}: each stream of p, its companion and the
    gradient in 16-byte pieces, 8-bit companions in 8. Operands of a matmul go through asynchronous copies on NVIDIA
    (`wide_copies`) and add to the loads on AMD, whose matrix units leave a thread 4 numbers of a narrow result.
    """
    nvidia = not target.startswith("gfx")
    _, constants, _ = arguments(case, nvidia)
    threads = 256 if constants["num_warps"] == 8 or not nvidia else 128

    def accesses(*dtypes: torch.dtype) -> int:
        return sum(elements * dtype.itemsize // 16 for dtype in dtypes)

    if case.kind == "weights":  # 8 elements a thread
        return {"loads": (8 * case.operands.itemsize // 16, 1), "stores": (0, 1)}
    if case.kind == "draw":  # 4 numbers a lane on AMD
        return {"loads": (0, 0), "stores": (1, 0) if nvidia else (0, 1)}
    if case.kind in ("sums", "single"):
        elements = matrix_sums_piece() // threads
        return {"loads": (accesses(case.operands), 0), "stores": (0, 0)}
    if case.newton_schulz:  # a tile is added to the product; a symmetric one is stored twice
        elements = constants["BM"] * constants.get("BN", constants["BM"]) // threads
        added = accesses(case.operands)
        return {"loads": (added, 0), "stores": (added * (2 if case.kind == "symmetric" else 1), 0)}
    seeded = case.kind == "seeded"
    elements = (constants["BR"] * constants["BS"] if seeded else constants["BM"] * constants["BN"]) // threads
    if seeded or case.kind == "project":
        stores = accesses(case.operands)
        return {
            "loads": (0 if nvidia else 1, 0),
            "stores": (stores, 0) if nvidia or case.operands == F32 else (0, 2 * stores),
        }
    precision = get_precision(case.precision).for_dtype(case.param)
    kept = [precision.companion_dtype(case.param)] if precision.companion else []
    eights = elements // 8 if torch.int8 in kept else 0
    kept = [dtype for dtype in kept if dtype != torch.int8]
    read = kept if precision.name == "master" else [case.param, *kept]
    read = read + [case.operands] * (case.residual is not None or case.kind == "scaled")
    return {"loads": (accesses(*read), eights), "stores": (accesses(case.param, *kept), eights)}


def packed_elements(case: MatrixCase) -> int:
    """Of a tile of the int4 operand, for each of its threads on NVIDIA."""
    if not case.packed:
        return 0
    constants = arguments(case, True)[1]
    side = constants["BM"] if (case.side == "left") else constants["BN"]
    return side * constants["BK"] // (32 * constants["num_warps"])


def matrix_sums_piece() -> int:
    from fusedopt.kernels.matrix_sums import PIECE, TILE_COLS

    return PIECE.value * TILE_COLS.value


def _resources(job: tuple[MatrixCase, str]) -> dict:
    case, target = job
    kernel = compile_case(case, target)
    hip, unit = target.startswith("gfx"), UNITS.get(target, "")
    if case.kind == "seeded" and case.side == "left" and case.rank <= 16 and not hip:
        unit = "HMMA"  # the wider units take 64 rows and more
    text = kernel.asm["amdgcn"] if hip else cuda_listing(kernel)
    use = hip_resources(kernel) if hip else cuda_resources(kernel)
    return {
        "kernel": str(case),
        "target": target,
        **use,
        "shared": kernel.metadata.shared,
        "unit": unit,
        "matrix_instructions": len(re.findall(rf"\b{unit}[._ ]", text)) if unit else 0,
        "nibbles": 0 if hip else len(re.findall(r"\band\.b(?:16|32)\s[^;]*, 15;", kernel.asm["ptx"])),
        "packed": packed_elements(case),
        "wide_copies": len(re.findall(r"\bLDGSTS\.E\S*128", text)),
        "needs": _needs(case, target),
    }


def resources(targets=None, cases=CASES, workers: int = WORKERS) -> list[dict]:
    """One dict per case and target: kernel, target, registers, spills, shared (bytes), loads and stores ({bits: count}), unit
    and matrix_instructions (how many of it), wide_copies (16-byte copies to shared memory), nibbles (masks of a 4-bit
    code in the PTX), packed (`packed_elements`), needs (`_needs`).

    targets: None for sm_90, and all TARGETS for COMMON cases, which keeps this under a minute. Not under TRITON_INTERPRET=1.
    """
    jobs = [
        (case, target) for case in cases for target in targets or TARGETS if targets or target == "sm_90" or case.common
    ]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_resources, jobs, chunksize=1))


if __name__ == "__main__":
    import json
    import sys

    for row in resources(tuple(sys.argv[1:]) or None):
        print(json.dumps(row))
