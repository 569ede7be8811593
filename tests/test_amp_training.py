"""Mixed precision in training: bf16 and fp16 autocast on the CPU, one GradScaler over several optimizers, overflows that leave
parameters, states and step counts as they were."""

import pytest
import torch
from configs import EVERY, assert_same_bits, each_config, tensors
from trainer_data import TinyLM, one_thread, run_recipe, text_windows  # noqa: F401

import fusedopt
from fusedopt.integrations import parameter_groups

each_protocol = pytest.mark.parametrize("amp_fused", [False, True], ids=["default", "fused"])
STEPS = 6


def run(opt, model, dtype=None, scaler=None) -> list[float]:
    """Losses of one batch, again and again: they fall for every rule."""
    losses, tokens = [], text_windows(4)
    for _ in range(STEPS):
        opt.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = model(tokens)
        (loss if scaler is None else scaler.scale(loss)).backward()
        opt.step() if scaler is None else scaler.step(opt)
        if scaler is not None:
            scaler.update()
        losses.append(loss.item())
    return losses


@each_config(EVERY)
@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_bf16_autocast(config, form):
    """The losses of fp32 to bf16's precision, and not the same ones; weights and states stay as they are kept."""
    options = {"lr": config.options["lr"] / 10, "state_format": form, "min_quantized_numel": 512}
    exact, model = TinyLM(), TinyLM()
    expected = run(config.make(exact.parameters(), **options), exact)
    opt = config.make(model.parameters(), **options)
    losses = run(opt, model, torch.bfloat16)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0.02, atol=0)
    assert losses != expected and losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("precision", ["stochastic", "split24", "kahan"])
def test_bf16_weights_with_autocast(precision):
    model = TinyLM(torch.bfloat16)
    opt = fusedopt.create("adamw8bit", parameter_groups(model, 0.1), lr=3e-3, param_precision=precision)
    losses = run(opt, model, torch.bfloat16)
    assert losses[-1] < losses[0] and all(p.dtype == torch.bfloat16 for p in model.parameters())


@each_protocol
@each_config(EVERY)
def test_fp16_autocast_with_a_scaler(config, amp_fused):
    options = {"lr": config.options["lr"] / 10}
    exact, model = TinyLM(), TinyLM()
    expected = run(config.make(exact.parameters(), **options), exact)
    opt = config.make(model.parameters(), amp_fused=amp_fused, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    losses = run(opt, model, torch.float16, scaler)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0.02, atol=0)
    assert losses[-1] < losses[0] and scaler.get_scale() == 2.0**11, "the scale grows while nothing overflows"


@each_protocol
@pytest.mark.parametrize("unscaled", [False, True], ids=["step unscales", "unscaled before"])
@each_config(EVERY)
def test_an_overflow_of_one_optimizer_stops_that_one_only(config, amp_fused, unscaled):
    """Two optimizers, one scaler: the one whose gradients overflow keeps every bit, also of its step counts."""
    models = TinyLM(), TinyLM()
    options = {"amp_fused": amp_fused, "state_format": "int8", "min_quantized_numel": 512}
    opts = [config.make(m.parameters(), **options) for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    tokens = text_windows(4)

    def step(factor: float) -> None:
        for model, opt, f in zip(models, opts, (1.0, factor), strict=True):
            opt.zero_grad()
            scaler.scale(model(tokens) * f).backward()
        for opt in opts:
            if unscaled:
                scaler.unscale_(opt)
            scaler.step(opt)
        scaler.update()

    step(1.0)
    kept = [tensors(o, list(m.parameters())) for o, m in zip(opts, models, strict=True)]
    step(float("nan"))
    assert_same_bits(tensors(opts[1], list(models[1].parameters())), kept[1])
    changed = tensors(opts[0], list(models[0].parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(changed, kept[0], strict=True))
    assert scaler.get_scale() == 8.0
    step(1.0)
    counts = [{int(entry["step"]) for entry in opt.state.values()} for opt in opts]
    assert counts == [{3}, {2}]
    assert not any(hasattr(opt, name) for opt in opts for name in ("grad_scale", "found_inf"))


@each_protocol
def test_a_first_step_that_overflows(amp_fused):
    """The scale starts too high more often than not: the run after it is that of one that starts with a fitting scale."""
    runs = []
    for scale, skipped in ((2.0**4, 0), (2.0**127, 1)):
        model = TinyLM()
        opt = fusedopt.create("adamw8bit", model, lr=3e-3, amp_fused=amp_fused, min_quantized_numel=512)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**4 / scale if skipped else 0.5)
        seen = 0
        for tokens in [*[text_windows(4)] * skipped, *text_windows(4 * STEPS).split(4)]:
            opt.zero_grad()
            scaler.scale(model(tokens) * (float("inf") if seen < skipped else 1.0)).backward()
            scaler.step(opt)
            scaler.update()
            seen += 1
        assert scaler.get_scale() == 2.0**4
        runs.append(tensors(opt, list(model.parameters())))
    assert_same_bits(runs[1], runs[0])


def test_fp16_weights_are_refused_by_the_scaler_and_taken_by_the_step():
    """torch unscales no fp16 gradients in place; the fused protocol unscales them in fp32 inside the step."""
    for amp_fused in (False, True):
        model = TinyLM(torch.float16)
        opt = fusedopt.AdamW(model.parameters(), lr=1e-2, amp_fused=amp_fused, param_precision="stochastic")
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        first = model(text_windows(4))
        scaler.scale(first).backward()
        if not amp_fused:
            with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
                scaler.step(opt)
            continue
        scaler.step(opt)
        assert model(text_windows(4)) < first


def test_the_recipe():
    batches = text_windows(4 * STEPS).split(4)
    model = TinyLM()
    first = model(batches[0]).item()
    names = run_recipe("Plain loop", model=model, batches=batches * 4, steps=4 * STEPS, device="cpu")
    assert model(batches[0]).item() < first and float(names["opt"].grad_norm) > 0
    states = names["opt"].state
    assert states[model.table.weight]["exp_avg"].dtype == torch.float32
    assert states[model.head.weight]["exp_avg"].dtype == torch.uint8
