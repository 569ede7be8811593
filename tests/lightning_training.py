"""TinyLM trained by Lightning; as a program it can die on the way: lightning_training.py DIR CASE STEP."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from trainer_data import TinyLM, text_windows

import fusedopt
from fusedopt.integrations import parameter_groups

BATCH, EPOCHS, PER_EPOCH = 4, 3, 4
CASES = {
    "adamw": {"name": "adamw", "lr": 3e-3},
    "adamw8bit": {"name": "adamw8bit", "lr": 3e-3, "param_precision": "stochastic", "min_quantized_numel": 512},
    "lamb": {"name": "lamb4bit", "lr": 3e-3, "min_quantized_numel": 512},
}


def make_model(case: str) -> TinyLM:
    return TinyLM(torch.bfloat16 if "param_precision" in CASES[case] else torch.float32)


def make_optimizer(model, case: str, **changes) -> torch.optim.Optimizer:
    options = {**CASES[case], **changes}
    return fusedopt.create(options.pop("name"), parameter_groups(model, 0.1), **options)


def make_schedule(opt):
    return torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=6e-3, total_steps=EPOCHS * PER_EPOCH)


class Module(pl.LightningModule):
    def __init__(self, case: str, manual: bool = False, die_at: int | None = None, **changes):
        super().__init__()
        self.model, self.case, self.die_at, self.changes = make_model(case), case, die_at, changes
        self.automatic_optimization = not manual
        self.losses = []

    def configure_optimizers(self):
        opt = make_optimizer(self.model, self.case, **self.changes)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": make_schedule(opt), "interval": "step"}}

    def training_step(self, tokens, index):
        if self.global_step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = self.model(tokens)
        self.losses.append(loss.item())
        if not self.automatic_optimization:
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(opt, 0.5, "norm")
            opt.step()
            self.lr_schedulers().step()
        return loss


def loader():
    return torch.utils.data.DataLoader(text_windows(BATCH * PER_EPOCH), BATCH)


def make_trainer(folder, manual: bool = False, **changes) -> pl.Trainer:
    saving = changes.get("enable_checkpointing", True)
    clip = {} if manual else {"gradient_clip_val": 0.5}
    return pl.Trainer(
        default_root_dir=str(folder), accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)] if saving else None,
        **{"max_epochs": EPOCHS, **clip, **changes},
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_trainer(Path(sys.argv[1])).fit(Module(sys.argv[2], die_at=int(sys.argv[3])), loader())
