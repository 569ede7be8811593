"""Muon: Newton-Schulz, which parameters it takes, torch.optim.Muon, storage. Long, skipped and resumed runs: test_matrix_rules."""

import copy
import json

import pytest
import torch
from configs import parameters, set_grads

import fusedopt
from fusedopt.newton_schulz import POLAR_EXPRESS, QUINTIC, orthogonalize, schedule

SHAPES = ((32, 48), (48, 32), (32, 48), (6, 4, 3, 3), (48,))
needs_torch_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")


def matrices(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(x, coefficients):
    """In fp64 from the singular values: odd polynomials act on them alone."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    if len(set(coefficients)) > 1:
        s = s / 1.01
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return u @ (s.unsqueeze(-1) * vh), s


@pytest.mark.parametrize("shape", [(40, 40), (40, 130), (130, 40), (3, 20, 60), (1, 7), (7, 1)])
@pytest.mark.parametrize("name", ["quintic", "polar_express"])
def test_iteration(shape, name):
    coefficients = schedule(QUINTIC, 5) if name == "quintic" else schedule("polar_express", 8)
    x = matrices(*shape, dtype=torch.float64)
    want, values = exact(x, coefficients)
    torch.testing.assert_close(orthogonalize(x, coefficients), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(orthogonalize(x.float(), coefficients).double(), want, rtol=0, atol=3e-4)
    got = orthogonalize(x.bfloat16(), coefficients)
    assert got.dtype == torch.bfloat16
    assert float((got.double() - want).norm() / want.norm()) < 0.05
    if shape[-1] != shape[-2]:  # a square random matrix has singular values near 0
        limits = (0.67, 1.21) if name == "quintic" else (0.97, 1.03)
        assert limits[0] < float(values.min()) and float(values.max()) < limits[1]
        assert limits[0] - 0.03 < float(torch.linalg.svdvals(got.float()).min())
        assert float(torch.linalg.svdvals(got.float()).max()) < limits[1] + 0.03


def test_zero_matrices_and_schedules():
    assert not orthogonalize(torch.zeros(3, 4), schedule(QUINTIC, 5)).any()
    assert schedule("polar_express", 10)[-1] == POLAR_EXPRESS[-1]
    for coefficients, steps in (
        ((1.0, 2.0), 5),
        ("other", 5),
        (QUINTIC, 0),
        (QUINTIC, 2.0),
        ((1.0, 2.0, float("nan")), 5),
    ):
        with pytest.raises(ValueError, match="ns_"):
            schedule(coefficients, steps)


@needs_torch_muon
@pytest.mark.parametrize(
    "options", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0}], ids=str
)
def test_equals_torch(options):
    """Ten steps in fp32 with bf16 products in both: to the rounding of a bf16 norm, which torch divides by."""
    one, two = parameters(*SHAPES[:3]), parameters(*SHAPES[:3])
    start = [p.detach().clone() for p in one]
    opt, other = fusedopt.Muon(one, lr=0.02, **options), torch.optim.Muon(two, lr=0.02, **options)
    for step in range(10):
        set_grads(one, step)
        set_grads(two, step)
        opt.step()
        other.step()
    for p, q, first in zip(one, two, start, strict=True):
        assert float((p - q).detach().norm() / (q - first).detach().norm()) < 0.02


def names_by_kind(opt):
    return {group["orthogonalize"]: group["param_names"] for group in opt.param_groups}


def test_a_model_is_split():
    model = torch.nn.ModuleDict({
        "wte": torch.nn.Embedding(11, 8), "block": torch.nn.Linear(8, 8), "conv": torch.nn.Conv1d(8, 4, 3),
        "norm": torch.nn.LayerNorm(8), "lm_head": torch.nn.Linear(8, 11, bias=False),
    })  # fmt: skip
    opt = fusedopt.Muon(model, lr=0.02, adam_lr=0.001)
    kinds = names_by_kind(opt)
    assert kinds[True] == ["block.weight", "conv.weight"]
    assert set(kinds[False]) == {"wte.weight", "block.bias", "conv.bias", "norm.weight", "norm.bias", "lm_head.weight"}
    assert [group["lr"] for group in opt.param_groups] == [0.02, 0.001]
    by_name = fusedopt.Muon(model.named_parameters(), lr=0.02)
    assert {k: set(v) for k, v in names_by_kind(by_name).items()} == {k: set(v) for k, v in kinds.items()}
    assert {k: set(v) for k, v in names_by_kind(fusedopt.create("muon", model)).items()} == {
        k: set(v) for k, v in kinds.items()
    }


def test_groups_say_what_they_are():
    matrix, table, vector = parameters((6, 4), (9, 4), (4,))
    opt = fusedopt.Muon([{"params": [matrix]}, {"params": [table, vector], "orthogonalize": False, "lr": 0.3}], lr=0.02)
    assert [g["orthogonalize"] for g in opt.param_groups] == [True, False]
    assert [g["lr"] for g in opt.param_groups] == [0.02, 0.3]
    opt.add_param_group({"params": parameters((5, 3), (3,))})
    assert [g["orthogonalize"] for g in opt.param_groups] == [True, False, True, False]
    with pytest.raises(ValueError, match="no matrix"):
        fusedopt.Muon([{"params": [vector], "orthogonalize": True}])
    for bad in ({"momentum": 1.0}, {"adjust_lr_fn": "best"}, {"ns_dtype": "fp8"}, {"ns_steps": 0}, {"eps": -1.0},
                {"projection": fusedopt.GaLore(rank=2)}):  # fmt: skip
        with pytest.raises(ValueError):
            fusedopt.Muon([matrix], **bad)


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
def test_narrow_momentum(form):
    one, two = parameters((64, 96), (96, 64)), parameters((64, 96), (96, 64))
    start = [p.detach().clone() for p in one]
    exact_opt = fusedopt.Muon(one, lr=0.02)
    narrow = fusedopt.Muon(two, lr=0.02, state_format=form, min_quantized_numel=0)
    for step in range(10):
        for ps, opt in ((one, exact_opt), (two, narrow)):
            set_grads(ps, step)
            opt.step()
    bound = {"bf16": 0.05, "int8": 0.1, "int4": 0.6}[form]
    for p, q, first in zip(one, two, start, strict=True):
        assert float((p - q).detach().norm() / (p - first).detach().norm()) < bound
    assert (
        fusedopt.state_bytes(narrow)
        < fusedopt.state_bytes(exact_opt) * {"bf16": 0.51, "int8": 0.27, "int4": 0.15}[form]
    )


@pytest.mark.parametrize("precision", fusedopt.list_precisions())
def test_bf16_parameters(precision):
    wide, narrow = parameters(*SHAPES), parameters(*SHAPES, dtype=torch.bfloat16)
    for p, q in zip(wide, narrow, strict=True):
        p.data.copy_(q.data)
    one, two = fusedopt.Muon(wide, lr=0.02), fusedopt.Muon(narrow, lr=0.02, param_precision=precision)
    for step in range(8):
        set_grads(narrow, step)
        for p, q in zip(wide, narrow, strict=True):
            p.grad = q.grad.float()
        one.step()
        two.step()
    kept = two.fp32_state_dict(torch.nn.ParameterList(narrow))
    for i, p in enumerate(wide):
        bound = {"split32": 1e-6, "master": 1e-6, "split24": 1e-4, "kahan": 1e-2}.get(precision, 3e-2)
        torch.testing.assert_close(kept[str(i)], p.detach(), rtol=bound, atol=bound)


def test_layouts_and_shared_shapes():
    """A transposed weight is stepped as the matrix it is, and equal matrices by themselves as they are together."""
    together, apart, turned = parameters(*SHAPES[:3]), parameters(*SHAPES[:3]), parameters(*SHAPES[:3])
    turned = [torch.nn.Parameter(p.detach().t().contiguous().t()) for p in turned]
    one, three = fusedopt.Muon(together, lr=0.02, ns_dtype="fp32"), fusedopt.Muon(turned, lr=0.02, ns_dtype="fp32")
    alone = [fusedopt.Muon([p], lr=0.02, ns_dtype="fp32") for p in apart]
    for step in range(5):
        set_grads(together, step)
        for p, q, r, opt in zip(together, apart, turned, alone, strict=True):
            q.grad, r.grad = p.grad.clone(), p.grad.clone()
            opt.step()
        one.step()
        three.step()
    for p, q, r in zip(together, apart, turned, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(p, r, rtol=1e-4, atol=1e-5)


def test_many_matrices_go_in_batches(monkeypatch):
    from fusedopt.projections import orthogonal

    monkeypatch.setattr(orthogonal, "CPU_TOGETHER", 2 * 6 * 4)
    one = parameters(*[(6, 4)] * 5)
    two = [torch.nn.Parameter(p.detach().clone()) for p in one]
    opt = fusedopt.Muon(one, lr=0.02, ns_dtype="fp32")
    for step in range(3):
        set_grads(one, step)
        for p, q in zip(one, two, strict=True):
            q.grad = p.grad.clone()
        opt.step()
        if step == 0:
            monkeypatch.undo()
            other = fusedopt.Muon(two, lr=0.02, ns_dtype="fp32")
        other.step()
    batches = {id(slot.site.batch): len(slot.site.batch.slots) for slot in opt._plan.slots}
    assert sorted(batches.values()) == [1, 2, 2]
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@needs_torch_muon
def test_loads_torchs_state():
    one, two = parameters(*SHAPES[:3]), parameters(*SHAPES[:3])
    theirs = torch.optim.Muon(one, lr=0.02)
    for step in range(3):
        set_grads(one, step)
        theirs.step()
    for p, q in zip(one, two, strict=True):
        q.data.copy_(p.data)
    opt = fusedopt.Muon(two, lr=0.02)
    opt.load_state_dict(theirs.state_dict())
    for step in range(3, 6):
        for ps, o in ((one, theirs), (two, opt)):
            set_grads(ps, step)
            o.step()
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=0.02, atol=2e-3)


@needs_torch_muon
@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_gives_torch_its_state(form):
    """State dicts in torch's form go on in torch.optim.Muon; with rates by noise, or a projection, there is no such form."""
    one, two = parameters(*SHAPES[:3]), parameters(*SHAPES[:3])
    opt = fusedopt.Muon(one, lr=0.02, state_format=form, min_quantized_numel=0)
    for step in range(3):
        set_grads(one, step)
        opt.step()
    for p, q in zip(one, two, strict=True):
        q.data.copy_(p.data)
    theirs = torch.optim.Muon(two, lr=0.5)
    given = copy.deepcopy(opt.state_dict(format="torch"))  # torch.optim takes tensors as they are
    assert all(set(entry) <= {"step", "momentum_buffer"} for entry in given["state"].values())
    theirs.load_state_dict(given)
    assert theirs.param_groups[0]["lr"] == 0.02
    for p, q in zip(one, two, strict=True):
        assert theirs.state[q]["momentum_buffer"].dtype == torch.float32
        assert form != "fp32" or torch.equal(theirs.state[q]["momentum_buffer"], opt.state[p]["momentum_buffer"])
    begun = [p.detach().clone() for p in one]
    for step in range(3, 6):
        for ps, o in ((one, opt), (two, theirs)):
            set_grads(ps, step)
            o.step()
    for p, q, start in zip(one, two, begun, strict=True):  # bf16 products: a percent or two of the way gone
        assert (p - q).norm() < (0.01 if form == "fp32" else 0.05) * (p - start).norm()
    noisy = fusedopt.Muon(one, lr=0.02, noise_rates=(1.0, 0.9))
    noisy.step()
    with pytest.raises(ValueError, match="no torch.optim form"):
        noisy.state_dict(format="torch")


def test_schedulers_reach_both_groups():
    params = parameters((6, 4), (4,))
    opt = fusedopt.Muon(params, lr=0.1, adam_lr=0.01)
    schedule_ = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    set_grads(params, 0)
    opt.step()
    schedule_.step()
    assert [g["lr"] for g in opt.param_groups] == [0.05, 0.005]


@needs_torch_muon
def test_a_quick_run_of_the_benchmark(tmp_path, capsys):
    from bench.__main__ import main

    assert main(["muon", "--quick", "--out", str(tmp_path / "muon.json")]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "muon.json").read_text())["rows"]}
    assert rows["torch.optim.Muon"]["ratio"] == 1.0 and all(row["ratio"] > 0 for row in rows.values())
    assert all(row["name"] in capsys.readouterr().out for row in list(rows.values())[:1])
    assert rows["fusedopt.Muon"]["state_bytes"] == rows["torch.optim.Muon"]["state_bytes"]
