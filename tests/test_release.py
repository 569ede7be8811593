"""Gradient release: the steps of an ordinary loop bit for bit, gradients that are gone, launches that stay few."""

import copy
import warnings

import pytest
import torch
from configs import assert_same_bits, backend_argument, each_backend, each_config, parameters, set_grads, tensors
from release_models import Tied, alive, assert_equal, everything, loss_of, pair, tokens, train
from torch import nn

import fusedopt
from fusedopt import parts
from fusedopt.projections import (
    DCT,
    Apollo,
    Conda,
    Frugal,
    GaLore,
    QGaLore,
    SubsetNorm,
    SubspaceMomentum,
)

SMALL = {"min_quantized_numel": 64}


@each_backend
@each_config()
@pytest.mark.parametrize("collect", [0, 1500, 1 << 20])
def test_steps_are_those_of_an_ordinary_loop(config, collect, backend):
    """int8 states and stochastically rounded bf16 weights: rows, step counts and random bits all show."""
    options = {"state_format": "int8", "param_precision": "stochastic", "clip_grad_norm": None, **SMALL}

    def make(model):
        groups = [{"params": list(model.parameters())[::2]}, {"params": list(model.parameters())[1::2], "lr": 0.003}]
        return config.make(groups, backend=backend, **options)

    plain, released, handle = pair(make, torch.bfloat16, collect=collect)
    for model, opt in (plain, released):
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
        train(model, opt, 0, 4, schedule)
    assert_equal(plain, released)
    assert handle.launches == 1 if collect == 1 << 20 else 2 < handle.launches <= 12


@pytest.mark.parametrize("form", ["fp32", "bf16_stochastic", "int4", "fp8"])
@pytest.mark.parametrize("precision", ["nearest", "split24", "kahan", "master"])
def test_formats_and_precisions(form, precision):
    def make(model):
        return fusedopt.AdamW(model.parameters(), lr=0.01, state_format=form, param_precision=precision, **SMALL)

    plain, released, _ = pair(make, torch.bfloat16, collect=1500)
    train(*plain, 0, 4)
    train(*released, 0, 4)
    assert_equal(plain, released)


PROJECTIONS = {
    "galore": GaLore(rank=4, update_every=3),
    "galore_random": GaLore(rank=4, update_every=3, method="random"),
    "qgalore": QGaLore(rank=4, update_every=2),
    "dct": DCT(rank=4),
    "frugal": Frugal(density=0.25, update_every=2),
    "frugal_columns": Frugal(density=0.25, update_every=2, method="columns"),
    "frugal_blocks": Frugal(density=0.4, update_every=2, method="blocks"),
    "apollo": Apollo(rank=4, update_every=3),
    "subspace_momentum": SubspaceMomentum(rank=4, update_every=3),
    "subset_norm": SubsetNorm(),
    "conda": Conda(update_every=2),
}


@each_backend
@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections(name, backend):
    """Refreshes are staggered by places among all projected tensors, and tensors take turns by them."""

    def make(model):
        return fusedopt.AdamW(
            model.parameters(), lr=0.01, projection=PROJECTIONS[name], backend=backend_argument(backend)
        )

    plain, released, _ = pair(make, collect=0)
    train(*plain, 0, 5)
    train(*released, 0, 5)
    assert_equal(plain, released)


@pytest.mark.parametrize("name", ["adafactor", "microadam"])
def test_factored_and_sparse_rules(name):
    def make(model):
        return fusedopt.create(name, model.parameters(), lr=0.01)

    plain, released, _ = pair(make, collect=0)
    train(*plain, 0, 5)
    train(*released, 0, 5)
    assert_equal(plain, released)


def test_int8_weights():
    def make(model):
        fusedopt.quantize_weights_(model, group=24)
        return fusedopt.AdamW(model.parameters(), lr=0.01, projection=GaLore(rank=4, update_every=2))

    plain, released, _ = pair(make, collect=0)
    assert any(isinstance(p, fusedopt.Int8Weight) for p in released[0].parameters())
    train(*plain, 0, 4)
    train(*released, 0, 4)
    assert_equal(plain, released)


@pytest.mark.parametrize("projection", [SubspaceMomentum(rank=4, update_every=2), SubsetNorm()], ids=lambda x: x.name)
def test_a_tensor_in_pieces_beside_a_larger_one(projection):
    """The largest matrix of a model says how large the pieces of all are, and with them the order of some sums."""
    one, two = (parameters((200, 30000), (129, 257)) for _ in range(2))
    plain, parted = (fusedopt.AdamW(ps, lr=0.01, projection=projection) for ps in (one, two))
    for step in range(3):
        set_grads(one, step)
        set_grads(two, step)
        plain.step()
        for p in two:
            parted.step_parameter(p)
    assert len(plain._plan.slots[1].site.pieces.pieces) == 1
    assert_same_bits(tensors(parted, two), tensors(plain, one))


# Memory and launches


