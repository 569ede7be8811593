"""What the two native backends share: loading a module, what it can step, and packing a Work into a Launch once."""

from __future__ import annotations

import torch

from fusedopt import abi
from fusedopt.backends.base import BucketKey, Int4Matrix, MatrixKernels, Work, unsupported
from fusedopt.rule import get_rule

_TRUST = (None, "gradient", "update")
_CPU = torch.device("cpu")
_POINTERS = abi.LAUNCH_FIELDS[: abi.LAUNCH_FIELDS.index("rows")]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def matrix_shape(grad: torch.Tensor) -> tuple[int, int]:
    if grad.dim() != 2:
        raise ValueError(f"sums by row and column need a matrix, not {list(grad.shape)}")
    return grad.shape[0], grad.shape[1]


def address(what: str, x, shape: tuple[int, ...], dtypes=abi.DTYPE_CODES, device=_CPU) -> int:
    """The address of a contiguous tensor that has the shape, one of the dtypes and the device, or 0 for None. Raises ValueError."""
    if x is None:
        return 0
    if isinstance(x, Int4Matrix):
        raise ValueError(f"{what}: the native kernels take no Int4Matrix; dequantise it first")
    if tuple(x.shape) != shape or x.dtype not in dtypes or x.device != device or not x.is_contiguous():
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(
            f"{what} must be a contiguous tensor {list(shape)} of {kinds} on {device}, "
            f"not {x.dtype} {list(x.shape)} with strides {list(x.stride())} on {x.device}"
        )
    return x.data_ptr()


class NativeBackend(MatrixKernels):
    """A backend over a native module with launch(packed, ...), launch_bytes() and describe()."""

    name: str

    def __init__(self):
        self._rules: dict[str, tuple] = {}
        self._loaded, self._reason = False, None

    def _load(self) -> str | None:
        """Loads the module and calls `_accept`; the reason why that is impossible, or None."""
        raise TypeError("a native backend says how it loads its module")

    def reason(self) -> str | None:
        """Why the backend cannot run at all, or None."""
        if not self._loaded:
            self._reason, self._loaded = self._load(), True
        return self._reason

    def _accept(self, module) -> str | None:
        if (size := module.launch_bytes()) != abi.LAUNCH_BYTES:
            return f"its native module takes launches of {size} bytes, not {abi.LAUNCH_BYTES}. Reinstall fusedopt"
        for i, (name, states, scalars, trust_on) in enumerate(module.describe()):
            self._rules[name] = i, _names(states), _names(scalars), _TRUST[trust_on]
        return None

    def _unsuited(self, key: BucketKey) -> str | None:
        """Why the device of a bucket does not suit, or None."""
        raise TypeError("a native backend says which devices it takes")

    def supports(self, key: BucketKey) -> str | None:
        why = self.reason() or self._unsuited(key) or unsupported(key)
        if why is not None:
            return why
        if key.rule not in self._rules:
            return "its native module was built without this rule. Reinstall fusedopt"
        rule = get_rule(key.rule)
        if self._rules[key.rule][1:] != (rule.state_names, rule.scalar_names, rule.trust_on):
            return "its native module was built from another version of this rule. Reinstall fusedopt"
        return None

    def packed(self, work: Work, **extra: int) -> bytes:
        """The bytes of a Launch. Packing costs more than a small launch: a work that has not moved is not packed again."""
        addresses = [t.data_ptr() if (t := getattr(work, name)) is not None else 0 for name in _POINTERS]
        state = (addresses, work.phase, work.max_norm, work.total_index, work.total_count, extra)
        cached = work.cache.get(self.name)
        if cached is None or cached[0] != state:
            fields = work.fields() | {"rule": self._rules[work.rule.name][0]} | extra
            cached = work.cache[self.name] = state, abi.pack_launch(fields)
        return cached[1]
