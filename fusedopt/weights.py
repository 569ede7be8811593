"""int8 weights with gradients: quantize_weights_ and Int8Weight, the affine group quantiser of Q-GaLore (arXiv 2407.08296).

Groups of 256 consecutive elements, the last one shorter where they do not come out even. Of the smallest and the largest
value, zero counted in: scale = max(largest - smallest, 1e-5) / 255, zero = clamp(-round(smallest / scale), 0, 255),
code = clamp(round(x / scale) + zero, 0, 255), x ~ scale * (code - zero). Without zero counted in, a group of one sign would
lose its offset, for `zero` cannot leave 0 .. 255. After a step, scale and zero are those of the new values, and the code is
rounded stochastically: to nearest, an update below half a code would never arrive.

No float copy of a weight stays alive: forward and backward decode it for one product, a step decodes some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from fusedopt.precision import philox16

GROUP = 256
LEVELS = 255
SMALLEST_RANGE = 1e-5
BLOCK_ELEMENTS = 1 << 17  # of a CPU, decoded at a time: stays in the cache
BLOCK_ELEMENTS_DEVICE = 1 << 20  # of a GPU

aten = torch.ops.aten


def _block_elements(device: torch.device) -> int:
    return BLOCK_ELEMENTS if device.type == "cpu" else BLOCK_ELEMENTS_DEVICE


def _grouped(x: torch.Tensor, group: int) -> torch.Tensor:
    """Flat values as [groups, group]; a short last group is filled with zeros, which a range counts in anyway."""
    pad = -x.numel() % group
    return functional.pad(x, (0, pad)).view(-1, group) if pad else x.view(-1, group)


def quantize_groups(
    x: torch.Tensor, group: int = GROUP, random16: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes uint8 [n], scale fp32 [groups], zero uint8 [groups]) of flat fp32 values in memory order.

    random16: integers 0 .. 65535, one an element, for stochastic rounding (up where fraction * 65536 > random16); None
    rounds to nearest even. A group with a NaN or an infinity has scale NaN, and so decodes to NaN.
    """
    values = _grouped(x, group)
    low, high = values.amin(1).clamp_(max=0.0), values.amax(1).clamp_(min=0.0)
    span = high - low
    scale = span.clamp(min=SMALLEST_RANGE) / LEVELS
    finite = torch.isfinite(span)
    scale = torch.where(finite, scale, torch.full_like(scale, float("nan")))
    zero = torch.where(finite, -(low / scale).round_(), torch.zeros_like(low)).clamp_(0, LEVELS)
    units = values / scale[:, None]
    if random16 is None:
        whole = units.round_()
    else:
        whole = units.floor()
        fraction = units.sub_(whole).mul_(65536.0)
        whole += fraction > _grouped(random16.view(-1), group)
    codes = whole.add_(zero[:, None]).nan_to_num_(0.0).clamp_(0, LEVELS).to(torch.uint8)
    return codes.view(-1)[: x.numel()], scale, zero.to(torch.uint8)


