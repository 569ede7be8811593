"""transformers.Trainer really run: against a loop written by hand, resumed, killed and resumed, embeddings in 32 bits."""

import copy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

import hf_training as hf  # noqa: E402
from trainer_data import Windows, assert_same_weights, one_thread, run_recipe  # noqa: E402, F401

import fusedopt  # noqa: E402
from fusedopt.integrations import keep_embeddings_fp32, parameter_groups, trainer_kwargs  # noqa: E402

HERE = Path(__file__).parent
each_case = pytest.mark.parametrize("case", hf.CASES)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Uninterrupted runs by case, made once: (trainer, losses, weights, folder)."""
    done = {}

    def run(case: str):
        if case not in done:
            folder = tmp_path_factory.mktemp(case)
            trainer = hf.make_trainer(folder, case)
            seen = []
            hook = trainer.model.register_forward_pre_hook(
                lambda m, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
            )
            trainer.train()
            hook.remove()
            weights = copy.deepcopy(trainer.model.state_dict())
            done[case] = (trainer, list(trainer.losses), weights, folder, seen)
        return done[case]

    return run


def by_hand(case: str, order: list[torch.Tensor], max_norm: float | None = 1.0, **options) -> tuple[list, dict]:
    """The same training in a loop: two groups of parameters, clipping by torch, transformers' linear schedule."""
    model = hf.make_model(case)
    model.train()
    arguments = {**hf.optimizer_options(case), **options}
    name, decay = arguments.pop("name"), arguments.pop("weight_decay", 0.0)
    opt = fusedopt.create(name, parameter_groups(model, decay), **arguments)
    schedule = transformers.get_linear_schedule_with_warmup(opt, 2, hf.STEPS)
    losses = []
    for tokens in order:
        # the Trainer divides by the labels that a shifted sequence predicts
        count = tokens[:, 1:].numel()
        loss = model(input_ids=tokens, labels=tokens, num_items_in_batch=torch.tensor(count)).loss
        loss.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        opt.step()
        schedule.step()
        opt.zero_grad()
        losses.append(loss.detach())
    return losses, model.state_dict()


@each_case
def test_reproduces_a_loop_written_by_hand(case, straight):
    """The same losses and weights, bit by bit."""
    trainer, losses, weights, _, order = straight(case)
    assert len(losses) == len(order) == hf.STEPS
    expected, final = by_hand(case, order)
    assert [float(x) for x in losses] == [float(x) for x in expected]
    assert_same_weights(weights, final)
    start = hf.make_model(case).state_dict()
    assert all(not torch.equal(weights[k], start[k]) for k in start), "something was not trained"


@pytest.mark.parametrize("case", ["adamw", "adamw8bit"])
def test_killed_and_resumed(case, straight, tmp_path):
    """kill -9 after the checkpoint of step 6; the resumed run ends with the bits of the uninterrupted one."""
    program = [sys.executable, str(HERE / "hf_training.py"), str(tmp_path), case, "7"]
    killed = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    saved = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert saved == ["checkpoint-3", "checkpoint-6"]
    trainer = hf.make_trainer(tmp_path, case)
    with torch.no_grad():  # what is in the checkpoint must be loaded: nothing is right by itself
        for p in trainer.model.parameters():
            p.zero_()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == hf.STEPS and len(trainer.losses) == hf.STEPS - 6
    _, losses, weights, _, _ = straight(case)
    assert [float(x) for x in trainer.losses] == [float(x) for x in losses[6:]]
    assert_same_weights(trainer.model.state_dict(), weights)


@pytest.mark.parametrize("case", ["lion", "galore"])
def test_resumed_from_an_early_checkpoint(case, straight):
    _, losses, weights, folder, _ = straight(case)
    trainer = hf.make_trainer(folder, case)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert [float(x) for x in trainer.losses] == [float(x) for x in losses[3:]]
    assert_same_weights(trainer.model.state_dict(), weights)


def test_checkpoints_load_with_weights_only(straight):
    _, _, _, folder, _ = straight("adamw8bit")
    saved = torch.load(folder / "checkpoint-6" / "optimizer.pt", weights_only=True)
    kinds = {v.dtype for entry in saved["state"].values() for v in entry.values()}
    assert torch.uint8 in kinds and len(saved["param_groups"]) == 3


def test_embeddings_have_32_bits(straight):
    trainer, _, _, _, _ = straight("adamw8bit")
    opt, model = trainer.optimizer.optimizer, trainer.model
    assert isinstance(opt, fusedopt.AdamW)
    embedding, matrix = model.model.embed_tokens.weight, model.model.layers[0].mlp.up_proj.weight
    assert opt.state[embedding]["exp_avg"].dtype == torch.float32
    assert opt.state[matrix]["exp_avg"].dtype == torch.uint8
    assert [g["state_format"] for g in opt.param_groups] == ["int8", "int8", "fp32"]
    assert [g["weight_decay"] for g in opt.param_groups] == [0.1, 0.0, 0.1]


