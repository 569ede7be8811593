"""Launches of the Triton kernels on matrices: updates in the epilogue of a matmul, int4 projection, sums of squares."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedopt.abi import DTYPE_CODES
from fusedopt.backends.base import Int4Matrix, MatrixWork

RESIDUALS = {None: 0, "sign": 1, "gradient": 2}


class Tiles(NamedTuple):
    """Tile of a matmul, rows x columns x inner, and how it is compiled."""

    BM: int
    BN: int
    BK: int
    num_warps: int = 8
    num_stages: int = 3

    def arguments(self, nvidia: bool) -> dict:
        """On AMD 4 warps are 256 threads, and two stages fill the 64 KB of local memory."""
        if nvidia:
            return self._asdict()
        return self._asdict() | {"num_warps": 4, "num_stages": 2}


# Of one product, and of two that share their left or their right operand. Not measured on a GPU. A thread holds 64
# accumulators: that leaves sm_90 room for two programs an SM, one multiplying while the other updates, and 128 x 128 reads
# each operand from L2 for 128 outputs. 16-bit: three stages of 64 inner elements keep 64 KB a program in flight and fit the 99 KB
# of consumer GPUs. tf32: its elements are twice as wide, so half as many. ieee: without tensor cores on NVIDIA, and
# with operands in registers, so small tiles.
TILES = {
    "half": (Tiles(128, 128, 64), Tiles(128, 64, 64), Tiles(64, 128, 64)),
    "tf32": (Tiles(128, 64, 32), Tiles(64, 64, 32), Tiles(64, 64, 32)),
    "ieee": (Tiles(64, 64, 16, num_stages=2), Tiles(64, 32, 16, num_stages=2), Tiles(64, 32, 16, num_stages=2)),
}
PROJECT_TILES = {
    "half": Tiles(64, 64, 64, num_warps=4, num_stages=4),
    "tf32": Tiles(64, 64, 32, num_warps=4, num_stages=4),
    "ieee": Tiles(64, 64, 16, num_stages=2),
}
SCALED_TILE = {"BM": 8, "BN": 256}  # 8 elements for each of 256 threads, as in the elementwise step


def nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def arithmetic(dtype: torch.dtype, on_nvidia: bool) -> str:
    """ "half", "ieee" or "tf32": fp32 matmuls follow torch.set_float32_matmul_precision. AMD multiplies fp32 exactly."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if on_nvidia and torch.get_float32_matmul_precision() != "highest" else "ieee"


def element(dtype: torch.dtype):
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def operand_dtype(*operands) -> torch.dtype:
    """The dtype matrices are multiplied in: what holds the values of the dense ones; int4 alone counts as fp32."""
    dtypes = [x.dtype for x in operands if isinstance(x, torch.Tensor)]
    result = dtypes[0] if dtypes else torch.float32
    for dtype in dtypes:
        result = torch.promote_types(result, dtype)
    return result


def parts(x) -> tuple:
    """(elements or codes, scale, zero) of an operand."""
    return (x.codes, x.scale, x.zero) if isinstance(x, Int4Matrix) else (x, None, None)


def same(a, b) -> bool:
    """Whether two operands are the same memory."""
    (a, _, _), (b, _, _) = parts(a), parts(b)
    return a is b or (a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape)


def check_operands(work: MatrixWork) -> None:
    """Raises ValueError where shapes do not fit together: a kernel would read beyond a tensor."""
    rows, cols = work.param.shape
    for what, left, right in (
        ("left @ right", work.left, work.right),
        ("grad_left @ grad_right", work.grad_left, work.grad_right),
    ):
        if left is None:
            continue
        if left.shape[0] != rows or right.shape[1] != cols or left.shape[1] != right.shape[0]:
            raise ValueError(
                f"{what} of shapes {tuple(left.shape)} and {tuple(right.shape)} is no update of a parameter of shape "
                f"{(rows, cols)}. Pass [rows, r] and [r, cols]"
            )
    if work.grad is not None and work.grad.shape != work.param.shape:
        raise ValueError(f"the gradient has shape {tuple(work.grad.shape)}, its parameter {(rows, cols)}")
    if work.residual not in RESIDUALS:
        raise ValueError(f"unknown residual {work.residual!r}; known: None, 'sign', 'gradient'")


