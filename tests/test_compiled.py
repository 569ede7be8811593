"""torch.compile: the step is one operator of the graph, with the bits of an eager step and no recompilation by schedules."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from configs import BY_NAME, CONFIGS, assert_same_bits, each_config, set_grads, tensors
from torch._dynamo.testing import CompileCounterWithBackend

import fusedopt
from fusedopt import compiled


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 5))


def compiled_step(opt, backend: str = "aot_eager"):
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def step():
        opt.step()

    return step, counter


@each_config()
@pytest.mark.parametrize("form, precision", [("fp32", "nearest"), ("int8", "stochastic"), ("int4", "split32")])
def test_compiled_step_has_the_bits_of_an_eager_one(config, form, precision):
    dtype = torch.float32 if precision == "nearest" else torch.bfloat16
    options = {"state_format": form, "param_precision": precision, "min_quantized_numel": 0}
    eager, graph = (config.make(model().to(dtype).parameters(), **options) for _ in range(2))
    step, counter = compiled_step(graph)
    for i in range(4):
        for opt in (eager, graph):
            set_grads(opt.param_groups[0]["params"], i)
        eager.step()
        step()
    lists = [tensors(opt, opt.param_groups[0]["params"]) for opt in (graph, eager)]
    assert_same_bits(*lists)
    assert counter.frame_count == 1
    assert counter.op_count >= 1


@pytest.mark.parametrize("schedule", ["onecycle", "lambda"])
def test_schedules_do_not_recompile(schedule):
    """The operator reads the numbers itself."""
    models = [model(), model()]
    opts = [fusedopt.AdamW(m.parameters(), lr=1e-2, clip_grad_norm=0.5) for m in models]
    if schedule == "onecycle":
        schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, 20) for o in opts]
    else:
        schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i)) for o in opts]
    step, counter = compiled_step(opts[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Detected call of")
        for i in range(10):
            for opt, do, plan in zip(opts, (opts[0].step, step), schedules, strict=True):
                set_grads(opt.param_groups[0]["params"], i)
                do()
                plan.step()
    assert_same_bits(*(list(m.parameters()) for m in models))
    assert counter.frame_count == 1
    assert opts[1].param_groups[0]["lr"] != 1e-2


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot trace backward()"
)
def test_a_whole_train_step_is_one_graph():
    models = [model(), model()]
    opts = [fusedopt.AdamW(m.parameters(), lr=1e-2, state_format="int8", min_quantized_numel=0) for m in models]
    counter = CompileCounterWithBackend("inductor")

    def train(m, opt, x):
        loss = m(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    graph = torch.compile(train, fullgraph=True, backend=counter)
    gen = torch.Generator().manual_seed(1)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for _ in range(5):
            x = torch.randn(16, 24, generator=gen)
            torch.testing.assert_close(graph(models[1], opts[1], x), train(models[0], opts[0], x))
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-3)  # int8 moments: a last-bit gradient can change a code
        assert q.grad is None
    assert counter.frame_count == 1


def test_frozen_and_missing_gradients_compile_anew():
    eager, graph = (fusedopt.Lion(model().parameters(), lr=1e-2) for _ in range(2))
    step, counter = compiled_step(graph)
    for i, without in enumerate([None, 1, 1, None]):
        for opt, do in ((eager, eager.step), (graph, step)):
            params = opt.param_groups[0]["params"]
            set_grads(params, i)
            if without is not None:
                params[without].grad = None
            do()
    assert_same_bits(*(list(opt.param_groups[0]["params"]) for opt in (graph, eager)))
    assert counter.frame_count == 2


def test_closure_and_hooks_run_in_a_compiled_step():
    opt, calls = fusedopt.SGD(model().parameters(), lr=0.1), []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    x = torch.ones(4, 24)
    set_grads(opt.param_groups[0]["params"], 0)
    before = [p.detach().clone() for p in opt.param_groups[0]["params"]]
    loss = torch.compile(lambda: opt.step(lambda: x.sum()), backend="aot_eager")()
    assert float(loss) == 96
    assert calls == ["pre", "post"]
    assert not torch.equal(before[0], opt.param_groups[0]["params"][0])


def test_projected_steps_compile():
    options = {"lr": 1e-2, "projection": fusedopt.GaLore(rank=4, update_every=2)}
    eager, graph = (fusedopt.AdamW(model().parameters(), **options) for _ in range(2))
    step, _ = compiled_step(graph)
    for i in range(4):
        for opt, do in ((eager, eager.step), (graph, step)):
            set_grads(opt.param_groups[0]["params"], i)
            do()
    assert_same_bits(*(tensors(opt, opt.param_groups[0]["params"]) for opt in (graph, eager)))


@each_config([BY_NAME["adamw"], BY_NAME["lamb"]])
def test_operator_passes_opcheck(config):
    opt = config.make([torch.nn.Parameter(torch.randn(6, 7)), torch.nn.Parameter(torch.randn(5))])
    params = opt.param_groups[0]["params"]
    set_grads(params, 0)
    with torch.no_grad():
        args = ([p.detach() for p in params], [p.grad for p in params], [0, 1], opt._traced.handle)
        torch.library.opcheck(compiled.step_op, args, test_utils=("test_schema", "test_faketensor"))


def test_operator_steps_copies_of_the_parameters():
    """A compiler may pass a copy: its values are stepped, and both end up with the result."""
    opt, want = (fusedopt.AdamW([torch.nn.Parameter(torch.ones(300))], lr=0.1) for _ in range(2))
    p, q = (o.param_groups[0]["params"][0] for o in (opt, want))
    copied = torch.full((300,), 2.0)
    with torch.no_grad():
        q.fill_(2.0)
    q.grad = torch.linspace(-1, 1, 300)
    want.step()
    torch.ops.fusedopt.step([copied], [q.grad], [0], opt._traced.handle)
    assert_same_bits([copied, p], [q, q])


def test_operator_says_what_is_wrong():
    opt = fusedopt.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    handle = opt._traced.handle
    with pytest.raises(RuntimeError, match="SGD has other parameters than when this step was compiled"):
        torch.ops.fusedopt.step([torch.ones(4)], [torch.ones(4)], [0], handle)
    with pytest.raises(RuntimeError, match="SGD has other parameters"):
        torch.ops.fusedopt.step([torch.ones(3)], [torch.ones(3)], [1], handle)
    assert torch.equal(opt.param_groups[0]["params"][0], torch.ones(3))
    del opt
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists"):
        torch.ops.fusedopt.step([torch.ones(3)], [torch.ones(3)], [0], handle)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_step_their_own_parameters(copied):
    opt = fusedopt.Adam([torch.nn.Parameter(torch.ones(8))], lr=0.1)
    torch.optim.lr_scheduler.StepLR(opt, 3)
    other = copied(opt)
    assert other._traced.handle != opt._traced.handle
    step, _ = compiled_step(other)
    other.param_groups[0]["params"][0].grad = torch.ones(8)
    step()
    assert torch.equal(opt.param_groups[0]["params"][0], torch.ones(8))
    assert not torch.equal(other.param_groups[0]["params"][0], torch.ones(8))
    opt.load_state_dict(other.state_dict())
    assert other._traced.handle != opt._traced.handle


@each_config(CONFIGS[:1])
def test_schedulers_leave_the_step_alone_and_still_notice_the_order(config):
    opt = config.make([torch.nn.Parameter(torch.ones(8))])
    schedule = torch.optim.lr_scheduler.StepLR(opt, 3)
    assert "step" not in vars(opt)
    with pytest.warns(UserWarning, match="Detected call of"):
        schedule.step()
    opt = config.make([torch.nn.Parameter(torch.ones(8))])
    schedule = torch.optim.lr_scheduler.StepLR(opt, 3)
    opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.step()


def test_nothing_is_copied_in_inductor(monkeypatch):
    """The compiler passes the parameters themselves to the operator."""
    seen, find = [], compiled.copied_parameters
    monkeypatch.setattr(compiled, "copied_parameters", lambda own, given: seen.append(find(own, given)) or seen[-1])
    m = model()
    step, _ = compiled_step(fusedopt.AdamW(m.parameters(), lr=1e-2), "inductor")
    for i in range(2):
        set_grads(list(m.parameters()), i)
        step()
    assert seen == [[], []]


def test_switched_parameters_are_stepped():
    """accelerate and FSDP2 put other tensors into the groups."""
    opt = fusedopt.AdamW([torch.nn.Parameter(torch.ones(8))], lr=0.1)
    step, _ = compiled_step(opt)
    set_grads(opt.param_groups[0]["params"], 0)
    step()
    opt.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(8))]
    set_grads(opt.param_groups[0]["params"], 0)
    step()
    want = fusedopt.AdamW([torch.nn.Parameter(torch.ones(8))], lr=0.1)
    set_grads(want.param_groups[0]["params"], 0)
    want.step()
    assert_same_bits(opt.param_groups[0]["params"], want.param_groups[0]["params"])
