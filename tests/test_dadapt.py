"""D-Adaptation for SGD and AdaGrad, A-DoG: runs in which their estimates grow, against the equations and other people's code."""

import pytest
import torch
from configs import each_backend, parameters
from oracle_cases import ORACLES, relative_error
from oracles.installed import package

import fusedopt
from fusedopt.rule import optimizers

SHAPES = ((7, 5), (5,), (3, 4, 2, 2), ())
GROWING = {
    "dadapt_sgd": ({"d0": 1e-3, "momentum": 0.5}, "d", lambda o: o.d),
    "dadapt_adagrad": ({"d0": 1e-3}, "d", lambda o: o.d),
    "adog": ({"reps_rel": 1e-3}, "max_distance", lambda o: o.r),
}


def pull(params, step: int) -> None:
    """Towards a point that is 3 away in every coordinate."""
    gen = torch.Generator().manual_seed(7 + step)
    for p in params:
        noise = torch.randn(p.shape, generator=gen, dtype=torch.float64)
        p.grad = (p.detach().double() - 3 + 0.1 * noise).to(p.dtype)


@pytest.mark.parametrize("name", GROWING)
def test_growing_estimates_follow_the_equations(name):
    options, memory, theirs = GROWING[name]
    mine, others = parameters(*SHAPES, dtype=torch.float64), parameters(*SHAPES, dtype=torch.float64)
    opt, oracle = optimizers()[name](mine, backend="reference", **options), ORACLES[name][0](others, lr=1.0, **options)
    seen = []
    for step in range(60):
        pull(mine, step)
        pull(others, step)
        opt.step()
        oracle.step()
        seen.append(float(opt.state[mine[0]][memory]))
        assert seen[-1] == pytest.approx(theirs(oracle), rel=1e-9)
    assert seen[-1] > 20 * seen[0] and len(set(seen)) > 5, seen
    for p, q, q0 in zip(mine, others, parameters(*SHAPES, dtype=torch.float64), strict=True):
        assert relative_error(p.detach() - q0.detach(), q.detach() - q0.detach()) <= 1e-9


@pytest.mark.parametrize("name, theirs", [("dadapt_sgd", "DAdaptSGD"), ("dadapt_adagrad", "DAdaptAdaGrad")])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_growing_estimates_match_package(name, theirs, weight_decay):
    """Which keeps its scalars in fp32."""
    options = {**GROWING[name][0], "lr": 1.0, "weight_decay": weight_decay}
    mine, others = parameters(*SHAPES, dtype=torch.float64), parameters(*SHAPES, dtype=torch.float64)
    opt = optimizers()[name](mine, backend="reference", **options)
    other = package(theirs, weight_decouple=False)(others, **{"momentum": 0.0, **options})
    for step in range(40):
        pull(mine, step)
        pull(others, step)
        opt.step()
        other.step()
    assert float(opt.state[mine[0]]["d"]) > 0.01
    for p, q, q0 in zip(mine, others, parameters(*SHAPES, dtype=torch.float64), strict=True):
        assert relative_error(p.detach() - q0.detach(), q.detach() - q0.detach()) <= 1e-4


@pytest.mark.parametrize("name", ["dadapt_sgd", "dadapt_adagrad"])
def test_growth_is_limited(name):
    params = parameters(*SHAPES)
    opt = optimizers()[name](params, d0=1e-3, growth_rate=1.1)
    last = 1e-3
    for step in range(30):
        pull(params, step)
        opt.step()
        d = float(opt.state[params[0]]["d"])
        assert last <= d <= 1.1 * last * (1 + 1e-12)
        last = d
    assert last > 2e-3


@each_backend
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", GROWING)
def test_nothing_moves_without_gradients(name, backend, capturable):
    """The first gradient that is not zero counts as the first; before it nothing is divided by zero."""
    options = GROWING[name][0]
    params, twins = parameters(*SHAPES), parameters(*SHAPES)
    opt, plain = (optimizers()[name](ps, backend=backend, capturable=capturable, **options) for ps in (params, twins))
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()
        torch.testing.assert_close(params, twins, rtol=0, atol=0)
    if name == "adog":
        return  # its weights have grown with the steps
    for step in range(4):
        for ps, o in ((params, opt), (twins, plain)):
            pull(ps, step)
            o.step()
    torch.testing.assert_close(params, twins, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", GROWING)
def test_reaches_the_point(name):
    """From an estimate a thousand times too small, without a learning rate."""
    params = parameters(*SHAPES)
    opt = optimizers()[name](params, **GROWING[name][0])
    for step in range(400):
        pull(params, step)
        opt.step()
    for p in params:
        assert float((p.detach() - 3).abs().max()) < 0.5


def test_options_out_of_range():
    params = parameters((3,))
    for cls in (fusedopt.DAdaptSGD, fusedopt.DAdaptAdaGrad):
        for options, message in (
            ({"d0": 0.0}, "Invalid d0 value: 0.0"),
            ({"growth_rate": 1.0}, "Invalid growth_rate value: 1.0; it must be above 1"),
            ({"momentum": 1.0}, r"Invalid momentum value: 1.0; it is in \[0, 1\)"),
            ({"state_format": {"step_sum": "int8"}}, "step_sum"),
            ({"projection": fusedopt.GaLore(rank=2)}, "takes no projection"),
        ):
            with pytest.raises(ValueError, match=message):
                cls(params, **options)
    with pytest.raises(ValueError, match="positive, or 0 with a positive eps"):
        fusedopt.DAdaptAdaGrad(params, initial_accumulator_value=0.0)
    for options in ({"reps_rel": 0.0}, {"coefficient": 0.0}, {"eps": -1.0}):
        with pytest.raises(ValueError, match="Invalid"):
            fusedopt.ADoG(params, **options)
