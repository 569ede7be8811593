"""`python -m bench conformance`: our classes pass every check, every check can fail, and its tables say what was found."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainer_data import one_thread  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fusedopt  # noqa: E402
from bench import conformance  # noqa: E402
from bench.conformance.base import Failed, NotMeant  # noqa: E402
from bench.conformance.subjects import Subject, all_subjects, ours, rivals  # noqa: E402
from fusedopt.rule import optimizers  # noqa: E402

CHECKS = conformance.all_checks()
OURS = {subject.name: subject for subject in ours()}
# What has no meaning for some of our rules: torch.optim has no class of the rule
NOT_MEANT = {
    "a torch.optim state dict loads, and the steps are torch's",
    "its state dict loads into torch.optim, and steps on",
}


@pytest.mark.parametrize("name", OURS)
def test_our_classes_pass(name):
    answers = {title: conformance.outcome(function, OURS[name]) for title, function in CHECKS.items()}
    assert [f"{t}: {a['reason']}" for t, a in answers.items() if a["status"] == "fail"] == []
    skipped = {t for t, a in answers.items() if a["status"] == "n/a"}
    stateless = {"a loaded state of the wrong shape is refused"} if name == "SPS" else set()
    assert skipped == (NOT_MEANT | stateless if OURS[name].torch_class is None else set())


def test_every_class_takes_part():
    classes = set(
        optimizers().values()
    )  # those that read more than gradients are stepped by a subclass that hands it to them
    assert {next(c for c in s.cls().__mro__ if c in classes) for s in OURS.values()} == classes and len(CHECKS) >= 40
    assert {n for n, s in OURS.items() if s.torch_class} == {"SGD", "Adam", "AdamW", "AdamW, int8 states"}


# Optimizers that do one thing wrong


class Base(torch.optim.AdamW):
    def _all(self):
        return [p for group in self.param_groups for p in group["params"]]


class NoStep(Base):
    def step(self, closure=None):
        return None


class SilentClosure(Base):
    def step(self, closure=None):
        super().step(closure)


class FreezesTensorLr(Base):
    def step(self, closure=None):
        for group in self.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"] = float(group["lr"])
        return super().step(closure)


class Nameless(Base):
    def __init__(self, params, **options):
        super().__init__([p[1] if isinstance(p, tuple) else p for p in params], **options)


class MovesAll(Base):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self._all():
            p.mul_(0.99)
        return super().step(closure)


class OneCount(Base):
    def step(self, closure=None):
        result = super().step(closure)
        for entry in self.state.values():
            entry["step"].fill_(max(float(e["step"]) for e in self.state.values()))
        return result


class SkipsScalars(Base):
    def step(self, closure=None):
        for p in self._all():
            p.grad = p.grad if p.dim() else None
        return super().step(closure)


class OneRate(Base):
    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = self.defaults["lr"]
        return super().step(closure)


class IgnoresGroups(Base):
    def add_param_group(self, group):
        if not self.param_groups:
            super().add_param_group(group)


class KeepsParameters(Base):
    def __init__(self, params, **options):
        super().__init__(params, **options)
        self._kept = [list(group["params"]) for group in self.param_groups]

    def step(self, closure=None):
        for group, kept in zip(self.param_groups, self._kept, strict=False):
            group["params"] = kept
        return super().step(closure)


class NoBetas(Base):
    def add_param_group(self, group):
        super().add_param_group(group)
        self.defaults.pop("betas", None)


class TakesOverflows(Base):
    _step_supports_amp_scaling = True


class NoHooks(Base):
    def register_step_post_hook(self, hook):
        return super().register_step_post_hook(lambda *args: None)

    def register_load_state_dict_post_hook(self, hook, prepend=False):
        return super().register_load_state_dict_post_hook(lambda *args: None)


class Unprintable(Base):
    def __repr__(self):
        return "Unprintable()"


class Forgets(Base):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for entry in self.state.values():
            for value in entry.values():
                value.zero_() if value.dim() else None


class HoldsObjects(Base):
    def step(self, closure=None):
        result = super().step(closure)
        for entry in self.state.values():
            entry["note"] = Nothing()
        return result


class Nothing:
    pass


class CastsStates(fusedopt.AdamW):
    load_state_dict = torch.optim.Optimizer.load_state_dict


class EagerStates(Base):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for p in self._all():
            self.state[p].setdefault("warm", torch.zeros(()))


class NeedsFlags(Base):
    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)


class WantsTensors(Base):
    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)
        if any(isinstance(entry.get("step"), float) for entry in self.state.values()):
            raise TypeError("step must be a tensor")


class Attributes(Base):
    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.mine = 1

    def step(self, closure=None):
        return super().step(closure) if self.mine else None


class OtherNames(Base):
    def state_dict(self):
        out = super().state_dict()
        state = {i: {f"my_{k}": v for k, v in entry.items()} for i, entry in out["state"].items()}
        return {**out, "state": state}


class Densifies(Base):
    def step(self, closure=None):
        for p in self._all():
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.to_dense() * 2 + 1
        return super().step(closure)


class DropsImaginary(Base):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self._all():
            if p.is_complex():
                p.sub_(p.grad.real.to(p.dtype))
                p.grad = None
        return super().step(closure)


class Contiguous(Base):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self._all():
            p.data = p.data.contiguous()
        return super().step(closure)


class IgnoresStrides(Base):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self._all():
            if not p.grad.is_contiguous():
                p.grad = p.grad.t().contiguous().view(p.shape)
        return super().step(closure)


class WritesBetween(Base):
    @torch.no_grad()
    def step(self, closure=None):
        result = super().step(closure)
        for p in self._all():
            torch.as_strided(p, (p.untyped_storage().nbytes() // 4,), (1,), 0).add_(1e-9)
        return result


class FewArguments(Base):
    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, lr=lr, weight_decay=weight_decay)


class Swallows(Base):
    def __init__(self, params, lr=1e-3, weight_decay=0.0, **anything):
        super().__init__(params, lr=lr, weight_decay=weight_decay)


class StepsThenRefuses(Base):
    def step(self, closure=None):
        for p in self._all():
            if p.grad.is_sparse:
                raise RuntimeError("no sparse gradients")
            p.data.sub_(p.grad)


BROKEN = {
    "steps on the CPU, the loss falls": NoStep,
    "closure= is called with gradients on, its value comes back": SilentClosure,
    "a tensor as lr steps as the float, changes in place count": FreezesTensorLr,
    "named parameters": Nameless,
    "parameters without gradients are left alone": MovesAll,
    "each parameter counts its own steps": OneCount,
    "layers frozen and unfrozen": MovesAll,
    "tensors of 0 dimensions and of 0 elements": SkipsScalars,
    "groups have their own lr and weight decay": OneRate,
    "add_param_group after steps": IgnoresGroups,
    "parameters replaced in their groups (accelerate, FSDP2)": KeepsParameters,
    "OneCycleLR": NoBetas,
    "GradScaler skips an overflow and undoes the scale": TakesOverflows,
    "step hooks in order, global ones too": NoHooks,
    "state-dict hooks, before and after saving and loading": NoHooks,
    "repr": Unprintable,
    "resumes bit for bit, fp32": Forgets,
    "resumes bit for bit, bf16": Forgets,
    "state dict loads with weights_only=True (HF Trainer)": HoldsObjects,
    "state dtypes survive a load": CastsStates,
    "an empty state dict round trip makes no states (accelerate)": EagerStates,
    "older state dicts, without the newer keys of groups": NeedsFlags,
    "step counts that are Python numbers load": WantsTensors,
    "distributed checkpoint, nested: exact resume": Forgets,
    "distributed checkpoint, flattened: exact resume": HoldsObjects,
    "distributed checkpoint of a new optimizer moves nothing": MovesAll,
    "pickled, and stepped on": Attributes,
    "deepcopy keeps all public attributes": Attributes,
    "a torch.optim state dict loads, and the steps are torch's": Forgets,
    "its state dict loads into torch.optim, and steps on": OtherNames,
    "a sparse gradient: right, or a clear error": Densifies,
    "complex parameters: right, or an error": DropsImaginary,
    "a transposed parameter steps as a contiguous one, in place": Contiguous,
    "a gradient with other strides than its parameter": IgnoresStrides,
    "a view with gaps leaves the memory between alone": WritesBetween,
    "zero gradients and lr=0 move nothing": MovesAll,
    "fused, foreach, capturable, differentiable and maximize as torch's defaults": FewArguments,
    "fused=True passed blindly (torchtune recipes)": FewArguments,
    "an unknown argument is refused": Swallows,
    "torch's error inputs (Adam's, or those for all rules): type and words": FewArguments,
    "a loaded state of the wrong shape is refused": Base,
    "a refused gradient leaves every parameter as it was": StepsThenRefuses,
}


@pytest.mark.parametrize("title", CHECKS)
def test_every_check_can_fail(title):
    """An optimizer with one fault fails the check that looks for it, and torch's own class does not."""
    template = replace(next(s for s in rivals() if s.name == "torch AdamW loop"), options={})
    broken = conformance.outcome(CHECKS[title], replace(template, cls=lambda: BROKEN[title]))
    assert broken["status"] == "fail" and broken["reason"]
    if BROKEN[title] is not Base:
        assert conformance.outcome(CHECKS[title], template)["status"] == "pass"


