"""Conversion of optimizer state dicts between formats, and from and to torch.optim, bitsandbytes and torchao."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch

from fusedopt import states as st
from fusedopt.conversion import foreign
from fusedopt.conversion.piece import Piece, signs, wide
from fusedopt.formats import FP32, Format, get_format
from fusedopt.precision import COMPANIONS
from fusedopt.rule import get_rule, list_rules
from fusedopt.transforms import state_names as transform_states

log = logging.getLogger("fusedopt")

FORMS = ("native", "torch", "bitsandbytes")


@dataclass
class Summary:
    """What a conversion did. Bytes are of states, their scales and companions.

    zeroed: first moments that became zero because their second moments had been rounded to zero.
    dropped: names of companions that the target has no place for.
    """

    source: str
    tensors: int = 0
    elements: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    zeroed: int = 0
    dropped: tuple[str, ...] = ()


def _nbytes(entry: dict) -> int:
    tensors = [v for k, v in entry.items() if k != "step" and isinstance(v, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


class Conversion:
    """A state dict laid out in another form. `layout` is the result; what is computed is uninitialised until `fill`."""

    def __init__(
        self, state_dict: dict, state_format, min_quantized_numel: int = 4096, optimizer=None, to: str = "native"
    ):
        """state_format: a name, a dict by state name, or None to keep formats. optimizer: see `convert`; an instance too."""
        self._check(state_dict, state_format, to)
        found = foreign.kind(state_dict)
        if found == "bitsandbytes":
            state_dict = foreign.adopt(state_dict, *foreign.resolve(optimizer, state_dict))
        else:
            state_dict = foreign.adopt(state_dict, None, None)
        self._format, self._smallest, self.to, self._wide = state_format, min_quantized_numel, to, wide()
        self.pieces: dict = {}
        entries: dict = {}
        for key, entry in state_dict["state"].items():
            if isinstance(entry, dict):
                piece = Piece(f"convert: entry {key}", entry, self._asked, bool(found), contiguous=to == "bitsandbytes")
                self.pieces[key], entry = piece, piece.out
            entries[key] = entry
        self.total = sum(piece.work for piece in self.pieces.values())
        self.layout = self._formed({**state_dict, "state": entries})
        own = any(option in group for group in state_dict["param_groups"] for option in st.OWN_OPTIONS)
        self.summary = self._summary(found or ("fusedopt" if own else "torch"))

    @staticmethod
    def _check(state_dict, state_format, to: str) -> None:
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError("convert: expected an optimizer's state dict, with 'state' and 'param_groups'")
        if to not in FORMS:
            raise ValueError(f"convert: unknown form {to!r}; it is one of {', '.join(FORMS)}")
        if state_format is not None:
            st.check_state_format(state_format)
        unknown = state_format.keys() - signs().keys() if isinstance(state_format, dict) else ()
        if unknown:
            raise ValueError(f"convert: state_format names {sorted(unknown)}; states are {', '.join(sorted(signs()))}")

    def _asked(self, name: str, numel: int, present: Format) -> Format:
        chosen = self._format
        if chosen is None:
            return present
        if name in self._wide:
            return FP32
        form = get_format(chosen.get(name, "fp32") if isinstance(chosen, dict) else chosen)
        return FP32 if form.block and numel < self._smallest else form

    def _formed(self, native: dict) -> dict:
        if self.to == "bitsandbytes":
            return foreign.to_bitsandbytes(native)
        groups = deepcopy(native["param_groups"])
        state = native["state"]
        if self.to == "torch":
            groups = [{k: v for k, v in g.items() if k not in st.OWN_OPTIONS} for g in groups]
            owners = {key: group for group in groups for key in group["params"]}
            state = {
                key: _torch_entry(e, owners.get(key, {})) if isinstance(e, dict) else e for key, e in state.items()
            }
        elif self._format is not None:
            for group in groups:
                group["state_format"] = deepcopy(self._format)
                group["min_quantized_numel"] = self._smallest
                group.setdefault("param_precision", "nearest")
                group.setdefault("seed", 0)
        return {**native, "state": state, "param_groups": groups}

    def _summary(self, source: str) -> Summary:
        out = Summary(source, bytes_before=sum(_nbytes(piece.entry) for piece in self.pieces.values()))
        out.tensors = sum(len(piece.names) for piece in self.pieces.values())
        out.elements = sum(piece.numel * len(piece.names) for piece in self.pieces.values())
        if self.to != "native":
            out.dropped = tuple(n for n in COMPANIONS if any(n in piece.entry for piece in self.pieces.values()))
        out.bytes_after = sum(
            _nbytes({k: v for k, v in piece.out.items() if k not in out.dropped}) for piece in self.pieces.values()
        )
        return out

    def fill(self, place: Callable = lambda tensor: tensor, progress: Callable | None = None) -> None:
        """Computes the result. place(t): the tensor to write in t's stead. progress(done, total): in elements."""
        done = 0

        def count(elements: int) -> None:
            nonlocal done
            done += elements
            if progress is not None:
                progress(done, self.total)

        with torch.no_grad():
            for piece in self.pieces.values():
                piece.fill(place, count)
        self.summary.zeroed = sum(piece.zeroed for piece in self.pieces.values())
        if self.summary.zeroed:
            log.info(
                "convert: %d first moments set to zero, whose second moments had been rounded to zero",
                self.summary.zeroed,
            )
        if self.summary.dropped:
            log.warning("convert: %s left out: %s has no place for it", ", ".join(self.summary.dropped), self.to)

    def pending(self) -> set[int]:
        """ids of the tensors in the layout that `fill` writes; the others are ready, and some are the source's own."""
        return {id(t) for piece in self.pieces.values() for t in piece.pending()}

    def result(self, progress: Callable | None = None, copy: bool = True) -> dict:
        """The converted state dict. copy: it shares no state tensor with the source."""
        self.fill(progress=progress)
        ready = self.pending()
        clones: dict = {}
        for entry in self.layout["state"].values() if copy else ():
            if isinstance(entry, dict):
                for name, value in entry.items():
                    if isinstance(value, torch.Tensor) and id(value) not in ready:
                        entry[name] = clones.setdefault(id(value), value.clone())
        return self.layout


