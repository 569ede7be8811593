"""Gradient transforms where steps come in parts, in graphs, over processes; what they refuse."""

import pytest
import torch
from configs import assert_same_bits, parameters, set_grads
from processes import run
from torch import nn

import fusedopt
from fusedopt import transforms as tf

SHAPES = ((12, 9), (5,), (3, 4, 2, 2))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def loss(net, step: int) -> torch.Tensor:
    return net(torch.randn(4, 6, generator=torch.Generator().manual_seed(step))).square().mean()


def adamw(net, *transforms, **options):
    return fusedopt.AdamW(net.parameters(), lr=0.01, gradient_transforms=transforms, **options)


LIST = (tf.Grokfast(alpha=0.8), tf.OrthoGrad(), tf.Centralize(), tf.AdaptiveClip(0.1), tf.Normalize())


def test_released_gradients_give_the_same_bits():
    one, two = model(), model()
    released, whole = adamw(one, *LIST), adamw(two, *LIST)
    fusedopt.release_gradients(one, released)
    for step in range(5):
        for net, opt in ((one, released), (two, whole)):
            loss(net, step).backward()
            opt.step()
            opt.zero_grad()
    assert_same_bits([p.detach() for p in one.parameters()], [p.detach() for p in two.parameters()])


def test_step_parameter_gives_the_same_bits():
    one, two = model(), model()
    single, whole = adamw(one, *LIST), adamw(two, *LIST)
    for step in range(5):
        for net in (one, two):
            net.zero_grad()
            loss(net, step).backward()
        assert single.supports_fused_back_pass()
        for p in one.parameters():
            single.step_parameter(p)
        whole.step()
    assert_same_bits([p.detach() for p in one.parameters()], [p.detach() for p in two.parameters()])


def test_compiled_steps_give_the_same_bits():
    one, two = model(), model()
    compiled, eager = adamw(one, *LIST), adamw(two, *LIST)
    step_op = torch.compile(compiled.step, backend="eager", fullgraph=True)
    for step in range(4):
        for net in (one, two):
            net.zero_grad()
            loss(net, step).backward()
        step_op()
        eager.step()
    assert_same_bits([p.detach() for p in one.parameters()], [p.detach() for p in two.parameters()])


@pytest.mark.parametrize("projection", [None, fusedopt.GaLore(rank=4)])
def test_projections_take_transformed_gradients(projection):
    one, two = parameters((16, 12)), parameters((16, 12))
    mine = fusedopt.AdamW(one, lr=0.01, projection=projection, gradient_transforms=[tf.Normalize()])
    plain = fusedopt.AdamW(two, lr=0.01, projection=projection)
    for step in range(3):
        set_grads(one, step)
        set_grads(two, step)
        two[0].grad /= two[0].grad.std() + 1e-8
        mine.step()
        plain.step()
    torch.testing.assert_close(one[0], two[0], rtol=1e-5, atol=1e-6)


def test_explain_and_frozen_parameters():
    net = model()
    net[0].bias.requires_grad_(False)
    opt = adamw(net, tf.Grokfast())
    assert "Grokfast(alpha=0.98" in opt.plan().explain()
    loss(net, 0).backward()
    report = opt.plan()
    assert {b["grad_dtype"] for b in report.buckets} == {"float32"}
    opt.step()
    assert "grokfast_ema" not in opt.state.get(net[0].bias, {})


def test_metrics_see_transformed_gradients():
    params = parameters(*SHAPES)
    opt = fusedopt.SGD(params, lr=0.1, gradient_transforms=[tf.UnitNorm()])
    opt.record_metrics()
    set_grads(params, 0)
    opt.step()
    assert opt.metrics()["grad_norm/0"] == pytest.approx(1.0, rel=1e-5)


def test_initialising_step_makes_states():
    """torch.distributed.checkpoint makes states with lr 0 and zero gradients; that step is not counted."""
    params = parameters(*SHAPES)
    opt = fusedopt.AdamW(params, lr=0.0, gradient_transforms=[tf.Grokfast()])
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all(opt.state[p]["grokfast_steps"] == 0 and "grokfast_ema" in opt.state[p] for p in params)


