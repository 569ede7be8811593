"""The CUDA backend: enqueues packed launches of the native driver on torch's current stream."""

from __future__ import annotations

from functools import cache

import torch

from fusedopt.abi import DTYPE_CODES
from fusedopt.backends.base import BucketKey, Work
from fusedopt.backends.native import NativeBackend
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
