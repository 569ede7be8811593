"""Matrix work of the CPU backend: checks tensors and packs the structs of csrc/cpu/matrix.h."""

from __future__ import annotations

import struct

import torch

from fusedopt.abi import DTYPE_CODES, SCALAR_STRIDE
from fusedopt.backends.base import Int4Matrix, MatrixWork
from fusedopt.backends.native import address, matrix_shape

# struct MatrixLaunch, ProjectLaunch, SumsLaunch, SeededLaunch
_APPLY = struct.Struct("=9Q5Q5q2f12i")
_PROJECT = struct.Struct("=4Q3q8i")
_SUMS = struct.Struct("=8Q2q4i")
_SEEDED = struct.Struct("=5Q4qI7i")
SIZES = (_APPLY.size, _PROJECT.size, _SUMS.size, _SEEDED.size)
_RESIDUALS = {None: 0, "sign": 1, "gradient": 2}


class Scratch:
    """Buffers that calls borrow, so that none is allocated in every step. Calls at the same time borrow different ones."""

    def __init__(self):
        self._free: list[torch.Tensor] = []

    def take(self, floats: int) -> torch.Tensor:
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = None
        if buffer is None or buffer.numel() < floats:
            buffer = torch.empty(floats, dtype=torch.float32)
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        if not self._free:
            self._free.append(buffer)


def low_precision() -> bool:
    """Whether fp32 operands may be rounded to bf16: torch's own switch, torch.set_float32_matmul_precision("medium")."""
    return torch.get_float32_matmul_precision() == "medium"


_FP32 = (torch.float32,)


def _flat(x: torch.Tensor | None) -> torch.Tensor | None:
    """A GradScaler's tensors have no dimension."""
    return None if x is None else x.view(-1)


def _code(x) -> int:
    return 0 if x is None else DTYPE_CODES[x.dtype]


def _factors(what: str, left, right, rows: int, cols: int) -> tuple[int, int, int]:
    """Addresses and rank of a product [rows, rank] @ [rank, cols], or zeros."""
    if left is None and right is None:
        return 0, 0, 0
    if left is None or right is None:
        raise ValueError(f"{what}: a product needs both factors")
    rank = left.shape[1] if len(left.shape) == 2 else 0
    if rank < 1:
        raise ValueError(f"{what}: factors are matrices of rank 1 or more, not {list(left.shape)}")
    return address(f"{what}, left", left, (rows, rank)), address(f"{what}, right", right, (rank, cols)), rank


def pack_apply(work: MatrixWork, scratch: torch.Tensor, threads: int, isa: int) -> bytes:
    """The bytes of a MatrixLaunch. Raises ValueError for what the kernels do not take."""
    if work.param.dim() != 2:
        raise ValueError(f"a projected parameter is seen as a matrix, not as {list(work.param.shape)}")
    rows, cols = shape = tuple(work.param.shape)
    left, right, rank = _factors("update", work.left, work.right, rows, cols)
    back_left, back_right, back_rank = _factors("residual", work.grad_left, work.grad_right, rows, cols)
    if work.residual not in _RESIDUALS:
        raise ValueError(f"unknown residual {work.residual!r}; known: {', '.join(map(str, _RESIDUALS))}")
    if work.residual is not None and not (left and back_left and work.grad is not None):
        raise ValueError("a residual needs the product of the update, the gradient and the factors of its projection")
    if not left and work.grad is None:
        raise ValueError("an update is a product or a scaled gradient; this one is neither")
    precision, companion_dtype = work.precision, None
    if precision.companion is not None:
        companion_dtype = precision.companion_dtype(work.param.dtype)
        if work.companion is None:
            raise ValueError(f"param_precision {precision.name!r} needs its companion")
    addresses = (
        address("param", work.param, shape),
        0 if companion_dtype is None else address("companion", work.companion, shape, (companion_dtype,)),
        left,
        right,
        address("grad", work.grad, shape),
        address("row_factor", work.row_factor, (rows,), _FP32),
        address("col_factor", work.col_factor, (cols,), _FP32),
        back_left,
        back_right,
        address("scalars", work.scalars, (SCALAR_STRIDE,), _FP32),
        address("grad_scale", _flat(work.grad_scale), (1,), _FP32),
        address("found_inf", _flat(work.found_inf), (1,), _FP32),
        address("clip", _flat(work.clip), (1,), _FP32),
        scratch.data_ptr(),
    )
    codes = (
        _code(work.param),
        precision.id,
        _code(work.grad),
        _code(work.left),
        _code(work.right),
        _code(work.grad_left),
        _code(work.grad_right),
        _RESIDUALS[work.residual],
        int(low_precision()),
        threads,
        isa,
        _APPLY.size,
    )
    sizes = rows, cols, rank, back_rank, work.tensor_id
    return _APPLY.pack(*addresses, *sizes, work.scale, work.residual_scale, *codes)


