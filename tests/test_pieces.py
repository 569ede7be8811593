"""Steps in pieces against the same rule in one launch: equal to the bit, whatever the format, precision and shape."""

from dataclasses import dataclass, replace

import pytest
import torch
from configs import native_cpu
from harness import RULES, assert_bitwise, assert_close, assert_guards, clone, make_problem, oracle, snapshot

from fusedopt.abi import GRAIN_SIZE, Column, Phase
from fusedopt.backends.select import get_backend
from fusedopt.backends.triton import TritonBackend
from fusedopt.formats import list_formats
from fusedopt.precision import list_precisions
from fusedopt.projections import pieces as pc
from fusedopt.projections.pieces import PieceLaunch, Pieces, Scratch

BACKENDS = [n for n in ("reference", "cpu", "triton") if n != "cpu" or native_cpu()]
SHAPES = ((7, 997), (24, 512), (13, 2048), (3, 5000), (9001, 1), (1, 9001), (5, 5))
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pc, "CPU_ELEMENTS", 2 * GRAIN_SIZE)


@dataclass
class Table:
    table: torch.Tensor
    numbers: list


class FakeSlot:
    """A parameter of the harness as a plan's slot."""

    def __init__(self, work):
        item = work.items[0]
        self.work_param, self.companion, self.precision = item.param, item.companion, work.precision
        self.stream = item.tensor_id


def usable(backend: str) -> None:
    if backend == "triton" and (why := TritonBackend().reason()):
        pytest.skip(why)


def whole_and_pieces(rule, shape, backend, *, through_scratch=False, **options):
    """The same one-tensor problem stepped by one launch and in pieces. through_scratch: the gradient comes in a scratch buffer."""
    rows, cols = shape
    problem = make_problem(rule, (rows * cols,), **options)
    work = problem.work
    alone = make_problem(rule, (rows * cols,), **options)
    get_backend(backend).launch(alone.work)
    pieces = Pieces(shape, torch.device("cpu"), backend)
    item = work.items[0]
    states = list(zip(item.states, item.scales, work.formats, strict=True))
    launch = PieceLaunch(pieces, FakeSlot(work), Table(work.scalars, work.numbers), item.scalar_row, work.rule,
                         work.phase, states=states, grad_dtype=item.grad.dtype)  # fmt: skip
    scratch = Scratch(torch.full((pieces.room,), float("nan"), dtype=item.grad.dtype))
    launch.use(scratch if through_scratch else item.grad, work.grad_scale, work.clip, work.found_inf)
    for i, piece in enumerate(pieces.pieces):
        if through_scratch:
            scratch.buffer.fill_(float("nan"))
            source = item.grad if pieces.whole else item.grad[piece.first : piece.last]
            pieces.part_of(piece, scratch).copy_(source)
        launch.run(i)
    return alone, problem, pieces


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("through_scratch", [False, True], ids=["gradient", "scratch"])
def test_shapes(shape, backend, through_scratch):
    usable(backend)
    alone, problem, pieces = whole_and_pieces("adam", shape, backend, through_scratch=through_scratch)
    assert pieces.pieces[0].first == 0 and pieces.pieces[-1].last == shape[0] * shape[1]
    if backend != "reference" and shape[0] * shape[1] > 4 * GRAIN_SIZE and shape != (13, 2048):
        assert len(pieces.pieces) > 1
    assert_bitwise(snapshot(problem), snapshot(alone))
    assert_guards(problem)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", list_formats())
def test_formats(form, backend):
    usable(backend)
    alone, problem, _ = whole_and_pieces("adam", (7, 1200), backend, formats=form, grad_dtype=HALF)
    assert_bitwise(snapshot(problem), snapshot(alone))
    assert_guards(problem)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", list_precisions())
def test_precisions(precision, backend):
    usable(backend)
    alone, problem, _ = whole_and_pieces(
        "ema", (24, 512), backend, precision=precision, param_dtype=HALF, formats="int8", through_scratch=True
    )
    assert_bitwise(snapshot(problem), snapshot(alone))
    assert_guards(problem)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scale_overflow_and_sign(backend):
    usable(backend)
    alone, problem, _ = whole_and_pieces("adam", (24, 512), backend, grad_scale=8.0, maximize=True)
    assert_bitwise(snapshot(problem), snapshot(alone))
    untouched = snapshot(make_problem("adam", (24 * 512,), found_inf=1.0))
    _, problem, _ = whole_and_pieces("adam", (24, 512), backend, found_inf=1.0)
    assert_bitwise(snapshot(problem), untouched)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(24, 512), (7, 997), (3, 5000)], ids=str)