def test_refused_at_construction():
    with pytest.raises(ValueError, match="holds 3, which is no transform"):
        fusedopt.SGD(parameters((3,)), gradient_transforms=[3])
    with pytest.raises(ValueError, match="holds grokfast twice"):
        fusedopt.SGD(parameters((3,)), gradient_transforms=[tf.Grokfast(), tf.Grokfast(0.9)])
    with pytest.raises(ValueError, match="differentiable"):
        fusedopt.SGD(parameters((3,)), gradient_transforms=[tf.Grokfast()], differentiable=True)
    fusedopt.SGD(parameters((3,)), gradient_transforms=tf.Normalize())


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf.Grokfast(alpha=1.0),
        lambda: tf.Grokfast(amplify=-1.0),
        lambda: tf.GrokfastMA(window=0),
        lambda: tf.GrokfastMA(amplify=-1.0),
        lambda: tf.GrokfastMA(reduce="max"),
        lambda: tf.ClipValue(0.0),
        lambda: tf.ClipFraction(1.0),
        lambda: tf.ClipComponents(-1.0),
        lambda: tf.AdaptiveClip(clip=0.0),
        lambda: tf.AdaptiveClip(eps=0.0),
        lambda: tf.Normalize(eps=-1.0),
        lambda: tf.UnitNorm(per="row"),
        lambda: tf.UnitNorm(eps=-1.0),
    ],
)
def test_options_out_of_range(make):
    with pytest.raises(ValueError, match="invalid|unknown"):
        make()


def test_refused_combinations():
    net = model()
    with pytest.raises(ValueError, match=r"release_gradients: ClipComponents of this AdamW needs all gradients"):
        fusedopt.release_gradients(net, adamw(net, tf.ClipComponents(components=("0.",))))
    with pytest.raises(ValueError, match="adds gradients to the states"):
        fusedopt.release_gradients(net, adamw(net, tf.Normalize()), micro_batches=2)
    with pytest.raises(ValueError, match="offload: it streams gradients"):
        fusedopt.offload(adamw(net, tf.Normalize()))
    opt = fusedopt.AdamW(net.parameters(), gradient_transforms=[tf.Normalize()], projection=fusedopt.GaLore(rank=2))
    with pytest.raises(ValueError, match="projected_linear: it keeps projected gradients"):
        fusedopt.projected_linear(net, opt)
    opt = adamw(net, tf.ClipComponents(components=("0.",)))
    loss(net, 0).backward()
    assert not opt.supports_fused_back_pass()
    with pytest.raises(RuntimeError, match="ClipComponents of this AdamW needs all gradients"):
        opt.step_parameter(net[0].weight)


def test_what_a_step_refuses_changes_nothing():
    params = parameters((6, 4), (5,))
    opt = fusedopt.SGD(params, lr=0.1, gradient_transforms=[tf.Grokfast()])
    set_grads(params, 0)
    opt.step()
    kept = [p.detach().clone() for p in params] + [opt.state[p]["grokfast_ema"].clone() for p in params]
    params[0].grad = torch.ones(6, 4)
    params[1].grad = torch.ones(5).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        opt.step()
    assert_same_bits([*(p.detach() for p in params), *(opt.state[p]["grokfast_ema"] for p in params)], kept)


def test_int8_weights():
    weight = torch.randn(64, 64)
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.data.copy_(weight)
    fusedopt.quantize_weights_(layer)
    opt = fusedopt.AdamW(layer.parameters(), lr=0.01, gradient_transforms=[tf.OrthoGrad()])
    layer(torch.randn(3, 64)).sum().backward()
    with pytest.raises(RuntimeError, match="parameter 0 .* is an int8 weight.*OrthoGrad cannot transform it"):
        opt.step()


