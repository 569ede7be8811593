"""Products of a gradient and a skinny matrix: A @ B as torch.mm, on AVX-512 CPUs by oneDNN.

torch.mm of fp32 goes to MKL, which holds itself to AVX2 on processors that are not Intel's: at 4096 x 4096 x 136 on 2 Zen 5
cores oneDNN takes half its time. torch offers oneDNN's fp32 product only through an operator without a public name.
"""

from __future__ import annotations

import torch

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def _onednn():
    if not (AVX512 and torch.backends.mkldnn.is_available()):
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        A, B = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4)
        same = torch.equal(operator(A, B.t(), None, "none", [], ""), A @ B)
        return operator if same else None
    except (AttributeError, RuntimeError):  # a torch without it, or with another signature
        return None


_linear = _onednn()
FAST = _linear is not None


def mm(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A @ B of one dtype; the result may be the transposed view of a dense matrix. The larger operand is never copied if
    it or its transpose is contiguous."""
    if (
        _linear is None
        or A.dtype != torch.float32
        or A.device.type != "cpu"
        or not torch.backends.mkldnn.enabled
        or min(A.shape[0], A.shape[1], B.shape[1]) < 2
    ):
        return torch.mm(A, B)
    if A.is_contiguous() or A.numel() < B.numel():
        return _linear(A.contiguous(), B.t(), None, "none", [], "")
    return _linear(B.t().contiguous(), A, None, "none", [], "").t()
