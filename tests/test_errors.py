"""What is refused at construction and at the step: torch.optim's messages where it has one; nothing is half-updated."""

import pytest
import torch
from configs import CONFIGS, EVERY, assert_same_bits, each_backend, each_config, parameters, set_grads, tensors

import fusedopt
from fusedopt.rule import optimizers

each_class = pytest.mark.parametrize("cls", optimizers().values(), ids=list(optimizers()))
adam_like = pytest.mark.parametrize(
    "cls", [fusedopt.Adam, fusedopt.AdamW, fusedopt.LAMB, fusedopt.Lion], ids=lambda c: c.__name__
)


@each_class
def test_construction(cls):
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(
        TypeError, match="params argument given to the optimizer should be an iterable of Tensors or dicts"
    ):
        cls(p)
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        cls([p, p])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        cls([{"params": p}, {"params": p}])
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        cls([])
    with pytest.raises(ValueError, match="all optimizer params should be with/without names"):
        cls([("a", p), torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="all optimizer param groups should be with/without names"):
        cls([{"params": [("a", p)]}, {"params": [torch.nn.Parameter(torch.zeros(1))]}])


@each_class
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"lr": torch.tensor([1e-3, 1e-3])}, ValueError, "Tensor lr must be 1-element"),
        ({"lr": torch.tensor(1e-3), "foreach": True}, ValueError, "lr as a Tensor is not supported for capturable"),
        ({"lr": -1e-3}, ValueError, "Invalid learning rate: -0.001"),
        ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
        ({"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
        ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together"),
        ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
        ({"state_format": "int3"}, ValueError, "unknown state_format 'int3'; known formats: fp32, bf16, bf16_stochastic, int8"),
        ({"param_precision": "up"}, ValueError, "unknown param_precision 'up'; known: nearest, stochastic"),
        ({"clip_grad_norm": 0.0}, ValueError, "Invalid clip_grad_norm value: 0.0; it must be positive, or None"),
        ({"clip_grad_norm": float("nan")}, ValueError, "Invalid clip_grad_norm value: nan"),
        ({"backend": "mps"}, ValueError, "unknown backend 'mps'; known backends: cuda, triton, cpu, reference"),
        ({"learning_rate": 1.0}, TypeError, "unexpected keyword argument 'learning_rate'"),
    ],
)  # fmt: skip
def test_options(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls([torch.nn.Parameter(torch.zeros(2))], **options)
    if error is ValueError and "lr" in options:  # raised before the parameters are looked at, as in torch.optim
        with pytest.raises(error, match=message):
            cls(None, **options)


@adam_like
def test_betas(cls):
    for betas, message in [
        ((1.0, 0.9), "Invalid beta parameter at index 0: 1.0"),
        ((0.9, -0.1), "Invalid beta parameter at index 1: -0.1"),
        ((torch.tensor(0.9), 0.99), "betas must be either both floats or both Tensors"),
        ((torch.tensor([0.9, 0.9]), torch.tensor(0.9)), r"Tensor betas\[0\] must be 1-element"),
    ]:
        with pytest.raises(ValueError, match=message):
            cls(None, betas=betas)
    with pytest.raises(
        ValueError, match=r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True"
    ):
        cls(None, betas=(torch.tensor(0.9), torch.tensor(0.99)), foreach=True)


def test_rule_specific_options():
    for options, message in [
        ({"momentum": -0.5}, "Invalid momentum value: -0.5"),
        ({"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
        (
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            "Nesterov momentum requires a momentum and zero dampening",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            fusedopt.SGD(None, **options)
    for options in ({"nesterov": True, "momentum": 0.0}, {"momentum": -1}, {"trust_coefficient": -1}, {"eps": -1}):
        with pytest.raises(ValueError):
            fusedopt.LARS(None, **options)
    for cls in (fusedopt.Adam, fusedopt.AdamW, fusedopt.LAMB):
        with pytest.raises(ValueError, match="Invalid epsilon value: -1"):
            cls(None, eps=-1)


# Tensors that no step takes. Each case: a parameter with its gradient, and the message.


def sparse_gradient():
    p = torch.nn.Parameter(torch.ones(4, 3))
    p.grad = torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 3), (4, 3))
    return p


def complex_parameter():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    return p


def integer_parameter():
    p = torch.ones(4, dtype=torch.int64)
    p.grad = None
    holder = torch.nn.Parameter(p, requires_grad=False)
    holder.grad = torch.ones_like(p)
    return holder


def meta_parameter():
    p = torch.nn.Parameter(torch.ones(4, device="meta"))
    p.grad = torch.ones(4, device="meta")
    return p


def expanded_parameter():
    p = torch.nn.Parameter(torch.ones(3, 1).expand(3, 5))
    p.grad = torch.ones(3, 5)
    return p


def float8_parameter():
    p = torch.nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn))
    p.grad = p.detach().clone()
    return p


BAD = {
    sparse_gradient: r"\(shape \(4, 3\).*sparse gradient.*does not support sparse gradients.*Use sparse=False",
    complex_parameter: r"is complex: \w+ does not support complex parameters. Optimise torch.view_as_real",
    integer_parameter: r"torch.int64.*only float32, bfloat16, float16 and float64 are stepped",
    meta_parameter: r"is on the meta device and has no data. Materialise the model with to_empty\(\)",
    expanded_parameter: r"share memory \(strides \(1, 0\)\). Use .clone\(\)",
    float8_parameter: r"float8_e4m3fn.*only float32",
}


@each_backend
@each_config(EVERY)
@pytest.mark.parametrize("make, message", BAD.items(), ids=[f.__name__ for f in BAD])
@pytest.mark.parametrize("when", ["first step", "later"])
def test_bad_tensor_among_good_ones(config, make, message, when, backend):
    """The error names the parameter; parameters, states and step counts of all others are as before."""
    good = parameters((5, 4), (3,), (2, 2))
    bad = make()
    gradient, bad.grad = bad.grad, None
    opt = config.make([good[0], good[1], bad, good[2]], backend=backend, clip_grad_norm=0.1)
    if when == "later":
        set_grads(good, 0)
        opt.step()
    before, entries = tensors(opt, good), len(opt.state)
    set_grads(good, 1)
    bad.grad = gradient
    with pytest.raises(RuntimeError, match=f"{type(opt).__name__}: parameter 2 .*{message}"):
        opt.step()
    assert_same_bits(tensors(opt, good), before)
    assert len(opt.state) == entries
    bad.grad = None
    opt.step()  # without the bad one all is well
    assert int(opt.state[good[2]]["step"]) == 1 + (when == "later")


@each_config(EVERY)
def test_forced_backend_that_cannot_is_named(config):
    """A backend asked for by name raises with its reason, before anything is changed."""
    params = parameters((5, 4))
    opt = config.make(params, backend="cuda")
    set_grads(params, 0)
    before = tensors(opt, params)[:1]
    with pytest.raises(
        RuntimeError, match=r"backend 'cuda' cannot step parameter 0 \(shape \(5, 4\), torch.float32, device cpu\)"
    ):
        opt.step()
    assert_same_bits([params[0].detach()], before)
    assert all(float(entry["step"]) == 0 for entry in opt.state.values())


@each_config(CONFIGS[:1])
def test_state_moved_to_another_shape_is_refused(config):
    params = parameters((5, 4))
    opt = fusedopt.AdamW(params)
    set_grads(params, 0)
    opt.step()
    opt.state[params[0]]["exp_avg"] = torch.zeros(3)
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 0 .*its state 'exp_avg' has shape \(3,\)"):
        opt.step()
    assert torch.equal(params[0], before)


def test_meta_parameters_work_after_to_empty():
    layer = torch.nn.Linear(3, 2, device="meta")
    opt = fusedopt.AdamW(layer.parameters())
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(0.5)
    opt.param_groups[0]["params"] = list(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    opt.step()
    assert all((p < 0.5).all() for p in layer.parameters())


def test_override_refuses_unknown_options():
    p = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"override: unknown options \['lr'\]; it takes state_format, param_precision, projection"
    ):
        fusedopt.override(p, lr=1.0)
    with pytest.raises(ValueError, match="unknown state_format"):
        fusedopt.override(p, state_format="x")
    with pytest.raises(TypeError, match="expected a tensor or a module, got str"):
        fusedopt.override("weight", state_format="fp32")