def _torch_entry(entry: dict, group: dict) -> dict:
    out = {k: v for k, v in entry.items() if k not in COMPANIONS and k not in transform_states()}
    for rule in map(get_rule, list_rules()):
        if rule.derived and set(rule.state_names) <= entry.keys():
            try:
                numbers = {name: number(group, float(entry["step"])) for name, number in rule.derived.items()}
            except KeyError:  # a group without the rule's hyperparameters: another one with the same states
                continue
            out |= {name: torch.tensor(float(number)) for name, number in numbers.items()}
    if "momentum_buffer" in out:  # torch.optim.SGD counts no steps
        out.pop("step", None)
    return out


def convert(
    state_dict: dict,
    state_format: str | dict[str, str],
    *,
    min_quantized_numel: int = 4096,
    optimizer: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """An optimizer's state dict with every state in another format, as a fusedopt optimizer loads it.

    Args:
        state_dict: of fusedopt (any formats), torch.optim, bitsandbytes (8 or 32 bits) or torchao. It is not changed.
        state_format: a name of `list_formats()`, or a dict by state name; states it does not name become fp32.
        min_quantized_numel: states with fewer elements become fp32 where a blockwise format is asked for.
        optimizer: whose state dict it is, "lion" or "sgd"; needed for bitsandbytes optimizers with one state.
        progress: called with (elements done, elements in all).
    Returns:
        The state dict. int8 states of bitsandbytes keep their codes and scales bit for bit, int8 and int4 states of torchao
        theirs; but first moments whose second moments were rounded to zero become zero, since m / sqrt(v) could be anything.
        Where all that is left of a shape is an odd number of packed int4 codes, the state is flat; loading restores it.
    Raises:
        ValueError: an entry cannot be read; the message names it.
    """
    return Conversion(state_dict, state_format, min_quantized_numel, optimizer).result(progress)


def to_bitsandbytes(
    state_dict: dict, *, bits: int = 8, min_8bit_size: int = 4096, progress: Callable[[int, int], None] | None = None
) -> dict:
    """A state dict of fusedopt, torch.optim or torchao as bitsandbytes' optimizers load it: Adam, AdamW, LAMB, Lion and SGD.

    int8 states of contiguous parameters keep their codes and scales bit for bit. kahan, split and master companions are left
    out: bitsandbytes goes on from the 16-bit parameters. bits: 8 or 32. Raises ValueError for amsgrad, nesterov and the like.
    """
    if bits not in (8, 32):
        raise ValueError(f"to_bitsandbytes: bits is 8 or 32, not {bits}")
    form = "int8" if bits == 8 else "fp32"
    return Conversion(state_dict, form, min_8bit_size, to="bitsandbytes").result(progress)


def for_loading(opt, state_dict: dict) -> dict:
    """What `load_state_dict` was given, under our names: a foreign state dict is converted without changing formats."""
    found = foreign.kind(state_dict)
    if found is None:
        return state_dict
    adam = "betas" in opt.defaults and opt.decay_mode == "coupled"
    if found == "bitsandbytes" and adam and any(group.get("weight_decay") for group in state_dict["param_groups"]):
        log.warning(
            "%s: weight decay is coupled here and decoupled in bitsandbytes; use AdamW to go on as before",
            type(opt).__name__,
        )
    return Conversion(state_dict, None, optimizer=opt).result(copy=False)
