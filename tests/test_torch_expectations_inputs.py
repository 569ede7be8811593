"""Every class with the inputs, schedulers and error inputs that the installed torch tests its own optimizers with."""

import copy
import inspect
import io

import pytest
import torch
from configs import assert_same_bits, copies, parameters, set_grads, tensors, train

from fusedopt.rule import optimizers

common = pytest.importorskip(
    "torch.testing._internal.common_optimizers", reason="torch ships it, expecttest is missing"
)

COUNTERPARTS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "adafactor": "Adafactor"}
INFOS = {info.optim_cls.__name__: info for info in common.optim_db}
NAMES = [name for name in optimizers() if COUNTERPARTS.get(name, "Adam") in INFOS]
SHAPES = ((6, 5), (4,), (3, 2, 2), ())

# torch's Adafactor has its own names; ours are those of the paper's authors and of transformers.
RENAMED = {"d": "clip_threshold", "beta2_decay": "decay_rate"}
# Of what torch's inputs leave open, for 20 steps on a steep parabola of 60 weights.
OWN_RATES = {
    "lars": {"lr": 0.01, "trust_coefficient": 0.05},  # the default of 1e-6 times the weights' norm moves no fp32 weight
    "schedulefree_sgd": {"lr": 0.01},  # 1 is beyond the parabola's stable rates
    "upgd": {"lr": 0.01},  # so is its 0.1
    "sgd_sai": {"eps": 100.0},  # so are 0.01 and more times its gain, that of gradients which hardly differ
    "dadapt_adam": {"lr": 0.1},  # its distance estimate overshoots at 1
    "dadapt_sgd": {"lr": 0.1, "d0": 0.1},  # 1e-6 at a rate of 1e-3 moves no fp32 weight in 20 steps
    "dadapt_adagrad": {"lr": 0.1, "d0": 0.1},
    "induced_metric": {"xi": 1e-3},  # maximised, larger gradients give smaller steps, below weight decay
    "sps": {"lower_bound": -10.0, "max_rate": 0.01},  # maximised, minus the loss stands for it
    "adahessian": {"lr": 0.01},  # the diagonal of these tests is not that of the parabola
    "sania_hessian": {"lower_bound": -10.0, "lr": 0.01},
    "sania": {"lower_bound": -10.0},
    "gravity": {"alpha": 0.0},  # a random start outlasts the 20 steps
    "adamod": {"beta3": 0.9},  # step sizes begin at 0, below weight decay
}
OWN_WORDS = {
    "epsilon1 should be >= 0": "Invalid epsilon value: -1e-30",
    "Clipping threshold d should be >= 1": "Invalid clip_threshold value: 0.0",
    "beta2_decay should be <= 0": "Invalid decay_rate value: 0.8",
}


def info_of(name: str):
    """torch's description of the class; that of Adam for rules torch does not have."""
    return INFOS[COUNTERPARTS.get(name, "Adam")]


def translated(name: str, kwargs: dict) -> dict | None:
    """Arguments for our class; None where it has no such argument."""
    kwargs = {RENAMED.get(k, k) if name == "adafactor" else k: v for k, v in kwargs.items()}
    kwargs = {**OWN_RATES.get(name, {}), **kwargs}
    if name == "adafactor":
        kwargs = {"variant": "torch", "eps": (None, 1e-3), **kwargs}
    known = {k for cls in optimizers()[name].__mro__ for k in inspect.signature(cls.__init__).parameters}
    return copy.deepcopy(kwargs) if kwargs.keys() <= known else None


def inputs(name: str) -> list[tuple[str, dict, dict]]:
    """(description, our arguments, torch's arguments): what torch would use on a GPU, capturable ones included."""
    found = []
    for case in info_of(name).optim_inputs_func(device="cuda"):
        kwargs = translated(name, case.kwargs)
        if kwargs is not None:
            found.append((case.desc, kwargs, case.kwargs))
    return found


CASES = [pytest.param(name, ours, theirs, id=f"{name}-{d}") for name in NAMES for d, ours, theirs in inputs(name)]
each_case = pytest.mark.parametrize("name, ours, theirs", CASES)
WITH_TORCH = pytest.mark.parametrize("name, ours, theirs", [case for case in CASES if case.values[0] in COUNTERPARTS])


def make(name, params, kwargs, **changes):
    return optimizers()[name](params, **copy.deepcopy(kwargs), **changes)


def test_every_class_takes_part():
    assert set(NAMES) == set(optimizers())
    counts = {name: len(inputs(name)) for name in NAMES}
    assert counts["sgd"] >= 9 and counts["adamw"] >= 10 and min(counts.values()) >= 4, counts


ERRORS = [
    pytest.param(name, error, id=f"{name}-{error.optimizer_error_input.desc}")
    for name in NAMES
    for error in info_of(name).optim_error_inputs_func("cpu", torch.float32)
    if translated(name, error.optimizer_error_input.kwargs) is not None
]


@pytest.mark.parametrize("name, error", ERRORS)
def test_error_inputs(name, error):
    """The type and the words of torch's errors, before the parameters are looked at where torch passes None."""
    case, words = error.optimizer_error_input, OWN_WORDS.get(error.error_regex, error.error_regex)
    kwargs = translated(name, case.kwargs)
    for word in COUNTERPARTS.values():
        words = words.replace(f"{word} does not support", f"{optimizers()[name].__name__} does not support")
    if error.error_on == common.OptimizerErrorEnum.STEP_ERROR:
        opt = make(name, case.params, kwargs)
        with pytest.raises(error.error_type, match=words):
            opt.step()
    elif issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=words):
            make(name, case.params, kwargs)
    else:
        with pytest.raises(error.error_type, match=words):
            make(name, case.params, kwargs)