def test_int8_weights_take_transforms_that_do_not_read_them():
    layers = [nn.Linear(64, 64, bias=False) for _ in "12"]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, transforms in zip(layers, ([tf.ClipValue(1e-3), tf.Grokfast(amplify=0.0)], []), strict=True):
        fusedopt.quantize_weights_(layer)
        opt = fusedopt.AdamW(layer.parameters(), lr=0.01, gradient_transforms=transforms)
        for step in range(3):
            layer.zero_grad()
            layer(torch.randn(3, 64, generator=torch.Generator().manual_seed(step))).sum().backward()
            if not transforms:
                layer.weight.grad.clamp_(-1e-3, 1e-3)
            opt.step()
    assert_same_bits([layers[0].weight.dequantize()], [layers[1].weight.dequantize()])


def test_states_travel_through_files(tmp_path):
    one, two = model(), model()
    opts = [adamw(net, tf.Grokfast(), tf.Lookahead()) for net in (one, two)]
    loss(one, 0).backward()
    opts[0].step()
    fusedopt.export_states(opts[0], tmp_path / "states.safetensors", one)
    fusedopt.import_states(opts[1], tmp_path / "states.safetensors", two)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert opts[0].state[p].keys() == opts[1].state[q].keys()
        names = sorted(opts[0].state[p])
        assert_same_bits([opts[1].state[q][n] for n in names], [opts[0].state[p][n] for n in names])


# Processes


def _sharded() -> None:
    import sharded_models as sm

    names = [
        (tf.Grokfast(alpha=0.8),),
        (tf.OrthoGrad(),),
        (tf.ClipValue(0.3), tf.ClipComponents(0.5)),
        (tf.Centralize(), tf.AdaptiveClip(0.1)),
        (tf.Normalize(), tf.UnitNorm(per="unit")),
        (tf.Lookahead(every=2), tf.NormLoss(factor=0.1), tf.StableDecay(decay=0.1)),
        (tf.LAWN(free_steps=1),),
        (tf.Layca(),),
        (tf.TangentProjection(delta=0.5, wd_ratio=0.3),),
        (tf.TangentProjection(delta=3.0),),
    ]
    for transforms in names:
        split, together = sm.sharded(), sm.build()
        opts = [fusedopt.AdamW(net.parameters(), lr=0.01, gradient_transforms=transforms) for net in (split, together)]
        for step in range(4):
            for net, opt in zip((split, together), opts, strict=True):
                sm.set_whole_grads(net, step)
                opt.step()
        for p, q in zip(split.parameters(), together.parameters(), strict=True):
            torch.testing.assert_close(sm.whole(p), q.detach(), rtol=1e-5, atol=1e-6)
        again = fusedopt.AdamW(split.parameters(), lr=0.01, gradient_transforms=transforms)
        again.load_state_dict(opts[0].state_dict())
    lr = torch.tensor(0.01)
    split, together = sm.sharded(), sm.build()
    watch = (tf.Hypergradient(rate=1e-4), tf.ClipComponents(1.0))
    rates = []
    for net in (split, together):
        opt = fusedopt.SGD(net.parameters(), lr=lr.clone(), gradient_transforms=watch)
        for step in range(4):
            sm.set_whole_grads(net, step)
            opt.step()
        rates.append(float(opt.param_groups[0]["lr"]))
    assert abs(rates[0] - rates[1]) <= 1e-6 * rates[1] != 0.01e-6
    opt = fusedopt.AdamW(sm.sharded().parameters(), lr=0.01, gradient_transforms=[tf.GrokfastMA(window=2)])
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="is a DTensor, and it needs the whole tensor"):
        opt.step()
    split = sm.sharded()
    opt = fusedopt.AdamW(split.parameters(), lr=0.01, gradient_transforms=[tf.Grokfast(alpha=0.8)])
    for step in range(3):
        sm.set_whole_grads(split, step)
        opt.step()
    twin = fusedopt.AdamW(split.parameters(), lr=0.01, gradient_transforms=[tf.Grokfast(alpha=0.8)])
    twin.load_state_dict(opt.state_dict())
    for p in split.parameters():
        for name in ("grokfast_ema", "grokfast_steps"):
            mine, other = opt.state[p][name], twin.state[p][name]
            assert torch.equal(getattr(mine, "_local_tensor", mine), getattr(other, "_local_tensor", other))


def test_two_processes_step_as_one():
    run(2, [_sharded])
