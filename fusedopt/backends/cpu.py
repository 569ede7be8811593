"""The CPU backend: the native driver compiled for this machine's instruction set."""

from __future__ import annotations

import os

import torch  # before the extension, which then shares torch's OpenMP runtime and its threads

from fusedopt.abi import DTYPE_CODES
from fusedopt.backends.base import BucketKey, Work
from fusedopt.backends.native import NativeBackend
from fusedopt.formats import Format

try:
    import fusedopt._native_cpu as native
except ImportError as error:
    native, _import_error = None, str(error)


class CpuBackend(NativeBackend):
    """Runs on the threads of `torch.get_num_threads()`. FUSEDOPT_CPU_ISA=baseline, avx2 or avx512 chooses the instruction set."""

    name = "cpu"

    def __init__(self, isa: str | None = None):
        """isa: name of an instruction set; None takes FUSEDOPT_CPU_ISA, or else the widest this machine has."""
        super().__init__()
        self.isa = isa or os.environ.get("FUSEDOPT_CPU_ISA") or None
        self._reason, self._loaded = self._load(), True

    def _load(self) -> str | None:
        if native is None:
            return f"its native module is not installed ({_import_error}). Reinstall fusedopt with a C++ compiler"
        usable = dict(native.isa())
        if self.isa is not None and self.isa not in usable:
            return f"instruction set {self.isa!r} (FUSEDOPT_CPU_ISA) is not one of {', '.join(usable)}"
        self.isa = self.isa or list(usable)[-1]
        self._isa = usable[self.isa]
        return self._accept(native)

    def _unsuited(self, key: BucketKey) -> str | None:
        if key.device.type != "cpu":
            return f"it needs CPU tensors, not {key.device}. Move the model to the CPU, or use another backend"
        return None

    def units(self, device: torch.device) -> int:
        return torch.get_num_threads()

    def launch(self, work: Work) -> None:
        native.launch(self.packed(work, threads=torch.get_num_threads(), isa=self._isa))

    def quantize(self, x: torch.Tensor, form: Format, signed: bool, codes: torch.Tensor, scale: torch.Tensor) -> None:
        dtype, code, threads = DTYPE_CODES[x.dtype], form.code(signed), torch.get_num_threads()
        native.encode(x.data_ptr(), dtype, x.numel(), code, codes.data_ptr(), scale.data_ptr(), self._isa, threads)

    def dequantize(
        self, codes: torch.Tensor, scale: torch.Tensor, form: Format, signed: bool, out: torch.Tensor
    ) -> None:
        dtype, code, threads = DTYPE_CODES[out.dtype], form.code(signed), torch.get_num_threads()
        native.decode(codes.data_ptr(), scale.data_ptr(), out.numel(), code, out.data_ptr(), dtype, self._isa, threads)