def test_groups_are_those_of_the_trainer():
    """Embeddings apart, what decays is what the Trainer would decay."""
    model = hf.make_model("adamw")
    names = hf.Trainer.get_decay_parameter_names(None, model)
    wanted = {id(p) for n, p in model.named_parameters() if n in names}
    groups = parameter_groups(model, 0.1)
    assert {id(p) for g in groups for p in g["params"] if g["weight_decay"]} == wanted
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    own = parameter_groups(model, 0.1, embeddings={}, decay=lambda n, p: "mlp" in n)
    assert len(own) == 2 and len(own[0]["params"]) == 6


def test_tied_and_frozen_parameters_in_groups():
    model = torch.nn.ModuleDict({"table": torch.nn.Embedding(9, 4), "head": torch.nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["table"].weight
    model["frozen"] = torch.nn.Linear(2, 2).requires_grad_(False)
    (group,) = parameter_groups(model)
    assert group["params"] == [model["table"].weight] and group["state_format"] == "fp32"
    assert keep_embeddings_fp32(model) == 36
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        parameter_groups(model.requires_grad_(False))
    for function in (parameter_groups, keep_embeddings_fp32):
        with pytest.raises(TypeError, match=f"{function.__name__}: expected a torch.nn.Module, got list"):
            function([])


def test_optimizer_and_schedule_passed_in(straight, tmp_path):
    """optimizers=(opt, schedule), groups made by hand, embeddings marked: the same training."""
    model = hf.make_model("adamw8bit")
    assert keep_embeddings_fp32(model) == 256 * 32
    matrices = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.dim() < 2]}]
    options = {"lr": 3e-3, "state_format": "int8", "min_quantized_numel": 512}
    opt = fusedopt.AdamW(groups, weight_decay=0.0, **options)
    schedule = transformers.get_linear_schedule_with_warmup(opt, 2, hf.STEPS)
    trainer = hf.make_trainer(tmp_path, "adamw8bit", model=model, optimizers=(opt, schedule), save_strategy="no")
    trainer.train()
    assert opt.state[model.model.embed_tokens.weight]["exp_avg"].dtype == torch.float32
    assert opt.state[matrices[1]]["exp_avg"].dtype == torch.uint8
    losses = straight("adamw8bit")[1]
    assert float(trainer.losses[0]) == float(losses[0])
    # here weights are rounded to nearest, there stochastically
    assert abs(float(trainer.losses[-1]) - float(losses[-1])) < 0.05 * float(losses[-1])


def test_clipping_inside_the_step(straight, tmp_path):
    """max_grad_norm=0 and clip_grad_norm=1: the Trainer's own clipping to fp32 rounding."""
    model = hf.make_model("adamw")
    how = trainer_kwargs(model, **hf.CASES["adamw"], clip_grad_norm=1.0)
    trainer = hf.Trainer(
        model, hf.arguments(tmp_path, max_grad_norm=0.0, save_strategy="no"), train_dataset=Windows(), **how
    )
    trainer.train()
    assert trainer.optimizer.optimizer.grad_norm is not None
    for name, value in straight("adamw")[2].items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_bf16_autocast_and_accumulation(straight, tmp_path):
    """bf16=True on the CPU: autocast over fp32 weights; two micro-batches a step."""
    trainer = hf.make_trainer(
        tmp_path, "adamw", bf16=True, gradient_accumulation_steps=2, save_strategy="no", per_device_train_batch_size=2
    )
    trainer.train()
    losses = [float(x) for x in trainer.losses]
    assert len(losses) == 2 * hf.STEPS and all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert sum(losses[-2:]) < sum(losses[:2])
    exact = [float(x) for x in straight("adamw")[1]]
    assert losses[0] + losses[1] != pytest.approx(exact[0], rel=1e-6), "autocast did not happen"


def test_what_trainer_kwargs_refuses():
    model = torch.nn.Linear(3, 3)
    with pytest.raises(TypeError, match="pass lr="):
        trainer_kwargs(model, "adamw")
    with pytest.raises(ValueError, match="unknown optimizer 'adamw7bit'"):
        trainer_kwargs(model, "adamw7bit", lr=1e-3)
    with pytest.raises(ValueError, match="names a projection"):
        trainer_kwargs(model, "galore_adamw", lr=1e-3, rank=4, projection=fusedopt.GaLore(rank=4))


def test_the_recipe(tmp_path):
    model = hf.make_model("adamw")
    args = hf.arguments(tmp_path, save_strategy="no", learning_rate=1e-3)
    names = run_recipe("Hugging Face", model=model, args=args, dataset=Windows(), Trainer=hf.Trainer)
    assert names["trainer"].state.global_step == hf.STEPS
    assert names["trainer"].optimizer.optimizer.param_groups[0]["state_format"] == "int8"
