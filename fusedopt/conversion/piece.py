"""The conversion of one parameter's state: its tensors laid out in the asked formats, then filled chunk by chunk.

Chunks are whole blocks in memory order, so that what is decoded at a time stays small, however large the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fusedopt import states as st
from fusedopt.backends import select
from fusedopt.formats import FP32, Format
from fusedopt.memory import empty_like, flat, is_dense, strides_match
from fusedopt.precision import COMPANIONS
from fusedopt.rule import State, get_rule, list_rules
from fusedopt.transforms import state_names as transform_states

CHUNK = 2**18  # elements: a multiple of every block; the pure-torch encoder takes some 60 bytes of scratch for each


def signs() -> dict[str, bool]:
    """Whether each state of the registered rules is signed, by name. Raises ValueError where two rules disagree."""
    out: dict[str, bool] = {}
    for rule in map(get_rule, list_rules()):
        for state in rule.states:
            if out.setdefault(state.name, state.signed) != state.signed:
                raise ValueError(
                    f"state {state.name!r} is signed in one rule and unsigned in another (rule {rule.name!r})"
                )
    return out


def wide() -> set[str]:
    """States that are fp32 in every format, by name. Raises ValueError where two rules disagree."""
    out: dict[str, bool] = {}
    for rule in map(get_rule, list_rules()):
        for state in rule.states:
            if out.setdefault(state.name, state.wide) != state.wide:
                raise ValueError(f"state {state.name!r} is wide in one rule and not in another (rule {rule.name!r})")
    return {name for name, is_wide in out.items() if is_wide}


def derived() -> set[str]:
    """Numbers of torch.optim's state dicts that rules compute from the step count: read over, and written for torch alone."""
    return {name for rule in map(get_rule, list_rules()) for name in rule.derived}


def memories() -> set[str]:
    """Names of the numbers that registered rules keep of a tensor beside its states."""
    return {name for rule in map(get_rule, list_rules()) for name in rule.memory}


@dataclass
class Shape:
    """The parameter behind an entry, as far as its states tell."""

    like: torch.Tensor  # a tensor with the parameter's shape and memory layout; only its metadata counts
    numel: int


def _shape(entry: dict, names: list[str], forms: dict[str, Format]) -> Shape | None:
    """From the tensors of whole elements; where all are packed, an odd number of elements counts as one more."""
    whole = [entry[n] for n in names if forms[n].bits >= 8] + [entry[n] for n in COMPANIONS if n in entry]
    if whole:
        like = min(whole, key=lambda t: (t.numel(), -t.dim()))
        return Shape(like, like.numel())
    if not names:
        return None
    packed = entry[names[0]]
    like = torch.empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=torch.uint8, device="meta")
    return Shape(like, like.numel())


