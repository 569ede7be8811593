"""README's page for newcomers does what it says: its lines run and train, its links lead somewhere, its folds are Markdown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from lora_models import model as adapted_model
from trainer_data import one_thread, text_windows  # noqa: F401 - a fixture

import fusedopt
from fusedopt.cli.demo import DEFAULT_OPTIMIZERS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FIRST_PAGE = README[: README.index("\n## Contents\n")]
CHOICES = dict(re.findall(r"^\| (.+?) \| `((?:opt = )?fusedopt\..+?)`", FIRST_PAGE, re.M))


class Model(torch.nn.Module):
    """Predicts a byte from the one before it; its hidden matrices are large enough for rank 128."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(256, 160)
        self.hidden = torch.nn.Sequential(torch.nn.Linear(160, 192), torch.nn.GELU(), torch.nn.Linear(192, 160))
        self.head = torch.nn.Linear(160, 256)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.hidden(self.table(tokens[:, :-1])))
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def trained(model: torch.nn.Module, opt: torch.optim.Optimizer, loss_of, steps: int = 12) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = loss_of()
        losses.append(loss.item())
        loss.backward()
        opt.step()
        opt.zero_grad()
    return losses


def test_the_one_line_change():
    """The line that is a comment is torch's; ours takes its place, and the losses stay near."""
    code = re.search(r"```python\n(.*?)```", FIRST_PAGE, re.S)[1]
    theirs = re.search(r"^# (opt = torch.+)$", code, re.M)[1]
    losses = []
    for lines in (f"import torch\n{theirs}", code):
        model = Model(torch.float32)
        names = {"model": model}
        exec(lines, names)
        tokens = text_windows(8)
        losses.append(trained(model, names["opt"], lambda model=model, tokens=tokens: model(tokens)))
    assert (
        type(names["opt"]) is fusedopt.AdamW and names["opt"].state[model.head.weight]["exp_avg"].dtype == torch.uint8
    )
    assert losses[1] == pytest.approx(losses[0], rel=2e-3) and losses[1][-1] < 0.95 * losses[1][0]


def test_every_line_of_how_to_choose_is_found():
    """The rows without code name a section instead."""
    table = FIRST_PAGE[FIRST_PAGE.index("## How to choose") :].split("\n\n")[1]
    rows = [line for line in table.splitlines()[2:]]
    assert len(rows) == len(CHOICES) + sum("see [" in row for row in rows) and len(CHOICES) >= 10


@pytest.mark.parametrize("situation", CHOICES)
def test_how_to_choose_trains(situation):
    line = CHOICES[situation]
    model = Model(torch.bfloat16 if "bf16" in situation else torch.float32)
    tokens = text_windows(8)
    loss_of = lambda: model(tokens)  # noqa: E731
    if "LoRA" in situation:
        model = adapted_model(torch.float32)
        x, y = torch.randn(16, 9), torch.randn(16, 4)
        loss_of = lambda: torch.nn.functional.mse_loss(model(x), y)  # noqa: E731
    names = {"fusedopt": fusedopt, "model": model, "opt": None}
    if not line.startswith("opt = ") or "offload" in line:
        names["opt"] = fusedopt.AdamW(model.parameters(), lr=3e-4)
    exec(line, names)
    losses = trained(model, names["opt"], loss_of)
    assert losses[-1] < losses[0] and torch.isfinite(torch.tensor(losses)).all(), losses
    if "galore" in line:
        assert any("projector" in state for state in names["opt"].state.values())


def test_the_two_commands():
    """The extra exists, and the demo draws what the figure shows."""
    commands = re.search(r"```bash\n(.*?)```", FIRST_PAGE, re.S)[1].splitlines()
    assert commands == ['pip install "torch>=2.6" -e ".[demo]"', "python -m fusedopt demo"]
    project = (ROOT / "pyproject.toml").read_text()
    assert '\ndependencies = ["torch>=2.6"]\n' in project and re.search(r"^demo = .*matplotlib", project, re.M)
    from bench.report_losses import DEMOS

    assert list(DEMOS["demo"]) == ["torch AdamW", *DEFAULT_OPTIMIZERS]


def test_links_lead_somewhere():
    plain = re.sub(r"```.*?```", "", README, flags=re.S)
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", plain, re.M)
    }
    links = re.findall(r"\]\(([^)]+)\)", plain)
    assert len(links) > 30
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        else:
            assert (ROOT / link).is_file(), link
    contents = README[README.index("\n## Contents\n") :].split("\n## ")[1]
    titles = re.findall(r"^## (.+)$", plain[plain.index("\n## Install") :], re.M)
    assert [title for title in titles if f"[{title}](" not in contents] == ["License"]


def test_folds_have_blank_lines_around_their_markdown():
    """Without them GitHub shows the source of a table."""
    assert README.count("<details>") == README.count("</details>") == README.count("<summary>") > 5
    for fold in re.findall(r"<details>(.*?)</details>", README, re.S):
        assert re.match(r"\n<summary>[^\n]+</summary>\n\n\S", fold) and fold.endswith("\n\n"), fold[:80]
    assert not re.search(r"[^\n]\n</details>|</details>\n[^\n]", README)
