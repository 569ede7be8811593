"""accelerate really run: prepare with a scheduler, accumulation, clipping, save_state and load_state, against a loop by hand."""

import pytest
import torch

accelerate = pytest.importorskip("accelerate")

from trainer_data import TinyLM, assert_same_weights, one_thread, run_recipe, text_windows  # noqa: E402, F401

import fusedopt  # noqa: E402
from fusedopt.integrations import parameter_groups  # noqa: E402

STEPS, BATCH = 8, 4
CASES = {
    "adamw": {"name": "adamw", "lr": 3e-3},
    "adamw8bit": {"name": "adamw8bit", "lr": 3e-3, "param_precision": "stochastic", "min_quantized_numel": 512},
    "split24": {"name": "lion_int8c", "lr": 3e-4, "param_precision": "split24", "min_quantized_numel": 512},
    "adafactor": {"name": "adafactor", "lr": 3e-2, "beta1": 0.9},
    "capturable": {"name": "adamw", "lr": 3e-3, "capturable": True},
}
each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerators share one state in a process."""
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def make(case: str):
    options = dict(CASES[case])
    model = TinyLM(torch.bfloat16 if "param_precision" in options else torch.float32)
    opt = fusedopt.create(options.pop("name"), parameter_groups(model, 0.1), **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    return model, opt, schedule


def by_hand(case: str, accumulate: int = 1) -> tuple[list[float], dict]:
    model, opt, schedule = make(case)
    losses = []
    for i, tokens in enumerate(text_windows(STEPS * BATCH).split(BATCH)):
        loss = model(tokens)
        losses.append(loss.item())
        (loss / accumulate).backward()
        if (i + 1) % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            schedule.step()
            opt.zero_grad()
    return losses, model.state_dict()


class Run:
    """The usual loop with an Accelerator."""

    def __init__(self, case: str, **options):
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        loader = torch.utils.data.DataLoader(text_windows(STEPS * BATCH), BATCH)
        self.model, self.opt, self.schedule, self.loader = self.accelerator.prepare(*make(case), loader)
        self.inner = self.opt.optimizer
        self.losses = []

    def train(self, first: int = 0, last: int = STEPS) -> None:
        for tokens in list(self.loader)[first:last]:
            with self.accelerator.accumulate(self.model):
                loss = self.model(tokens)
                self.losses.append(loss.item())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.opt.step()
                self.schedule.step()
                self.opt.zero_grad()

    def weights(self) -> dict:
        return self.accelerator.unwrap_model(self.model).state_dict()


@each_case
def test_reproduces_a_loop_written_by_hand(case):
    run = Run(case)
    assert not run.inner.state, "prepare loads an empty state dict, which must make no states"
    run.train()
    losses, weights = by_hand(case)
    assert run.losses == losses
    assert_same_weights(run.weights(), weights)


@pytest.mark.parametrize("case", ["adamw", "adamw8bit"])
def test_gradient_accumulation(case):
    run = Run(case, gradient_accumulation_steps=2)
    run.train()
    losses, weights = by_hand(case, accumulate=2)
    assert run.losses == losses and all(int(e["step"]) == STEPS // 2 for e in run.inner.state.values())
    assert_same_weights(run.weights(), weights)


@each_case
def test_saved_and_loaded_state(case, tmp_path):
    """save_state after 5 steps, load_state into new objects: the rest is that of the uninterrupted run, in every bit."""
    first = Run(case)
    first.train(0, 5)
    first.accelerator.save_state(str(tmp_path))
    second = Run(case)
    with torch.no_grad():
        for p in second.model.parameters():
            p.zero_()
    second.accelerator.load_state(str(tmp_path))
    second.train(5)
    losses, weights = by_hand(case)
    assert second.losses == losses[5:]
    assert_same_weights(second.weights(), weights)
    assert second.inner.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_parameters_switched_in_their_groups():
    """What accelerate does to optimizers on a TPU and with FSDP2: other tensors in place of the ones they were made with."""
    run = Run("adamw8bit")
    old = dict(run.model.named_parameters())
    new = {name: torch.nn.Parameter(p.detach().clone()) for name, p in old.items()}
    run.opt._switch_parameters({p: new[name] for name, p in old.items()})
    for name, p in new.items():
        module, _, leaf = name.rpartition(".")
        setattr(run.model.get_submodule(module), leaf, p)
    run.train()
    losses, weights = by_hand("adamw8bit")
    assert run.losses == losses and set(run.inner.state) == set(new.values())
    assert_same_weights(run.weights(), weights)
    assert run.inner.state[new["table.weight"]]["exp_avg"].dtype == torch.float32


def test_bf16_autocast():
    run = Run("adamw", mixed_precision="bf16")
    run.train()
    assert run.losses[0] != by_hand("adamw")[0][0] and run.losses[-1] < 0.95 * run.losses[0]


def test_an_overflow_is_seen_as_a_skipped_step():
    """accelerate asks whether `step` was called, and holds the learning rate where it was not."""
    accelerate.Accelerator(cpu=True)
    model, opt, _ = make("adamw")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    prepared = accelerate.optimizer.AcceleratedOptimizer(opt, scaler=scaler)
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale(model(text_windows(2)) * factor).backward()
        prepared.step()
        assert prepared.step_was_skipped == (factor != 1.0)
        prepared.zero_grad()
    assert scaler.get_scale() == 2.0 and all(int(entry["step"]) == 2 for entry in opt.state.values())


def test_the_recipe(tmp_path):
    loader = torch.utils.data.DataLoader(text_windows(STEPS * BATCH), BATCH)
    accelerator = accelerate.Accelerator(cpu=True)
    names = run_recipe(
        "accelerate", model=TinyLM(), loader=loader, accelerator=accelerator, steps=STEPS, folder=str(tmp_path)
    )
    assert all(int(entry["step"]) == STEPS for entry in names["opt"].optimizer.state.values())
    assert (tmp_path / "optimizer.bin").exists()
