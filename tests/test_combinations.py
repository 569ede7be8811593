"""What goes wrong only where features meet: states changed by hand, views in packed formats, refused and skipped steps."""

import copy
import struct

import pytest
import torch
from configs import assert_same_bits, each_backend, parameters, set_grads, tensors

import fusedopt


def gapped(*shape, dtype=torch.float32, seed: int = 0) -> torch.nn.Parameter:
    """A parameter that takes every other column of its memory."""
    gen = torch.Generator().manual_seed(seed)
    wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=gen).to(dtype)
    return torch.nn.Parameter(wide[..., ::2])


# States that are changed outside the optimizer: launches go by addresses


def stepped(cls=fusedopt.AdamW, **options):
    params = parameters((40, 50), (7,))
    opt = cls(params, lr=0.01, **options)
    set_grads(params, 0)
    opt.step()
    return params, opt


def test_a_narrower_state_is_widened_and_memory_beside_it_is_left_alone():
    params, opt = stepped()
    twins, twin = stepped()
    memory = torch.full((6000,), 7.0, dtype=torch.float16)
    narrow = memory[2000:4000].view(40, 50)
    for ps, o in ((params, opt), (twins, twin)):
        o.state[ps[0]]["exp_avg"] = o.state[ps[0]]["exp_avg"].half()
    narrow.copy_(opt.state[params[0]]["exp_avg"])
    opt.state[params[0]]["exp_avg"] = narrow
    twin.state[twins[0]]["exp_avg"] = twin.state[twins[0]]["exp_avg"].float()
    for ps, o in ((params, opt), (twins, twin)):
        set_grads(ps, 1)
        o.step()
    assert_same_bits(tensors(opt, params), tensors(twin, twins))
    assert (memory[:2000] == 7).all() and (memory[4000:] == 7).all()


@pytest.mark.parametrize(
    "options, name, change, message",
    [
        ({}, "exp_avg", lambda t: t.long(), "state 'exp_avg' is torch.int64"),
        ({}, "exp_avg", lambda t: None, "'exp_avg' is no dense tensor but NoneType"),
        ({}, "exp_avg", lambda t: t.to_sparse(), "'exp_avg' is no dense tensor"),
        ({"state_format": "int8"}, "exp_avg", lambda t: t.float(), "int8 state 'exp_avg' is torch.float32"),
        ({"state_format": "int8"}, "exp_avg_int8_scale", lambda t: t[:3], r"scales of torch.float32 and shape \(3,\)"),
        ({"state_format": "int4"}, "exp_avg_int4_scale", lambda t: t.half(), "scales of torch.float16"),
        ({"state_format": "int8"}, "exp_avg_int8_scale", lambda t: t.repeat_interleave(2)[::2], "scales of torch.float32"),
    ],
)  # fmt: skip
def test_states_that_cannot_be_read_are_refused(options, name, change, message):
    params, opt = stepped(min_quantized_numel=0, **options)
    entry = opt.state[params[0]]
    entry[name] = change(entry[name])
    before = [p.detach().clone() for p in params]
    steps = [opt.state[p]["step"].clone() for p in params]
    with pytest.raises(RuntimeError, match=r"AdamW: parameter 0 \(shape .*" + message):
        opt.step()
    assert_same_bits([p.detach() for p in params], before)
    assert_same_bits([opt.state[p]["step"] for p in params], steps)