def test_outcomes():
    def passing(s):
        return None

    def failing(s):
        raise Failed("it did not")

    def strange(s):
        raise KeyError("state1")

    def silent(s):
        raise NotMeant("no such rule")

    subject = all_subjects()["AdamW"]
    assert [conformance.outcome(f, subject)["status"] for f in (passing, failing, strange, silent)] == [
        "pass", "fail", "fail", "n/a",
    ]  # fmt: skip
    assert conformance.outcome(strange, subject)["reason"] == "KeyError: 'state1'"
    assert isinstance(subject, Subject) and subject.package == "fusedopt"


PASS, FAIL, NONE = ({"status": s, "reason": "KeyError: 'x'" if s == "fail" else ""} for s in ("pass", "fail", "n/a"))
RESULT = {
    "checks": ["one", "two", "three"],
    "beyond": ["three"],
    "versions": {"torch": "2.13", "gone": None},
    "optimizers": {
        "SGD": {"package": "fusedopt", "bytes": 4.0, "checks": {"one": PASS, "two": PASS, "three": PASS}},
        "torch A": {"package": "torch", "bytes": 4.0, "checks": {"one": PASS, "two": FAIL, "three": NONE}},
        "torch B": {"package": "torch", "bytes": 2.0, "checks": {"one": PASS, "two": PASS, "three": FAIL}},
        "gone C": {"package": "gone", "absent": "ModuleNotFoundError: No module named 'gone'", "checks": {}},
    },
}