def test_gradients_alive_at_once():
    """No more than the largest module's at any hook; an ordinary loop has all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(8)], nn.Linear(32, 96), nn.Linear(96, 10))
    opt = fusedopt.AdamW(model.parameters())
    most = []
    for p in model.parameters():  # before the handle's hooks, so that these see what is there when a gradient comes
        p.register_post_accumulate_grad_hook(lambda _: most.append(alive(model)))
    handle = fusedopt.release_gradients(model, opt, collect=0)
    total, largest = sum(4 * p.numel() for p in model.parameters()), 4 * 33 * 96
    assert handle.limit == 4 * 96 * 32
    for step in range(3):
        most.clear()
        model(torch.randn(4, 32)).square().mean().backward()
        assert alive(model) == 0
        assert max(most) <= largest < total / 3, f"step {step}"
        opt.step()
    assert handle.launches <= 10


def test_collecting_needs_fewer_launches():
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(20)])
    launches = []
    for collect in (0, 4 * 17 * 16 * 5, 1 << 20):
        opt = fusedopt.SGD(model.parameters(), lr=0.1)
        with fusedopt.release_gradients(model, opt, collect=collect) as handle:
            for _ in range(2):
                model(torch.randn(2, 16)).sum().backward()
                opt.step()
            launches.append(handle.launches)
    assert launches == [20, 5, 1] or launches == [20, 4, 1], launches


def test_plans_are_made_once(monkeypatch):
    made = []
    build = parts.PartPlan.__init__

    def count(self, *args):
        made.append(args[2])
        build(self, *args)

    monkeypatch.setattr(parts.PartPlan, "__init__", count)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(10)])
    opt = fusedopt.AdamW(model.parameters(), lr=0.1)
    fusedopt.release_gradients(model, opt, collect=3000)
    for step in range(6):
        if step == 3:
            made.clear()
            opt.param_groups[0]["lr"] = 0.01
        model(torch.randn(2, 16)).sum().backward()
        opt.step()
    assert made == []


def test_kept_plans_are_bounded():
    """Models that use other parts of themselves at every step do not fill memory with plans."""
    torch.manual_seed(0)
    experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(8)])
    opt = fusedopt.AdamW(experts.parameters())
    fusedopt.release_gradients(experts, opt)
    for step in range(256):
        chosen = [m for i, m in enumerate(experts) if step >> i & 1]
        if chosen:
            sum(m(torch.randn(2, 4)).sum() for m in chosen).backward()
        opt.step()
    assert 0 < len(opt._parts.plans()) <= 2 * 16 + parts.MORE_PLANS


# The loop around it


def test_a_second_backward_is_refused_before_anything_changes():
    model = Tied()
    opt = fusedopt.AdamW(model.parameters(), lr=0.1)
    fusedopt.release_gradients(model, opt, collect=0)
    train(model, opt, 0, 2)
    loss_of(model, 0).backward()
    before = everything(model, opt)
    with pytest.raises(
        RuntimeError, match=r"parameter \d+ .*'(\w|\.)+', has been stepped .*opt\.step\(\).*micro_batches"
    ):
        loss_of(model, 1).backward()
    for a, b in zip(everything(model, opt), before, strict=True):
        assert torch.equal(a, b)
    opt.zero_grad()
    opt.step()
    train(model, opt, 2, 4)


def test_a_later_part_of_a_refused_backward_is_not_applied():
    """The second pass comes to a tensor of its own first: that must wait until the pass is known to be allowed."""
    trunk, heads = nn.Linear(6, 6), nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
    model = nn.ModuleList([trunk, heads])
    opt = fusedopt.SGD(model.parameters(), lr=0.1)
    fusedopt.release_gradients(model, opt, collect=0)
    x = torch.randn(3, 6)
    heads[0](trunk(x)).sum().backward()
    before = heads[1].weight.detach().clone()
    with pytest.raises(RuntimeError, match="has been stepped"):
        heads[1](trunk(x)).sum().backward()
    assert torch.equal(heads[1].weight, before) and heads[1].weight.grad is not None


def test_losses_with_their_own_parameters_may_have_their_own_backward():
    torch.manual_seed(0)
    one = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
    two = copy.deepcopy(one)
    plain, released = (fusedopt.AdamW(m.parameters(), lr=0.1, param_precision="stochastic") for m in (one, two))
    fusedopt.release_gradients(two, released, collect=0)
    for _ in range(3):
        x = torch.randn(3, 6)
        for model, opt in ((one, plain), (two, released)):
            for layer in model:
                layer(x).square().sum().backward()
            opt.step()
            opt.zero_grad()
    assert_equal((one, plain), (two, released))


def test_schedulers_closures_and_hooks():
    one, two = Tied(), Tied()
    plain, released = fusedopt.AdamW(one.parameters()), fusedopt.AdamW(two.parameters())
    fusedopt.release_gradients(two, released)
    calls = []
    released.register_step_pre_hook(lambda *_: calls.append("pre"))
    released.register_step_post_hook(lambda *_: calls.append("post"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model, opt in ((one, plain), (two, released)):
            schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.01, total_steps=8)
            for step in range(4):

                def closure(model=model, opt=opt, step=step):
                    opt.zero_grad()
                    loss = loss_of(model, step)
                    loss.backward()
                    return loss

                assert opt.step(closure).item() > 0
                schedule.step()
    assert calls == ["pre", "post"] * 4
    assert_equal((one, plain), (two, released))


def test_nothing_to_step():
    model = Tied()
    opt = fusedopt.AdamW(model.parameters())
    handle = fusedopt.release_gradients(model, opt)
    assert opt.step() is None and handle.launches == 0 and not opt.state


def test_gradients_set_by_hand_are_stepped_by_step():
    """torch.distributed.checkpoint makes states by a step with gradients of zero and a learning rate of zero."""
    plain, released, _ = pair(lambda m: fusedopt.AdamW(m.parameters(), lr=0.1))
    for model, opt in (plain, released):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step(closure=None)
        opt.zero_grad()
    assert_equal(plain, released)
    train(*plain, 0, 2)
    train(*released, 0, 2)
    assert_equal(plain, released)
    loss_of(released[0], 0).backward()
    released[0].scale.grad = torch.ones(())
    with pytest.raises(RuntimeError, match="'scale', has been stepped"):
        released[1].step()


def test_a_failed_backward_can_be_repeated():
    """An error in the middle of a pass leaves gradients that were not used; they are the ones an ordinary loop has."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise MemoryError("no room")

    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    two = copy.deepcopy(one)
    plain, released = fusedopt.AdamW(one.parameters()), fusedopt.AdamW(two.parameters())
    fusedopt.release_gradients(two, released)
    x = torch.randn(2, 5)
    for model, opt in ((one, plain), (two, released)):
        with pytest.raises(MemoryError):
            model[1](Fails.apply(model[0](x))).sum().backward()
        opt.zero_grad()
        for _ in range(2):
            model(x).square().sum().backward()
            opt.step()
            opt.zero_grad()
    assert_equal((one, plain), (two, released))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(5)])
            self.head = nn.Linear(12, 1)

        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), x, use_reentrant=reentrant)
            return self.head(x)

    one, two = Deep(), Deep()
    plain, released = fusedopt.AdamW(one.parameters()), fusedopt.AdamW(two.parameters())
    handle = fusedopt.release_gradients(two, released, collect=0)
    for step in range(4):
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(step)).requires_grad_()
        for model, opt in ((one, plain), (two, released)):
            model(x).square().sum().backward()
            opt.step()
            opt.zero_grad()
    assert handle.launches == 6
    assert_equal((one, plain), (two, released))


