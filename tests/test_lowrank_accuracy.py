"""bench lowrank-accuracy: how it chooses learning rates and what it runs, tiny runs, and the committed result."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import lowrank_accuracy as study  # noqa: E402
from bench.accuracy_runs import train  # noqa: E402

RESULT = ROOT / "bench" / "results" / "lowrank_accuracy.json"
TINY = {"steps": 3, "batch": 2, "context": 16, "width": 80, "layers": 1}
METHODS = {m.name: m for m in study.METHODS}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tuned(name: str, losses: dict) -> dict:
    return {("tune", name, factor): {"held_out": loss} for factor, loss in losses.items()}


def test_learning_rates_are_tried_until_the_best_is_inside():
    method = METHODS["DCT"]
    found = {0.5: 2.0, 1.0: 2.1}
    assert study.tuning(method, tuned("DCT", found)) == ([2.0], None)
    found[2.0] = 2.2
    assert study.tuning(method, tuned("DCT", found)) == ([0.25], None)
    found[0.25] = 2.3
    assert study.tuning(method, tuned("DCT", found)) == ([], 0.5)
    found[2.0] = 1.9
    assert study.tuning(method, tuned("DCT", found)) == ([4.0], None)
    falling = {2.0**k: 2 - 0.1 * k for k in range(-3, 5)}
    assert study.tuning(method, tuned("DCT", falling)) == ([], 16.0)
    assert study.tuning(method, tuned("GaLore", found))[1] is None, "each tunes its own"


def test_what_is_run():
    """First every method's learning rates, then the seeds together, each method at its own or its tuner's."""
    first = [key for key, *_ in study.wanted({}, False)]
    assert {key[1] for key in first} == {m.name for m in study.METHODS if not m.tuned_as}
    assert all(key[0] == "tune" for key in first)
    runs = {}
    for m in study.METHODS:
        runs |= tuned(m.name, {0.25: 3.0, 0.5: 2.0, 1.0: 2.5, 2.0: 3.0})
    found = study.wanted(runs, False)
    assert [key[2] for key, *_ in found] == sorted(key[2] for key, *_ in found)
    configs = {key[1]: arguments[0] for key, _, arguments in found}
    assert configs.keys() == METHODS.keys()
    assert {c.factor for c in configs.values() if c is not configs[study.RECIPE.name]} == {0.5}
    assert configs[study.RECIPE.name].factor == 1.0
    done = runs | {key: {} for key, *_ in found}
    assert study.wanted(done, False) == []


@pytest.mark.parametrize("name", ["AdamW", "GaLore 8-bit", "Q-GaLore, int8 weights", "Adafactor"])
def test_a_tiny_run(name):
    found = train(METHODS[name], TINY, 0)
    assert 3 < found["held_out"] < 7
    assert found["state_bytes"] == 8 if name == "AdamW" else found["state_bytes"] < 4


def test_the_rate_is_that_of_the_blocks():
    setup = study.Setup(None, torch.device("cpu"), 0, width=80, layers=1)
    for name, rate in (("AdamW", 2e-3), ("GaLore", 16e-3), ("Subset-Norm", 32e-3), ("FRUGAL", 2e-3)):
        opt = study.replace(METHODS[name], factor=2.0).optimizer(setup.model())
        assert [g["lr"] for g in opt.param_groups] == pytest.approx([rate, 1e-3, 1e-3])


def document() -> dict:
    return json.loads(RESULT.read_text())


def test_the_committed_result():
    """GaLore's two ways to a basis agree within what seeds differ; its 8-bit form is not 1 % worse than AdamW, at the better of
    AdamW's two rates."""
    found = document()
    losses = found["losses"]
    assert not found["quick"] and losses.keys() == METHODS.keys()
    assert all(len(r["held_out"]) == METHODS[name].seeds for name, r in losses.items())
    pair = losses["GaLore"]["against_svd"]
    assert abs(pair["change_percent"]) < max(pair["seeds_spread_percent"])
    best = min(losses[name]["mean"] for name in ("AdamW", "AdamW, the demo's rate"))
    assert losses["GaLore 8-bit"]["mean"] < 1.01 * best
    assert abs(losses["GaLore 8-bit"]["mean"] / losses["GaLore"]["mean"] - 1) < 0.005
    assert (
        losses["GaLore 8-bit"]["state_bytes"]
        < 1
        < losses["GaLore"]["state_bytes"]
        < 0.35 * losses["AdamW"]["state_bytes"]
    )
    text = study.report(found)
    assert all(name in text for name in losses)


def test_chart(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.lowrank_plot import draw

    draw(document()).savefig(tmp_path / "chart.png", dpi=40)
    assert (tmp_path / "chart.png").stat().st_size > 10_000
