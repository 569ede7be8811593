"""Rules with numbers of whole tensors on sharded models: sums are over the mesh, memory is the same on every process."""

import torch
from processes import run
from sharded_models import sharded, train, weights
from test_distributed import pair

import fusedopt

CASES = (
    (fusedopt.NovoGrad, {"lr": 0.02, "weight_decay": 0.1}),
    (fusedopt.SGDSaI, {"lr": 0.002}),
    (fusedopt.TVLARS, {"lr": 0.5, "trust_coefficient": 0.1}),
    (fusedopt.MARSAdamW, {"lr": 0.01}),
    (fusedopt.FAdam, {"lr": 0.01}),
    (fusedopt.Prodigy, {"d0": 1e-2, "clip_grad_norm": 1.0}),
    (fusedopt.DAdaptAdam, {"d0": 1e-2}),
    (fusedopt.DAdaptSGD, {"d0": 1e-2}),
    (fusedopt.DAdaptAdaGrad, {"d0": 1e-2}),
    (fusedopt.DoG, {"reps_rel": 1e-2}),
    (fusedopt.ADoG, {"reps_rel": 1e-2}),
    (fusedopt.LDoG, {"reps_rel": 1e-2, "state_format": "int8", "min_quantized_numel": 0}),
    (fusedopt.AdaptiveBraking, {"lr": 0.02, "rho": 0.7}),
    (fusedopt.InducedMetric, {"lr": 0.1, "rms": True}),
)


def sharded_steps():
    for cls, options in CASES:
        (model, opt), (model2, opt2) = pair(cls, **options)
        for x, y in zip(weights(model2), weights(model), strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6, msg=cls.__name__)
        for p, q in zip(model.parameters(), model2.parameters(), strict=True):
            for name in cls.rule_for(opt.param_groups[0]).memory:
                torch.testing.assert_close(opt2.state[q][name], opt.state[p][name], rtol=1e-5, atol=1e-12)


def resumed():
    """A sharded optimizer from the state dict of another goes on bit for bit."""
    for cls, options in CASES:
        one = sharded()
        first = cls(one.parameters(), **options)
        train(one, first, 0, 2)
        two = sharded()
        with torch.no_grad():
            for p, q in zip(one.parameters(), two.parameters(), strict=True):
                q.copy_(p)
        second = cls(two.parameters(), **options)
        second.load_state_dict(first.state_dict())
        for model, opt in ((one, first), (two, second)):
            train(model, opt, 2, 4)
        for x, y in zip(weights(two), weights(one), strict=True):
            assert torch.equal(x, y), cls.__name__


def test_two_processes():
    run(2, [sharded_steps, resumed])


def test_four_processes():
    run(4, [sharded_steps])