def test_reentrant_checkpoints_of_one_layer_are_refused():
    from torch.utils.checkpoint import checkpoint

    layer = nn.Linear(4, 4)
    opt = fusedopt.SGD(layer.parameters(), lr=0.1)
    fusedopt.release_gradients(layer, opt, collect=0)
    x = torch.randn(2, 4, requires_grad=True)
    y = checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        y.sum().backward()


def test_bf16_autocast():
    one, two = Tied(), Tied()
    plain, released = fusedopt.AdamW(one.parameters()), fusedopt.AdamW(two.parameters())
    fusedopt.release_gradients(two, released, collect=0)
    for step in range(3):
        for model, opt in ((one, plain), (two, released)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, step)
            loss.backward()
            opt.step()
            opt.zero_grad()
    assert_equal((one, plain), (two, released))


def test_frozen_and_thawed_parameters_and_new_groups():
    one, two = Tied(), Tied()
    plain, released = fusedopt.AdamW(one.parameters(), lr=0.1), fusedopt.AdamW(two.parameters(), lr=0.1)
    for model in (one, two):
        model.wide.requires_grad_(False)
    fusedopt.release_gradients(two, released, collect=0)
    for model, opt in ((one, plain), (two, released)):
        train(model, opt, 0, 2)
        model.wide.requires_grad_(True)
        torch.manual_seed(1)
        model.extra = nn.Linear(24, 24)
        opt.add_param_group({"params": list(model.extra.parameters()), "lr": 0.01})
        for step in range(2, 5):
            (loss_of(model, step) + model.extra(model.embed(tokens(step))).square().mean()).backward()
            opt.step()
            opt.zero_grad()
    assert two.extra.weight in released._release._hooks and two.wide.weight in released._release._hooks
    assert_equal((one, plain), (two, released))


def test_remove_and_with():
    plain, released, handle = pair(lambda m: fusedopt.AdamW(m.parameters(), param_precision="stochastic"))
    train(*plain, 0, 4)
    train(*released, 0, 2)
    handle.remove()
    loss_of(released[0], 2).backward()
    assert alive(released[0]) > 0
    released[1].step()
    released[1].zero_grad()
    with fusedopt.release_gradients(released[0], released[1]):
        loss_of(released[0], 3).backward()
        assert alive(released[0]) == 0
        released[1].step()
    assert released[1]._release is None
    assert_equal(plain, released)


def test_the_optimizer_can_be_collected():
    import gc
    import weakref

    model = Tied()
    opt = fusedopt.AdamW(model.parameters())
    fusedopt.release_gradients(model, opt)
    train(model, opt, 0, 2)
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None
    loss_of(model, 0).backward()  # its hooks do nothing then
    assert alive(model) > 0