def project_shape(grad: torch.Tensor, projector: torch.Tensor, side: str) -> tuple[bool, int]:
    """(right, rank) of a projection. Raises ValueError for unknown sides."""
    if side not in ("left", "right"):
        raise ValueError(f"unknown side {side!r}; known: left, right")
    if grad.dim() != 2 or isinstance(projector, Int4Matrix) or projector.dim() != 2:
        raise ValueError(
            "a projection takes a gradient and a projector that are matrices (dequantise an Int4Matrix first)"
        )
    return side == "right", projector.shape[0 if side == "right" else 1]


def pack_project(
    grad, projector, side: str, out, scratch: torch.Tensor, threads: int, isa: int, rough: bool = False
) -> bytes:
    right, rank = project_shape(grad, projector, side)
    rows, cols = grad.shape
    addresses = (
        address("grad", grad, (rows, cols)),
        address("projector", projector, (rank, cols) if right else (rows, rank)),
        address("out", out, (rows, rank) if right else (rank, cols)),
        scratch.data_ptr(),
    )
    codes = (
        int(right),
        _code(grad),
        _code(projector),
        _code(out),
        int(rough or low_precision()),
        threads,
        isa,
        _PROJECT.size,
    )
    return _PROJECT.pack(*addresses, rows, cols, rank, *codes)


def pack_seeded(
    grad, seed: int, tensor_id: int, step: int, rank: int, side: str, out, squares, scratch, threads: int, isa: int
) -> bytes:
    right = side == "right"
    rows, cols = grad.shape
    addresses = (
        address("grad", grad, (rows, cols)),
        address("out", out, (rows, rank) if right else (rank, cols)),
        address("squares", squares, (rows if right else cols,), _FP32),
        scratch.data_ptr(),
    )
    codes = int(right), _code(grad), _code(out), int(low_precision()), threads, isa, _SEEDED.size
    return _SEEDED.pack(*addresses, seed & (2**64 - 1), rows, cols, rank, tensor_id, step, *codes)


def pack_sums(grad, row_out, col_out, total, mul, weights, scratch: torch.Tensor, threads: int, isa: int) -> bytes:
    """weights: (row_weight, col_weight) of a total, or (None, None)."""
    rows, cols = matrix_shape(grad)
    if not grad.numel():
        raise ValueError("a matrix without elements has no sums")
    addresses = (
        address("grad", grad, (rows, cols)),
        address("row_out", row_out, (rows,), _FP32),
        address("col_out", col_out, (cols,), _FP32),
        address("out", total, (1,), _FP32),
        address("mul", mul, (1,), _FP32),
        address("row_weight", weights[0], (rows,), _FP32),
        address("col_weight", weights[1], (cols,), _FP32),
        scratch.data_ptr(),
    )
    return _SUMS.pack(*addresses, rows, cols, _code(grad), threads, isa, _SUMS.size)
