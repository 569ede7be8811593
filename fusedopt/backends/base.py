"""What a backend is given and what it must answer: BucketKey, Item, Work, Backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from fusedopt.abi import DTYPE_CODES, Phase
from fusedopt.formats import Format
from fusedopt.precision import ParamPrecision
from fusedopt.rule import Rule


class BucketKey(NamedTuple):
    """Everything that is code rather than data: parameters that share a key share their launches."""

    device: torch.device
    backend: str
    rule: str
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    formats: tuple[str, ...]  # one per state of the rule
    precision: str
    aligned: bool  # all addresses of all rows are multiples of 16 bytes
    projected: bool = False  # rows are projected gradients, updates and their low-rank states


class Item(NamedTuple):
    """The tensors of one row. All share one dense memory layout, except packed states and scales (fp32 [blocks] or None).

    companion: what the param_precision keeps beside the parameter, or None. first_octet: where its random bits begin.
    """

    param: torch.Tensor
    grad: torch.Tensor
    states: tuple[torch.Tensor, ...]
    scales: tuple[torch.Tensor | None, ...]
    tensor_id: int
    scalar_row: int
    companion: torch.Tensor | None = None
    first_octet: int = 0


class RowNumbers(NamedTuple):
    """The numbers of one scalar row in double precision: host numbers, or 0-dim tensors on the device (capturable)."""

    lr: float
    decay: float  # lr * decoupled weight decay
    l2: float  # coupled weight decay
    grad_sign: float
    seed: int
    step: int
    scalars: tuple  # the rule's, in the order of its scalar_names


@dataclass(slots=True, eq=False)
class Work:
    """One launch for one bucket (struct Launch of csrc/fusedopt.h, with the tensors behind its addresses).

    table: int64 [Column.COUNT, rows]. chunks: int64 [n_chunks], see `abi.chunk_table`. scalars: fp32 [rows, SCALAR_STRIDE];
    numbers: the same in double precision.
    clip: fp32 [1], written by the last NORM launch when max_norm > 0, otherwise read. sums: fp32 [tensor ids, 2].
    partials: fp32 [grains, 2]. totals: fp32 [NORM launches]. norm: fp32 [1]. counters: int32 [rows + 1], zero before and after.
    grad_scale, found_inf: fp32, 1 element. Tensors that do not apply are None.
    """

    key: BucketKey
    rule: Rule
    formats: tuple[Format, ...]
    precision: ParamPrecision
    items: list[Item]
    table: torch.Tensor
    chunks: torch.Tensor
    scalars: torch.Tensor
    numbers: list[RowNumbers]
    chunk: int
    grains: int
    phase: Phase = Phase.FUSED
    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None
    clip: torch.Tensor | None = None
    partials: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    totals: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    counters: torch.Tensor | None = None
    max_norm: float = 0.0
    total_index: int = 0
    total_count: int = 1
    cache: dict = field(default_factory=dict)  # a backend's own, dropped with the bucket

    def fields(self) -> dict:
        """The Launch fields that describe this work, addresses as integers; `pack_launch` takes them."""
        out = {
            "rows": len(self.items),
            "n_chunks": self.chunks.numel(),
            "chunk": self.chunk,
            "grains": self.grains,
            "max_norm": self.max_norm,
            "phase": int(self.phase),
            "param_dtype": DTYPE_CODES[self.key.param_dtype],
            "grad_dtype": DTYPE_CODES[self.key.grad_dtype],
            "precision": self.precision.id,
            "aligned": int(self.key.aligned),
            "total_index": self.total_index,
            "total_count": self.total_count,
        }
        for i, (form, state) in enumerate(zip(self.formats, self.rule.states, strict=True)):
            out[f"format{i}"] = form.code(state.signed)
        for name in (
            "table",
            "chunks",
            "scalars",
            "grad_scale",
            "found_inf",
            "clip",
            "partials",
            "sums",
            "totals",
            "norm",
            "counters",
        ):
            tensor = getattr(self, name)
            if tensor is not None:
                out[name] = tensor.data_ptr()
        return out


class Int4Matrix(NamedTuple):
    """A projector in packed int4 (Q-GaLore): groups of `group` consecutive elements, row-major, value = scale * (code - zero).

    codes: uint8 [ceil(rows * cols / 2)], even element in the high half. scale: fp32 [groups]. zero: uint8 [groups].
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    shape: tuple[int, int]
    group: int = 256


