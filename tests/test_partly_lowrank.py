"""Subset-Norm, Subspace-Momentum and Conda against transcriptions of their papers; formats, precisions, resuming, memory."""

import io
import math
from dataclasses import replace

import pytest
import torch
from configs import BACKENDS, assert_same_bits, backend_argument, parameters, set_grads, tensors, train
from oracles.compare import tensor
from oracles.conda import Conda as CondaTranscription
from oracles.subset_norm import SubsetNorm as SubsetTranscription
from oracles.subset_norm import subset_size as by_trial
from oracles.subspace_momentum import SubspaceMomentum as SubspaceTranscription
from projections import BETAS, EPS, LR, SHAPES, follow, matrix, site_of

import fusedopt
from fusedopt import Conda, SubsetNorm, SubspaceMomentum
from fusedopt.masters import weights
from fusedopt.projections import pieces as pc
from fusedopt.projections.conda import full_basis
from fusedopt.projections.subset_norm import subset_size
from fusedopt.projections.subspace_momentum import METHODS, hadamard_basis
from fusedopt.states import state_bytes

ADAM = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.0}
BOUND = {torch.float64: 1e-11, torch.float32: 1e-6}
over_shapes = pytest.mark.parametrize("shape", (*SHAPES[:2], (30, 301), (301, 30)), ids=str)
over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_cells = pytest.mark.parametrize(
    "backend, dtype", [(b, torch.float64 if b == "reference" else torch.float32) for b in BACKENDS], ids=str
)
EVERY = {
    "subset_norm": SubsetNorm(),
    "subset_heuristic": SubsetNorm("heuristic"),
    "subspace": SubspaceMomentum(rank=3, update_every=3),
    "subspace_subset": SubspaceMomentum(rank=3, update_every=3, subset_size=-1),
    "conda": Conda(update_every=3),
}
over_every = pytest.mark.parametrize("projection", EVERY.values(), ids=list(EVERY))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pc, "CPU_ELEMENTS", 4096)


def adamw(params, projection, backend=None, **options):
    params = [params] if isinstance(params, torch.Tensor) else params
    return fusedopt.AdamW(params, projection=projection, backend=backend_argument(backend), **{**ADAM, **options})


def projector(opt) -> torch.Tensor:
    return next(e["projector"] for e in opt.state.values()).double()


# Against the papers' algorithms


@over_shapes
@over_cells
@pytest.mark.parametrize("size", (-2, -1, 5, "heuristic"))
def test_subset_norm(shape, dtype, backend, size):
    p = matrix(shape, dtype)
    by = "chunk" if size != "heuristic" else "row" if shape[0] >= shape[1] else "column"
    oracle = SubsetTranscription(size, by, 20 * LR, BETAS, EPS)  # sums of squares make small steps
    assert max(follow(adamw(p, SubsetNorm(size), backend, lr=20 * LR), p, oracle, 8)) < BOUND[dtype]


@over_shapes
@over_cells
@pytest.mark.parametrize("method", METHODS)
def test_subspace_momentum(shape, dtype, backend, method):
    p = matrix(shape, dtype)
    opt = adamw(p, SubspaceMomentum(rank=3, update_every=4, method=method), backend)
    oracle = SubspaceTranscription(3, 4, None, LR, BETAS, EPS)
    assert max(follow(opt, p, oracle, 9, projector)) < BOUND[dtype]


@over_shapes
@over_backends
@pytest.mark.parametrize("official", (False, True))
@pytest.mark.parametrize("chunk", (None, -1, 6))
def test_refreshes_and_subsets(shape, backend, official, chunk):
    p = matrix(shape)
    opt = adamw(
        p, SubspaceMomentum(rank=3, update_every=4, method="svd", subset_size=chunk, official_refresh=official), backend
    )
    oracle = SubspaceTranscription(3, 4, chunk, LR, BETAS, EPS, official_refresh=official)
    assert max(follow(opt, p, oracle, 9)) < 1e-10  # each with its own basis


