"""quantize_blockwise and dequantize_blockwise: the state formats as functions on tensors, on every backend."""

from __future__ import annotations

import torch

from fusedopt.backends import select
from fusedopt.backends.base import BucketKey
from fusedopt.formats import Format, get_format, list_formats
from fusedopt.memory import empty_like, flat, is_dense, strides_match
from fusedopt.states import stored_shape


def _format(name: str | Format, what: str) -> Format:
    form = get_format(name)
    if not form.block:
        known = ", ".join(f for f in list_formats() if get_format(f).block)
        raise ValueError(f"{what}: format {form.name!r} has no blocks; formats with blocks are {known}")
    return form


def _backend(x: torch.Tensor):
    key = BucketKey(x.device, "", "sgd", x.dtype, x.dtype, (), "nearest", True)
    return select.get_backend(select.choose(key, select.requested(None))[0])


def _check_values(x: torch.Tensor, what: str) -> None:
    if x.layout != torch.strided or not x.dtype.is_floating_point or x.is_meta:
        raise TypeError(f"{what}: {x.dtype}, {x.layout} on {x.device}; it takes dense floating-point tensors with data")


def _check_out(t: torch.Tensor, like: torch.Tensor, name: str, what: str) -> None:
    if t.dtype != like.dtype or t.device != like.device or not strides_match(t, like):
        raise ValueError(
            f"{what}: out {name} is {t.dtype} {tuple(t.shape)} with strides {t.stride()} on {t.device}; it must be "
            f"{like.dtype} {tuple(like.shape)} with strides {like.stride()} on {like.device}"
        )


@torch.no_grad()
def quantize_blockwise(
    x: torch.Tensor,
    format: str | Format = "8bit",
    *,
    signed: bool = True,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes a tensor in a blockwise state format.

    Args:
        x: floating point, any shape; blocks are consecutive in memory (a tensor with gaps is copied first).
        format: "int8", "int8c", "fp8", "int4" or an alias of one; see fusedopt.formats.
        signed: True for values of both signs (first moments), False for values that are never negative (second moments),
            which do not become zero unless they are zero. The sign of a negative value is lost then.
        out: (codes, scale) to write into.
    Returns:
        codes: uint8 of x's shape and layout; int4 halves the last dimension where x is contiguous and that is even, else
            it is flat. scale: fp32 [blocks], the largest finite magnitude of each block.
    Raises:
        TypeError: x is not a dense floating-point tensor. ValueError: no such blockwise format, or an `out` that does not fit.
    """
    what = "quantize_blockwise"
    form = _format(format, what)
    _check_values(x, what)
    dense = x.detach() if is_dense(x) else x.detach().contiguous()
    scale = torch.empty(form.scale_count(x.numel()), dtype=torch.float32, device=x.device)
    packed = form.bits < 8
    codes = (
        torch.empty(stored_shape(form, dense), dtype=form.storage, device=x.device)
        if packed
        else empty_like(dense, form.storage)
    )
    if out is not None:
        for t, like, name in zip(out, (codes, scale), ("codes", "scale"), strict=True):
            _check_out(t, like, name, what)
        codes, scale = out
    if x.numel():
        _backend(dense).quantize(flat(dense), form, signed, flat(codes), scale)
    return codes, scale


@torch.no_grad()
def dequantize_blockwise(
    codes: torch.Tensor,
    scale: torch.Tensor,
    format: str | Format = "8bit",
    *,
    signed: bool = True,
    shape=None,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decodes what `quantize_blockwise` made.

    Args:
        codes, scale, format, signed: as there.
        shape: of the result; needed for flat int4 codes of a tensor of another shape. Default: that of `codes`, with the
            last dimension doubled for int4.
        dtype: of the result (rounded to nearest even).
        out: a tensor to write into; its shape and dtype take the place of `shape` and `dtype`.
    Raises:
        ValueError: codes, scale, shape and out do not fit together. TypeError: a result that is not floating point.
    """
    what = "dequantize_blockwise"
    form = _format(format, what)
    packed = form.bits < 8
    if out is None:
        if shape is None:
            shape = (*codes.shape[:-1], 2 * codes.shape[-1]) if packed else codes.shape
        same = not packed and tuple(shape) == tuple(codes.shape)
        out = empty_like(codes, dtype) if same else torch.empty(shape, dtype=dtype, device=codes.device)
    _check_values(out, what)
    n = out.numel()
    if codes.dtype != form.storage or codes.numel() != form.stored_count(n) or scale.numel() != form.scale_count(n):
        raise ValueError(
            f"{what}: {n} elements in {form.name} are {form.stored_count(n)} codes of {form.storage} and "
            f"{form.scale_count(n)} scales, not {codes.numel()} of {codes.dtype} and {scale.numel()}"
        )
    if not is_dense(codes) or not packed and codes.shape == out.shape and not strides_match(codes, out):
        raise ValueError(f"{what}: codes with strides {codes.stride()} and a result with strides {out.stride()}")
    if scale.dtype != torch.float32 or scale.device != codes.device or out.device != codes.device:
        raise ValueError(f"{what}: scale must be float32, and everything on {codes.device}")
    if not is_dense(out):
        raise ValueError(f"{what}: out has gaps (strides {out.stride()}); decode into a new tensor and copy")
    if n:
        _backend(out).dequantize(flat(codes), scale.contiguous(), form, signed, flat(out))
    return out