def test_directions_into_scratch_and_numerators_from_it(backend, shape):
    """A moving average written piece by piece into scratch is the next launch's numerator: the two halves make Adam."""
    usable(backend)
    rows, cols = shape
    n = rows * cols
    problem = make_problem("adam_denominator", (n,), formats=("fp32", "int8"))
    work, item = problem.work, problem.work.items[0]
    before = clone(problem)
    pieces, slot, table = Pieces(shape, torch.device("cpu"), backend), FakeSlot(work), Table(work.scalars, work.numbers)
    average = make_problem("ema", (n,), seed=5)
    m = average.work.items[0].states[0]
    m_before = m.clone()
    numerator = Scratch(torch.full((pieces.room,), float("nan")))
    ema = PieceLaunch(pieces, slot, table, 0, average.work.rule, Phase.DIRECTION, target=numerator,
                      states=[(m, None, average.work.formats[0])])  # fmt: skip
    states = [(numerator, None, average.work.formats[0]), (item.states[1], item.scales[1], work.formats[1])]
    adam = PieceLaunch(pieces, slot, table, 0, work.rule, Phase.FUSED, states=states)
    for launch in (ema, adam):
        launch.use(item.grad, None, None, None)
    for i, piece in enumerate(pieces.pieces):
        ema.run(i)
        part = pieces.part_of(piece, numerator)
        assert torch.equal(part, m[piece.first : piece.last] if not pieces.whole else m)
        assert pieces.rows_of(piece, numerator).shape == (piece.stop - piece.row, cols)
        adam.run(i)
    # The same in one launch of Adam over the whole, its numerator given.
    whole = make_problem("adam_denominator", (n,), formats=("fp32", "int8"))
    whole.work.items[0].states[0].copy_(m)
    get_backend(backend).launch(whole.work)
    got, want = work.items[0], whole.work.items[0]
    assert_bitwise([got.param, got.states[1], got.scales[1]], [want.param, want.states[1], want.scales[1]])
    assert torch.equal(got.states[0], before.work.items[0].states[0]), "the stored numerator was not used"
    beta1 = work.numbers[0].scalars[0]
    torch.testing.assert_close(m, beta1 * m_before + (1 - beta1) * item.grad, rtol=1e-6, atol=1e-8)


def test_scratch_rows_are_aligned_as_the_tensor():
    pieces = Pieces((40, 997), torch.device("cpu"), "cpu")
    scratch = Scratch(torch.zeros(pieces.room))
    assert {pieces.address(scratch, p) % 16 for p in pieces.pieces} == {0}
    for p in pieces.pieces:
        assert p.first % GRAIN_SIZE == 0 and p.row * 997 <= p.first < p.last <= p.stop * 997
        assert pieces.part_of(p, scratch).data_ptr() == pieces.address(scratch, p) + 4 * p.first
        assert pieces.rows_of(p, scratch).data_ptr() == pieces.address(scratch, p) + 4 * 997 * p.row


def test_pieces_are_small_and_whole_rows_where_they_can_be():
    pieces = Pieces((300, 512), torch.device("cpu"), "cpu")
    assert all(p.first % 512 == 0 for p in pieces.pieces)
    odd = Pieces((60, 997), torch.device("cpu"), "cpu", whole_rows=True)
    assert len(odd.pieces) == 1 and odd.pieces[0] == (0, 60 * 997, 0, 60)


def test_a_table_row_says_where_the_tensor_lies():
    problem = make_problem("ema", (24 * 512,))
    work, item = problem.work, problem.work.items[0]
    pieces = Pieces((24, 512), torch.device("cpu"), "cpu")
    launch = PieceLaunch(pieces, FakeSlot(work), Table(work.scalars, []), 1, work.rule, Phase.FUSED,
                         states=[(item.states[0], None, work.formats[0])])  # fmt: skip
    launch.use(item.grad, None, None, None)
    assert set(launch.table[Column.PARAM].tolist()) == {item.param.data_ptr()}
    assert set(launch.table[Column.META].tolist()) == {item.tensor_id << 32 | 1}
    assert "adam" in RULES and launch.works[0].key.precision == "nearest"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_a_lazy_adam_leaves_elements_without_a_gradient(form, backend):
    """Others are Adam's; in 8 bits an element that stays may take another code where its block's scale grows."""
    usable(backend)
    gone = torch.arange(2500) % 3 > 0

    def some(g, i):
        return torch.where(gone, 0.0, g)

    before = make_problem("adam_lazy", (2500,), formats=form, grad_values=some)
    problem, whole = (make_problem(rule, (2500,), formats=form, grad_values=some) for rule in ("adam_lazy", "adam"))
    old, (got, want) = before.work.items[0], (p.work.items[0] for p in (problem, whole))
    for p in (problem, whole):
        get_backend(backend).launch(replace(p.work, phase=Phase.FUSED))
    assert_close(problem, oracle(before))
    decayed = old.param * (1 - before.work.numbers[0].decay)
    torch.testing.assert_close(got.param[gone], decayed[gone], rtol=1e-6, atol=1e-8)
    assert torch.equal(got.param[~gone], want.param[~gone])
    if form == "fp32":
        for state, first, last in zip(got.states, old.states, want.states, strict=True):
            assert torch.equal(state[gone], first[gone]) and torch.equal(state[~gone], last[~gone])
