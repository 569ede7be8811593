"""The CUDA backend: enqueues packed launches of the native driver on torch's current stream."""

from __future__ import annotations

from functools import cache

import torch

from fusedopt.abi import DTYPE_CODES
from fusedopt.backends.base import BucketKey, Int4Matrix, MatrixWork, Work
from fusedopt.backends.native import NativeBackend, address, matrix_shape
from fusedopt.formats import Format

OLDEST = (8, 0)  # bf16 conversions and warp-wide maxima in hardware


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


class CudaBackend(NativeBackend):
    """Steps CUDA tensors of compute capability 8.0 and newer. Nothing is loaded before the first question."""

    name = "cuda"

    def __init__(self, library=None, on_cpu: bool = False):
        """library: an object with the interface of fusedopt._native_cuda instead of that module.
        on_cpu: the library takes host memory (the shim of the tests)."""
        super().__init__()
        self._library, self._on_cpu = library, on_cpu
        self._sm_counts: dict[int, int] = {}

    def _load(self) -> str | None:
        if self._library is None:
            try:
                import fusedopt._native_cuda as native
            except ImportError as error:
                return f"its native module is not installed ({error}). Reinstall fusedopt with nvcc and FUSEDOPT_CUDA=1"
            if not torch.cuda.is_available():
                return "torch finds no CUDA device"
            self._library = native
        return self._accept(self._library)

    def _unsuited(self, key: BucketKey) -> str | None:
        if key.device.type != ("cpu" if self._on_cpu else "cuda"):
            return f"it needs CUDA tensors, not {key.device}. Move the model to CUDA, or use backend='cpu'"
        if not self._on_cpu and _capability(_index(key.device)) < OLDEST:
            return f"{key.device} is older than compute capability {OLDEST[0]}.{OLDEST[1]}. Use backend='triton'"
        return None

    def units(self, device: torch.device) -> int:
        index = 0 if self._on_cpu else _index(device)
        if index not in self._sm_counts:
            self._sm_counts[index] = self._library.sm_count(index)
        return self._sm_counts[index]

    def launch(self, work: Work) -> None:
        self._check(work.rule.name)
        self._enqueue(self._library.launch, work.key.device, self.packed(work))

    def quantize(self, x: torch.Tensor, form: Format, signed: bool, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self._check("quantize_blockwise")
        addresses = codes.data_ptr(), scale.data_ptr()
        self._enqueue(
            self._library.encode, x.device, x.data_ptr(), DTYPE_CODES[x.dtype], x.numel(), form.code(signed), *addresses
        )

    def dequantize(
        self, codes: torch.Tensor, scale: torch.Tensor, form: Format, signed: bool, out: torch.Tensor
    ) -> None:
        self._check("dequantize_blockwise")
        to = out.data_ptr(), DTYPE_CODES[out.dtype]
        self._enqueue(
            self._library.decode, out.device, codes.data_ptr(), scale.data_ptr(), out.numel(), form.code(signed), *to
        )

    def apply_matrix(self, work: MatrixWork) -> bool:
        """By Triton's kernel, where Triton is there."""
        triton = self._triton()
        return triton is not None and triton.apply_matrix(work)

    def project_packed(self, grad: torch.Tensor, packed: Int4Matrix, side: str, out: torch.Tensor) -> bool:
        triton = self._triton()
        return triton is not None and triton.project_packed(grad, packed, side, out)

    def project_seeded(self, grad, seed, tensor_id, step, rank, side, out, squares) -> bool:
        triton = self._triton()
        return triton is not None and triton.project_seeded(grad, seed, tensor_id, step, rank, side, out, squares)

    def newton_schulz(self, x, coefficients) -> bool:
        triton = self._triton()
        return triton is not None and triton.newton_schulz(x, coefficients)

    def _triton(self):
        """The backend whose kernels multiply matrices, or None where it cannot run."""
        from fusedopt.backends.select import get_backend

        triton = get_backend("triton")
        return None if self._on_cpu or triton.reason() else triton

    def row_col_sums(
        self,
        grad: torch.Tensor,
        row_out: torch.Tensor | None,
        col_out: torch.Tensor | None,
        mul: torch.Tensor | None = None,
    ) -> bool:
        """Sums of (mul * grad)^2 by row into row_out fp32 [rows] and by column into col_out fp32 [cols]; grad [rows, cols] is
        contiguous (fp32, bf16, fp16), mul fp32 [1]. The same bits at every run. Raises ValueError for other tensors."""
        self._check("row_col_sums")
        rows, cols = matrix_shape(grad)
        fp32 = (torch.float32,)
        addresses = (
            address("mul", mul, (1,), fp32, grad.device),
            address("row_out", row_out, (rows,), fp32, grad.device),
            address("col_out", col_out, (cols,), fp32, grad.device),
        )
        return self._enqueue_sums(self._library.row_col_sums, grad, addresses)

    def weighted_square_sum(
        self, grad: torch.Tensor, row_weight: torch.Tensor, col_weight: torch.Tensor, out: torch.Tensor
    ) -> bool:
        """out fp32 [1] = sum of grad[i, j]^2 * row_weight[i] * col_weight[j]; weights fp32 [rows] and [cols]."""
        self._check("weighted_square_sum")
        rows, cols = matrix_shape(grad)
        fp32 = (torch.float32,)
        addresses = (
            address("row_weight", row_weight, (rows,), fp32, grad.device),
            address("col_weight", col_weight, (cols,), fp32, grad.device),
            address("out", out, (1,), fp32, grad.device),
        )
        return self._enqueue_sums(self._library.weighted_square_sum, grad, addresses)

    def _enqueue_sums(self, function, grad: torch.Tensor, addresses: tuple[int, ...]) -> bool:
        rows, cols = grad.shape
        where = address("grad", grad, (rows, cols), device=grad.device)
        if not grad.numel():
            raise ValueError("a matrix without elements has no sums")
        scratch = torch.empty(self._library.sums_scratch(rows, cols), dtype=torch.float32, device=grad.device)
        self._enqueue(function, grad.device, where, DTYPE_CODES[grad.dtype], rows, cols, *addresses, scratch.data_ptr())
        return True

    def _check(self, what: str) -> None:
        if why := self.reason():
            raise RuntimeError(f"{what}: backend 'cuda' cannot run: {why}")

    def _enqueue(self, function, device: torch.device, *arguments) -> None:
        """Calls a function of the library with torch's current stream of a device as its last argument."""
        if self._on_cpu:
            function(*arguments, 0)
            return
        index = _index(device)
        if index == torch.cuda.current_device():
            function(*arguments, torch.cuda.current_stream(index).cuda_stream)
        else:
            with torch.cuda.device(index):
                function(*arguments, torch.cuda.current_stream(index).cuda_stream)
