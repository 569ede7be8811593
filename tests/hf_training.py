"""A tiny Llama trained by transformers.Trainer; as a program it can die on the way: hf_training.py DIR CASE STEP."""

from __future__ import annotations

import os
import signal
import sys

import torch
from trainer_data import Windows
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from fusedopt.integrations import trainer_kwargs

BATCH, STEPS, SAVE = 4, 8, 3
# bf16 says whether the weights are kept in it; every 8-bit state is one of at least 512 elements
CASES = {
    "adamw": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1},
    "adamw8bit": {
        "name": "adamw8bit", "lr": 3e-3, "weight_decay": 0.1, "param_precision": "stochastic", "min_quantized_numel": 512,
        "bf16": True,
    },
    "lion": {"name": "lion", "lr": 3e-4, "weight_decay": 0.1},
    "galore": {"name": "galore_adamw", "lr": 3e-3, "rank": 8, "update_every": 3},
}  # fmt: skip


def make_model(case: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    return model.bfloat16() if CASES[case].get("bf16") else model


def optimizer_options(case: str) -> dict:
    return {k: v for k, v in CASES[case].items() if k != "bf16"}


def arguments(folder, **changes) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, save_steps=SAVE, logging_steps=1,
        report_to=[], use_cpu=True, seed=7, lr_scheduler_type="linear", warmup_steps=2, disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"max_grad_norm": 1.0, "per_device_train_batch_size": BATCH, **changes},
    )  # fmt: skip


class Recorder(TrainerCallback):
    """Dies at a step if it is told to, as a machine does: nothing is cleaned up."""

    def __init__(self, die_at: int | None = None):
        self.die_at = die_at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def make_trainer(folder, case: str, die_at: int | None = None, model=None, optimizers=None, **changes) -> Trainer:
    model = model if model is not None else make_model(case)
    how = {"optimizers": optimizers} if optimizers else trainer_kwargs(model, **optimizer_options(case))
    trainer = Trainer(model, arguments(folder, **changes), train_dataset=Windows(), callbacks=[Recorder(die_at)], **how)
    trainer.losses = []
    model.register_forward_hook(lambda m, args, out: trainer.losses.append(out.loss.detach().clone()))
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_trainer(sys.argv[1], sys.argv[2], int(sys.argv[3])).train()
