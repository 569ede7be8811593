"""timm's schedulers over our optimizers: each writes learning rates that the next step uses."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from configs import EVERY, assert_same_bits, each_config, parameters, tensors, train
from trainer_data import TinyLM, run_recipe, text_windows

import fusedopt

SHAPES = ((6, 5), (4,), ())
WITHIN = {"t_initial": 6, "warmup_t": 2, "warmup_lr_init": 1e-4, "t_in_epochs": True}
KINDS = {
    "cosine": ("CosineLRScheduler", {**WITHIN, "lr_min": 1e-5, "cycle_limit": 2}),
    "step": ("StepLRScheduler", {"decay_t": 2, "decay_rate": 0.5, "warmup_t": 1}),
    "poly": ("PolyLRScheduler", WITHIN),
    "noise": ("CosineLRScheduler", {**WITHIN, "noise_range_t": 3}),
    "plateau": ("PlateauLRScheduler", {"decay_rate": 0.3, "patience_t": 0, "mode": "min"}),
}


@pytest.fixture(scope="module")
def scheduler():
    """timm.scheduler alone: the whole of timm needs torchvision, its schedulers do not."""
    if "timm" in sys.modules:
        yield importlib.import_module("timm.scheduler")
        return
    found = importlib.util.find_spec("timm")
    if found is None:
        pytest.skip("timm is not installed")
    bare = types.ModuleType("timm")
    bare.__path__ = list(found.submodule_search_locations)
    sys.modules["timm"] = bare
    try:
        module = importlib.import_module("timm.scheduler")
        assert Path(module.__file__).parent.parent == Path(bare.__path__[0])
        yield module
    finally:
        for name in [n for n in sys.modules if n == "timm" or n.startswith("timm.")]:
            del sys.modules[name]


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@each_config(EVERY)
@pytest.mark.parametrize("kind", KINDS)
def test_learning_rates_are_followed(scheduler, config, kind):
    """The bits are those of an optimizer that is told every rate by hand; two groups, one at a third of the rate."""

    def groups(params):
        return [{"params": params[:1]}, {"params": params[1:], "lr": config.options["lr"] / 3}]

    scheduled, told = parameters(*SHAPES), parameters(*SHAPES)
    one, two = config.make(groups(scheduled)), config.make(groups(told))
    name, options = KINDS[kind]
    schedule = getattr(scheduler, name)(one, **options)
    seen = set()
    for epoch in range(7):
        for group, other in zip(one.param_groups, two.param_groups, strict=True):
            other["lr"] = float(group["lr"])
            seen.add(float(group["lr"]))
        train(one, scheduled, epoch, epoch + 1)
        train(two, told, epoch, epoch + 1)
        schedule.step(epoch + 1, 1.0) if kind == "plateau" else schedule.step(epoch + 1)
    assert len(seen) >= 6, "the scheduler changed nothing"
    assert_same_bits(tensors(one, scheduled), tensors(two, told))


def test_states_of_a_schedule_and_its_optimizer(scheduler):
    """Both state dicts into new objects after 3 of 6 epochs: the same end."""

    def make(params):
        opt = fusedopt.create("adamw8bit", params, lr=0.05, min_quantized_numel=1)
        return opt, scheduler.CosineLRScheduler(opt, 6, warmup_t=2, warmup_lr_init=1e-3)

    def run(params, opt, schedule, first, last):
        for epoch in range(first, last):
            train(opt, params, epoch, epoch + 1)
            schedule.step(epoch + 1)

    params = parameters(*SHAPES)
    opt, schedule = make(params)
    run(params, opt, schedule, 0, 3)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded, again = make(others)
    loaded.load_state_dict(opt.state_dict())
    again.load_state_dict(schedule.state_dict())
    run(params, opt, schedule, 3, 6)
    run(others, loaded, again, 3, 6)
    assert_same_bits(tensors(loaded, others), tensors(opt, params))


def test_the_recipe(scheduler):
    model = TinyLM()
    rates = []

    def train_epoch(model, opt):
        rates.append(opt.param_groups[0]["lr"])
        model(text_windows(4)).backward()
        opt.step()
        opt.zero_grad()

    before = model(text_windows(4)).item()
    run_recipe("timm", model=model, train_epoch=train_epoch, timm=types.SimpleNamespace(scheduler=scheduler))
    assert len(set(rates)) >= 5 and max(rates) <= 5e-3 and model(text_windows(4)).item() < before
