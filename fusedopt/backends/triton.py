"""The Triton backend: one launch of kernels/driver.py per Work, on a GPU or interpreted on the CPU."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from functools import cache

import torch

from fusedopt.abi import GRAIN_SIZE, MAX_STATES, RAISED, Phase
from fusedopt.backends.base import BucketKey, Int4Matrix, MatrixKernels, MatrixWork, Work, unsupported
from fusedopt.formats import Format
from fusedopt.kernels.language import missing
from fusedopt.precision import get_precision
from fusedopt.rule import Rule, get_rule

_TRUST = {None: 0, "gradient": 1, "update": 2}


def interpreted() -> bool:
    """Whether kernels run on the CPU: TRITON_INTERPRET=1 when Triton was imported."""
    if missing:
        return False
    from fusedopt.kernels.bits import INTERPRETED

    return bool(INTERPRETED.value)


def _precision(name: str, param_dtype: torch.dtype, phase: Phase) -> int:
    """The Precision a kernel is compiled for. PROBE stores nothing, but reads the weight that a companion stands for."""
    precision = get_precision(name).for_dtype(param_dtype)
    reads_only = phase == Phase.NORM or (phase == Phase.PROBE and precision.companion is None)
    return 0 if reads_only else precision.id


@cache
def _raised(name: str) -> tuple[bool, ...]:
    """Of each state of a rule, whether it leaves 0 where gradient, parameter and states are 0."""
    rule = get_rule(name)
    zero = torch.zeros(1, dtype=torch.float64)
    scalars = {scalar: 0.3 + 0.05 * i for i, scalar in enumerate(rule.scalar_names)}
    _, *states = rule.reference(zero, zero, *[zero] * (rule.noise + len(rule.states)), **scalars)
    return tuple(bool((state != 0).any()) for state in states)


def constants(rule: Rule, formats, param_dtype, grad_dtype, precision: str, phase: Phase, aligned: bool) -> dict:
    """The compile-time arguments of the step kernel. NORM is the same kernel for every rule."""
    import triton.language as tl

    element = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    norm = phase == Phase.NORM
    codes = [] if norm else [form.code(state.signed) for form, state in zip(formats, rule.states, strict=True)]
    codes = [code | RAISED * up for code, up in zip(codes, _raised(rule.name), strict=True)] if codes else []
    codes += [-1] * (MAX_STATES - len(codes))
    narrow = any(dtype != torch.float32 for dtype in (param_dtype, grad_dtype, *(form.storage for form in formats)))
    terms = rule.measures if phase == Phase.PROBE else None
    return {
        "DIRECTION": None if norm else rule.direction,
        "TERMS": None if terms is None else terms.terms_triton,
        "LARGEST": terms is not None and terms.largest,
        "NOISE": rule.noise and phase not in (Phase.NORM, Phase.PROBE),
        "TRUST": None if norm else rule.trust_triton,
        "TRUST_ON": 0 if norm else _TRUST[rule.trust_on],
        **{f"F{i}": code for i, code in enumerate(codes)},
        "PARAM": element[param_dtype],
        "GRAD": element[grad_dtype],
        "PRECISION": _precision(precision, param_dtype, phase),
        "PHASE": int(phase),
        "ALIGNED": 0 if not aligned else 2 if narrow and not norm else 1,
    }


def _on(device: torch.device):
    """A context in which `device` is the current one."""
    return nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


class TritonBackend(MatrixKernels):
    name = "triton"

    def reason(self) -> str | None:
        """Why this backend cannot run here at all, or None."""
        if missing:
            return f"{missing}. Install it with pip install triton."
        if interpreted():
            return None
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            return "Triton needs a C compiler on the host to build its launcher. Install gcc or clang, or set CC."
        return None

    def supports(self, key: BucketKey) -> str | None:
        why = self.reason() or self._unsuited(key.device) or unsupported(key)
        if why is not None:
            return why
        if get_rule(key.rule).direction is None:
            return f"rule {key.rule!r} has no Triton body"
        return None

    def _unsuited(self, device: torch.device) -> str | None:
        if device.type == "cpu" and not interpreted():
            return "it cannot step CPU tensors. Move the model to a GPU, or set TRITON_INTERPRET=1 to test without one"
        if device.type not in ("cpu", "cuda", "xpu"):
            return f"it needs a CUDA, ROCm or XPU device, not {device}. Use backend='reference'"
        return None

    def units(self, device: torch.device) -> int:
        if device.type == "cpu":
            return 1
        properties = getattr(torch, device.type).get_device_properties(device)
        return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count

    def launch(self, work: Work) -> None:
        chunks = work.chunks.numel()
        if chunks == 0:
            if work.phase == Phase.NORM:  # only empty tensors, yet their total of 0 has a place in the global norm
                from fusedopt.backends.reference import ReferenceBackend

                ReferenceBackend().launch(work)
            return
        with _on(work.table.device):
            self._launch(work, chunks)

    def quantize(self, x: torch.Tensor, form: Format, signed: bool, codes: torch.Tensor, scale: torch.Tensor) -> None:
        if x.numel():
            from fusedopt.kernels.quantize import quantize_kernel

            self._blockwise(quantize_kernel, (x, codes, scale), x.numel(), form.code(signed))

    def dequantize(
        self, codes: torch.Tensor, scale: torch.Tensor, form: Format, signed: bool, out: torch.Tensor
    ) -> None:
        if out.numel():
            from fusedopt.kernels.quantize import dequantize_kernel

            self._blockwise(dequantize_kernel, (codes, scale, out), out.numel(), form.code(signed))

    def apply_matrix(self, work: MatrixWork) -> bool:
        """One launch: a tile of the product and its update in the same program (kernels/matrix.py).

        False, with nothing done, for fp64 and for tensors with gaps. Raises ValueError where shapes do not fit.
        """
        from fusedopt.backends.triton_matrix import apply_matrix

        with _on(work.param.device):
            return apply_matrix(work)

    def project_packed(self, grad: torch.Tensor, packed: Int4Matrix, side: str, out: torch.Tensor) -> bool:
        """out = P^T grad (side "left", P [rows, r], out [r, cols]) or grad P^T (side "right", P [r, cols], out [rows, r]).

        fp32, bf16 or fp16; P is rounded to grad's dtype, sums are fp32. False, with nothing done, for fp64 and for tensors
        with gaps. Raises ValueError where shapes do not fit.
        """
        from fusedopt.backends.triton_matrix import project_packed

        with _on(grad.device):
            return project_packed(grad, packed, side, out)

    def newton_schulz(self, x: torch.Tensor, coefficients: tuple[tuple[float, float, float], ...]) -> bool:
        """See MatrixKernels. False, with nothing done, for fp32 and fp64 and for tensors with gaps."""
        from fusedopt.backends.triton_newton_schulz import newton_schulz

        with _on(x.device):
            return newton_schulz(x, coefficients)

    def project_seeded(
        self, grad: torch.Tensor, seed: int, tensor_id: int, step: int, rank: int, side: str, out: torch.Tensor,
        squares: torch.Tensor | None,
    ) -> bool:  # fmt: skip
        """See MatrixKernels; sums are fp32, and the same every time. False, with nothing done, for fp64 and for tensors with
        gaps. Raises ValueError where shapes do not fit."""
        from fusedopt.backends.triton_seeded import project_seeded

        with _on(grad.device):
            return project_seeded(grad, seed, tensor_id, step, rank, side, out, squares)

    def row_col_sums(
        self,
        grad: torch.Tensor,
        row_out: torch.Tensor | None = None,
        col_out: torch.Tensor | None = None,
        mul: torch.Tensor | None = None,
        *,
        total_out: torch.Tensor | None = None,
        row_weight: torch.Tensor | None = None,
        col_weight: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> bool:
        """Weighted sums of q = (mul * grad)^2 + eps in one read of grad [rows, cols]. mul: fp32 [1] or None for 1.

        With weights a = row_weight [rows] and b = col_weight [cols], fp32, or None for 1: row_out[i] = sum_j q_ij b_j,
        col_out[j] = sum_i a_i q_ij, total_out[0] = sum_ij a_i q_ij b_j, each fp32 or None. The same bits every time.
        False, with nothing done, for fp64 and for gradients with gaps. Raises ValueError for a vector of another size or
        dtype.
        """
        from fusedopt.backends.triton_matrix import row_col_sums

        with _on(grad.device):
            return row_col_sums(grad, row_out, col_out, total_out, row_weight, col_weight, mul, eps)

    def weighted_square_sum(
        self, grad: torch.Tensor, row_weight: torch.Tensor, col_weight: torch.Tensor, out: torch.Tensor
    ) -> bool:
        """out fp32 [1] = sum of grad[i, j]^2 row_weight[i] col_weight[j]. See `row_col_sums`."""
        return self.row_col_sums(grad, total_out=out, row_weight=row_weight, col_weight=col_weight)

    def _blockwise(self, kernel, tensors: tuple[torch.Tensor, ...], numel: int, code: int) -> None:
        device = tensors[0].device
        nvidia = device.type == "cuda" and torch.version.hip is None
        aligned = all(t.data_ptr() % 16 == 0 for t in tensors)
        with _on(device):
            kernel[(-(-numel // GRAIN_SIZE),)](
                *tensors, numel, FORMAT=code, ALIGNED=aligned, num_warps=8 if nvidia else 4, enable_fp_fusion=True
            )

    def _launch(self, work: Work, chunks: int) -> None:
        from fusedopt.kernels.driver import launch_options, step_kernel

        norm = work.phase == Phase.NORM
        reduces = norm or work.phase == Phase.PROBE
        fixed = work.cache.get("triton")
        if fixed is None:
            key = work.key
            fixed = constants(
                work.rule, work.formats, key.param_dtype, key.grad_dtype, work.precision.name, work.phase, key.aligned
            )
            nvidia = work.table.is_cuda and torch.version.hip is None
            fixed |= launch_options(fixed, nvidia, work.rule.heavy)
            fixed["live_rows"] = sum(item.param.numel() > 0 for item in work.items)
            work.cache["triton"] = fixed
        step_kernel[(chunks,)](
            work.table,
            work.chunks,
            work.scalars,
            work.grad_scale,
            None if reduces else work.found_inf,
            work.clip if not norm or work.max_norm > 0 else None,
            work.partials if reduces else None,
            work.sums,
            work.totals if norm else None,
            work.norm if norm else None,
            work.counters if reduces else None,
            len(work.items),
            chunk=work.chunk,
            max_norm=work.max_norm,
            total_index=work.total_index,
            total_count=work.total_count,
            **fixed,
        )