def group_of(*operands) -> int:
    sizes = {x.group for x in operands if isinstance(x, Int4Matrix)} or {256}
    if len(sizes) > 1:
        raise ValueError(f"int4 operands of one product have groups of {sorted(sizes)} elements. Use one size")
    return sizes.pop()


def product_constants(work: MatrixWork, on_nvidia: bool) -> dict:
    """The compile-time arguments and options of the matmul kernel."""
    operands = [work.left, work.right]
    shared = 0
    if work.residual is not None:
        operands += [work.grad_left, work.grad_right]
        if same(work.left, work.grad_left):
            shared = 1
        elif same(work.right, work.grad_right):
            shared = 2
    dtype, group = operand_dtype(*operands), group_of(*operands)
    ranks = [x.shape[1] for x in operands[::2]]
    kind = arithmetic(dtype, on_nvidia)
    return {
        "TYPE": element(dtype),
        "GROUP": group,
        "RESIDUAL": RESIDUALS[work.residual],
        "SHARED": shared,
        "PRECISION": work.precision.for_dtype(work.param.dtype).id,
        "COLS8": work.param.shape[1] % 8 == 0 and group % 8 == 0,
        "RANK8": all(rank % 8 == 0 for rank in ranks) and group % 8 == 0,
        "INPUT_PRECISION": "tf32" if kind == "tf32" else "ieee",
        **TILES[kind][0 if work.residual is None else 2 if shared == 2 else 1].arguments(on_nvidia),
        "enable_fp_fusion": True,
    }


