"""MicroAdam's step of one tensor against the transcription: codes and bounds bit for bit, the update to rounding."""

import weakref

import pytest
import torch
from oracles import microadam as oracle
from torch.utils._python_dispatch import TorchDispatchMode

from fusedopt.projections.window import NAMES, SHARE, Options, allocate, update

SMALL = {"window": 3, "density": 0.05, "block": 64, "error_block": 32}


def gradient(n, step, dtype=torch.float32) -> torch.Tensor:
    """Magnitudes over four decades, a place's own from step to step."""
    size = torch.logspace(-3, 1, n, dtype=torch.float64)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    return (torch.randn(n, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * size).to(dtype)


def collect(entry, grad, step, options, **kwargs) -> torch.Tensor:
    """u as a whole; the ranges must come in order and cover everything once."""
    parts, ends = [], [0]

    def apply(first, last, u):
        assert first == ends[-1] and u.shape == (last - first,)
        ends.append(last)
        parts.append(u.clone())

    update(entry, grad, step, options, apply, **kwargs)
    assert ends[-1] == grad.numel()
    return torch.cat(parts)


def fresh(n, options) -> dict:
    entry = {}
    allocate(entry, n, "cpu", options)
    return entry


def unpacked(entry, n) -> torch.Tensor:
    codes = entry["error_codes"].long()
    return torch.stack([codes // 16, codes % 16], 1).view(-1)[:n]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 31, 33, 64, 65, 127, 128, 1000])
@pytest.mark.parametrize(
    "setting", [{}, {"error_block": 64}, {"error_block": 2}, {"density": 1.0}, {"window": 1}], ids=str
)
def test_steps_match_the_transcription(dtype, n, setting):
    settings = {**SMALL, **setting}
    options, entry = Options(betas=(0.8, 0.95), **settings), fresh(n, Options(**settings))
    other = oracle.MicroAdam(n, betas=(0.8, 0.95), dtype=dtype, **settings)
    for step in range(1, 9):
        g = gradient(n, step, dtype)
        u, expected = collect(entry, g, step, options), other.update(g)
        assert torch.equal(unpacked(entry, n), other.codes), f"codes at step {step}"
        bounds = torch.tensor(other.bounds, dtype=torch.float64)
        assert torch.equal(entry["error_min"].double(), bounds[:, 0])
        assert torch.equal(entry["error_max"].double(), bounds[:, 1])
        row = other.rows[(step - 1) % options.window]
        stored_i = entry["window_indices"][(step - 1) % options.window].long()
        stored_v = entry["window_values"][(step - 1) % options.window].double()
        starts = torch.tensor([i // 64 * 64 for i, _ in row])
        found = {int(i + s): float(v) for i, s, v in zip(stored_i, starts, stored_v, strict=True)}
        assert found == {i: float(v) for i, v in row}
        assert expected.abs().max() > 0
        bound = 1e-5 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(u, expected, rtol=bound, atol=bound)


def test_published_sizes():
    """Blocks of 32768, 1 %, a tail: sizes of the state, and its 0.9 bytes an element."""
    n, options = 200_001, Options()
    entry = fresh(n, options)
    assert tuple(entry) == NAMES
    k = 6 * 328 + 34
    assert entry["window_indices"].shape == entry["window_values"].shape == (10, k)
    assert entry["error_codes"].shape == (100_001,) and entry["error_min"].shape == (7,)
    assert sum(t.nbytes for t in entry.values()) / n == pytest.approx(0.9, abs=0.005)
    for step in range(1, 4):
        g = gradient(n, step)
        u = collect(entry, g, step, options)
    assert 0 < (u != 0).float().mean() < 0.031
    assert entry["window_indices"].max() > 30_000 and entry["window_indices"].min() >= 0


def test_the_first_row_holds_the_largest_of_each_block():
    n, options = 300_000, Options(density=0.001)
    entry, g = fresh(n, options), gradient(n, 1)
    collect(entry, g, 1, options)
    blocks = [(first, min(first + 32768, n)) for first in range(0, n, 32768)]
    column = 0
    for first, last in blocks:
        k = -(-(last - first) // 1000)
        indices = entry["window_indices"][0, column : column + k].long()
        assert torch.equal(entry["window_values"][0, column : column + k], g[first:last][indices].bfloat16())
        assert set(indices.tolist()) == set(g[first:last].abs().topk(k).indices.tolist())
        column += k
    assert column == entry["window_values"].shape[1]


def test_nothing_is_lost_between_window_and_error():
    n, options = 5000, Options(density=0.01, block=1024, error_block=256, window=40)
    entry, total, sent = (
        fresh(n, options),
        torch.zeros(5000, dtype=torch.float64),
        torch.zeros(5000, dtype=torch.float64),
    )
    starts = (torch.arange(55) // 11 * 1024)[: options.kept_of(n)]
    for step in range(1, 13):
        g = torch.randn(n, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        total += g
        collect(entry, g, step, options)
        row = step - 1
        sent.index_add_(0, entry["window_indices"][row].long() + starts, entry["window_values"][row].double())
    unit = ((entry["error_max"] - entry["error_min"]).double() / 15).repeat_interleave(256)[:n]
    low = entry["error_min"].double().repeat_interleave(256)[:n]
    error = unpacked(entry, n) * unit + low
    assert ((total - sent - error).abs() <= 12 * 0.8 * unit).all()
    assert (total - sent - error).norm() < 0.3 * (total - sent).norm()


def test_a_step_count_on_the_device_gives_the_same():
    n, options = 1000, Options(**SMALL)
    one, two = fresh(n, options), fresh(n, options)
    for step in range(1, 8):
        g = gradient(n, step)
        a = collect(one, g, step, options)
        b = collect(two, g, torch.tensor(float(step)), options)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert all(torch.equal(one[name], two[name]) for name in NAMES)


def test_multiplier_of_the_gradient():
    n, options = 300, Options(**SMALL)
    states = [fresh(n, options) for _ in range(3)]
    g = gradient(n, 1)
    a = collect(states[0], g * -0.25, 1, options)
    b = collect(states[1], g, 1, options, grad_mul=-0.25)
    c = collect(states[2], g, 1, options, grad_mul=torch.tensor([-0.25]))
    assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradients_are_widened(dtype):
    n, options = 300, Options(**SMALL)
    one, two = fresh(n, options), fresh(n, options)
    g = gradient(n, 1).to(dtype)
    assert torch.equal(collect(one, g, 1, options), collect(two, g.float(), 1, options))


@pytest.mark.parametrize("on_device", [False, True])
def test_skipped_steps_change_nothing(on_device):
    n, options = 300, Options(**SMALL)
    entry = fresh(n, options)
    collect(entry, gradient(n, 1), 1, options)
    before = {name: t.clone() for name, t in entry.items()}
    bad = gradient(n, 2)
    bad[7] = float("nan")
    step = torch.tensor(2.0) if on_device else 2
    update(entry, bad, step, options, lambda *_: None, skip=torch.ones(1))
    assert all(torch.equal(entry[name], before[name]) for name in NAMES)
    update(entry, gradient(n, 2), step, options, lambda *_: None, skip=torch.zeros(1))
    assert not any(torch.equal(entry[name], before[name]) for name in NAMES)


def test_constant_blocks_and_zero_gradients():
    n, options = 128, Options(**{**SMALL, "eps": 0.0})
    entry = fresh(n, options)
    assert torch.equal(collect(entry, torch.zeros(n), 1, options), torch.zeros(n))
    u = collect(entry, torch.full((n,), 0.5), 2, options)
    assert torch.isfinite(u).all() and (u != 0).sum() == 2 * options.kept(64)
    assert (entry["error_max"] == 0.5).all()


def test_several_blocks_at_a_time_change_nothing(monkeypatch):
    n, options = 64 * 40 + 17, Options(**SMALL)
    one, two = fresh(n, options), fresh(n, options)
    for step in range(1, 5):
        g = gradient(n, step)
        a = collect(one, g, step, options)
        monkeypatch.setattr("fusedopt.projections.window.SHARE", 3)
        b = collect(two, g, step, options)
        monkeypatch.setattr("fusedopt.projections.window.SHARE", SHARE)
        assert torch.equal(a, b) and all(torch.equal(one[name], two[name]) for name in NAMES)


class Live(TorchDispatchMode):
    """Follows the bytes of the storages that operations make, while they are alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, tuple) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in inputs | self.known:
                pointer, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
                self.known.add(pointer)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(t.untyped_storage(), self.freed, pointer, size)
        return out

    def freed(self, pointer, size):
        self.known.discard(pointer)
        self.now -= size


def test_temporaries_are_small():
    """Below 5 % of a tensor of 4 million elements in fp32, the rule of projected steps."""
    n, options = 1 << 22, Options(block=8192, error_block=8192)
    entry, grad = fresh(n, options), torch.randn(1 << 22)
    with Live() as live:
        update(entry, grad, 1, options, lambda *_: None)
    assert 0 < live.peak < 0.05 * grad.nbytes


@pytest.mark.parametrize(
    "setting, message",
    [({"density": 0}, "density"), ({"window": 0}, "window"), ({"block": 40000}, "32768"), ({"error_block": 3}, "even"),
     ({"error_block": 30000}, "divide block")],
)  # fmt: skip
def test_options_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        Options(**setting)


def test_empty_tensors():
    options = Options()
    entry = fresh(0, options)
    update(entry, torch.zeros(0), 1, options, lambda *_: pytest.fail("nothing to apply"))


def test_training_with_it_lowers_a_loss():
    """A quadratic with 1000 weights, of which 1 % move in a step: error feedback brings all of them down."""
    n, options = 1000, Options(block=256, error_block=64)
    entry, p = fresh(n, options), torch.randn(n, generator=torch.Generator().manual_seed(0))
    start = p.norm()
    for step in range(1, 401):

        def apply(first, last, u):
            p[first:last] -= 0.01 * u

        update(entry, p.clone(), step, options, apply)
    assert p.norm() < 0.65 * start and (p.abs() > 1.5).sum() < 20
