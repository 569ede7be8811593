"""States that are points beside the parameter: where they start, what they are kept in, and what their rules refuse; the two
points of the schedule-free classes."""

import pytest
import torch
from configs import BY_NAME, assert_same_bits, copies, each_config, parameters, set_grads, tensors, train

import fusedopt
from fusedopt import masters

POINTS = [BY_NAME[name] for name in ("madgrad", "innaprop", "opt_amsgrad", "schedulefree_sgd", "schedulefree_adamw")]
SCHEDULE_FREE = [BY_NAME[name] for name in ("schedulefree_sgd", "schedulefree_adamw")]
COMPANIONS = ("kahan", "split24", "split32", "master")


def points(config, opt) -> list:
    return [s for s in config.cls.rule_for(opt.param_groups[0]).states if s.position is not None]


@each_config(POINTS)
@pytest.mark.parametrize("layout", ["contiguous", "turned", "gaps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_point_starts_at_its_share_of_the_parameter(config, dtype, layout):
    values = torch.randn(12, 18).to(dtype)
    values = {"contiguous": values, "turned": values.t(), "gaps": values[:, ::2]}[layout]
    p = torch.nn.Parameter(values)
    opt = config.make([p], state_format="int8", min_quantized_numel=0)
    start = p.detach().clone()
    opt.plan()
    for state in points(config, opt):
        got = opt.state[p][state.name]
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and got.shape == p.shape
        share = state.position(opt.param_groups[0])
        assert torch.equal(got, start.to(got.dtype) * share) and share != 0
    assert torch.equal(p.detach(), start)


@each_config(POINTS)
@pytest.mark.parametrize("precision", COMPANIONS)
def test_a_point_starts_at_the_weights_behind_a_16_bit_parameter(config, precision):
    model = torch.nn.Linear(9, 7, bias=False).bfloat16()
    old = fusedopt.SGD(model.parameters(), lr=0.1, param_precision=precision)
    set_grads([model.weight], 0)
    old.step()
    exact = masters.weights(model.weight, old.state[model.weight])
    opt = config.make(model.parameters(), param_precision=precision)
    opt.state[model.weight] = {k: v for k, v in old.state[model.weight].items() if k != "step"}
    opt.plan()
    for state in points(config, opt):
        torch.testing.assert_close(
            opt.state[model.weight][state.name], exact * state.position(opt.param_groups[0]), rtol=1e-7, atol=0
        )
    assert not torch.equal(exact, model.weight.float())


@each_config(POINTS)
def test_wide_states_refuse_a_narrow_format_by_name_only(config):
    (p,) = parameters((40, 130))
    opt = config.make([p], state_format="int8")
    declared = config.cls.rule_for(opt.param_groups[0]).states
    train(opt, [p], 0, 1)
    for state in declared:
        assert opt.state[p][state.name].dtype == (torch.float32 if state.wide else torch.uint8)
    assert "fp32 in every state_format" in opt.plan().explain()
    wide = [s.name for s in declared if s.wide]
    with pytest.raises(ValueError, match=rf"{config.cls.__name__}: .*'{wide[0]}'.* stays in fp32"):
        config.make([p], state_format={wide[0]: "bf16"})
    assert config.make([p], state_format={wide[0]: "fp32"})
    fusedopt.override(p, state_format={wide[0]: "int8"})
    late = config.make([p])
    with pytest.raises(ValueError, match="stays in fp32"):
        late.step()


@each_config(POINTS)
def test_projections_and_int8_weights_are_refused(config):
    (p,) = parameters((40, 130))
    with pytest.raises(ValueError, match=r"points beside the parameter.*no projection"):
        config.make([p], projection=fusedopt.GaLore(rank=4))
    fusedopt.override(p, projection=fusedopt.GaLore(rank=4))
    opt = config.make([p])
    set_grads([p], 0)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 0 .* is projected or an int8 weight"):
        opt.step()
    assert torch.equal(p.detach(), before) and "z" not in opt.state[p]


@each_config(POINTS)
@pytest.mark.parametrize("how", ["offloaded", "offloaded to a file", "released"])
def test_points_start_right_where_states_are_made_late(config, how, tmp_path):
    mine, alone = parameters((30, 20), (7,)), parameters((30, 20), (7,))
    plain, opt = config.make(alone, state_format="bf16"), config.make(mine, state_format="bf16")
    if how == "released":
        fusedopt.release_gradients(torch.nn.ParameterList(mine), opt)
    else:
        fusedopt.offload(opt, folder=tmp_path if "file" in how else None)
    for step in range(3):
        set_grads(alone, step)
        if how == "released":
            sum((p * q.grad).sum() for p, q in zip(mine, alone, strict=True)).backward()
        else:
            set_grads(mine, step)
        opt.step()
        plain.step()
    for a, b in zip(mine, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@each_config(SCHEDULE_FREE)
@pytest.mark.parametrize("precision", ["nearest", *COMPANIONS])
def test_there_and_back(config, precision):
    """eval() and train() return to the same weights, as far as what is kept tells; calling one twice is calling it once."""
    params = [torch.nn.Parameter(p.detach().bfloat16()) for p in parameters((30, 20), (7,))]
    if precision == "nearest":
        params = parameters((30, 20), (7,))
    opt = config.make(params, param_precision=precision)
    train(opt, params, 0, 6)

    def now():
        return [masters.weights(p, opt.state[p]) for p in params]

    start = now()
    opt.eval()
    opt.eval()
    average = now()
    opt.train()
    opt.train()
    for p, a, b, x in zip(params, start, now(), average, strict=True):
        assert (x - a).abs().max() > 1e-4
        torch.testing.assert_close(b, a, rtol=2.0**-15 if precision in ("kahan", "split24") else 1e-6, atol=1e-6)
        beta = opt.param_groups[0].get("momentum", 0.9)
        torch.testing.assert_close(beta * x + (1 - beta) * opt.state[p]["z"], a, rtol=1e-3, atol=1e-4)


@each_config(SCHEDULE_FREE)
@pytest.mark.parametrize("precision", ["master", "split24"])
def test_swaps_keep_their_tensors(config, precision):
    """A captured graph goes on reading the same memory."""
    params = [torch.nn.Parameter(torch.randn(30, 20).bfloat16())]
    opt = config.make(params, param_precision=precision)
    train(opt, params, 0, 2)
    addresses = [t.data_ptr() for t in (*params, *opt.state[params[0]].values())]
    opt.eval()
    opt.train()
    assert [t.data_ptr() for t in (*params, *opt.state[params[0]].values())] == addresses


@each_config(SCHEDULE_FREE)
def test_resumes_from_a_checkpoint_of_the_average(config):
    params = parameters((30, 20), (7,))
    opt = config.make(params)
    train(opt, params, 0, 4)
    opt.eval()
    saved, at_average = opt.state_dict(), copies(params)
    again = config.make(at_average)
    again.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="optimizer.train"):
        train(again, at_average, 4, 5)
    for ps, o in ((params, opt), (at_average, again)):
        o.train()
        train(o, ps, 4, 8)
    assert_same_bits(tensors(opt, params), tensors(again, at_average))


@each_config(SCHEDULE_FREE)
@pytest.mark.parametrize("folder", [False, True])
def test_swaps_offloaded_states(config, folder, tmp_path):
    mine, alone = parameters((30, 20), (7,)), parameters((30, 20), (7,))
    opt, plain = config.make(mine), config.make(alone)
    fusedopt.offload(opt, folder=tmp_path if folder else None)
    for ps, o in ((mine, opt), (alone, plain)):
        train(o, ps, 0, 3)
        o.eval()
    assert_same_bits(mine, alone)
    for ps, o in ((mine, opt), (alone, plain)):
        o.train()
        train(o, ps, 3, 5)
    assert_same_bits(mine, alone)


@pytest.mark.parametrize("warmup_steps, power", [(0, 2.0), (1, 2.0), (7, 2.0), (7, 0.5)])
def test_shares_on_the_device_are_those_of_the_host(warmup_steps, power):
    from fusedopt.rules.schedulefree import averaging

    h = {"warmup_steps": warmup_steps, "weight_lr_power": power}
    for step in (1, 2, 6, 7, 8, 100):
        on_device = averaging(h, torch.tensor(float(step), dtype=torch.float64))
        assert [float(x) for x in on_device] == pytest.approx(list(averaging(h, step)), rel=1e-13)


def test_invalid_values():
    p = parameters((2,))
    with pytest.raises(ValueError, match="momentum value: 1.0; it must be strictly between 0 and 1"):
        fusedopt.ScheduleFreeSGD(p, momentum=1.0)
    with pytest.raises(ValueError, match="index 0: 0.0; it must be strictly between 0 and 1"):
        fusedopt.ScheduleFreeAdamW(p, betas=(0.0, 0.9))
    with pytest.raises(ValueError, match="Invalid warmup_steps value: 2.5"):
        fusedopt.ScheduleFreeSGD(p, warmup_steps=2.5)
    with pytest.raises(ValueError, match="below beta=0.9"):
        fusedopt.INNAprop(p, lr=1.0)
    with pytest.raises(ValueError, match="Invalid momentum value: 1.0"):
        fusedopt.MADGRAD(p, momentum=1.0)
