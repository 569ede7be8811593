"""Rules with numbers of whole tensors: against their oracles on every backend, kept over restarts, skipped steps and groups."""

import copy
import io

import pytest
import torch
from configs import BACKENDS, assert_same_bits, each_backend, parameters, set_grads, tensors
from harness import clone, make_problem
from oracle_cases import ORACLES, ours, relative_error
from simt import build as simt

import fusedopt
from fusedopt.abi import Phase
from fusedopt.backends.cuda import CudaBackend
from fusedopt.backends.reference import ReferenceBackend
from fusedopt.backends.select import get_backend
from fusedopt.conversion import convert
from fusedopt.formats import list_formats
from fusedopt.rule import get_rule, list_rules, optimizers

MEASURED = [name for name in list_rules() if get_rule(name).measures is not None]
PROBING = [name for name in MEASURED if get_rule(name).probes]
# One case of each measured rule: its class's name and options. The first, where distances start at 1e-2 of what they are of:
# a first step of 1e-6 is rounded to a few bits in fp32 parameters, and the step sizes that grow from it are as coarse.
CLASSES = {}
for _name, (_oracle, _cases) in ORACLES.items():
    for _options in _cases:
        _cls = optimizers()[_name]
        _rule = _cls.rule_for(_cls([torch.nn.Parameter(torch.zeros(1))], **ours(_name, _options)).param_groups[0]).name
        if _rule in MEASURED and not _options.get("maximize"):
            if _rule not in CLASSES or _options.get("weight_decay") and not CLASSES[_rule][1].get("weight_decay"):
                CLASSES[_rule] = _name, _options
SHAPES = ((40, 130), (7, 5), (5,), (3, 4, 2, 2), ())
each_rule = pytest.mark.parametrize("rule", MEASURED)


def test_every_measured_rule_has_a_case():
    assert set(CLASSES) == set(MEASURED) and len(MEASURED) > 0


def make(rule, params, **changes):
    name, options = CLASSES[rule]
    return optimizers()[name](params, **{**options, **changes})


def pull(params, step: int) -> None:
    """Gradients that draw the parameters together: rounding does not grow over many steps."""
    gen = torch.Generator().manual_seed(100 + step)
    for p in params:
        noise = torch.randn(p.shape, generator=gen, dtype=torch.float64)
        p.grad = (0.3 * p.detach().double() + noise).to(p.dtype)


@each_rule
@pytest.mark.parametrize("steps", [10, 200])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_trajectory_in_fp32(rule, steps, backend):
    name, options = CLASSES[rule]
    mine = parameters(*SHAPES)
    exact = [torch.nn.Parameter(p.detach().double()) for p in mine]
    opt, other = make(rule, mine, backend=backend), ORACLES[name][0](exact, **options)
    for step in range(steps):
        pull(exact, 0 if rule == "dasa" else step)  # a full batch's: of noise its rate falls to nothing
        for p, q in zip(mine, exact, strict=True):
            p.grad = q.grad.float()
            q.grad = p.grad.double()
        opt.step()
        other.step()
    for p, q, start in zip(mine, exact, parameters(*SHAPES), strict=True):
        assert float((q - start).detach().abs().max()) > 0
        if rule == "adaptive_braking" and p.numel() == 1 and steps == 200:
            continue  # |b|^2 is carried on by a sum that cancels where the velocity of one element passes zero
        assert relative_error(p.detach().double(), q.detach()) <= 1e-5


@each_rule
@each_backend
def test_resumed_bit_for_bit(rule, backend):
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    first, second = make(rule, one, backend=backend), make(rule, two, backend=backend)
    for step in range(4):
        set_grads(one, step)
        first.step()
    for p, q in zip(one, two, strict=True):
        q.data.copy_(p.data)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer))
    for step in range(4, 8):
        for params, opt in ((one, first), (two, second)):
            set_grads(params, step)
            opt.step()
    assert_same_bits(tensors(first, one), tensors(second, two), rule)


