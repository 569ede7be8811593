"""What would make the host wait for a GPU, found on the CPU: a dispatch mode that raises for operations that read a tensor."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero",
    "aten::_unique2", "aten::unique_dim", "aten::_linalg_eigh", "aten::_linalg_svd", "aten::bincount",
    "aten::lift_fresh",  # torch.tensor of host numbers, which a GPU gets by a copy that waits
}  # fmt: skip
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class NoWaiting(TorchDispatchMode):
    """Raises RuntimeError within the context. host: tensors that lie in host memory on a GPU as well, and may be read."""

    def __init__(self, host=()):
        super().__init__()
        self.host = {t.untyped_storage().data_ptr() for t in host}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        waits = name in READS
        if name in INDEXED:  # a mask has as many results as it has ones
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        on_host = args and isinstance(args[0], torch.Tensor) and args[0].untyped_storage().data_ptr() in self.host
        if waits and not on_host:
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))
