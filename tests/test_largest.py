"""Probes that take the largest of their terms, noise that a rule takes, and random starts: alike on every backend and in shards."""

import pytest
import torch
from configs import BACKENDS, assert_same_bits, parameters, set_grads, tensors
from harness import clone, make_problem
from processes import run
from sharded_models import build, set_whole_grads, sharded, weights
from simt import build as simt

import fusedopt
from fusedopt import distributed
from fusedopt.abi import Phase
from fusedopt.backends.cuda import CudaBackend
from fusedopt.backends.reference import ReferenceBackend
from fusedopt.backends.select import get_backend
from fusedopt.precision import gaussian16
from fusedopt.rule import get_rule, list_rules

LARGEST = [name for name in list_rules() if get_rule(name).takes_largest]
NUMELS = (300, 1, 2048, 5000, 20000)


def backends() -> dict:
    found = {"reference": get_backend("reference")}
    if "cpu" in BACKENDS:
        found["cpu"] = get_backend("cpu")
    if simt.compiler() is not None:
        found["cuda"] = CudaBackend(simt.library(), on_cpu=True)
    triton = get_backend("triton")
    if triton.reason() is None and triton._unsuited(torch.device("cpu")) is None:
        found["triton"] = triton
    return found


def probed(rule: str, backend, **options) -> tuple[torch.Tensor, torch.Tensor]:
    given = make_problem(rule, NUMELS, **options)
    exact = clone(given)
    exact.run(ReferenceBackend(torch.float64), phases=(Phase.PROBE,))
    given.run(backend, phases=(Phase.PROBE,))
    live = [it.tensor_id for it in given.work.items]
    return given.work.sums[live].double(), exact.work.sums[live].double()


def test_there_are_such_rules():
    assert LARGEST and any(get_rule(name).noise for name in list_rules())