def test_tables(tmp_path, capsys):
    text = conformance.document(RESULT)
    assert "| two | yes | **no** (A) |" in text and "| three (+) | yes | **no** |" in text
    assert "3 of 3 | 3 of 5 |" in text and "4.00 | 2.00 to 4.00 |" in text
    assert "KeyError: 'x'" in text and "gone C: not here (ModuleNotFoundError" in text and "gone None" not in text
    short = conformance.table(RESULT, failed_only=True)
    assert "| one |" not in short and short.endswith("1 of the 3 checks are passed by all and not shown.")
    file, readme = tmp_path / "c.json", tmp_path / "README.md"
    file.write_text(json.dumps(RESULT))
    readme.write_text(f"before\n{conformance.MARKS[0]}\nold\n{conformance.MARKS[1]}\nafter\n")
    parser = argparse.ArgumentParser()
    conformance.add_arguments(parser)
    assert conformance.main(parser.parse_args(["--table", str(file), "--readme", str(readme)])) == 0
    content = readme.read_text()
    assert (
        content.startswith("before\n") and content.endswith("\nafter\n") and short in content and "old" not in content
    )
    assert "| one | yes | yes |" in capsys.readouterr().out and (tmp_path / "c.md").exists()
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        conformance.put_into(readme, "x")


def test_a_process_that_dies_fails_one_check(monkeypatch):
    """The answers before it are kept, the check it was at fails, and the next process starts behind that one."""
    calls = []

    class Done:
        def __init__(self, lines, returncode):
            self.stdout, self.returncode = "\n".join(map(json.dumps, lines)), returncode

    def run(command, **kwargs):
        calls.append(int(command[-1]))
        if calls[-1] == 0:
            return Done([{"check": "one", "status": "pass", "reason": ""}], -11)
        return Done([{"check": "three", "status": "pass", "reason": ""}, {"bytes": 1.0}], 0)

    monkeypatch.setattr(conformance.subprocess, "run", run)
    answers = conformance.ask("X", ["one", "two", "three"])
    assert calls == [0, 2] and answers["bytes"] == 1.0
    assert [answers["checks"][t]["status"] for t in ("one", "two", "three")] == ["pass", "fail", "pass"]
    assert answers["checks"]["two"]["reason"] == "the process ended with -11"


def test_the_committed_result():
    """It is of the present checks, and our column has no failure."""
    result = json.loads(conformance.RESULTS.read_text())
    assert result["checks"] == list(CHECKS)
    mine = {n: a for n, a in result["optimizers"].items() if a["package"] == "fusedopt"}
    assert set(mine) == set(OURS)
    assert {c["status"] for a in mine.values() for c in a["checks"].values()} == {"pass", "n/a"}
    failing = {t for a in result["optimizers"].values() for t, c in a["checks"].items() if c["status"] == "fail"}
    assert len(failing) >= 15
    content = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    assert conformance.table(result, failed_only=True) in content