def apply_product(work: MatrixWork) -> None:
    from fusedopt.kernels.matrix import product_kernel

    rows, cols = work.param.shape
    fixed = product_constants(work, nvidia(work.param.device))
    grad_left = grad_right = None
    if work.residual is not None:
        grad_left = None if fixed["SHARED"] == 1 else work.grad_left
        grad_right = None if fixed["SHARED"] == 2 else work.grad_right
    grid = (-(-rows // fixed["BM"]) * -(-cols // fixed["BN"]),)
    product_kernel[grid](
        work.param,
        work.companion,
        None if work.residual is None else work.grad,
        *parts(work.left),
        *parts(work.right),
        *parts(grad_left),
        *parts(grad_right),
        work.scalars,
        work.grad_scale,
        work.clip,
        work.found_inf,
        rows,
        cols,
        work.left.shape[1],
        0 if work.residual is None else work.grad_left.shape[1],
        float(work.scale),
        float(work.residual_scale),
        work.tensor_id,
        **fixed,
    )


def scaled_constants(work: MatrixWork, on_nvidia: bool) -> dict:
    return {
        "PRECISION": work.precision.for_dtype(work.param.dtype).id,
        "COLS8": work.param.shape[1] % 8 == 0,
        **SCALED_TILE,
        "num_warps": 8 if on_nvidia else 4,
        "enable_fp_fusion": True,
    }


def apply_scaled(work: MatrixWork) -> None:
    from fusedopt.kernels.matrix import scaled_kernel

    rows, cols = work.param.shape
    grid = (-(-rows // SCALED_TILE["BM"]) * -(-cols // SCALED_TILE["BN"]),)
    scaled_kernel[grid](
        work.param,
        work.companion,
        work.grad,
        work.row_factor,
        work.col_factor,
        work.scalars,
        work.found_inf,
        rows,
        cols,
        float(work.scale),
        work.tensor_id,
        **scaled_constants(work, nvidia(work.param.device)),
    )


def reads(*tensors) -> bool:
    """Whether kernels can read all tensors: of a dtype they know, without gaps."""
    return all(
        x is None or isinstance(x, Int4Matrix) or (x.dtype in DTYPE_CODES and x.is_contiguous()) for x in tensors
    )


def apply_matrix(work: MatrixWork) -> bool:
    check_operands(work)
    if not reads(work.param, work.grad, work.left, work.right, work.grad_left, work.grad_right):
        return False
    if work.param.numel() == 0:
        return True
    if work.left is None:
        apply_scaled(work)
    else:
        apply_product(work)
    return True


def project_constants(grad: torch.Tensor, packed: Int4Matrix, side: str, on_nvidia: bool) -> dict:
    kind = arithmetic(grad.dtype, on_nvidia)
    eights = packed.group % 8 == 0
    rank = packed.shape[1] if side == "left" else packed.shape[0]
    return {
        "LEFT": side == "left",
        "TYPE": element(grad.dtype),
        "GROUP": packed.group,
        "COLS8": grad.shape[1] % 8 == 0 and eights,
        "RANK8": rank % 8 == 0 and eights,
        "INPUT_PRECISION": "tf32" if kind == "tf32" else "ieee",
        **PROJECT_TILES[kind].arguments(on_nvidia),
        "enable_fp_fusion": True,
    }


def project_packed(grad: torch.Tensor, packed: Int4Matrix, side: str, out: torch.Tensor) -> bool:
    from fusedopt.kernels.project import project_kernel

    rows, cols = grad.shape
    if side not in ("left", "right"):
        raise ValueError(f"unknown side {side!r}; known: 'left', 'right'")
    rank = packed.shape[1] if side == "left" else packed.shape[0]
    shapes = ((rows, rank), (rank, cols)) if side == "left" else ((rank, cols), (rows, rank))
    if (tuple(packed.shape), tuple(out.shape)) != shapes:
        raise ValueError(
            f"a gradient of shape {(rows, cols)} projected on the {side} needs a projector of shape {shapes[0]} and an "
            f"output of shape {shapes[1]}, not {tuple(packed.shape)} and {tuple(out.shape)}"
        )
    if not reads(grad, out):
        return False
    if out.numel() == 0:
        return True
    fixed = project_constants(grad, packed, side, nvidia(grad.device))
    height, width = out.shape
    grid = (-(-height // fixed["BM"]) * -(-width // fixed["BN"]),)
    project_kernel[grid](grad, *parts(packed), out, rows, cols, rank, **fixed)
    return True


def sums_constants(grad: torch.Tensor, on_nvidia: bool) -> dict:
    return {"COLS8": grad.shape[1] % 8 == 0, "num_warps": 8 if on_nvidia else 4, "enable_fp_fusion": True}


def row_col_sums(grad, row_out, col_out, total_out, row_weight, col_weight, mul, eps: float) -> bool:
    from fusedopt.kernels.matrix_sums import TILE_COLS, TILE_ROWS, add_kernel, partial_kernel

    rows, cols = grad.shape
    for what, out, size in (
        ("row_out", row_out, rows),
        ("col_out", col_out, cols),
        ("total_out", total_out, 1),
        ("row_weight", row_weight, rows),
        ("col_weight", col_weight, cols),
        ("mul", mul, 1),
    ):
        if out is not None and (out.numel() != size or out.dtype != torch.float32 or not out.is_contiguous()):
            raise ValueError(
                f"{what} must be {size} contiguous fp32 elements for a gradient of shape {(rows, cols)}, not "
                f"{out.numel()} of {out.dtype}"
            )
    if not reads(grad):
        return False
    if grad.numel() == 0:
        for out in (row_out, col_out, total_out):
            if out is not None:
                out.zero_()
        return True
    down, across = -(-rows // TILE_ROWS.value), -(-cols // TILE_COLS.value)

    def parts_of(out, count: int):
        return None if out is None else torch.empty(count, out.numel(), dtype=torch.float32, device=grad.device)

    sums = ((row_out, parts_of(row_out, across)), (col_out, parts_of(col_out, down)))
    total_part = parts_of(total_out, down * across)
    fixed = sums_constants(grad, nvidia(grad.device))
    partial_kernel[(down * across,)](
        grad, sums[0][1], sums[1][1], total_part, row_weight, col_weight, mul, rows, cols, float(eps),
        **fixed,
    )  # fmt: skip
    options = {name: fixed[name] for name in ("num_warps", "enable_fp_fusion")}
    for out, part in sums:
        if out is not None:
            add_kernel[(-(-out.numel() // 128),)](part, out, *part.shape, ROWS=16, COLS=128, **options)
    if total_out is not None:
        add_kernel[(1,)](total_part, total_out, *total_part.shape, ROWS=1024, COLS=1, **options)
    return True