@pytest.mark.parametrize("rule", LARGEST)
@pytest.mark.parametrize("chunk", [2048, 8192])
@pytest.mark.parametrize("offset", [0, 1])
def test_over_chunks(rule, chunk, offset):
    for name, backend in backends().items():
        got, want = probed(rule, backend, chunk=chunk, offset=offset)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("where", [0, 299, -1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_of_gradients_that_are_not_finite(where, value):
    def spoil(g, i):
        g = g.clone()
        g[where if i != 1 else 0] = value
        return g

    for name, backend in backends().items():
        got, _ = probed("gravity", backend, grad_values=spoil)
        want = torch.full_like(got[:, 0], float("inf") if value == value else value)
        torch.testing.assert_close(got[:, 0], want, equal_nan=True, msg=name)


@pytest.mark.parametrize("chunk", [2048, 8192])
def test_of_terms_below_zero(chunk):
    """The utility of UPGD where no weight is of use: lanes past the end of a tensor have none, and do not count as 0."""
    for name, backend in backends().items():
        given = make_problem("upgd", NUMELS, chunk=chunk, hyper_changes={"weight_decay": 0.0})
        for item in given.work.items:
            item.grad.copy_(item.param.sign() * 0.5)
            item.states[0].copy_(-item.states[0].abs() - 0.01)
        exact = clone(given)
        exact.run(ReferenceBackend(torch.float64), phases=(Phase.PROBE,))
        given.run(backend, phases=(Phase.PROBE,))
        live = [it.tensor_id for it in given.work.items]
        got, want = given.work.sums[live, 0].double(), exact.work.sums[live, 0]
        assert (got < -0.008).all(), name
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", [fusedopt.Gravity, fusedopt.UPGD, fusedopt.AdaptiveUPGD])
def test_an_empty_tensor_changes_nothing(cls, backend):
    """Nor where all terms of the others are below zero."""
    one, two = parameters((40, 30), (7,)), parameters((40, 30), (7,))
    empty = torch.nn.Parameter(torch.zeros(0, 3))

    def make(params):
        return cls(params, lr=0.01, backend=backend)

    opts = [make(ps) for ps in (one, [*two, empty])]
    for ps, opt in zip((one, two), opts, strict=True):
        for p in ps:
            p.grad = p.detach().sign()
        empty.grad = torch.zeros(0, 3)
        opt.step()
    for p, q in zip(one, two, strict=True):
        for name, value in opts[0].state[p].items():
            assert torch.equal(opts[1].state[q][name], value), name
    make([empty]).step()


def test_largest_over_processes():
    """distributed.largest by hand: NaN wins, and -inf is nothing."""
    x = torch.tensor([1.0, float("nan"), -float("inf"), -3.0], dtype=torch.float64)
    torch.testing.assert_close(distributed.largest(x, ()), x, equal_nan=True)


# Noise


def test_noise_is_normal():
    z = gaussian16(5, 3, 2, 1 << 20)
    assert abs(float(z.mean())) < 4e-3 and abs(float(z.std()) - 1) < 2e-3
    assert float((z**4).mean()) == pytest.approx(3, abs=0.03) and 4.4 < float(z.abs().max()) <= 4.9
    even, odd = z.view(-1, 2).unbind(1)
    assert abs(float((even * odd).mean())) < 5e-3 and abs(float((even.abs() * odd.abs()).mean()) - 2 / torch.pi) < 5e-3
    assert abs(float((z[:-8] * z[8:]).mean())) < 5e-3
    for other in (gaussian16(6, 3, 2, 1000), gaussian16(5, 4, 2, 1000), gaussian16(5, 3, 1, 1000)):
        assert abs(float((other * z[:1000]).mean())) < 0.15
    assert torch.equal(gaussian16(5, 3, 2, 1001), z[:1001])
    assert torch.equal(gaussian16(5, 3, 2, 92, first=808), z[808:900])


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda", "triton"])
def test_noise_in_the_step(backend):
    """The update of UPGD without a gradient is lr sigma z / 2, of tensors and shards that begin anywhere."""
    if backend not in backends():
        pytest.skip(f"no {backend} backend here")
    for rule, factor in (("upgd", 0.5), ("upgd_adaptive", 0.5)):
        given = make_problem(rule, NUMELS, hyper_changes={"sigma": 0.5, "weight_decay": 0.0})
        before = [it.param.clone() for it in given.work.items]
        for item in given.work.items:
            item.grad.zero_()
            for state in item.states:
                state.zero_()
        given.run(backends()[backend], phases=(Phase.FUSED,))
        for item, p in zip(given.work.items, before, strict=True):
            row = given.work.numbers[item.scalar_row]
            z = gaussian16(row.seed, row.step, item.tensor_id, p.numel(), first=8 * item.first_octet)
            want = p.double() - row.lr * 0.5 * factor * z
            torch.testing.assert_close(item.param.double(), want, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("cls", [fusedopt.UPGD, fusedopt.AdaptiveUPGD])
@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_follows_the_seed_and_the_step(cls, backend):
    def trained(**options):
        params = parameters((40, 30), (7,))
        opt = cls(params, sigma=0.5, backend=backend, **options)
        for step in range(3):
            set_grads(params, step)
            opt.step()
        return tensors(opt, params)

    assert_same_bits(trained(seed=1), trained(seed=1))
    assert not torch.equal(trained(seed=1)[0], trained(seed=2)[0])
    assert_same_bits(trained(seed=1, capturable=True)[:2], trained(seed=1)[:2])


# Random starts


def test_gravity_starts_at_random():
    (p,) = parameters((300, 200))
    opt = fusedopt.Gravity([p], lr=0.05, alpha=0.02)
    opt.plan()
    v = opt.state[p]["velocity"]
    assert float(v.std()) == pytest.approx(0.4, rel=0.02) and abs(float(v.mean())) < 0.01
    others = [fusedopt.Gravity([p], lr=0.05, alpha=0.02, **o) for o in ({"seed": 1}, {"backend": "reference"}, {})]
    for other in others:
        other.plan()
    starts = [other.state[p]["velocity"] for other in others]
    assert not torch.equal(starts[0], v) and torch.equal(starts[1], v) and torch.equal(starts[2], v)
    still = fusedopt.Gravity([p], alpha=0.0)
    still.plan()
    assert not still.state[p]["velocity"].any()
    warm = fusedopt.Gravity([{"params": [p], "lr": 0.0, "base_lr": 0.05}], alpha=0.02)
    warm.plan()
    assert torch.equal(warm.state[p]["velocity"], v)


def test_gravity_from_its_start_as_the_package():
    from pytorch_optimizer import Gravity

    mine, theirs = parameters((6, 5), (4,), dtype=torch.float64), parameters((6, 5), (4,), dtype=torch.float64)
    opt, other = fusedopt.Gravity(mine, lr=0.05, alpha=0.02), Gravity(theirs, lr=0.05, alpha=0.02, foreach=False)
    opt.plan()
    for step in range(10):
        set_grads(mine, step)
        set_grads(theirs, step)
        if step == 0:
            other.init_group(other.param_groups[0])
            for p, q in zip(mine, theirs, strict=True):
                other.state[q]["v"].copy_(opt.state[p]["velocity"])
        opt.step()
        other.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_start_in_coded_states_and_offloaded():
    one, two = parameters((64, 80)), parameters((64, 80))
    opts = [fusedopt.Gravity(ps, lr=0.05, alpha=0.02) for ps in (one, two)]
    fusedopt.offload(opts[1])
    for ps, opt in zip((one, two), opts, strict=True):
        set_grads(ps, 0)
        opt.step()
    assert_same_bits(one, two)
    coded = fusedopt.Gravity(parameters((64, 80)), lr=0.05, alpha=0.02, state_format="int8", min_quantized_numel=0)
    coded.plan()
    p = coded.param_groups[0]["params"][0]
    exact = fusedopt.starts.normal(p, p, fusedopt.starts.mix(0, fusedopt.starts.PURPOSE), 0, 0) * 0.4
    got = fusedopt.states.decode(p, coded.state[p], get_rule("gravity").states[0])
    assert float((got - exact).norm() / exact.norm()) < 0.03


SHARDED = (
    (fusedopt.Gravity, {"lr": 0.01, "alpha": 0.001}),
    (fusedopt.UPGD, {"lr": 0.01, "sigma": 0.0}),
    (fusedopt.UPGD, {"lr": 0.01, "sigma": 0.0, "protecting": False}),
    (fusedopt.AdaptiveUPGD, {"lr": 0.01, "sigma": 0.0}),
)


def sharded_steps():
    for cls, options in SHARDED:
        trained = []
        for model in (build(), sharded()):
            opt = cls(model.parameters(), **options)
            for i in range(4):
                set_whole_grads(model, i)
                opt.step()
            trained.append(weights(model))
        for x, y in zip(trained[1], trained[0], strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6, msg=f"{cls.__name__} {options}")


def sharded_not_a_number():
    """One process alone has it, and all know."""
    model = sharded()
    opt = fusedopt.UPGD(model.parameters(), sigma=0.0)
    set_whole_grads(model, 0)
    first = next(model.parameters())
    if torch.distributed.get_rank() == 1:
        first.grad.to_local().view(-1)[0] = float("nan")
    opt.step()
    assert all(w.isnan().all() for w in weights(model))


def sharded_starts():
    """Of shards of rows and of columns, as of the whole tensor."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    whole = torch.arange(13 * 9 * 4, dtype=torch.float32).view(13, 9, 4)
    want = fusedopt.starts.normal(whole, whole, 77, 3, 0)
    for dim in range(3):
        p = distribute_tensor(whole, mesh, [Shard(dim)])
        mine = fusedopt.starts.normal(p, p.to_local(), 77, 3, 0)
        got = DTensor.from_local(mine, mesh, [Shard(dim)], shape=whole.shape, stride=whole.stride())
        assert torch.equal(got.full_tensor(), want), dim


def test_two_processes():
    run(2, [sharded_steps, sharded_not_a_number, sharded_starts])
