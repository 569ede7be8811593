"""Lightning really run: automatic and manual optimization against a loop by hand, clipping, killed and resumed."""

import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning.pytorch")

import lightning_training as lt  # noqa: E402
from trainer_data import assert_same_weights, one_thread, run_recipe, text_windows  # noqa: E402, F401

HERE = Path(__file__).parent
each_case = pytest.mark.parametrize("case", lt.CASES)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def by_hand(case: str, max_norm: float | None = 0.5, **changes) -> tuple[list[float], dict]:
    model = lt.make_model(case)
    opt = lt.make_optimizer(model, case, **changes)
    schedule, losses = lt.make_schedule(opt), []
    for _ in range(lt.EPOCHS):
        for tokens in text_windows(lt.BATCH * lt.PER_EPOCH).split(lt.BATCH):
            opt.zero_grad()
            loss = model(tokens)
            loss.backward()
            if max_norm is not None:
                # in the optimizer's order, as Lightning does: the last bit of a norm depends on it
                torch.nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], max_norm)
            opt.step()
            schedule.step()
            losses.append(loss.item())
    return losses, model.state_dict()


def fit(folder, module, path=None, **changes):
    trainer = lt.make_trainer(folder, not module.automatic_optimization, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, lt.loader(), ckpt_path=path)
    return trainer


@each_case
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_reproduces_a_loop_written_by_hand(case, manual, tmp_path):
    module = lt.Module(case, manual)
    fit(tmp_path, module, enable_checkpointing=False)
    losses, weights = by_hand(case)
    assert module.losses == losses and losses[-1] < 0.95 * losses[0]
    assert_same_weights(module.model.state_dict(), weights)


@pytest.mark.parametrize("case", ["adamw", "adamw8bit"])
def test_killed_and_resumed(case, tmp_path):
    """kill -9 in the third epoch; the resumed run ends with the bits of the loop by hand that was never interrupted."""
    program = [sys.executable, str(HERE / "lightning_training.py"), str(tmp_path), case, "9"]
    killed = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    module = lt.Module(case)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    fit(tmp_path, module, str(tmp_path / "epoch=1.ckpt"))
    losses, weights = by_hand(case)
    assert module.losses == losses[2 * lt.PER_EPOCH :]
    assert_same_weights(module.model.state_dict(), weights)


@each_case
def test_resumed_from_the_first_epoch(case, tmp_path):
    fit(tmp_path, lt.Module(case), max_epochs=1)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["optimizer_states"][0]
    kinds = {v.dtype for entry in saved["state"].values() for v in entry.values()}
    assert (torch.uint8 in kinds) == (case != "adamw")
    module = lt.Module(case)
    fit(tmp_path, module, str(tmp_path / "epoch=0.ckpt"))
    losses, weights = by_hand(case)
    assert module.losses == losses[lt.PER_EPOCH :]
    assert_same_weights(module.model.state_dict(), weights)


def test_clipping_inside_the_step(tmp_path):
    """gradient_clip_val=None and clip_grad_norm=: Lightning's own clipping to fp32 rounding."""
    module = lt.Module("adamw", clip_grad_norm=0.5)
    fit(tmp_path, module, enable_checkpointing=False, gradient_clip_val=None)
    losses, weights = by_hand("adamw")
    torch.testing.assert_close(torch.tensor(module.losses), torch.tensor(losses), rtol=1e-5, atol=0)
    for name, value in weights.items():
        torch.testing.assert_close(module.model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_bf16_mixed_with_clipping(tmp_path):
    """Lightning refuses to clip for optimizers that unscale by themselves; ours does only when amp_fused=True."""
    module = lt.Module("adamw")
    fit(tmp_path, module, enable_checkpointing=False, precision="bf16-mixed")
    exact = by_hand("adamw")[0]
    assert module.losses != exact and module.losses[-1] == pytest.approx(exact[-1], rel=0.02)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(tmp_path, lt.Module("adamw", amp_fused=True), enable_checkpointing=False, precision="bf16-mixed")


def test_gradient_accumulation(tmp_path):
    module = lt.Module("adamw")
    trainer = fit(tmp_path, module, enable_checkpointing=False, accumulate_grad_batches=2)
    assert trainer.global_step == lt.EPOCHS * lt.PER_EPOCH // 2
    opt = trainer.optimizers[0]
    assert all(int(entry["step"]) == trainer.global_step for entry in opt.state.values())


def test_the_recipe(tmp_path):
    import lightning

    module = run_recipe("Lightning", lightning=lightning)["Module"](lt.make_model("adamw"))
    trainer = fit(tmp_path, module, enable_checkpointing=False)
    assert trainer.global_step == lt.EPOCHS * lt.PER_EPOCH
    assert trainer.optimizers[0].param_groups[0]["state_format"] == "int8"