@dataclass(slots=True, eq=False)
class MatrixWork:
    """The update of one matrix: p <- p - (lr * u + decay * p), rounded as `precision` says, with u never stored.

    param [rows, cols], its companion and `grad` are views in memory order with unit column stride and no gaps. u is either
    the low-rank product, u = scale * (left @ right), with left [rows, r] and right [r, cols] contiguous and of one dtype
    (fp32, bf16, fp16; a projector may be an Int4Matrix), or the scaled gradient (left is None),
    u = scale * row_factor[:, None] * col_factor[None, :] * grad (fp32 factors [rows], [cols], or None for 1).
    residual (FRUGAL), added to the product, with e = grad - grad_left @ grad_right:
        "sign": residual_scale * grad_sign * sign(e); "gradient": residual_scale * mul * e, mul = grad_sign / grad_scale * clip.
    scalars: fp32 [SCALAR_STRIDE], a scalar row on the device (head only: lr, decay, grad_sign, seed, step); numbers: the same
    in double precision. Random bits are those of element i in memory order, stream 0, as in a step. found_inf: fp32 [1];
    non-zero: nothing is written. grad_scale, clip: fp32 [1] or None.
    """

    param: torch.Tensor
    companion: torch.Tensor | None
    precision: ParamPrecision
    left: torch.Tensor | Int4Matrix | None
    right: torch.Tensor | Int4Matrix | None
    scalars: torch.Tensor
    numbers: RowNumbers
    tensor_id: int
    scale: float = 1.0
    grad: torch.Tensor | None = None
    row_factor: torch.Tensor | None = None
    col_factor: torch.Tensor | None = None
    residual: str | None = None
    residual_scale: float = 1.0
    grad_left: torch.Tensor | Int4Matrix | None = None
    grad_right: torch.Tensor | Int4Matrix | None = None
    grad_scale: torch.Tensor | None = None
    clip: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None


def unsupported(key: BucketKey) -> str | None:
    """Why no driver steps a bucket, whatever its device, or None. Drivers know every registered format and precision."""
    for what, dtype in (("parameters", key.param_dtype), ("gradients", key.grad_dtype)):
        if dtype not in DTYPE_CODES:
            return f"its {what} are {dtype}; drivers take {', '.join(map(str, DTYPE_CODES))}"
    return None


def check_seeded(side: str, rank: int) -> None:
    """Raises ValueError for a side or a rank that no projection has."""
    if side not in ("left", "right"):
        raise ValueError(f"unknown side {side!r}; known: 'left', 'right'")
    if rank < 1:
        raise ValueError(f"a projection has rank 1 or more, not {rank}")


class MatrixKernels(Protocol):
    """The kernels of projected and factored steps. Each answers whether it took the work; these take none, and torch's
    operations do instead."""

    def apply_matrix(self, work: MatrixWork) -> bool:
        """One parameter update."""
        return False

    def project(self, grad: torch.Tensor, basis: torch.Tensor, side: str, out: torch.Tensor) -> bool:
        """out = basis^T grad (left; basis [rows, r]) or grad basis^T (right; basis [r, cols]); grad [rows, cols]."""
        return False

    def project_packed(self, grad: torch.Tensor, packed: Int4Matrix, side: str, out: torch.Tensor) -> bool:
        """The same with a packed basis."""
        return False

    def project_seeded(
        self, grad: torch.Tensor, seed: int, tensor_id: int, step: int, rank: int, side: str, out: torch.Tensor,
        squares: torch.Tensor | None,
    ) -> bool:  # fmt: skip
        """`project` with the basis that `projections.subspace.gaussian_projector` makes of the seed, rounded to grad's dtype,
        and in the same read the sums of grad^2 of each column (left), fp32 [cols], or row (right), fp32 [rows]; None: without."""
        return False

    def row_col_sums(
        self, grad: torch.Tensor, row_out: torch.Tensor | None, col_out: torch.Tensor | None, mul: torch.Tensor | None
    ) -> bool:
        """Sums of (mul * grad)^2 by row, fp32 [rows], and by column, fp32 [cols], in one read. mul: fp32 [1] or None."""
        return False

    def weighted_square_sum(
        self, grad: torch.Tensor, row_weight: torch.Tensor, col_weight: torch.Tensor, out: torch.Tensor
    ) -> bool:
        """out fp32 [1] = sum of grad[i, j]^2 row_weight[i] col_weight[j]."""
        return False

    def newton_schulz(self, x: torch.Tensor, coefficients: tuple[tuple[float, float, float], ...]) -> bool:
        """For each (a, b, c): x <- a x + (b A + c A^2) x with A = x x^T, of a batch of matrices [n, rows, cols], in place."""
        return False


class Backend(MatrixKernels, Protocol):
    """Steps buckets. `supports` answers None or the reason why not; `launch` runs one Work on the current stream."""

    name: str

    def supports(self, key: BucketKey) -> str | None: ...

    def reason(self) -> str | None:
        """Why it can step nothing here, or None."""
        ...

    def units(self, device: torch.device) -> int:
        """Parallel units (SMs or threads) the chunk size should fill."""
        ...

    def launch(self, work: Work) -> None: ...

    def quantize(self, x: torch.Tensor, form: Format, signed: bool, codes: torch.Tensor, scale: torch.Tensor) -> None:
        """Encodes a flat tensor (fp32, bf16, fp16) in a blockwise format into `codes` and `scale`, both whole and contiguous."""
        ...

    def dequantize(
        self, codes: torch.Tensor, scale: torch.Tensor, form: Format, signed: bool, out: torch.Tensor
    ) -> None:
        """Decodes into a flat tensor (fp32, bf16, fp16; rounded to nearest even)."""
        ...
