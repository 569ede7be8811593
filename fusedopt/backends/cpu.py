"""The CPU backend: packs a Work into a Launch and runs it with the native driver of this machine's instruction set."""

from __future__ import annotations

import os

import torch  # before the extension, which then shares torch's OpenMP runtime and its threads

from fusedopt import abi
from fusedopt.backends.base import BucketKey, Work
from fusedopt.rule import get_rule

try:
    from fusedopt import _native_cpu as native
except ImportError as error:
    native, _import_error = None, str(error)

FORMATS = ("fp32", "bf16", "int8")
PRECISIONS = ("nearest", "stochastic")
TRUST = (None, "gradient", "update")
_POINTERS = abi.LAUNCH_FIELDS[: abi.LAUNCH_FIELDS.index("rows")]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


class CpuBackend:
    """Runs on `torch.get_num_threads()` threads.

    FUSEDOPT_CPU_ISA=baseline, avx2 or avx512 chooses the instruction set; results do not depend on it.
    """

    name = "cpu"

    def __init__(self, isa: str | None = None):
        """isa: name of an instruction set; None takes FUSEDOPT_CPU_ISA, or else the widest this machine has."""
        self._rules: dict[str, tuple] = {}
        self._reason = self._load(isa or os.environ.get("FUSEDOPT_CPU_ISA") or None)

    def _load(self, isa: str | None) -> str | None:
        if native is None:
            return f"its native module is not installed ({_import_error}). Reinstall fusedopt with a C++ compiler"
        if native.launch_bytes() != abi.LAUNCH_BYTES:
            return "its native module was built from another version of fusedopt. Reinstall fusedopt"
        usable = dict(native.isa())
        if isa is not None and isa not in usable:
            return f"instruction set {isa!r} (FUSEDOPT_CPU_ISA) is not one of {', '.join(usable)}"
        self.isa = isa or list(usable)[-1]
        self._isa = usable[self.isa]
        for i, (name, states, scalars, trust_on) in enumerate(native.describe()):
            self._rules[name] = i, _names(states), _names(scalars), TRUST[trust_on]
        return None

    def reason(self) -> str | None:
        """Why the backend cannot run at all, or None."""
        return self._reason

    def supports(self, key: BucketKey) -> str | None:
        why = self._reason or self._refuse(key)
        return why and f"{key.rule}: backend 'cpu' cannot step this bucket: {why}"

    def _refuse(self, key: BucketKey) -> str | None:
        if key.device.type != "cpu":
            return f"its tensors are on {key.device}. Move the model to the CPU, or use another backend"
        for what, dtype in (("parameters", key.param_dtype), ("gradients", key.grad_dtype)):
            if dtype not in abi.DTYPE_CODES:
                return f"its {what} are {dtype}; it takes {', '.join(map(str, abi.DTYPE_CODES))}"
        for form in key.formats:
            if form not in FORMATS:
                return f"it has no state format {form!r}; it has {', '.join(FORMATS)}"
        if key.precision not in PRECISIONS:
            return f"it has no param_precision {key.precision!r}; it has {', '.join(PRECISIONS)}"
        if key.rule not in self._rules:
            return "its native module was built without this rule. Reinstall fusedopt"
        rule = get_rule(key.rule)
        _, states, scalars, trust_on = self._rules[key.rule]
        if (states, scalars, trust_on) != (rule.state_names, rule.scalar_names, rule.trust_on):
            return "its native module was built from another version of this rule. Reinstall fusedopt"
        return None

    def units(self, device: torch.device) -> int:
        return torch.get_num_threads()

    def launch(self, work: Work) -> None:
        # Packing costs more than a small launch; a work that has not moved since its last launch is not packed again.
        addresses = [t.data_ptr() if (t := getattr(work, name)) is not None else 0 for name in _POINTERS]
        threads = torch.get_num_threads()
        state = (addresses, work.phase, threads, self._isa, work.max_norm, work.total_index, work.total_count)
        cached = work.cache.get("cpu")
        if cached is None or cached[0] != state:
            fields = work.fields() | {"rule": self._rules[work.rule.name][0], "threads": threads, "isa": self._isa}
            cached = work.cache["cpu"] = state, abi.pack_launch(fields)
        native.launch(cached[1])