@pytest.mark.parametrize("cls", [fusedopt.AdamW, fusedopt.Adafactor], ids=lambda c: c.__name__)
@pytest.mark.parametrize("first, then", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_a_model_that_is_cast_goes_on(cls, first, then):
    """.double() and .float() change the parameters' dtype under the optimizer: as after loading its own state dict."""
    runs = []
    for reload in (False, True):
        params = parameters((40, 50), (7,), dtype=first)
        opt = cls(params, lr=0.01, **({"relative_step": False} if cls is fusedopt.Adafactor else {}))
        for step in range(3):
            if step == 1:
                for p in params:
                    p.grad, p.data = None, p.data.to(then)
                if reload:
                    opt.load_state_dict(opt.state_dict())
            set_grads(params, step)
            opt.step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# Views with gaps


@each_backend
@pytest.mark.parametrize("shape", [(64, 64), (33, 8, 4), (600,)])
def test_packed_states_of_a_view_are_those_of_a_contiguous_tensor(backend, shape):
    view = gapped(*shape)
    whole = torch.nn.Parameter(view.detach().clone(memory_format=torch.contiguous_format))
    opts = [fusedopt.AdamW([p], state_format="int4", min_quantized_numel=0, backend=backend) for p in (view, whole)]
    for step in range(3):
        for p, opt in zip((view, whole), opts, strict=True):
            set_grads([p], step)
            opt.step()
        if step == 1:
            for opt in opts:
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert_same_bits(tensors(opts[0], [view]), tensors(opts[1], [whole]))


def test_a_copied_model_with_views_steps_on():
    """deepcopy closes the gaps of a parameter, and its packed states still fit."""
    params = [gapped(64, 64)]
    opt = fusedopt.AdamW(params, state_format="int4", min_quantized_numel=0)
    set_grads(params, 0)
    opt.step()
    twins, twin = copy.deepcopy((params, opt))
    for ps, o in ((params, opt), (twins, twin)):
        set_grads(ps, 1)
        o.step()
    assert_same_bits(tensors(twin, twins), tensors(opt, params))


# Steps that are refused or skipped


@pytest.mark.parametrize(
    "option, value", [("lr", "fast"), ("betas", (0.9,)), ("eps", None), ("weight_decay", "x"), ("seed", None)]
)
@pytest.mark.parametrize("capturable", [False, True])
def test_an_option_that_is_no_number_changes_nothing(option, value, capturable):
    params = parameters((5, 7), (3,))
    opt = fusedopt.AdamW([{"params": [p]} for p in params], capturable=capturable)
    set_grads(params, 0)
    opt.step()
    before, good = tensors(opt, params), opt.param_groups[1][option]
    opt.param_groups[1][option] = value
    with pytest.raises((TypeError, ValueError, struct.error)):
        opt.step()
    assert_same_bits(tensors(opt, params), before)
    opt.param_groups[1][option] = good
    twins, twin = copy.deepcopy((params, opt))
    for ps, o in ((params, opt), (twins, twin)):
        set_grads(ps, 1)
        o.step()
    assert_same_bits(tensors(opt, params), tensors(twin, twins))
    assert int(opt.state[params[0]]["step"]) == 2


@pytest.mark.parametrize(
    "projection",
    [
        fusedopt.GaLore(rank=4, update_every=3),
        fusedopt.Apollo(rank=4, update_every=3),
        fusedopt.Frugal(density=0.3, update_every=2),
        fusedopt.DCT(rank=4, update_every=2),
        fusedopt.QGaLore(rank=4, update_every=2),
    ],
    ids=lambda p: type(p).__name__,
)
def test_steps_skipped_on_the_device_do_not_move_refreshes(projection):
    """With device counters the host does not learn of a skipped step; projectors still change at the steps they would without
    it, so that a run resumed from a state dict does not part from one that went on."""

    def run(skips, resume_at=None):
        params = parameters((24, 40), (16, 16), (9,))
        made = []

        def build():
            made.append(fusedopt.AdamW(params, capturable=True, amp_fused=True, projection=projection))
            return made[-1]

        opt = build()
        for step in range(8):
            if step == resume_at:
                saved = copy.deepcopy(opt.state_dict())
                opt = build()
                opt.load_state_dict(saved)
            for overflow in [1.0] * (step in skips) + [0.0]:
                set_grads(params, step)
                opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(overflow)
                opt.step()
        return tensors(opt, params)

    straight = run(())
    for skips in ((0,), (3,), (2, 3, 5)):
        assert_same_bits(run(skips), straight, f"{skips}")
    assert_same_bits(run((3,), resume_at=5), straight)


@pytest.mark.parametrize("judged_by", ["closure", "trial"])
def test_a_trial_step_is_taken_back_where_its_closure_raises(judged_by):
    params = parameters((5, 7), (3,))
    opt = fusedopt.SMB(params, lr=0.1)

    def loss_of(limit):
        calls = []

        def closure():
            calls.append(1)
            if len(calls) == limit:
                raise KeyboardInterrupt
            opt.zero_grad()
            loss = sum(p.square().sum() for p in params)
            loss.backward()
            return loss

        return closure

    def broken():
        raise KeyboardInterrupt

    opt.step(loss_of(99))
    before = tensors(opt, params)
    with pytest.raises(KeyboardInterrupt):
        opt.step(loss_of(2)) if judged_by == "closure" else opt.step(loss_of(99), broken)
    assert_same_bits(tensors(opt, params), before)
    opt.step(loss_of(99))
    assert int(opt.state[params[0]]["step"]) == 2


# Inputs that were taken without a word


@pytest.mark.parametrize("make", [False, True], ids=["first step", "loaded"])
def test_inference_mode(make):
    """States that are made under torch.inference_mode can be changed later."""
    params, twins = parameters((5, 7)), parameters((5, 7))
    opt, twin = (fusedopt.AdamW(ps, backend="reference") for ps in (params, twins))
    for step in range(3):
        for ps, o in ((params, opt), (twins, twin)):
            set_grads(ps, step)
            if o is opt and step == int(make):
                with torch.inference_mode():
                    if make:
                        o.load_state_dict(copy.deepcopy(o.state_dict()))
                    o.step()
            else:
                o.step()
    assert_same_bits(tensors(opt, params), tensors(twin, twins))


@pytest.mark.parametrize(
    "cls, options",
    [
        (fusedopt.AdamW, {"state_format": "int8", "clip_grad_norm": 1.0, "backend": "reference"}),
        (fusedopt.AdamW, {"projection": fusedopt.GaLore(rank=2, update_every=2)}),
        (fusedopt.AdamW, {"gradient_transforms": [fusedopt.Grokfast(), fusedopt.Lookahead(every=2)]}),
        (fusedopt.Muon, {"state_format": "int4"}),
        (fusedopt.Prodigy, {"capturable": True}),
        (fusedopt.LAMB, {}),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "-".join(v) or "plain",
)
def test_another_default_device(cls, options, tmp_path):
    """What a step makes on the host lies there also after torch.set_default_device, here to a device without data."""
    runs = []
    for device in ("cpu", "meta"):
        params = parameters((24, 40), (9,))
        model = torch.nn.ParameterList(params)
        with torch.device(device):
            opt = cls(params, lr=0.01, min_quantized_numel=0, **options)
        for step in range(4):
            set_grads(params, step)
            with torch.device(device):
                opt.step()
                if step == 1:
                    fusedopt.save_checkpoint(tmp_path / "a.pt", model=model, optimizer=opt)
                    fusedopt.load_checkpoint(tmp_path / "a.pt", model=model, optimizer=opt)
                if step == 2:
                    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
                    opt.plan().explain()
                    fusedopt.global_norm([p.grad for p in params])
        runs.append(tensors(opt, params))
    assert_same_bits(*runs)


def test_another_default_device_in_the_backward_pass():
    runs = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        model, x = torch.nn.Linear(5, 3), torch.randn(4, 5)
        opt = fusedopt.AdamW(model.parameters())
        fusedopt.release_gradients(model, opt)
        for _ in range(2):
            loss = model(x).square().mean()
            with torch.device(device):
                loss.backward()
                opt.step()
        runs.append([p.detach() for p in model.parameters()])
    assert_same_bits(*runs)


def test_a_parameter_listed_twice_is_refused():
    (p,) = parameters((5, 7))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = fusedopt.AdamW([p, p])
    set_grads([p], 0)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 1 \(shape \(5, 7\).* is parameter 0 too. List it once."):
        opt.step()
    assert_same_bits([p.detach()], [before])
    assert not opt.state


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"state_format": "int3"}, ValueError, "unknown state_format 'int3'"),
        ({"state_format": {"exp_avgg": "int8"}}, ValueError, "names 'exp_avgg', which no rule keeps; rule 'adam' keeps exp_avg"),
        ({"param_precision": "exact"}, ValueError, "unknown param_precision 'exact'"),
        ({"seed": 1.5}, ValueError, "Invalid seed: 1.5; it must be an integer"),
        ({"min_quantized_numel": -1}, ValueError, "Invalid min_quantized_numel: -1; it must be an integer, 0 or more"),
        ({"clip_grad_norm": 1.0}, ValueError, "clip_grad_norm is of the whole optimizer"),
        ({"gradient_transforms": [fusedopt.OrthoGrad()]}, ValueError, "gradient_transforms is of the whole optimizer"),
        ({"backend": "cpu"}, ValueError, "backend is of the whole optimizer"),
    ],
)  # fmt: skip
def test_options_of_a_group(options, error, message):
    params = parameters((3,), (4,))
    opt = fusedopt.AdamW(params[:1])
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": params[1:], **options})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"lr": "1e-3"}, TypeError, "Invalid learning rate: '1e-3'; it must be a number"),
        ({"lr": None}, TypeError, "Invalid learning rate: None; it must be a number"),
        ({"weight_decay": None}, TypeError, "Invalid weight_decay value: None; it must be a number"),
        ({"betas": 0.9}, ValueError, "Invalid betas: 0.9; it takes 2 of them"),
        ({"betas": (0.9,)}, ValueError, r"Invalid betas: \(0.9,\); it takes 2 of them"),
        ({"betas": (0.9, 0.99, 0.999)}, ValueError, "it takes 2 of them"),
        ({"betas": ("a", 0.9)}, TypeError, "Invalid beta parameter at index 0: 'a'; it must be a number"),
        ({"seed": None}, ValueError, "Invalid seed: None"),
        ({"min_quantized_numel": "1"}, ValueError, "Invalid min_quantized_numel: '1'"),
    ],
)
def test_options_of_the_wrong_kind(options, error, message):
    with pytest.raises(error, match=message):
        fusedopt.AdamW(parameters((3,)), **options)


