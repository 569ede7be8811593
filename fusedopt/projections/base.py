"""Projection: which low-rank space a matrix's gradient is stepped in; Site: one projected parameter of a plan.

A projected matrix W with gradient G is stepped in four moves: refresh of the projector where it is due, R = project(G), the
rule's direction U of R with states shaped like R (one launch for all projected tensors), and W <- W - (lr U_back + decay W),
a matrix product whose epilogue is the parameter update.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from fusedopt.backends.base import MatrixWork
from fusedopt.distributed import Sharding, is_dtensor, local, spread
from fusedopt.memory import flat, is_dense
from fusedopt.options import check_nonnegative
from fusedopt.projections import ops
from fusedopt.rule import Rule
from fusedopt.states import option_overrides, scale_names

SIDES = ("std", "reverse_std", "left", "right")


def matrix_shape(p: torch.Tensor) -> tuple[int, int] | None:
    """(rows, cols) of a tensor as a matrix in memory order: its slowest dimension against all others. None: it is none.

    A transposed matrix is the matrix of its storage; a convolution weight (out, in, h, w) is (out, in h w), channels_last
    with its columns in another order. A DTensor is that of its first dimension: its strides are not its shards'.
    """
    if p.dim() < 2 or not p.numel():
        return None
    if is_dtensor(p) or not is_dense(p) or p.is_contiguous():
        return p.shape[0], p.numel() // p.shape[0]
    rows = p.shape[max(range(p.dim()), key=lambda d: (p.shape[d] != 1, p.stride(d)))]
    return rows, p.numel() // rows


@dataclass(frozen=True)
class Projection:
    """How gradients of matrices are projected: an immutable description, shared by all parameters of a group.

    Subclasses add options, the tensors they keep per parameter (`tensors`) and a Site, which does the work.
    """

    name: ClassVar[str]
    site: ClassVar[type]
    turns = False  # whether tensors change their rule from time to time: `turn` is called before each step
    update_every = None  # steps between refreshes, a field of those that have some
    compares: ClassVar[bool] = False  # whether tensors' steps depend on each other's gradients
    low_rank_gradient: ClassVar[bool] = False  # R is all that a step needs of a gradient: projected_linear takes it

    def describe(self) -> dict:
        """Its name and options as plain values, as a state dict holds them."""
        return {"name": self.name, **asdict(self)}

    def refuses(self, p: torch.Tensor) -> str | None:
        """Why a parameter is stepped without projection, or None."""
        shape = matrix_shape(p)
        if shape is None:
            return f"{p.dim()}-D tensors are not projected"
        rank = self.rank_for(shape)
        return f"rank {rank} does not reduce a {shape[0]} x {shape[1]} matrix" if rank >= min(shape) else None

    def sharded_site(self) -> type | None:
        """The Site of sharded matrices (DTensor). None: it needs whole ones."""
        return None

    def refuses_shards(self, p: torch.Tensor) -> str | None:
        """Why a DTensor parameter, split as it is, cannot be stepped, or None."""
        return None if self.sharded_site() is not None else "needs the whole tensor"

    def rank_for(self, shape: tuple[int, int]) -> int:
        raise TypeError(f"{type(self).__name__} does not say its rank")

    def side_for(self, shape: tuple[int, int]) -> str:
        """ "left": R = P^T G is [rank, cols]; "right": R = G P^T is [rows, rank]."""
        raise TypeError(f"{type(self).__name__} does not say its side")

    def state_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of the rule's states for a matrix."""
        rank = self.rank_for(shape)
        return (rank, shape[1]) if self.side_for(shape) == "left" else (shape[0], rank)

    def rule_for(self, rule: Rule) -> Rule:
        """The rule whose states a projected parameter keeps, and whose numbers are in its scalar row; `rule` is the class's.

        Raises ValueError where the projection cannot step with the class's rule.
        """
        return rule

    def rule_in(self, rule: Rule, entry: dict) -> Rule:
        """rule_for, where it depends on a parameter's state dict."""
        return self.rule_for(rule)

    def turn(self, entry: dict, place: tuple[int, int], seed: int, step: int, rule: Rule) -> None:
        """Called before a step where `turns` is set: may take states away or leave them to be made anew."""

    def state_like(self, p: torch.Tensor, name: str) -> torch.Tensor:
        """A tensor whose shape, dtype, device and layout a state takes; p itself for a state of full size. Of a DTensor another
        one, which is split along the dimension of the gradient that the projection keeps."""
        shape = matrix_shape(p)
        low_rank = self.state_shape(shape)
        if is_dtensor(p):
            kept = 1 if self.side_for(shape) == "left" else 0
            return spread(p, low_rank, {kept: kept}, p.dtype)
        return torch.empty(low_rank, dtype=p.dtype, device=p.device)

    def tensors(self, p: torch.Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what is kept in a parameter's state beside the rule's states, zero at the start."""
        return {}

    def tensor_like(self, p: torch.Tensor, name: str) -> torch.Tensor | None:
        """Of a DTensor parameter: a DTensor of the shape and with the placements of one of `tensors`. None: every process has it
        whole."""
        return None

    def on_host(self) -> tuple[str, ...]:
        """The names among them that lie in host memory whatever the parameter's device: a schedule's integers."""
        return ()


@dataclass(frozen=True)
class Subspace(Projection):
    """A projection onto `rank` dimensions of one side of a matrix, with what all of them share."""

    rank: int = 128
    update_every: int = 200
    scale: float = 1.0
    side: str = "std"
    stagger: bool = True

    def __post_init__(self):
        check_positive_int(self.rank, "rank")
        check_schedule(self)

    def rank_for(self, shape):
        return min(self.rank, *shape)

    def side_for(self, shape):
        return resolve_side(self.side, shape)


def check_schedule(projection) -> None:
    """Raises ValueError for update_every, scale or side out of range."""
    check_positive_int(projection.update_every, "update_every")
    check_nonnegative(projection.scale, "projection scale")
    check_choice(projection.side, "projection side", SIDES)


def check_choice(value, what: str, known) -> None:
    if value not in known:
        raise ValueError(f"Invalid {what}: {value!r}; it is one of {', '.join(map(str, known))}")


def basis_shape(shape: tuple[int, int], rank: int, side: str) -> tuple[int, int]:
    return (shape[0], rank) if side == "left" else (rank, shape[1])


def configured(p: torch.Tensor, group: dict) -> Projection | None:
    """The projection that steps a parameter: its override, else the group's, where it takes the tensor."""
    chosen = option_overrides(p).get("projection", group.get("projection"))
    return chosen if chosen is not None and chosen.refuses(p) is None else None


def places(opt) -> dict[int, tuple[Projection, tuple[int, int]]]:
    """By tensor id: the projection of every projected parameter, with or without a gradient, and (index, number) among them."""
    owners = [(p, group) for group in opt.param_groups for p in group["params"]]
    chosen = {i: c for i, (p, group) in enumerate(owners) if (c := opt.projection_for(p, group)) is not None}
    return {i: (c, (place, len(chosen))) for place, (i, c) in enumerate(chosen.items())}


def states_like(p: torch.Tensor, projection: Projection | None, rule: Rule) -> list[torch.Tensor]:
    """For each state of a parameter a tensor whose shape, dtype, device and layout it takes: p where nothing is projected."""
    return [p if projection is None else projection.state_like(p, state.name) for state in rule.states]


def sharded_likes(p: torch.Tensor, projection: Projection | None, rule: Rule) -> dict[str, torch.Tensor]:
    """For each tensor of a DTensor parameter's state that is not split as the parameter is, by name: a DTensor that is."""
    if projection is None or not is_dtensor(p):
        return {}
    out = {}
    for state, like in zip(rule.states, states_like(p, projection, rule), strict=True):
        if like is not p:
            out.update(dict.fromkeys((state.name, *scale_names(state.name)), like))
    for name in projection.tensors(p):
        if (like := projection.tensor_like(p, name)) is not None:
            out[name] = like
    return out


def kept_tensors(p: torch.Tensor, projection: Projection | None) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """`tensors` of a parameter's projection as this process keeps them: of a DTensor their shards."""
    if projection is None:
        return {}
    out = projection.tensors(p)
    if is_dtensor(p):
        for name, (_, dtype) in out.items():
            if (like := projection.tensor_like(p, name)) is not None:
                out[name] = (tuple(local(like).shape), dtype)
    return out


def basis_dtype(p: torch.Tensor) -> torch.dtype:
    """Projectors are bf16 for bf16 parameters; fp16 would overflow under a loss scale."""
    return p.dtype if p.dtype in (torch.bfloat16, torch.float64) else torch.float32


def resolve_side(side: str, shape: tuple[int, int]) -> str:
    """GaLore's convention: "std" projects the longer side away on the right where rows >= cols."""
    if side in ("left", "right"):
        return side
    return "right" if (shape[0] >= shape[1]) == (side == "std") else "left"


def check_positive_int(value, what: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"Invalid {what}: {value!r}; it must be a positive integer")


def reset_states(slot) -> None:
    """Zeroes the rule's states of a slot, in their formats."""
    for state, form, stored, scale in zip(
        slot.rule.states, slot.formats, slot.state_tensors, slot.scale_tensors, strict=True
    ):
        stored.fill_(form.zero_code(state.signed))
        if scale is not None:
            scale.zero_()


def change_states(slot, like: torch.Tensor, change) -> None:
    """Replaces each of a slot's states x, shaped like `like`, by change(x), in its format."""
    for state, form, stored, scale in zip(
        slot.rule.states, slot.formats, slot.state_tensors, slot.scale_tensors, strict=True
    ):
        wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
        x = form.decode(stored.reshape(-1), scale, state.signed, wide, like.numel()).view(like.shape)
        x = change(x).reshape(-1)
        codes, new_scale = form.encode(x, state.signed) if form.block else (x, None)
        stored.copy_(codes.view(stored.shape))
        if scale is not None:
            scale.copy_(new_scale)


def refresh_offset(projection, place: tuple[int, int]) -> int:
    """By how many steps the refreshes of a parameter come later than those of the first projected one.

    place: its index among the projected parameters and their number.
    """
    index, count = place
    return index * projection.update_every // count if projection.stagger else 0


def due(projection, place: tuple[int, int], step: int) -> bool:
    """Whether a projector is refreshed at a step: at the first one, and every `update_every` from its offset on."""
    return step == 1 or (step - 1) % projection.update_every == refresh_offset(projection, place)


class Operation(NamedTuple):
    """What a site does in a step between two refreshes beside the launch of directions, and the bytes that it must move."""

    name: str
    bytes: float


def nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def weight_bytes(slot) -> tuple[float, float]:
    """Bytes (read, written) of a slot's parameter, with its companion or the scales of its int8 groups."""
    if slot.quantized:
        size = nbytes(slot.param.codes, slot.param.scale, slot.param.zero)
        return size, size
    return tuple(slot.param.numel() * x for x in slot.precision.traffic(slot.param.dtype))


class Site:
    """One projected parameter of a plan: its buffers, and the work before and after the launch of directions.

    Attributes: shape (rows, cols), of a shard where the whole is `whole`; side, rank; `projected` (R) and `update` (U),
    low-rank buffers that live as long as the plan; entry, the parameter's state dict; place: its index among the projected
    parameters and their number.
    """

    owed = False  # whether a refresh has been put off
    cold = False  # whether the refresh of this step is the first one
    takes_int8 = False  # whether it updates int8 weights (fusedopt.weights), through ops.apply or ops.step_rows
    launched = True  # whether the rule steps `projected` into `update` in the launch of directions
    plain_rule: str | None = None  # of a second scalar row, for launches over updates (slot.plain_row)
    room = 0  # elements of the scratch buffers it shares with other sites (ProjectedSteps.scratch)
    full_room = 0  # the same, of buffers of full size
    sharding: Sharding | None = None  # where the parameter is a DTensor
    counting = None  # sites of one group and step count share a scalar row if they agree in this

    def __init__(self, projection: Projection, p: torch.Tensor, entry: dict, grad_dtype: torch.dtype, tensor_id: int,
                 group: dict, place: tuple[int, int]):  # fmt: skip
        self.projection: Any = projection  # of the site's own class, with its options
        self.entry, self.tensor_id, self.place = entry, tensor_id, place
        self.seed = group["seed"]
        self.shape = self.whole = matrix_shape(p)
        wide = torch.float64 in (p.dtype, grad_dtype)
        self.basis_dtype = torch.float64 if wide else basis_dtype(p)
        self.side, self.rank = projection.side_for(self.shape), projection.rank_for(self.shape)
        low_rank = local(projection.state_like(p, "")).shape
        self.projected = torch.empty(low_rank, dtype=ops.projected_dtype(grad_dtype, self.basis_dtype), device=p.device)
        self.update = torch.empty(low_rank, dtype=self.basis_dtype, device=p.device)

    def matrix(self, t: torch.Tensor) -> torch.Tensor:
        """A dense tensor of the parameter's layout as [rows, cols]."""
        return flat(t).view(self.shape)

    @property
    def offset(self) -> int:
        return refresh_offset(self.projection, self.place)

    def due(self, step: int) -> bool:
        """Whether the projector is refreshed at a step."""
        return self.projection.update_every is not None and due(self.projection, self.place, step)

    def refreshes(self, step: int, steps) -> bool:
        """Whether the projector is refreshed now. Where a step may be skipped on the device (found_inf), a refresh asks the
        host and is put off to the next step: a skipped step must not change it, least of all the first one. A captured step
        refreshes nothing: refreshes ask the host."""
        wanted = self.due(step) or self.owed
        self.cold = step == 1 or self.owed and self.cold
        if self.update.is_cuda and torch.cuda.is_current_stream_capturing():
            if self.cold:
                raise RuntimeError(
                    f"parameter {self.tensor_id} (shape {self.shape}) has no projector yet, and a CUDA graph cannot make it: "
                    "run one step before the capture"
                )
            self.owed = wanted
            return False
        self.owed = wanted and steps.found is not None and bool(steps.found)
        return wanted and not self.owed

    def rule_step(self, step):
        """The step count that the rule's bias corrections see; arithmetic only, step may be a tensor."""
        return step

    def bind(self, slot, steps) -> None:
        """Called once, when the plan knows the slot's backend and scalar row."""

    def before(self, grad: torch.Tensor, step: int, slot, steps) -> None:
        """Refreshes where it is due and fills `projected`. grad: [rows, cols]; step: from 1; steps: the ProjectedSteps."""
        raise TypeError("a Site says how it projects")

    def after(self, grad: torch.Tensor, slot, steps) -> None:
        """Updates the parameter."""
        ops.apply(slot.key.backend, self.work(steps.work(slot, grad)))

    def basis_bytes(self) -> float:
        """Bytes that a product reads of the projector."""
        side = self.shape[0] if self.side == "left" else self.shape[1]
        return side * self.rank * self.basis_dtype.itemsize

    def operations(self, slot) -> list[Operation]:
        """The projection, unless a backward pass has done it, and the update. Refreshes are not counted."""
        grad = slot.param.numel() * slot.grad_dtype.itemsize
        low_rank = self.update.numel() * ops.projected_dtype(slot.grad_dtype, self.basis_dtype).itemsize
        update = sum(weight_bytes(slot)) + nbytes(self.update) + self.basis_bytes()
        out = [] if slot.source is not None else [Operation("projection", grad + self.basis_bytes() + low_rank)]
        return [*out, Operation("update", update)]

    def work(self, base: MatrixWork) -> MatrixWork:
        """The update from `update`, completed from a work that has everything about the parameter."""
        raise TypeError("a Site says how it projects back")
