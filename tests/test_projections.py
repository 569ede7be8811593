"""Projected steps against transcriptions of the papers (tests/oracles), with one basis for both; fp64 and fp32."""

from __future__ import annotations

import pytest
import torch
from configs import BACKENDS, backend_argument
from oracles.apollo import Apollo
from oracles.dct_adamw import DctAdamW
from oracles.frugal import Frugal
from oracles.galore import GaLore
from oracles.lowrank import Adam
from oracles.qgalore import QGaLore
from projections import BETAS, DECAY, EPS, LR, SHAPES, basis_of, follow, matrix, site_of

import fusedopt
from fusedopt.projections.dct import dct_columns
from fusedopt.projections.selection import active_blocks
from fusedopt.projections.subspace import gaussian_projector

ADAM = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
DTYPES = {torch.float64: 1e-11, torch.float32: 1e-6}
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def adamw(p, projection, **options):
    return fusedopt.AdamW([p], projection=projection, **{**ADAM, **options})


@over_shapes
@over_dtypes
@pytest.mark.parametrize("method", ("svd", "randomized", "random"))
def test_galore(shape, dtype, method):
    p = matrix(shape, dtype)
    opt = adamw(p, fusedopt.GaLore(rank=3, update_every=4, scale=0.5, method=method))
    oracle = GaLore(3, 4, 0.5, LR, BETAS, EPS, DECAY, form="D1", decay_first=True)
    # p (1 - lr decay) - lr u is what both compute: the engine in one rounding
    assert max(follow(opt, p, oracle, 11, basis_of)) < DTYPES[dtype]


@pytest.mark.parametrize("side", ("left", "right", "reverse_std"))
@over_shapes
def test_sides(shape, side):
    p = matrix(shape)
    opt = adamw(p, fusedopt.GaLore(rank=3, update_every=4, scale=1.0, side=side))
    std = "right" if shape[0] >= shape[1] else "left"
    mine = {"right": "left", "left": "right"}[std] if side == "reverse_std" else side
    oracle = GaLore(3, 4, 1.0, LR, BETAS, EPS, DECAY, form="D1", decay_first=True, side=mine)
    assert max(follow(opt, p, oracle, 6, basis_of)) < 1e-11
    assert opt.state[p]["exp_avg"].shape == ((3, shape[1]) if mine == "left" else (shape[0], 3))


@over_shapes
def test_qgalore(shape):
    p = matrix(shape)
    opt = adamw(p, fusedopt.QGaLore(rank=3, update_every=4, scale=0.5))
    oracle = QGaLore(3, 4, 0.5, LR, BETAS, EPS, DECAY, projector_bits=None)
    # the transcription decays after the update, the engine before: p (1 - lr decay) + u and (p + u) (1 - lr decay)
    assert max(follow(opt, p, oracle, 9, basis_of, lambda step: step in (1, 5, 9))) < 0.5 * LR * DECAY
    opt = adamw(p := matrix(shape), fusedopt.QGaLore(rank=3, update_every=4, scale=0.5), weight_decay=0.0)
    oracle = QGaLore(3, 4, 0.5, LR, BETAS, EPS, 0.0, projector_bits=None)
    assert max(follow(opt, p, oracle, 9, basis_of, lambda step: step in (1, 5, 9))) < 1e-11
    stored = {k: v for k, v in opt.state[p].items() if k.startswith("projector")}
    assert (
        stored["projector_codes"].numel() == (3 * min(shape) + 1) // 2
        and stored["projector_codes"].dtype == torch.uint8
    )


@over_shapes
@over_dtypes
@pytest.mark.parametrize("residual", ("sign", "sgd", "none"))
@pytest.mark.parametrize("method", ("svd", "random", "columns", "top_columns"))
def test_frugal(shape, dtype, residual, method):
    p = matrix(shape, dtype)
    options = {"density": 0.4, "update_every": 4, "scale": 0.5, "residual_scale": 0.25, "method": method}
    opt = adamw(p, fusedopt.Frugal(residual=residual, **options))
    chosen = method.endswith("columns")
    oracle = Frugal(0.4, 4, "columns" if chosen else "svd", {"sign": "sign_sgd", "sgd": "sgd", "none": "no"}[residual],
                    0.25, LR, BETAS, EPS, DECAY, 0.5)  # fmt: skip
    hand_in = (lambda o: o.state[p]["indices"].long()) if chosen else basis_of
    distances = follow(opt, p, oracle, 9, hand_in, lambda step: step in (1, 5, 9))
    assert max(distances) < DTYPES[dtype]


