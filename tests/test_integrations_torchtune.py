"""torchtune's ways with an optimizer, a few lines of which are written here: a dotted path with keywords that are passed
blindly, and one optimizer for each parameter that steps in the backward pass."""

import importlib
import io

import pytest
import torch
from configs import EVERY, assert_same_bits, each_config, tensors
from trainer_data import TinyLM, assert_same_weights, one_thread, recipe, text_windows  # noqa: F401

import fusedopt

STEPS = 5


def instantiate(config: dict, *args):
    """config.instantiate of torchtune: everything but _component_ becomes a keyword argument."""
    path, _, name = config["_component_"].rpartition(".")
    return getattr(importlib.import_module(path), name)(
        *args, **{k: v for k, v in config.items() if k != "_component_"}
    )


class OptimizerInBackward:
    """OptimizerInBackwardWrapper of torchtune: a dict of optimizers by the parameter's name, saved and loaded as one."""

    def __init__(self, model, make):
        self.optimizers = {name: make(p) for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.register_post_accumulate_grad_hook(self._step(self.optimizers[name]))

    @staticmethod
    def _step(opt):
        def hook(p):
            opt.step()
            opt.zero_grad()

        return hook

    def state_dict(self) -> dict:
        return {name: opt.state_dict() for name, opt in self.optimizers.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, opt in self.optimizers.items():
            opt.load_state_dict(state[name])

    def set_lr(self, lr: float) -> None:
        for opt in self.optimizers.values():
            for group in opt.param_groups:
                group["lr"] = lr


@pytest.mark.parametrize("flag", [{"fused": True}, {"fused": False}, {"foreach": True}, {}], ids=str)
@each_config(EVERY)
def test_components(config, flag):
    """The same recipe line for every class: fused is taken by all of them, and the step is that of the class."""
    recipe = {"_component_": f"fusedopt.{config.cls.__name__}", **config.options, **flag, "state_format": "int8"}
    model, other = TinyLM(), TinyLM()
    opt = instantiate(recipe, model.parameters())
    assert type(opt) is config.cls and opt.defaults["fused"] is flag.get("fused")
    plain = config.make(other.parameters(), state_format="int8", fused=flag.get("fused"))
    for m, o in ((model, opt), (other, plain)):
        for tokens in text_windows(8).split(4):
            m(tokens).backward()
            o.step()
            o.zero_grad(set_to_none=True)
    assert_same_weights(model.state_dict(), other.state_dict())


def train(model, first: int, last: int, wrapped=None, opt=None) -> list[float]:
    losses = []
    for step, tokens in enumerate(text_windows(STEPS * 4).split(4)):
        if first <= step < last:
            for thing in (opt,) if wrapped is None else wrapped.optimizers.values():
                for group in thing.param_groups:
                    group["lr"] = 1e-3 * (step + 1)
            loss = model(tokens)
            loss.backward()
            losses.append(loss.item())
            if opt is not None:
                opt.step()
                opt.zero_grad()
    return losses


@each_config([c for c in EVERY if c.optimizer != "lamb"])
def test_one_optimizer_for_each_parameter_equals_one_for_all(config):
    """Also after saving and loading all of them half-way. LAMB is left out: it clips by the norm of all gradients."""
    options = {"state_format": "int8", "min_quantized_numel": 512}
    together = TinyLM()
    opt = config.make(together.parameters(), **options)
    expected = train(together, 0, STEPS, opt=opt)

    apart = TinyLM()
    wrapped = OptimizerInBackward(apart, lambda p: config.make([p], **options))
    losses = train(apart, 0, 3, wrapped)
    assert all(p.grad is None for p in apart.parameters())
    file = io.BytesIO()
    torch.save((wrapped.state_dict(), apart.state_dict()), file)
    file.seek(0)
    states, weights = torch.load(file, weights_only=True)
    resumed = TinyLM()
    resumed.load_state_dict(weights)
    again = OptimizerInBackward(resumed, lambda p: config.make([p], **options))
    again.load_state_dict(states)
    losses += train(resumed, 3, STEPS, again)
    assert losses == expected
    assert_same_weights(resumed.state_dict(), together.state_dict())
    for (name, p), q in zip(resumed.named_parameters(), together.parameters(), strict=True):
        mine = again.optimizers[name]
        assert_same_bits(tensors(mine, [p]), tensors(opt, [q]), name)


def test_stochastic_rounding_of_single_parameters_differs_by_the_seed_given():
    """A parameter alone is parameter 0: recipes that round stochastically give each optimizer its own seed."""

    def start(seed):
        p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        p.grad = torch.ones_like(p)
        recipe = {"_component_": "fusedopt.SGD", "lr": 1e-3, "param_precision": "stochastic", "seed": seed}
        instantiate(recipe, [p]).step()
        return p.detach()

    assert torch.equal(start(0), start(0)) and not torch.equal(start(0), start(1))


def test_the_recipe():
    """YAML as simple as this is read by hand; torchtune's own reader makes the same dict of it."""
    lines = [line.strip().split(": ", 1) for line in recipe("torchtune").splitlines() if line.startswith("  ")]
    found = dict(lines)
    assert found.pop("fused") == "True"
    config = {**found, "lr": float(found["lr"]), "fused": True}
    model = TinyLM()
    opt = instantiate(config, model.parameters())
    assert isinstance(opt, fusedopt.AdamW) and opt.defaults["lr"] == 2e-5
    losses = train(model, 0, STEPS, opt=opt)
    assert len(losses) == STEPS and opt.state[model.head.weight]["exp_avg"].dtype == torch.uint8