def _check(what: str, entry: dict, name: str) -> Format:
    """The format of a state. Raises ValueError where its tensors cannot be one."""
    tensor = entry[name]
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(
            f"{what}: state {name!r} is a {type(tensor).__name__}, not a tensor. Convert a whole state dict."
        )
    form = st.stored_format(entry, name)
    if (tensor.dtype == torch.uint8) != bool(form.block) or not (form.block or tensor.dtype.is_floating_point):
        raise ValueError(
            f"{what}: state {name!r} is {tensor.dtype}, and of its scales ({', '.join(st.scale_names(name))}) there is "
            f"{'one' if form.block else 'none'}. Convert a whole state dict of fusedopt, torch.optim or bitsandbytes."
        )
    if form.block:
        need = form.scale_count(tensor.numel() * (8 // form.bits))
        count = entry[st.scale_name(name, form)].numel()
        if count != need:
            raise ValueError(
                f"{what}: {form.name} state {name!r} needs {need} scales, not {count}. Convert a whole state dict."
            )
    if not is_dense(tensor):
        entry[name] = tensor.contiguous()
    return form


class Piece:
    """One parameter's state on its way into other formats.

    out: the result. Tensors that stay as they are, are the source's own; the others are uninitialised until `fill`.
    """

    def __init__(
        self,
        what: str,
        entry: Mapping,
        asked: Callable[[str, int, Format], Format],
        lossy: bool = False,
        contiguous: bool = False,
    ):
        """asked(name, numel, present format): the format a state shall have. lossy: second moments of zero may have been
        larger; their first moments become zero. contiguous: elements in the order of their indices, whatever the layout."""
        computed = derived()
        self.what, self.entry = what, {k: v for k, v in entry.items() if v is not None and k not in computed}
        self.signs = signs()
        self.names = [name for name in self.entry if name in self.signs]
        self._refuse_others()
        self.forms = {name: _check(what, self.entry, name) for name in self.names}
        if contiguous:
            self._straighten()
        self.shape = _shape(self.entry, self.names, self.forms)
        self.numel = self.shape.numel if self.shape else 0
        self._check_sizes()
        self.seconds = [n for n in self.names if not self.signs[n]]
        self.lossy = bool(self.seconds) and (lossy or self._half())
        self.zeroed = 0
        self.targets: dict[str, Format] = {}
        self.out: dict = {}
        self._lay_out(asked)

    def _refuse_others(self) -> None:
        known = {
            "step",
            *self.signs,
            *COMPANIONS,
            *memories(),
            *transform_states(),
            *(s for n in self.names for s in st.scale_names(n)),
        }
        others = [k for k, v in self.entry.items() if k not in known and isinstance(v, (torch.Tensor, dict))]
        if others:
            raise ValueError(
                f"{self.what} holds {sorted(others)}, which no rule of fusedopt keeps; it knows {sorted(self.signs)}. "
                "Convert the state dict of an optimizer that fusedopt has."
            )

    def _check_sizes(self) -> None:
        for name, form in self.forms.items():
            tensor, n = self.entry[name], self.numel
            if tensor.numel() not in (form.stored_count(n), form.stored_count(n + n % 2)):
                raise ValueError(
                    f"{self.what}: state {name!r} has shape {tuple(tensor.shape)}, the parameter {n} elements. "
                    "Convert a whole state dict."
                )

    def _half(self) -> bool:
        """fp16 second moments underflow below 6e-8."""
        return any(self.entry[n].dtype == torch.float16 for n in self.seconds)

    def _straighten(self) -> None:
        for name, form in self.forms.items():
            tensor = self.entry[name]
            if tensor.is_contiguous():
                continue
            if form.block:
                values = st.decode(tensor, self.entry, State(name, self.signs[name]))
                del self.entry[st.scale_name(name, form)]
                tensor, self.forms[name] = values, FP32
            self.entry[name] = tensor.contiguous()

    def _lay_out(self, asked) -> None:
        for name in self.names:
            tensor, found = self.entry[name], self.forms[name]
            form = found if tensor.dtype == torch.float64 else asked(name, self.numel, found)
            same = form is found if form.block else not found.block and tensor.dtype in (form.storage, torch.float64)
            if same and not (self.lossy and self.signs[name]):
                self.out[name] = tensor
                if form.block:
                    self.out[st.scale_name(name, form)] = self.entry[st.scale_name(name, form)]
                continue
            self.targets[name] = form
            like = self.shape.like if found.bits < 8 or tensor.numel() != self.numel else tensor
            shape = st.stored_shape(form, like)
            dtype = torch.float64 if tensor.dtype == torch.float64 else form.storage
            if form.bits >= 8 and is_dense(like):
                self.out[name] = torch.empty_strided(shape, like.stride(), dtype=dtype, device=tensor.device)
            else:
                self.out[name] = torch.empty(shape, dtype=dtype, device=tensor.device)
            if form.block:
                count = form.scale_count(self.numel)
                self.out[st.scale_name(name, form)] = torch.empty(count, dtype=torch.float32, device=tensor.device)
        scales = {s for n in self.names for s in st.scale_names(n)}
        self.out.update({k: v for k, v in self.entry.items() if k not in scales and k not in self.out})

    @property
    def work(self) -> int:
        """Elements `fill` converts."""
        return self.numel * len(self.targets)

    def pending(self) -> list[torch.Tensor]:
        """The tensors of `out` that `fill` writes."""
        scales = [self.out[st.scale_name(name, form)] for name, form in self.targets.items() if form.block]
        return [self.out[name] for name in self.targets] + scales

    def fill(self, place: Callable, done: Callable[[int], None]) -> None:
        """Computes what is uninitialised. place(t): the tensor to write in t's stead. done(n): n more elements are there."""
        seconds = [self._aligned(n) for n in self.seconds] if self.lossy else []
        for name, form in self.targets.items():
            out = flat(place(self.out[name]))
            scale = place(self.out[st.scale_name(name, form)]) if form.block else None
            for begin in range(0, self.numel, CHUNK):
                end = min(begin + CHUNK, self.numel)
                gone = None
                if seconds and self.signs[name]:
                    gone = torch.stack([self._read(n, begin, end, t) == 0 for n, t in seconds]).all(0)
                self._convert(name, form, out, scale, begin, end, gone)
                done(end - begin)

    def _aligned(self, name: str) -> tuple[str, torch.Tensor]:
        """A second moment in the memory layout of the first moments."""
        tensor, first = self.entry[name], next((self.entry[n] for n in self.names if self.signs[n]), None)
        if first is not None and tensor.shape == first.shape and not strides_match(tensor, first):
            if self.forms[name].block:
                raise ValueError(
                    f"{self.what}: its states differ in memory layout. Make them contiguous and save again."
                )
            tensor = empty_like(first, tensor.dtype).copy_(tensor)
        return name, tensor

    def _read(self, name: str, begin: int, end: int, tensor: torch.Tensor | None = None) -> torch.Tensor:
        """Elements of a state, fp32 (fp64 of fp64)."""
        stored, form = flat(self.entry[name] if tensor is None else tensor), self.forms[name]
        if not form.block:
            part = stored[begin:end]
            return part if part.dtype == torch.float64 else part.to(torch.float32)
        codes, scale = _part(stored, self.entry[st.scale_name(name, form)], form, begin, end)
        out = torch.empty(end - begin, dtype=torch.float32, device=stored.device)
        _codec(stored.device).dequantize(codes, scale, form, self.signs[name], out)
        return out

    def _convert(self, name, form, out, scale, begin, end, gone) -> None:
        values = self._read(name, begin, end)
        if gone is not None:
            gone &= values != 0
            self.zeroed += int(gone.sum())
        if not form.block:
            out[begin:end].copy_(values if gone is None else values.masked_fill(gone, 0.0))
            return
        codes, scales = _part(out, scale, form, begin, end)
        if form is not self.forms[name]:
            values = values if gone is None else values.masked_fill(gone, 0.0)
            _codec(out.device).quantize(values.to(torch.float32), form, self.signs[name], codes, scales)
            return
        # The codes stay bit for bit, except those of first moments that become zero.
        old, old_scales = _part(flat(self.entry[name]), self.entry[st.scale_name(name, form)], form, begin, end)
        codes.copy_(_zero_codes(old, gone, form, self.signs[name]))
        scales.copy_(old_scales)


def _part(stored: torch.Tensor, scale: torch.Tensor, form: Format, begin: int, end: int):
    """Codes and scales of elements; begin is a multiple of the block."""
    per_byte = 8 // form.bits
    codes = stored[begin // per_byte : -(-end // per_byte)]
    return codes, scale.view(-1)[begin // form.block : -(-end // form.block)]


def _zero_codes(codes: torch.Tensor, where: torch.Tensor | None, form: Format, signed: bool) -> torch.Tensor:
    if where is None:
        return codes
    zero = form.zero_code(signed)
    if form.bits == 8:
        return codes.masked_fill(where, zero)
    pairs = torch.nn.functional.pad(where, (0, where.numel() % 2)).view(-1, 2)
    high = torch.where(pairs[:, 0], zero & 0xF0, codes & 0xF0)
    return high | torch.where(pairs[:, 1], zero & 0x0F, codes & 0x0F)


def _codec(device: torch.device):
    """The backend whose kernels encode and decode: the one asked for where it is for this device, else the best that is there."""
    order = select.automatic_order(device)
    asked = select.requested(None)
    usable = [name for name in order if select.get_backend(name).reason() is None]
    return select.get_backend(asked if asked in usable else usable[0])