def test_adam_has_all_of_torchs_error_inputs():
    """7 for every optimizer and 6 of Adam's own; more in a newer torch."""
    assert sum(case.values[0] == "adam" for case in ERRORS) >= 12


TINY_STEPS = ("adog", "dog", "ldog")  # 20 of them with lr 0.01 change the loss by less than fp32 resolves


def least_squares(strided: bool, dtype: torch.dtype = torch.float32):
    gen = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*shape, generator=gen).to(dtype) for shape in ((10, 5), (10,)))
    if strided:
        weight, bias = torch.stack([weight, weight], -1)[..., 0], torch.stack([bias, bias], -1)[..., 0]
    params = [torch.nn.Parameter(weight), torch.nn.Parameter(bias)]
    x = torch.randn(5, generator=gen).to(dtype)
    return params, lambda: (params[0].mv(x) + params[1]).square().sum()


@each_case
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "lr per group"])
def test_goes_in_the_right_direction_under_torchs_schedulers(name, ours, theirs, strided, grouped):
    for schedulers in ([], *info_of(name).scheduler_inputs):
        params, loss = least_squares(strided, torch.float64 if name in TINY_STEPS else torch.float32)
        kwargs = copy.deepcopy(ours)
        if grouped:  # the second group has a learning rate of its own
            params = [{"params": [params[0]]}, {"params": [params[1]], "lr": kwargs.get("lr", 1e-3) * 0.5}]
        opt = optimizers()[name](params, **kwargs)
        schedules = [schedule(opt) for schedule in schedulers]
        first = loss().item()
        for _ in range(20):
            opt.zero_grad()
            value = loss()
            value.backward()
            opt.step()
            for s in schedules:
                plateau = isinstance(s, torch.optim.lr_scheduler.ReduceLROnPlateau)
                s.step(value.detach()) if plateau else s.step()
        assert loss().item() > first if ours.get("maximize") else loss().item() < first


@WITH_TORCH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_torchs_loop(name, ours, theirs, dtype):
    """Parameters and every state after 7 iterations: gradients missing at 2, a layer frozen at 3 and back at 5."""
    runs = []
    for cls, kwargs in ((optimizers()[name], ours), (info_of(name).optim_cls, theirs)):
        params = parameters(*SHAPES, dtype=dtype)
        mine = cls is optimizers()[name]
        flags = {} if mine else {"foreach": False}
        if not mine and kwargs.get("capturable"):  # torch wants a GPU for it; its numbers are the same without
            kwargs = {k: v for k, v in kwargs.items() if k != "capturable"}
        opt = cls(params, **copy.deepcopy(kwargs), **flags)
        for step in range(7):
            set_grads(params, step)
            params[1].requires_grad_(not 3 <= step < 5)
            if step == 2:
                params[0].grad = params[3].grad = None
            if 3 <= step < 5:
                params[1].grad = None
            opt.step()
        runs.append((params, opt))
    (params, opt), (expected, other) = runs
    # torch rounds tensor hyperparameters and 1 - beta to fp32 and so does not keep to fp64 with them
    exact = dtype == torch.float64 and not any(isinstance(v, (torch.Tensor, tuple)) for v in theirs.values())
    near = {"rtol": 1e-9, "atol": 1e-11} if exact else {"rtol": 2e-5, "atol": 2e-6}
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, **near)
        for key, value in other.state[q].items():
            names = {"row_var": "exp_avg_sq_row", "col_var": "exp_avg_sq_col", "variance": "exp_avg_sq"}
            if value is not None:
                got = opt.state[p][names.get(key, key)]
                torch.testing.assert_close(got.view(value.shape), value, check_dtype=False, **near, msg=key)


@each_case
def test_tensor_lr_equals_float_lr(name, ours, theirs):
    plain, other = parameters(*SHAPES), parameters(*SHAPES)
    lr = float(ours.get("lr", 1e-3))
    one = make(name, plain, {**ours, "lr": lr})
    two = make(name, other, {**ours, "lr": torch.tensor(lr, dtype=torch.float64)})
    train(one, plain, 0, 5)
    train(two, other, 0, 5)
    for p, q in zip(plain, other, strict=True):
        torch.testing.assert_close(q, p, rtol=2e-6, atol=2e-7)


@each_case
def test_state_dicts(name, ours, theirs):
    """weights_only loading, named and unnamed in all four pairs: 4 more steps in step, and equal state dicts."""
    for saved_named in (False, True):
        for loaded_named in (False, True):
            params = parameters(*SHAPES)
            opt = make(name, named(params) if saved_named else params, ours)
            train(opt, params, 0, 4)
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            file.seek(0)
            others = copies(params)
            loaded = make(name, named(others) if loaded_named else others, ours)
            loaded.load_state_dict(torch.load(file, weights_only=True))
            if saved_named or loaded_named:
                names = [n for group in loaded.param_groups for n in group["param_names"]]
                assert sorted(names) == sorted(n for n, _ in named(params))  # Muon makes two groups of them
            train(opt, params, 4, 8)
            train(loaded, others, 4, 8)
            assert_same_bits(tensors(loaded, others), tensors(opt, params))


def named(params) -> list[tuple[str, torch.Tensor]]:
    return [(f"name{i}", p) for i, p in enumerate(params)]


@each_case
def test_older_state_dicts(name, ours, theirs):
    """Without the keys that torch added after an optimizer's first release."""
    params = parameters(*SHAPES)
    opt = make(name, params, ours)
    train(opt, params, 0, 2)
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        for flag in info_of(name).not_og_supported_flags:
            group.pop(flag, None)
    opt.load_state_dict(saved)
    train(opt, params, 2, 4)
    assert "maximize" in opt.param_groups[0] and all(torch.isfinite(p).all() for p in params)