@over_shapes
@over_dtypes
@pytest.mark.parametrize("scope", ("channel", "tensor"))
@pytest.mark.parametrize("growth", (1.01, None))
def test_apollo(shape, dtype, scope, growth):
    p = matrix(shape, dtype)
    opt = adamw(p, fusedopt.Apollo(rank=3, update_every=4, scale=4.0, scope=scope, norm_growth=growth))
    oracle = Apollo(4.0, scope, LR, BETAS, EPS, DECAY, limit=growth is not None, form="D1", decay_first=True)
    step = iter(range(1, 100))

    def projector(opt):
        keys = {"seed": 0, "tensor_id": 0, "step": (next(step) - 1) // 4 * 4 + 1}
        return gaussian_projector(shape, 3, site_of(opt).side, dtype=torch.float64, **keys)

    assert max(follow(opt, p, oracle, 11, projector)) < DTYPES[dtype]


@over_shapes
@over_dtypes
@pytest.mark.parametrize("feedback", (None, "fp32", "int8", "int4"))
@pytest.mark.parametrize("every", (1, 3))
def test_dct(shape, dtype, feedback, every):
    p = matrix(shape, dtype)
    opt = adamw(p, fusedopt.DCT(rank=3, update_every=every, error_feedback=feedback))
    oracle = DctAdamW(3, every, {None: None, "fp32": "fp32", "int8": 8, "int4": 4}[feedback], True, "matmul", 1, LR,
                      BETAS, EPS, DECAY)  # fmt: skip
    distances = follow(opt, p, oracle, 9)
    bound = DTYPES[dtype] if dtype == torch.float64 or feedback in (None, "fp32") else 0.002  # a code may tip at a tie
    assert max(distances) < bound
    assert sorted(oracle.indices.tolist()) == opt.state[p]["indices"].tolist()


def test_dct_keeps_no_basis():
    p = matrix((64, 48), torch.float32)
    opt = adamw(p, fusedopt.DCT(rank=8))
    p.grad = torch.randn_like(p)
    opt.step()
    assert fusedopt.state_bytes(opt) == 2 * 64 * 8 * 4 + 8 * 4
    columns = dct_columns(48, opt.state[p]["indices"].long(), torch.float64)
    assert torch.allclose(columns.T @ columns, torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize(
    "cls,options", (("lion", {}), ("sgd", {"momentum": 0.9}), ("sgd", {}), ("adam", {"amsgrad": True}))
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_rules_in_a_fixed_subspace(cls, options, backend):
    """A projected step is an ordinary step of R, projected back."""
    p, basis = matrix((24, 16), torch.float32), None
    opt = fusedopt.create(
        cls, [p], lr=0.01, projection=fusedopt.GaLore(4, 100, 1.0), backend=backend_argument(backend), **options
    )
    low = torch.nn.Parameter(torch.zeros(24, 4))
    plain = fusedopt.create(cls, [low], lr=0.01, backend=backend_argument(backend), **options)
    start = p.detach().clone()
    for step in range(5):
        p.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(step))
        opt.step()
        basis = site_of(opt).basis()
        low.grad = p.grad @ basis.T
        plain.step()
    want = start + low.detach() @ basis
    if cls == "sgd" and options:
        assert (p - want).abs().max() < 1e-5
    else:
        assert (p - want).abs().max() < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", ("sign", "sgd", "none"))
@pytest.mark.parametrize("order", ("ascending", "random", "mirror"))
def test_frugal_by_whole_tensors(backend, residual, order):
    """A tensor whose turn it is starts AdamW afresh; the others go through the stateless rule."""
    options = {"lr": 0.01, "betas": BETAS, "eps": EPS, "weight_decay": 0.1}
    params = [torch.nn.Parameter(torch.randn(9, 7, generator=torch.Generator().manual_seed(i))) for i in range(5)]
    mirror = [p.detach().double().clone() for p in params]
    projection = fusedopt.Frugal(0.4, 3, method="blocks", order=order, residual=residual, residual_scale=0.5)
    opt = fusedopt.AdamW(
        params, projection=projection, backend=backend_argument(backend), clip_grad_norm=1e9, **options
    )
    adam = {}
    for step in range(1, 11):
        if step % 3 == 1:
            active = active_blocks(5, 0.4, (step - 1) // 3, order)
            adam = {i: Adam(BETAS, EPS) for i in active}
            assert len(active) == 2
        for i, (p, q) in enumerate(zip(params, mirror, strict=True)):
            g = torch.randn(9, 7, generator=torch.Generator().manual_seed(100 * step + i))
            p.grad = g
            u = {"sign": 0.5 * g.sign(), "sgd": 0.5 * g, "none": 0 * g}[residual].double()
            u = adam[i].direction(g.double()) if i in active else u
            q -= 0.01 * (u + 0.1 * q)
        opt.step()
        assert [i for i, p in enumerate(params) if "exp_avg" in opt.state[p]] == active
        for p, q in zip(params, mirror, strict=True):
            assert (p - q).abs().max() < 2e-6
    again = fusedopt.AdamW(params, projection=projection, **options)
    again.load_state_dict(opt.state_dict())
    assert ["exp_avg" in again.state[p] for p in params] == ["exp_avg" in opt.state[p] for p in params]