@over_shapes
@over_cells
@pytest.mark.parametrize("method", ("gram", "svd"))
def test_conda(shape, dtype, backend, method):
    p = matrix(shape, dtype)
    opt = adamw(p, Conda(update_every=4, scale=0.5, method=method), backend)
    oracle = CondaTranscription(4, 0.5, LR, BETAS, EPS)
    assert max(follow(opt, p, oracle, 9, projector)) < 2 * BOUND[dtype]


@pytest.mark.parametrize("method", ("gram", "svd"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conda_chooses_the_basis_of_the_paper(shape, method):
    p = matrix(shape)
    opt = adamw(p, Conda(update_every=4, method=method))
    assert max(follow(opt, p, CondaTranscription(4, 1.0, LR, BETAS, EPS), 9)) < 1e-9


@pytest.mark.parametrize("shape", ((60, 20), (20, 60), (40, 40)), ids=str)
def test_gram_basis_is_the_svd_basis_up_to_signs(shape):
    m = tensor(shape)
    side = "right" if shape[0] >= shape[1] else "left"
    a, b = (full_basis(m, side, method) for method in ("gram", "svd"))
    products = a @ b.t() if side == "right" else a.t() @ b
    torch.testing.assert_close(products.abs(), torch.eye(min(shape), dtype=m.dtype), rtol=0, atol=1e-9)


@pytest.mark.parametrize("projection, make", [
    (SubsetNorm(-2), lambda: SubsetTranscription(-2, "chunk", LR, BETAS, EPS)),
    (SubspaceMomentum(rank=4, update_every=50), lambda: SubspaceTranscription(4, 50, None, LR, BETAS, EPS)),
    (Conda(update_every=50), lambda: CondaTranscription(50, 1.0, LR, BETAS, EPS)),
], ids=["subset", "subspace", "conda"])  # fmt: skip
@over_backends
def test_two_hundred_steps(projection, make, backend):
    p = matrix((24, 36), torch.float32)
    given = None if isinstance(projection, SubsetNorm) else projector
    assert max(follow(adamw(p, projection, backend), p, make(), 200, given)) < 1e-5


def test_subset_sizes():
    for n in (1, 7, 12, 36, 97, 360, 1024, 9030):
        for target in (-1, -2, -3, 1, 5, 64, 10**6):
            assert subset_size(n, target) == by_trial(n, target), (n, target)


@pytest.mark.parametrize("size", (16, 12, 1))
def test_hadamard_basis_is_orthonormal(size):
    gen = torch.Generator().manual_seed(1)
    for side in ("left", "right"):
        b = hadamard_basis(size, min(size, 5), side, gen, torch.float64)
        b = b if side == "left" else b.t()
        torch.testing.assert_close(b.t() @ b, torch.eye(min(size, 5), dtype=b.dtype), rtol=0, atol=1e-12)
        if size == 16:
            assert set(b.abs().flatten().tolist()) == {0.25}


# What every step offers


@over_every
@over_backends
@pytest.mark.parametrize("form", ("bf16", "bf16_stochastic", "int8", "int4"))
def test_formats_follow_fp32(projection, backend, form):
    made = []
    for name in ("fp32", form):
        params = parameters((30, 301), (20, 16))
        opt = adamw(params, projection, backend, state_format=name, min_quantized_numel=0)
        train(opt, params, 0, 4)
        made.append(params)
    for p, q, start in zip(*made, parameters((30, 301), (20, 16)), strict=True):
        assert 0 < (p - q).norm() < (0.4 if form == "int4" else 0.1) * (p - start).norm()


@over_every
@over_backends
@pytest.mark.parametrize("precision", ("split24", "stochastic", "master", "kahan"))
def test_precisions(projection, backend, precision):
    p32, p16 = parameters((20, 64)), parameters((20, 64), dtype=torch.bfloat16)
    p32[0].data.copy_(p16[0].data)
    start = p32[0].detach().clone()
    lr = 2e-3 if getattr(projection, "subset_size", None) is None else 4e-2  # sums of squares make small steps
    one = adamw(p32, projection, backend, lr=lr)
    two = adamw(p16, projection, backend, lr=lr, param_precision=precision)
    for step in range(5):
        p32[0].grad = torch.randn((20, 64), generator=torch.Generator().manual_seed(step)).bfloat16().float()
        p16[0].grad = p32[0].grad.bfloat16()
        one.step(), two.step()
    kept, moved = weights(p16[0], two.state[p16[0]]), (p32[0].detach() - start).norm()
    assert (kept - p32[0].detach()).norm() < (1.0 if precision == "stochastic" else 0.1) * moved


@over_every
@over_backends
@pytest.mark.parametrize("options", [{}, {"state_format": "int8", "min_quantized_numel": 0}], ids=["fp32", "int8"])
def test_resume_is_exact(projection, backend, options):
    shapes = ((30, 64), (64, 30), (9,))
    made = {"param_precision": "split24", **options}
    params = parameters(*shapes, dtype=torch.bfloat16)
    opt = adamw(params, projection, backend, **made)
    train(opt, params, 0, 4)
    file = io.BytesIO()
    torch.save((opt.state_dict(), [p.detach() for p in params]), file)
    train(opt, params, 4, 8)
    file.seek(0)
    saved, values = torch.load(file, weights_only=True)
    again = [torch.nn.Parameter(v) for v in values]
    other = adamw(again, projection, backend, **made)
    other.load_state_dict(saved)
    train(other, again, 4, 8)
    assert_same_bits(tensors(other, again), tensors(opt, params))


@over_every
@over_backends
def test_maximize_and_loss_scale(projection, backend):
    mine, theirs = parameters((30, 64), (64, 30)), parameters((30, 64), (64, 30))
    one = adamw(mine, projection, backend, maximize=True, amp_fused=True)
    two = adamw(theirs, projection, backend)
    one.grad_scale, one.found_inf = torch.full((1,), 1024.0), torch.zeros(1)
    for step in range(5):
        set_grads(mine, step, scale=-1024.0), set_grads(theirs, step)
        one.step(), two.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@over_every
@over_backends
def test_clipping_equals_clipped_gradients(projection, backend):
    if getattr(projection, "method", "") == "randomized":  # its sketch of a rescaled gradient is rounded otherwise
        projection = replace(projection, method="svd")
    mine, theirs = parameters((30, 64), (64, 30), (5,)), parameters((30, 64), (64, 30), (5,))
    one, two = adamw(mine, projection, backend, clip_grad_norm=0.5), adamw(theirs, projection, backend)
    for step in range(4):
        set_grads(mine, step), set_grads(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        one.step(), two.step()
        torch.testing.assert_close(one.grad_norm, norm.view(1))
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@over_every
@pytest.mark.parametrize("form", ("fp32", "int8"))
def test_overflow_on_the_device_changes_nothing(projection, form):
    params = parameters((30, 64), (64, 30))
    opt = adamw(params, projection, state_format=form, min_quantized_numel=0)
    train(opt, params, 0, 3)
    before = tensors(opt, params)
    for p in params:
        p.grad.fill_(float("nan"))
    device = opt._plan.devices[0]
    device.set_amp(None, torch.ones(1))
    for row in device.scalars.rows:  # a step that would choose a subspace anew
        row.step = 4 if isinstance(projection, Conda) else 3
    device.step([p.grad for p in params])
    assert_same_bits(tensors(opt, params), before)


@over_every
@over_backends
def test_decoupled_decay_and_transposed_parameters(projection, backend):
    """Decay shrinks by lr * decay a step; the layout of a parameter changes nothing where the second moment has none."""
    p = torch.nn.Parameter(torch.ones(12, 20))
    opt = adamw([p], projection, backend, weight_decay=0.5)
    p.grad = torch.zeros_like(p)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((12, 20), 1 - LR * 0.5))
    q = torch.nn.Parameter(tensor((20, 12)).float().t())
    r = torch.nn.Parameter(tensor((20, 12)).float())
    one, two = adamw([q], projection, backend), adamw([r], projection, backend)
    for step in range(4):
        set_grads([r], step)
        q.grad = r.grad.t()
        one.step(), two.step()
    torch.testing.assert_close(q.t(), r, rtol=1e-5, atol=1e-6)


def test_state_bytes():
    n = 64 * 96
    for projection, want in (
        (SubsetNorm(), 4 * n + 4 * n // subset_size(n, -2)),
        (SubsetNorm("heuristic"), 4 * n + 4 * 96),
        (SubspaceMomentum(rank=8), 4 * 64 * 8 + 4 * 8 * 96 + 4 * n),
        (SubspaceMomentum(rank=8, subset_size=-2), 4 * 64 * 8 + 4 * 8 * 96 + 4 * n // subset_size(n, -2)),
        (Conda(), 8 * n + 4 * 64 * 64),
    ):
        opt = adamw(params := parameters((64, 96)), projection)
        train(opt, params, 0, 1)
        assert state_bytes(opt) == want, projection
    opt = adamw(params := parameters((64, 96)), SubsetNorm(), state_format="int8")
    train(opt, params, 0, 1)
    assert state_bytes(opt) == n + 4 * math.ceil(n / 256) + 4 * n // subset_size(n, -2)


def test_scratch_buffers_are_small_and_shared():
    params = parameters((512, 640), (640, 512), (300, 128))
    for projection in (SubsetNorm(), SubspaceMomentum(rank=3), Conda()):
        opt = adamw(params, projection)
        set_grads(params, 0)
        opt.step()
        buffers = opt._plan.devices[0].projected.buffers
        assert len({key[0] for key in buffers}) == len(buffers) - isinstance(projection, Conda)
        small = [t.numel() for (_, _, full), t in buffers.items() if not full]
        assert sum(small) <= 3 * (10240 + pc.PAD)
        if not isinstance(projection, Conda):
            assert len(small) == 1
        assert len(site_of(opt).pieces.pieces) > 10


def test_names_and_errors():
    model = torch.nn.Linear(40, 30)
    opt = fusedopt.create("adamw_sn8bit", model, subset_size=-1)
    assert opt.param_groups[0]["projection"] == SubsetNorm(-1) and opt.param_groups[0]["state_format"] == "int8"
    assert fusedopt.create("conda", model, scale=0.5).param_groups[0]["projection"] == Conda(scale=0.5)
    opt = fusedopt.create("subspace_momentum_adamw", model, rank=4, method="srht")
    assert opt.param_groups[0]["projection"] == SubspaceMomentum(rank=4, method="srht")
    assert fusedopt.create("conda_adam", model).param_groups[0]["projection"] == Conda()
    for projection in EVERY.values():
        for cls in (fusedopt.Lion, fusedopt.SGD):
            with pytest.raises(ValueError, match="is a form of Adam, and cannot step with rule"):
                cls(model.parameters(), projection=projection)
        with pytest.raises(ValueError, match="cannot step with rule 'adam_amsgrad'"):
            fusedopt.AdamW(model.parameters(), projection=projection, amsgrad=True)
    for make, message in (
        (lambda: SubsetNorm(0), "Invalid subset_size: 0"),
        (lambda: SubsetNorm("rows"), "Invalid subset_size: 'rows'"),
        (lambda: SubspaceMomentum(method="pca"), "Invalid projection method: 'pca'"),
        (lambda: SubspaceMomentum(subset_size=1.5), "Invalid subset_size: 1.5"),
        (lambda: SubspaceMomentum(rank=0), "Invalid rank: 0"),
        (lambda: Conda(method="qr"), "Invalid projection method: 'qr'; it is one of gram, svd"),
        (lambda: Conda(update_every=0), "Invalid update_every: 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