@each_rule
@each_backend
def test_capturable_equals_plain(rule, backend):
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    plain, other = make(rule, one, backend=backend), make(rule, two, backend=backend, capturable=True)
    for step in range(5):
        for params, opt in ((one, plain), (two, other)):
            set_grads(params, step)
            opt.step()
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)
    for name in get_rule(rule).memory:
        for p, q in zip(one, two, strict=True):
            torch.testing.assert_close(other.state[q][name], plain.state[p][name], rtol=1e-6, atol=0)


@each_rule
@each_backend
def test_a_skipped_step_changes_nothing(rule, backend):
    """found_inf on the device: neither parameters nor memory nor counts move."""
    params = parameters(*SHAPES)
    opt = make(rule, params, backend=backend, capturable=True, amp_fused=True)
    opt.grad_scale = torch.tensor([1024.0])
    for step in range(4):
        before = copy.deepcopy(tensors(opt, params)) if step == 2 else []
        set_grads(params, step, 1024.0)
        if step == 2:
            params[0].grad.fill_(float("inf"))
        opt.found_inf = torch.tensor([float(step == 2)])
        opt.step()
        if step == 2:
            assert_same_bits(tensors(opt, params), before)
    unscaled = parameters(*SHAPES)
    plain = make(rule, unscaled, backend=backend)
    for step in (0, 1, 3):
        set_grads(unscaled, step)
        plain.step()
    for p, q in zip(params, unscaled, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@each_rule
@each_backend
def test_measures_the_clipped_gradient(rule, backend):
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    inside, outside = make(rule, one, backend=backend, clip_grad_norm=0.7), make(rule, two, backend=backend)
    for step in range(4):
        set_grads(one, step)
        inside.step()
        set_grads(two, step)
        torch.nn.utils.clip_grad_norm_(two, 0.7)
        outside.step()
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@each_rule
@each_backend
def test_coded_states_and_bf16(rule, backend):
    """8-bit states and bf16 parameters move about as fp32 ones do."""
    exact, coarse = parameters((64, 80), (90, 60)), parameters((64, 80), (90, 60), dtype=torch.bfloat16)
    one = make(rule, exact, backend=backend)
    two = make(rule, coarse, backend=backend, state_format="int8", param_precision="kahan", min_quantized_numel=0)
    start = [p.detach().clone() for p in exact]
    for step in range(12):
        pull(exact, step)
        for p, q in zip(exact, coarse, strict=True):
            q.grad = p.grad.bfloat16()
        one.step()
        two.step()
    for p, q, at in zip(exact, coarse, start, strict=True):
        moved = (p - at).detach()
        error = (q.float() - p).detach()
        assert float(error.norm()) <= 0.1 * float(moved.norm()) + 2.0**-8 * float(at.norm())


@each_rule
def test_a_late_parameter_joins(rule):
    """One that gets its first gradient later; what is shared by all is one number then and after a restart."""
    params = parameters(*SHAPES)
    opt = make(rule, params)
    for step in range(6):
        set_grads(params, step)
        if step < 3:
            params[1].grad = None
        if step == 4:
            params[2].grad = None
        opt.step()
    declared = get_rule(rule)
    if declared.measures.scope != "tensor":
        for name in declared.memory:
            assert len({float(opt.state[p][name]) for p in params}) == 1
    assert all(torch.isfinite(p).all() for p in params)
    again = make(rule, [torch.nn.Parameter(p.detach().clone()) for p in params])
    again.load_state_dict(opt.state_dict())
    mine = again.param_groups[0]["params"]
    for ps, o in ((params, opt), (mine, again)):
        set_grads(ps, 9)
        o.step()
    assert_same_bits(tensors(again, mine), tensors(opt, params))


@each_rule
def test_what_it_refuses(rule):
    p = parameters((8, 8))
    with pytest.raises(ValueError, match="differentiable"):
        make(rule, p, differentiable=True)
    with pytest.raises(ValueError, match="projection"):
        make(rule, p, projection=fusedopt.GaLore(rank=2))
    declared, opt = get_rule(rule), make(rule, p)
    set_grads(p, 0)
    apart = declared.measures.scope == "tensor" and not declared.measures.given
    if declared.memory or not apart:
        with pytest.raises(ValueError, match="offload"):
            fusedopt.offload(opt)
    model = torch.nn.Linear(4, 4)
    opt = make(rule, model.parameters())
    if not apart:
        with pytest.raises(ValueError, match="release_gradients"):
            fusedopt.release_gradients(model, opt)
        model.weight.grad = torch.ones_like(model.weight)
        with pytest.raises(RuntimeError, match="all gradients"):
            opt.step_parameter(model.weight)


@pytest.mark.parametrize(
    "rule",
    [r for r in MEASURED if (m := get_rule(r).measures).scope == "tensor" and not m.given and not m.compares],
)
def test_stepped_one_by_one(rule):
    """step_parameter gives the bits of a step."""
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    whole, parts = make(rule, one), make(rule, two)
    for step in range(4):
        set_grads(one, step)
        whole.step()
        set_grads(two, step)
        for p in two:
            parts.step_parameter(p)
            p.grad = None
    assert_same_bits(tensors(whole, one), tensors(parts, two))


def test_a_state_dict_without_the_memory_is_refused():
    params = parameters((8, 8))
    opt = fusedopt.NovoGrad(params)
    set_grads(params, 0)
    opt.step()
    state = copy.deepcopy(opt.state_dict())
    del state["state"][0]["grad_norm_sq"]
    with pytest.raises(ValueError, match="grad_norm_sq"):
        opt.load_state_dict(state)


def backends():
    found = {"reference": get_backend("reference"), "cpu": get_backend("cpu")}
    if simt.compiler() is not None:
        found["cuda"] = CudaBackend(simt.library(), on_cpu=True)
    return found


@pytest.mark.parametrize("rule", PROBING)
@pytest.mark.parametrize("form", list_formats())
@pytest.mark.parametrize("offset", [0, 1])
def test_sums_of_a_probe(rule, form, offset):
    for name, backend in backends().items():
        given = make_problem(rule, (300, 1, 2048, 5000), formats=form, offset=offset, grad_scale=4.0)
        exact = clone(given)
        exact.run(ReferenceBackend(torch.float64), phases=(Phase.PROBE,))
        given.run(backend, phases=(Phase.PROBE,))
        live = [it.tensor_id for it in given.work.items]
        got, want = given.work.sums[live].double(), exact.work.sums[live].double()
        scale = want.abs() + want.abs().amax(0, keepdim=True) * 1e-2  # signed terms cancel
        assert ((got - want).abs() <= 1e-5 * scale + 1e-9).all(), (name, got, want)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_swats_switches(per_tensor):
    """Or its oracle cases would say nothing of SGD."""
    params = parameters(*SHAPES)
    opt = fusedopt.SWATS(params, lr=0.02, betas=(0.9, 0.99), eps=1e-3, switch_tolerance=1e-2, per_tensor=per_tensor)
    for step in range(14):
        pull(params, step)
        opt.step()
    assert any(float(opt.state[p]["sgd_lr"]) > 0 and float(opt.state[p]["sgd_steps"]) > 2 for p in params)


@each_rule
def test_exported_converted_and_pickled(rule, tmp_path):
    """Every way out and in keeps the memory: the next step is the same."""
    params = parameters((64, 80), (7,))
    opt = make(rule, params, state_format="int8", min_quantized_numel=0)
    for step in range(3):
        set_grads(params, step)
        opt.step()
    path = tmp_path / "states.safetensors"
    fusedopt.export_states(opt, path)
    others = [[torch.nn.Parameter(p.detach().clone()) for p in params] for _ in range(2)]
    read, loaded = (make(rule, ps, state_format="int8", min_quantized_numel=0) for ps in others)
    fusedopt.import_states(read, path)
    loaded.load_state_dict(convert(opt.state_dict(), state_format="int8", min_quantized_numel=0))
    twin_params, twin = copy.deepcopy((params, opt))
    for ps, o in ((params, opt), (others[0], read), (others[1], loaded), (twin_params, twin)):
        set_grads(ps, 9)
        o.step()
    want = tensors(opt, params)
    for ps, o in ((others[0], read), (others[1], loaded), (twin_params, twin)):
        assert_same_bits(tensors(o, ps), want)