def dequantize_groups(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int = GROUP, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Flat values of flat codes: scale * (code - zero), one fp32 product rounded once to the dtype of `out` (fp32 if None)."""
    n = codes.numel()
    out = torch.empty(n, dtype=torch.float32, device=codes.device) if out is None else out
    body = n // group * group
    for first, last, size in ((0, body, group), (body, n, n - body)):
        if last > first:
            index = slice(first // group, -(-last // group))
            block = out[first:last].view(-1, size)
            # Differences of codes are whole numbers up to 255, exact in bf16 and fp16: no fp32 copy on a GPU.
            torch.sub(codes[first:last].view(-1, size), zero[index].to(torch.int16)[:, None], out=block)
            block.mul_(scale[index][:, None])
    return out


class Int8Weight(torch.Tensor):
    """A weight in affine int8 codes that autograd takes for a leaf of its dtype: `weight.grad` is an ordinary dense tensor.

    codes: uint8 of its shape, contiguous. scale: fp32 [groups], zero: uint8 [groups], of `group` consecutive codes. dtype is
    what it decodes to. nn.Linear's forward and backward decode it for their products. Other operations that only read it
    get a temporary decoded copy; operations that write to it are refused, except copy_ (quantises to nearest).
    """

    @staticmethod
    def __new__(cls, codes, scale, zero, group=GROUP, dtype=torch.float32, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=dtype, device=codes.device, requires_grad=requires_grad
        )

    def __init__(self, codes, scale, zero, group=GROUP, dtype=torch.float32, requires_grad=False):
        self.codes, self.scale, self.zero, self.group = codes, scale, zero, group

    @classmethod
    @torch.no_grad()
    def from_float(cls, weight: torch.Tensor, group: int = GROUP, dtype: torch.dtype | None = None) -> Int8Weight:
        """Quantises a floating-point tensor of any shape (to nearest), some rows at a time. dtype: None for the weight's."""
        if group <= 0 or group % 8:
            raise ValueError(f"Int8Weight: group is {group}; it must be a positive multiple of 8")
        if not weight.dtype.is_floating_point or weight.layout != torch.strided or weight.is_meta:
            raise TypeError(
                f"Int8Weight: {weight.dtype}, {weight.layout} on {weight.device} (shape {tuple(weight.shape)}); it "
                "quantises dense floating-point tensors with data"
            )
        groups = -(-weight.numel() // group)
        out = cls(
            torch.empty(weight.shape, dtype=torch.uint8, device=weight.device),
            torch.empty(groups, dtype=torch.float32, device=weight.device),
            torch.empty(groups, dtype=torch.uint8, device=weight.device),
            group,
            dtype or weight.dtype,
        )
        _fill(out, weight.detach())
        return out

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A new dense tensor with the weight's values, rounded to nearest even. dtype: None for the weight's."""
        out = torch.empty(self.codes.shape, dtype=dtype or self.dtype, device=self.codes.device)
        step = out.numel()
        if out.device.type == "cpu":  # its mixed operations go through copies in the common dtype
            step = BLOCK_ELEMENTS // self.group * self.group or self.group
        codes, values = self.codes.view(-1), out.view(-1)
        for first in range(0, out.numel(), step or 1):
            last = min(first + step, out.numel())
            index = slice(first // self.group, -(-last // self.group))
            dequantize_groups(
                codes[first:last], self.scale[index], self.zero[index], self.group, out=values[first:last]
            )
        return out

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None) -> Int8Weight:
        return Int8Weight(
            change(self.codes),
            change(self.scale),
            change(self.zero),
            self.group,
            self.dtype if dtype is None else dtype,
        )

    def __repr__(self, *, tensor_contents=None) -> str:
        grad = ", requires_grad=True" if self.requires_grad else ""
        return (
            f"Int8Weight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, group={self.group}{grad})"
        )

    def __tensor_flatten__(self):
        return ["codes", "scale", "zero"], (self.group, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner, meta, outer_size, outer_stride):
        return Int8Weight(inner["codes"], inner["scale"], inner["zero"], *meta)

    def __deepcopy__(self, memo):
        if not self.is_leaf:
            raise RuntimeError("Int8Weight: only leaves of the graph can be copied deeply; use .detach()")
        if id(self) not in memo:
            out = self._with(torch.clone).requires_grad_(self.requires_grad)
            memo[id(self)] = out
            for name in self.__dict__.keys() - {"codes", "scale", "zero", "group"}:
                setattr(out, name, self.__dict__[name])
            if self.grad is not None:
                out.grad = self.grad.clone()
        return memo[id(self)]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is functional.linear:
                return _linear(*args, **kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.detach.default:
            return args[0]._with(torch.detach)
        if func is aten.clone.default:
            return args[0]._with(torch.clone)
        if func is aten._to_copy.default:
            return _to_copy(args[0], **kwargs)
        if func is aten.copy_.default and isinstance(args[0], Int8Weight):
            return _copy(args[0], args[1])
        if func in (aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default):
            return func(_stand_in(args[0]), *args[1:], **{"dtype": args[0].dtype, **kwargs})
        written = [
            value
            for value, spec in [
                *zip(args, func._schema.arguments, strict=False),
                *((kwargs[a.name], a) for a in func._schema.arguments if a.name in kwargs),
            ]
            if spec.alias_info is not None and spec.alias_info.is_write
        ]
        if any(isinstance(value, Int8Weight) for value in written):
            raise TypeError(
                f"{func._schema.name} writes to an int8 weight (shape {tuple(written[0].shape)}), which has no "
                "floating-point data. Step it with a fusedopt optimizer that takes int8 weights, set it with copy_(), or "
                "edit weight.dequantize() and copy_() that back."
            )
        args, kwargs = tree_map_only(Int8Weight, lambda t: t.dequantize(), (args, kwargs))
        return func(*args, **kwargs)


def storage(p: torch.Tensor) -> torch.Tensor:
    """The tensor that holds a parameter's elements: itself, or an int8 weight's codes."""
    return p.codes if isinstance(p, Int8Weight) else p


torch.serialization.add_safe_globals([Int8Weight])  # so that torch.load reads it with weights_only=True


def _stand_in(w: Int8Weight) -> torch.Tensor:
    """Something of its shape and device that holds no more than its codes do."""
    return w.codes


def _to_copy(w: Int8Weight, *, dtype=None, device=None, non_blocking=False, **_) -> torch.Tensor:
    dtype = dtype or w.dtype
    if not dtype.is_floating_point:
        return w.dequantize().to(device=device, dtype=dtype)
    return w._with(lambda t: t.to(device=device, non_blocking=non_blocking, copy=True), dtype)


def _copy(w: Int8Weight, source: torch.Tensor) -> Int8Weight:
    if isinstance(source, Int8Weight) and source.group == w.group and source.shape == w.shape:
        w.codes.copy_(source.codes)
        w.scale.copy_(source.scale)
        w.zero.copy_(source.zero)
    else:
        _fill(w, source.expand(w.shape))
    return w


def _fill(w: Int8Weight, source: torch.Tensor) -> None:
    for first, last in row_blocks(w):
        rows = source if source.dim() < 2 else source.reshape(source.shape[0], -1)[first:last]
        store_rows(w, first, last, rows.dequantize() if isinstance(rows, Int8Weight) else rows)


class _Linear(torch.autograd.Function):
    """x W^T + b with W decoded for the product and forgotten; the graph keeps x and the codes."""

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        ctx.save_for_backward(x, weight)
        ctx.dtype, ctx.bias_dtype = dtype, None if bias is None else bias.dtype
        return functional.linear(x, weight.dequantize(dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_w = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight.dequantize(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_w = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_b = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_w, grad_b, None


def _linear(input, weight, bias=None):
    if not isinstance(weight, Int8Weight):  # an int8 weight as input or bias
        input, bias = (t.dequantize() if isinstance(t, Int8Weight) else t for t in (input, bias))
        return functional.linear(input, weight, bias)
    dtype = weight.dtype
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            return _Linear.apply(input, weight, bias, dtype)
    return _Linear.apply(input, weight, bias, dtype)


def _matrix(w: Int8Weight) -> tuple[int, int]:
    """(rows, columns) of the weight in memory order; what is not a matrix is flattened to one."""
    rows = w.shape[0] if w.dim() >= 2 else 1
    return rows, math.prod(w.shape[1:]) if w.dim() >= 2 else w.numel()


def row_blocks(weight: Int8Weight, elements: int | None = None) -> Iterator[tuple[int, int]]:
    """(first row, last row + 1) of blocks of about `elements` elements that begin and end between two groups.

    Where few rows do not fill whole groups, a block has group / gcd(columns, group) rows or a multiple of that, which may be
    more than `elements`, at the worst the whole weight.
    """
    rows, columns = _matrix(weight)
    if not rows * columns:
        return
    unit = weight.group // math.gcd(columns, weight.group)
    step = max(1, (elements or _block_elements(weight.device)) // (columns * unit)) * unit
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _span(weight: Int8Weight, first_row: int, last_row: int) -> tuple[slice, slice, int]:
    """The codes and the groups of some rows."""
    rows, columns = _matrix(weight)
    first, last, n = first_row * columns, last_row * columns, rows * columns
    if not 0 <= first_row <= last_row <= rows or first % weight.group or (last % weight.group and last != n):
        raise ValueError(
            f"int8 weight of shape {tuple(weight.shape)}: rows {first_row} to {last_row} do not begin and end between groups "
            f"of {weight.group} elements. Take the blocks of row_blocks(weight)."
        )
    return slice(first, last), slice(first // weight.group, -(-last // weight.group)), columns


@torch.no_grad()
def dequantize_rows(weight: Int8Weight, first_row: int, last_row: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """fp32 [last_row - first_row, columns]: the values of a block of `row_blocks`. out: such a tensor to write into.

    Raises ValueError for rows that share a group with others.
    """
    elements, groups, columns = _span(weight, first_row, last_row)
    flat = None if out is None else out.view(-1)
    codes = weight.codes.view(-1)[elements]
    return dequantize_groups(codes, weight.scale[groups], weight.zero[groups], weight.group, flat).view(-1, columns)


@torch.no_grad()
def store_rows(
    weight: Int8Weight,
    first_row: int,
    last_row: int,
    values: torch.Tensor,
    random16: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> None:
    """Quantises a block's new values into the weight, with a scale and a zero of their own.

    Args:
        values: [last_row - first_row, columns], rounded to fp32.
        random16: one a value, see `quantize_groups`; for row block `first_row` of a step, precision.philox16(seed, step,
            tensor_id, numel, first=first_row * columns). None rounds to nearest.
        skip: fp32 [1] on the device; where not zero, the block stays as it is (no host synchronisation).
    Raises:
        ValueError: rows that share a group with others, or values of another shape.
    """
    elements, groups, columns = _span(weight, first_row, last_row)
    if values.numel() != (last_row - first_row) * columns:
        raise ValueError(
            f"int8 weight of shape {tuple(weight.shape)}: rows {first_row} to {last_row} take "
            f"{(last_row - first_row) * columns} values, not {tuple(values.shape)}"
        )
    new = quantize_groups(values.reshape(-1).to(torch.float32), weight.group, random16)
    old = (weight.codes.view(-1)[elements], weight.scale[groups], weight.zero[groups])
    for target, value in zip(old, new, strict=True):
        target.copy_(value if skip is None else torch.where(skip.view(()) != 0, target, value))
    torch.autograd.graph.increment_version(weight)


@torch.no_grad()
def update_rows(
    weight: Int8Weight,
    first_row: int,
    last_row: int,
    u: torch.Tensor,
    numbers,
    scalars: torch.Tensor,
    tensor_id: int,
    *,
    scale: float = 1.0,
    stochastic: bool = True,
    found_inf: torch.Tensor | None = None,
    triton: bool = False,
) -> None:
    """A block of rows' step: p <- p - (lr * scale * u + decay * p), encoded again.

    Args:
        u: [last_row - first_row, columns], contiguous, fp32, bf16 or fp16: those rows of the update.
        numbers, scalars: the scalar row of the step, in double precision and as fp32 [SCALAR_STRIDE] on the device.
        tensor_id: with seed and step, what the random bits of element i in memory order are drawn from.
        stochastic: False rounds to nearest.
        found_inf: fp32 [1]; where not zero, the block stays as it is.
        triton: one kernel that needs no memory besides u; for groups of 256. Else torch operations.
    Raises:
        ValueError: rows that share a group with others, u of another size, or triton with other groups.
    """
    elements, _, columns = _span(weight, first_row, last_row)
    n = elements.stop - elements.start
    if u.numel() != n or not u.is_contiguous():
        raise ValueError(
            f"int8 weight of shape {tuple(weight.shape)}: rows {first_row} to {last_row} take a contiguous update of {n} "
            f"values, not {tuple(u.shape)} with strides {u.stride()}"
        )
    if triton and weight.group != GROUP:
        raise ValueError(f"int8 weight with groups of {weight.group}: the Triton kernel takes groups of {GROUP}")
    if not n:
        return
    if not triton:
        p = dequantize_rows(weight, first_row, last_row)
        step = u.view(-1, columns).float() * (numbers.lr * scale)
        p -= step.add_(p * numbers.decay)
        random16 = None
        if stochastic:
            random16 = philox16(numbers.seed, numbers.step, tensor_id, n, weight.device, first=first_row * columns)
        store_rows(weight, first_row, last_row, p, random16, found_inf)
        return
    from fusedopt.backends.triton import _on
    from fusedopt.kernels.weights import TILE, update_kernel

    tiles = -(-elements.stop // TILE.value) - elements.start // TILE.value
    with _on(weight.device):
        update_kernel[(tiles,)](
            weight.codes, weight.scale, weight.zero, u, scalars, found_inf, elements.start, n, tensor_id, scale,
            STOCHASTIC=stochastic, ALIGNED=weight.codes.data_ptr() % 16 == 0 and u.data_ptr() % 16 == 0,
            num_warps=8 if torch.version.hip is None else 4, enable_fp_fusion=True,
        )  # fmt: skip
    torch.autograd.graph.increment_version(weight)


def quantize_weights_(
    model: torch.nn.Module,
    group: int = GROUP,
    *,
    filter: Callable[[str, torch.nn.Linear], bool] | None = None,
    dtype: torch.dtype | None = None,
) -> torch.nn.Module:
    """Replaces the weights of a model's nn.Linear modules by int8 ones that train: see Int8Weight. Call it before the
    optimizer is built, for the parameters are new ones.

    Args:
        group: elements that share a scale and a zero point.
        filter: filter(name, module) says which modules, e.g. to leave out the head; None takes every nn.Linear.
        dtype: that the weights decode to and their gradients have; None keeps each weight's.
    Returns:
        The model.
    Raises:
        ValueError: a weight is also a parameter of another kind of module (a tied embedding), or group is not a positive
            multiple of 8. TypeError: a weight without data (meta device). Nothing is changed then.
    """
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (filter is None or filter(name, module))
    }
    linear = {name: module for name, module in linear.items() if not isinstance(module.weight, Int8Weight)}
    weights = {id(module.weight): name for name, module in linear.items()}
    chosen = {id(module) for module in linear.values()}
    for other_name, other in model.named_modules():
        for key, p in other.named_parameters(recurse=False):
            if id(p) in weights and not (id(other) in chosen and key == "weight"):
                raise ValueError(
                    f"quantize_weights_: the weight of {weights[id(p)]!r} is also {other_name}.{key}. Leave the module out "
                    "with filter=, or untie them."
                )
    made: dict[int, torch.nn.Parameter] = {}
    for module in linear.values():
        weight = module.weight
        if id(weight) not in made:
            kept = Int8Weight.from_float(weight, group, dtype)
            made[id(weight)] = torch.nn.Parameter(kept, requires_grad=weight.requires_grad)
    for module in linear.values():
        module.weight = made[id(module.weight)]
    return model
