"""The CUDA backend: packs a Work into a Launch and enqueues it on torch's current stream."""

from __future__ import annotations

from functools import cache

import torch

from fusedopt import abi
from fusedopt.backends.base import BucketKey, Work
from fusedopt.rule import get_rule

FORMATS = ("fp32", "bf16", "int8")
PRECISIONS = ("nearest", "stochastic")
TRUST = (None, "gradient", "update")
OLDEST = (8, 0)  # bf16 conversions and warp-wide maxima in hardware
_POINTERS = abi.LAUNCH_FIELDS[: abi.LAUNCH_FIELDS.index("rows")]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


class CudaBackend:
    """Steps CUDA tensors of compute capability 8.0 and newer. Nothing is loaded before the first question."""

    name = "cuda"

    def __init__(self, library=None, on_cpu: bool = False):
        """library: an object with the interface of fusedopt._native_cuda instead of that module.
        on_cpu: the library takes host memory (the shim of the tests)."""
        self._library = library
        self._on_cpu = on_cpu
        self._rules: dict[str, tuple] = {}
        self._sm_counts: dict[int, int] = {}
        self._loaded = False
        self._reason: str | None = None

    def reason(self) -> str | None:
        """Why the backend cannot run at all, or None."""
        if not self._loaded:
            self._reason = self._load()
            self._loaded = True
        return self._reason

    def _load(self) -> str | None:
        if self._library is None:
            try:
                from fusedopt import _native_cuda
            except ImportError as error:
                return f"its native module is not installed ({error}); reinstall fusedopt with nvcc and FUSEDOPT_CUDA=1"
            if not torch.cuda.is_available():
                return "torch finds no CUDA device"
            self._library = _native_cuda
        if (size := self._library.launch_bytes()) != abi.LAUNCH_BYTES:
            return f"its native module takes launches of {size} bytes, not {abi.LAUNCH_BYTES}; reinstall fusedopt"
        for i, (name, states, scalars, trust_on) in enumerate(self._library.describe()):
            self._rules[name] = i, _names(states), _names(scalars), TRUST[trust_on]
        return None

    def supports(self, key: BucketKey) -> str | None:
        why = self.reason() or self._refuse(key)
        return why and f"{key.rule}: backend 'cuda' cannot step this bucket: {why}"

    def _refuse(self, key: BucketKey) -> str | None:
        if key.device.type != ("cpu" if self._on_cpu else "cuda"):
            return f"its tensors are on {key.device}. Move the model to a CUDA device, or use another backend"
        if not self._on_cpu and _capability(self._index(key.device)) < OLDEST:
            return f"{key.device} is older than compute capability {OLDEST[0]}.{OLDEST[1]}. Use another backend"
        for what, dtype in (("parameters", key.param_dtype), ("gradients", key.grad_dtype)):
            if dtype not in abi.DTYPE_CODES:
                return f"its {what} are {dtype}; it takes {', '.join(map(str, abi.DTYPE_CODES))}"
        for form in key.formats:
            if form not in FORMATS:
                return f"it has no state format {form!r}; it has {', '.join(FORMATS)}"
        if key.precision not in PRECISIONS:
            return f"it has no param_precision {key.precision!r}; it has {', '.join(PRECISIONS)}"
        if key.rule not in self._rules:
            return "the native CUDA module was built without this rule; reinstall fusedopt"
        rule = get_rule(key.rule)
        _, states, scalars, trust_on = self._rules[key.rule]
        if (states, scalars, trust_on) != (rule.state_names, rule.scalar_names, rule.trust_on):
            return "the native CUDA module was built from another version of this rule; reinstall fusedopt"
        return None

    @staticmethod
    def _index(device: torch.device) -> int:
        return torch.cuda.current_device() if device.index is None else device.index

    def units(self, device: torch.device) -> int:
        index = 0 if self._on_cpu else self._index(device)
        if index not in self._sm_counts:
            self._sm_counts[index] = self._library.sm_count(index)
        return self._sm_counts[index]

    def launch(self, work: Work) -> None:
        # Packing costs more than a small launch; a work that has not moved since its last launch is not packed again.
        addresses = [t.data_ptr() if (t := getattr(work, name)) is not None else 0 for name in _POINTERS]
        state = (addresses, work.phase, work.max_norm, work.total_index, work.total_count)
        cached = work.cache.get("cuda")
        if cached is None or cached[0] != state:
            if why := self.reason():
                raise RuntimeError(f"{work.rule.name}: backend 'cuda' cannot run: {why}")
            packed = abi.pack_launch(work.fields() | {"rule": self._rules[work.rule.name][0]})
            cached = work.cache["cuda"] = state, packed
        if self._on_cpu:
            self._library.launch(cached[1], 0)
            return
        index = self._index(work.key.device)
        if index == torch.cuda.current_device():
            self._library.launch(cached[1], torch.cuda.current_stream(index).cuda_stream)
        else:
            with torch.cuda.device(index):
                self._library.launch(cached[1], torch.cuda.current_stream(index).cuda_stream)