def test_stable_decay_of_a_rule_without_betas():
    params = parameters((5, 7))
    opt = fusedopt.INNAprop(params, gradient_transforms=[fusedopt.StableDecay()])
    set_grads(params, 0)
    before = params[0].detach().clone()
    with pytest.raises(
        ValueError, match="StableDecay: rule 'innaprop' keeps no full exp_avg_sq of parameter 0 by betas"
    ):
        opt.step()
    assert_same_bits([params[0].detach()], [before])


def test_an_estimate_of_a_precision_that_cannot_be():
    params = parameters((5,), (6,), dtype=torch.float16)
    opt = fusedopt.AdaHessian(params, param_precision="split24")
    with pytest.raises(RuntimeError, match=r"AdaHessian: parameter 0 .*'split24' keeps bfloat16 parameters"):
        opt.estimate_hessian(sum(p.square().sum() for p in params))
    assert not opt.state and all(p.grad is None for p in params)


def test_release_of_another_model():
    opt = fusedopt.AdamW(parameters((5,)))
    with pytest.raises(ValueError, match="the model has no parameter of this AdamW"):
        fusedopt.release_gradients(torch.nn.Linear(2, 2), opt)


def test_a_vector_among_hidden_matrices_is_named():
    with pytest.raises(ValueError, match=r"parameter 1 of its group, of shape \(8,\), is no matrix"):
        fusedopt.Muon([{"params": parameters((8, 8), (8,)), "orthogonalize": True}])


def test_a_plan_sees_other_strides_at_the_same_address():
    """A square weight that is transposed in place of its data: its gradients are copied to the layout of the storage again."""
    p, q = (torch.nn.Parameter(torch.arange(16.0).view(4, 4)) for _ in range(2))
    ours, theirs = fusedopt.SGD([p], lr=0.5), torch.optim.SGD([q], lr=0.5)  # exact
    for turn in range(2):
        for w, opt in ((p, ours), (q, theirs)):
            w.grad = torch.arange(16.0).view(4, 4) ** 2
            opt.step()
            if turn == 0:
                w.data = w.data.t()
    assert torch.equal(p, q)
