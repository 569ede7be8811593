"""predicted_weights against XGrad's equations on torch.optim's states, and that the weights come back."""

import math

import pytest
import torch
from configs import BY_NAME, assert_same_bits, copies, each_config, parameters, set_grads, train

import fusedopt

PREDICTED = [BY_NAME[name] for name in ("sgd_momentum", "sgd_nesterov", "adam", "adamw", "adamw_amsgrad")]
SHAPES = ((40, 130), (7,), ())


def expected(config, other, theta, steps):
    """The prediction from torch.optim's states."""
    (group,), state = other.param_groups, other.state[theta]
    if "momentum_buffer" in state:
        return theta.detach() - steps * group["lr"] * state["momentum_buffer"]
    t, (b1, b2) = int(state["step"]), group["betas"]
    v = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    return theta.detach() - steps * group["lr"] * (state["exp_avg"] / (1 - b1**t)) / (
        v.sqrt() / math.sqrt(1 - b2**t) + group["eps"]
    )


def grads_at(params, step):
    """Gradients that depend on where they are taken."""
    set_grads(params, step)
    for p in params:
        p.grad += 0.3 * p.detach()


@each_config(PREDICTED)
@pytest.mark.parametrize("steps", [1, 2.5])
def test_ten_steps_are_those_of_the_paper(config, steps):
    mine, theirs = parameters(*SHAPES), parameters(*SHAPES)
    opt, other = config.make(mine), config.make_torch(theirs)
    for step in range(10):
        kept = [p.detach().clone() for p in theirs]
        with torch.no_grad():
            if step:
                ahead = [expected(config, other, p, steps) for p in theirs]
                for p, a in zip(theirs, ahead, strict=True):
                    p.copy_(a)
        grads_at(theirs, step)
        with torch.no_grad():
            for p, k in zip(theirs, kept, strict=True):
                p.copy_(k)
        other.step()
        before = copies(mine)
        with fusedopt.predicted_weights(opt, steps):
            assert step == 0 or not torch.equal(mine[0], before[0])
            grads_at(mine, step)
        assert_same_bits(mine, before)
        opt.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["int8", "int4", "bf16"])
def test_coded_states_and_16_bit_parameters(form):
    params = [torch.nn.Parameter(torch.randn(40, 130).bfloat16())]
    opt = fusedopt.AdamW(params, lr=0.01, state_format=form, param_precision="split24")
    train(opt, params, 0, 3)
    before, wide = copies(params), copies(params)
    exact = fusedopt.AdamW(wide, lr=0.01)
    exact.load_state_dict(opt.state_dict())
    with fusedopt.predicted_weights(opt), fusedopt.predicted_weights(exact):
        assert not torch.equal(params[0], before[0])
        torch.testing.assert_close(params[0], wide[0], rtol=0, atol=0)
    assert_same_bits(params, before)


def test_weights_come_back_from_an_error():
    params = parameters(*SHAPES)
    opt = fusedopt.AdamW(params)
    train(opt, params, 0, 2)
    before = copies(params)
    with pytest.raises(ZeroDivisionError), fusedopt.predicted_weights(opt):
        raise ZeroDivisionError
    assert_same_bits(params, before)


def test_a_step_inside_is_an_error():
    params = parameters(*SHAPES)
    opt = fusedopt.AdamW(params)
    train(opt, params, 0, 2)
    before = copies(params)
    with pytest.raises(RuntimeError, match="3 parameters were changed inside"), fusedopt.predicted_weights(opt):
        train(opt, params, 2, 3)
    assert_same_bits(params, before)


def test_offloaded_states(tmp_path):
    mine, alone = parameters(*SHAPES), parameters(*SHAPES)
    opt, plain = fusedopt.AdamW(mine), fusedopt.AdamW(alone)
    fusedopt.offload(opt, folder=tmp_path)
    for ps, o in ((mine, opt), (alone, plain)):
        train(o, ps, 0, 2)
    with fusedopt.predicted_weights(opt), fusedopt.predicted_weights(plain):
        assert_same_bits(mine, alone)
    assert_same_bits(mine, alone)


def test_refusals():
    params = parameters((40, 130))
    for opt, match in (
        (fusedopt.Lion(params), "rule 'lion' of Lion says nothing of the next update"),
        (fusedopt.SGD(params, lr=0.1), "rule 'sgd' of SGD says nothing"),
        (fusedopt.AdamW(params, projection=fusedopt.GaLore(rank=4)), "parameter 0 .* is projected"),
    ):
        with pytest.raises(ValueError, match=match), fusedopt.predicted_weights(opt):
            pass
    with (
        pytest.raises(ValueError, match="Invalid steps value: -1"),
        fusedopt.predicted_weights(fusedopt.AdamW(params), -1),
    ):
        pass
    opt = fusedopt.AdamW(params)
    fusedopt.release_gradients(torch.nn.ParameterList(params), opt)
    with pytest.raises(ValueError, match="steps during the backward pass"), fusedopt.predicted_weights(opt):
        pass
