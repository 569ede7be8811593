"""Checkpoint files: whole or not at all, read with weights_only, pruned, refused when damaged; runs go on bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from configs import assert_same_bits, tensors

import fusedopt
from fusedopt import files


class Net(torch.nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.first, self.last = torch.nn.Linear(16, width), torch.nn.Linear(width, 4)
        self.to(torch.bfloat16)

    def forward(self, x):
        return self.last(torch.nn.functional.dropout(self.first(x).relu(), 0.2))


def setting(folder=None, width: int = 64):
    torch.manual_seed(0)
    model = Net(width)
    opt = fusedopt.AdamW(
        model.parameters(), lr=0.01, param_precision="stochastic", state_format="int8", min_quantized_numel=1
    )
    if folder is not None:
        fusedopt.offload(opt, folder=folder)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    return {"model": model, "optimizer": opt, "scheduler": schedule}


def run(things, steps: int) -> list[torch.Tensor]:
    for _ in range(steps):
        things["optimizer"].zero_grad()
        things["model"](torch.randn(8, 16, dtype=torch.bfloat16) * random.random()).square().mean().backward()
        things["optimizer"].step()
        things["scheduler"].step()
    return tensors(things["optimizer"], list(things["model"].parameters()))


@pytest.mark.parametrize("offload", [False, True])
def test_a_run_goes_on_bit_for_bit(tmp_path, offload):
    folder = tmp_path if offload else None
    things = setting(folder)
    random.seed(1)
    run(things, 3)
    fusedopt.save_checkpoint(tmp_path / "run.pt", extra={"step": 3, "loss": torch.tensor(0.5)}, **things)
    straight = run(things, 4)
    random.seed(7)
    torch.manual_seed(7)
    resumed = setting(folder)
    extra = fusedopt.load_checkpoint(tmp_path / "run.pt", **resumed)
    assert extra["step"] == 3 and extra["loss"] == 0.5
    assert_same_bits(run(resumed, 4), straight)
    assert resumed["scheduler"].get_last_lr() == things["scheduler"].get_last_lr()
    assert os.listdir(tmp_path) == ["run.pt"]


def test_numpys_generator_is_saved_too(tmp_path):
    numpy = pytest.importorskip("numpy")
    numpy.random.standard_normal(3)  # leaves one of a pair behind
    fusedopt.save_checkpoint(tmp_path / "run.pt")
    drawn = numpy.random.standard_normal(5), torch.randn(3), random.random()
    fusedopt.load_checkpoint(tmp_path / "run.pt")
    again = numpy.random.standard_normal(5), torch.randn(3), random.random()
    assert (drawn[0] == again[0]).all() and torch.equal(drawn[1], again[1]) and drawn[2] == again[2]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fusedopt.load_checkpoint(tmp_path / "run.pt", random_states=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_old_files_are_removed_by_number(tmp_path):
    for n in (5, 6, 70, 8, 100):
        fusedopt.save_checkpoint(tmp_path / f"step-{n}.pt", extra=n, keep=3)
        (tmp_path / f"other-{n}.pt").touch()
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["step-8.pt", "step-70.pt", "step-100.pt", *(f"other-{n}.pt" for n in (5, 6, 70, 8, 100))]
    )
    assert fusedopt.latest_checkpoint(tmp_path / "step-0.pt").name == "step-100.pt"
    assert fusedopt.latest_checkpoint(tmp_path / "missing" / "step-0.pt") is None
    assert fusedopt.latest_checkpoint(tmp_path / "none-0.pt") is None
    fusedopt.save_checkpoint(tmp_path / "step-2.pt", keep=1)  # a run that was set back keeps what it has just written
    assert "step-2.pt" in os.listdir(tmp_path)
    with pytest.raises(ValueError, match="keep=2 needs a number"):
        fusedopt.save_checkpoint(tmp_path / "run.pt", keep=2)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("when", ["while writing", "before the rename", "at the rename"])
def test_an_interrupted_save_leaves_the_previous_file(tmp_path, monkeypatch, when):
    path = tmp_path / "run.pt"
    fusedopt.save_checkpoint(path, extra="first")
    before = path.read_bytes()

    def stop(*args, **kwargs):
        raise Interrupted

    if when == "while writing":
        monkeypatch.setattr(torch, "save", lambda content, file: (file.write(b"half"), stop()))
    else:
        monkeypatch.setattr(os, "fsync" if when == "before the rename" else "replace", stop)
    with pytest.raises(Interrupted):
        fusedopt.save_checkpoint(path, extra="second")
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["run.pt"]
    assert fusedopt.load_checkpoint(path) == "first"


def test_content_is_on_the_disk_before_the_name_stands_for_it(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (order.append(f"sync {'folder' if _is_folder(fd) else 'file'}"), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    fusedopt.save_checkpoint(tmp_path / "run.pt")
    assert order == ["sync file", "rename", "sync folder"]


def _is_folder(descriptor: int) -> bool:
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


@pytest.mark.skipif(files.fcntl is None, reason="needs POSIX file locks")
def test_left_overs_of_killed_savers_are_removed_and_others_are_not(tmp_path):
    code = (
        "import sys; from pathlib import Path; from fusedopt import files\n"
        "with files.replacing(Path(sys.argv[1])) as f:\n"
        "    f.write(b'half'); f.flush(); print('writing', flush=True); sys.stdin.read()"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(fusedopt.__file__).parent.parent)}
    saver = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "step-1.pt")], stdin=-1, stdout=-1, text=True, env=env
    )
    assert saver.stdout.readline() == "writing\n"
    (tmp_path / ".else-1.pt.x.saving").touch()
    fusedopt.save_checkpoint(tmp_path / "step-2.pt")
    assert len(list(tmp_path.glob(".step-1.pt.*.saving"))) == 1  # its writer lives
    saver.send_signal(signal.SIGKILL)
    saver.communicate()
    time.sleep(0.05)
    fusedopt.save_checkpoint(tmp_path / "step-3.pt")
    assert sorted(os.listdir(tmp_path)) == [".else-1.pt.x.saving", "step-2.pt", "step-3.pt"]


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.9, -1])
def test_truncated_files_are_named(tmp_path, kept):
    things = setting()
    run(things, 1)
    fusedopt.save_checkpoint(tmp_path / "run.pt", **things)
    whole = (tmp_path / "run.pt").read_bytes()
    (tmp_path / "run.pt").write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    before = run(things, 1)
    with pytest.raises(ValueError, match=r"run\.pt \(\d+ bytes\) is truncated, damaged, or no checkpoint"):
        fusedopt.load_checkpoint(tmp_path / "run.pt", **things)
    assert_same_bits(tensors(things["optimizer"], list(things["model"].parameters())), before)


def test_what_does_not_fit_changes_nothing(tmp_path):
    things = setting()
    run(things, 2)
    fusedopt.save_checkpoint(tmp_path / "run.pt", **things)
    other = setting(width=32)
    before, rates = run(other, 1), other["scheduler"].state_dict()
    generator = torch.get_rng_state()
    for wrong, why in (
        (other, r"model is of another model: 'first.weight' has shape \(64, 16\), the model's \(32, 16\)"),
        ({"optimizer": other["optimizer"]}, r"parameter 0 .*the loaded state 'exp_avg' has shape \(64, 16\)"),
        ({"model": torch.nn.Linear(2, 2)}, "has no weight, bias and has first.weight"),
        ({"scaler": other["scheduler"]}, "holds model, optimizer, scheduler, not scaler"),
        ({**other, "model": setting()["model"]}, "parameter 0"),
    ):
        model = wrong.get("model")
        weights = None if model is None else [p.clone() for p in model.parameters()]
        generator = torch.get_rng_state()
        with pytest.raises(ValueError, match=why):
            fusedopt.load_checkpoint(tmp_path / "run.pt", **wrong)
        if weights is not None:
            assert_same_bits(list(model.parameters()), weights)
        assert torch.equal(torch.get_rng_state(), generator)
    assert_same_bits(tensors(other["optimizer"], list(other["model"].parameters())), before)
    assert other["scheduler"].state_dict() == rates


def test_fp32_weights_are_those_of_the_loaded_model(tmp_path):
    """An optimizer that keeps master weights where the checkpoint has none takes them from the loaded parameters."""
    things = setting()
    run(things, 2)
    fusedopt.save_checkpoint(tmp_path / "run.pt", **things)
    torch.manual_seed(5)
    model = Net()
    opt = fusedopt.AdamW(model.parameters(), param_precision="master", state_format="int8", min_quantized_numel=1)
    fusedopt.load_checkpoint(tmp_path / "run.pt", optimizer=opt, model=model)
    for p in model.parameters():
        assert torch.equal(opt.state[p]["master_param"], p.float())


def test_other_files_and_contents_are_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="was not written by save_checkpoint"):
        fusedopt.load_checkpoint(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        fusedopt.load_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(TypeError, match="model is a int, which has no state_dict"):
        fusedopt.save_checkpoint(tmp_path / "run.pt", model=3)
    with pytest.raises(ValueError, match=r"\['extra'\]\['a'\]\[1\] is a pathlib.*weights_only=True does not load"):
        fusedopt.save_checkpoint(tmp_path / "run.pt", extra={"a": [1, tmp_path]})
    assert os.listdir(tmp_path) == ["other.pt"]
    torch.save({"kind": files.KIND, "version": 99}, tmp_path / "new.pt")
    with pytest.raises(ValueError, match="newer fusedopt"):
        fusedopt.load_checkpoint(tmp_path / "new.pt")


def test_plain_torch_reads_a_checkpoint(tmp_path):
    things = setting()
    run(things, 1)
    fusedopt.save_checkpoint(tmp_path / "run.pt", **things)
    content = torch.load(tmp_path / "run.pt", weights_only=True)
    assert content["objects"]["optimizer"]["state"][0]["exp_avg"].dtype == torch.uint8
    assert os.stat(tmp_path / "run.pt").st_mode & 0o777 == 0o666 & ~_mask()


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
