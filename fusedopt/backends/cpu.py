"""The CPU backend: the native driver compiled for this machine's instruction set."""

from __future__ import annotations

import contextlib
import os

import torch  # before the extension, which then shares torch's OpenMP runtime and its threads

from fusedopt.abi import DTYPE_CODES
from fusedopt.backends import cpu_matrix
from fusedopt.backends.base import BucketKey, MatrixWork, Work, check_seeded
from fusedopt.backends.native import NativeBackend, matrix_shape
from fusedopt.formats import Format

try:
    import fusedopt._native_cpu as native
except ImportError as error:
    native, _import_error = None, str(error)


_spared = 0


@contextlib.contextmanager
def sparing_threads(count: int):
    """Within the context steps leave some threads of `torch.get_num_threads()` to others, as long as one is left. A parallel
    region waits for its slowest thread: with readers and writers of a file on the same cores it takes many times longer."""
    global _spared
    before, _spared = _spared, count
    try:
        yield
    finally:
        _spared = before


def step_threads() -> int:
    return max(1, torch.get_num_threads() - _spared)


class CpuBackend(NativeBackend):
    """Runs on the threads of `torch.get_num_threads()`. FUSEDOPT_CPU_ISA=baseline, avx2 or avx512 chooses the instruction set."""

    name = "cpu"

    def __init__(self, isa: str | None = None):
        """isa: name of an instruction set; None takes FUSEDOPT_CPU_ISA, or else the widest this machine has."""
        super().__init__()
        self.isa = isa or os.environ.get("FUSEDOPT_CPU_ISA") or None
        self._scratch = cpu_matrix.Scratch()
        self._reason, self._loaded = self._load(), True

    def _load(self) -> str | None:
        if native is None:
            return f"its native module is not installed ({_import_error}). Reinstall fusedopt with a C++ compiler"
        usable = dict(native.isa())
        if self.isa is not None and self.isa not in usable:
            return f"instruction set {self.isa!r} (FUSEDOPT_CPU_ISA) is not one of {', '.join(usable)}"
        self.isa = self.isa or list(usable)[-1]
        self._isa = usable[self.isa]
        if (sizes := native.matrix_bytes()) != cpu_matrix.SIZES:
            return f"its native module takes matrix work of {sizes} bytes, not {cpu_matrix.SIZES}. Reinstall fusedopt"
        return self._accept(native)

    def _unsuited(self, key: BucketKey) -> str | None:
        if key.device.type != "cpu":
            return f"it needs CPU tensors, not {key.device}. Move the model to the CPU, or use another backend"
        return None

    def units(self, device: torch.device) -> int:
        return torch.get_num_threads()

    def launch(self, work: Work) -> None:
        native.launch(self.packed(work, threads=step_threads(), isa=self._isa))

    def quantize(self, x: torch.Tensor, form: Format, signed: bool, codes: torch.Tensor, scale: torch.Tensor) -> None:
        dtype, code, threads = DTYPE_CODES[x.dtype], form.code(signed), torch.get_num_threads()
        native.encode(x.data_ptr(), dtype, x.numel(), code, codes.data_ptr(), scale.data_ptr(), self._isa, threads)

    def dequantize(
        self, codes: torch.Tensor, scale: torch.Tensor, form: Format, signed: bool, out: torch.Tensor
    ) -> None:
        dtype, code, threads = DTYPE_CODES[out.dtype], form.code(signed), torch.get_num_threads()
        native.decode(codes.data_ptr(), scale.data_ptr(), out.numel(), code, out.data_ptr(), dtype, self._isa, threads)

    def has_history(self) -> bool:
        """Whether the next two can run."""
        return self.reason() is None and hasattr(native, "history_span")  # an earlier build has none

    def history_products(
        self, rows: torch.Tensor, scale: torch.Tensor | None, form: Format, width: int, place: int
    ) -> torch.Tensor:
        """The products of a row with all rows of a window of gradients in a format (transforms/history.py), fp64 [window]: the
        same bits for every thread count and instruction set."""
        spans = -(-width // native.history_span)
        part = torch.empty(spans, len(rows), dtype=torch.float64)
        native.history_products(
            *self._history(rows, scale, form, width), place, part.data_ptr(), self._isa, torch.get_num_threads()
        )
        return part.sum(0)

    def history_combine(
        self, rows: torch.Tensor, scale: torch.Tensor | None, form: Format, width: int, y: torch.Tensor
    ) -> torch.Tensor:
        """The sum of y_j (fp64 [window]) times row j, fp32 [width]."""
        y, out = y.contiguous(), torch.empty(width)
        native.history_combine(
            *self._history(rows, scale, form, width), y.data_ptr(), out.data_ptr(), self._isa, torch.get_num_threads()
        )
        return out

    @staticmethod
    def _history(rows: torch.Tensor, scale: torch.Tensor | None, form: Format, width: int) -> tuple:
        if not rows.is_contiguous() or scale is not None and not scale.is_contiguous():
            raise ValueError("a window of gradients is contiguous")
        scales = (0, 0) if scale is None else (scale.data_ptr(), scale.shape[1])
        row_bytes = rows.shape[1] * rows.element_size()
        return rows.data_ptr(), scales[0], form.code(True), len(rows), width, row_bytes, scales[1]

    def apply_matrix(self, work: MatrixWork) -> bool:
        """p <- p - (lr * u + decay * p) as MatrixWork says, with every precision; the same bits for every thread count.
        False, and nothing done, for fp64.

        Products of fp32 factors are fp32, or round the factors to bf16 where torch.get_float32_matmul_precision() is
        "medium". Raises ValueError for an Int4Matrix and for tensors that are not contiguous.
        """
        if torch.float64 in (work.param.dtype, getattr(work.left, "dtype", None), getattr(work.grad, "dtype", None)):
            return False
        threads = torch.get_num_threads()
        scratch = self._scratch.take(native.apply_scratch(work.residual is not None, threads))
        native.apply_matrix(cpu_matrix.pack_apply(work, scratch, threads, self._isa))
        self._scratch.give_back(scratch)
        return True

    def project(
        self, grad: torch.Tensor, projector: torch.Tensor, side: str, out: torch.Tensor, rough: bool = False
    ) -> bool:
        """out = projector^T @ grad (side "left": [rank, cols] from a projector [rows, rank]) or grad @ projector^T
        (side "right": [rows, rank] from [rank, cols]). fp32, bf16 or fp16, accumulated in fp32; precision as in
        `apply_matrix`, or rough: fp32 operands rounded to bf16. False, and nothing done, for fp64."""
        if torch.float64 in (grad.dtype, projector.dtype, out.dtype):
            return False
        right, rank = cpu_matrix.project_shape(grad, projector, side)
        threads = torch.get_num_threads()
        scratch = self._scratch.take(native.project_scratch(right, *grad.shape, rank, threads))
        native.project(cpu_matrix.pack_project(grad, projector, side, out, scratch, threads, self._isa, rough))
        self._scratch.give_back(scratch)
        return True

    def project_seeded(
        self, grad: torch.Tensor, seed: int, tensor_id: int, step: int, rank: int, side: str, out: torch.Tensor,
        squares: torch.Tensor | None,
    ) -> bool:  # fmt: skip
        """See MatrixKernels; the same bits for every thread count. grad, out: fp32, bf16 or fp16; precision as in `project`.
        False, and nothing done, for fp64. Raises ValueError for tensors of other shapes or with gaps, and for ranks below 1."""
        if torch.float64 in (grad.dtype, out.dtype):
            return False
        rows, cols = matrix_shape(grad)
        check_seeded(side, rank)
        threads = torch.get_num_threads()
        scratch = self._scratch.take(native.seeded_scratch(side == "right", rows, cols, rank, threads))
        native.project_seeded(
            cpu_matrix.pack_seeded(grad, seed, tensor_id, step, rank, side, out, squares, scratch, threads, self._isa)
        )
        self._scratch.give_back(scratch)
        return True

    def row_col_sums(
        self,
        grad: torch.Tensor,
        row_out: torch.Tensor | None,
        col_out: torch.Tensor | None,
        mul: torch.Tensor | None = None,
    ) -> bool:
        """Sums of (mul * grad)^2 by row into row_out fp32 [rows] and by column into col_out fp32 [cols]; mul: fp32 [1]."""
        return self._sums(grad, row_out, col_out, None, mul, (None, None))

    def weighted_square_sum(
        self, grad: torch.Tensor, row_weight: torch.Tensor, col_weight: torch.Tensor, out: torch.Tensor
    ) -> bool:
        """out fp32 [1] = sum of grad[i, j]^2 * row_weight[i] * col_weight[j]; weights fp32 [rows] and [cols]."""
        return self._sums(grad, None, None, out, None, (row_weight, col_weight))

    def _sums(self, grad, row_out, col_out, total, mul, weights) -> bool:
        if grad.dtype == torch.float64:
            return False
        threads = torch.get_num_threads()
        scratch = self._scratch.take(native.sums_scratch(*grad.shape, col_out is not None))
        native.square_sums(
            cpu_matrix.pack_sums(grad, row_out, col_out, total, mul, weights, scratch, threads, self._isa)
        )
        self._scratch.give_back(scratch)
        return True
