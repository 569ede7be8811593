"""python -m fusedopt rules: the table of README is that of the classes, and each class says what it must."""

import inspect
from pathlib import Path

import pytest

from fusedopt.__main__ import main
from fusedopt.cli import rules
from fusedopt.rule import optimizers

README = Path(__file__).parent.parent / "README.md"


def test_readme_has_the_table_of_the_classes():
    text = README.read_text()
    assert text == rules.with_table(text), "run python -m fusedopt rules --readme README.md"
    for cls in optimizers().values():
        assert f"`{cls.__name__}`" in rules.table()


def test_type_checkers_know_the_classes(tmp_path):
    file = tmp_path / "classes.pyi"
    assert main(["rules", "--stub", str(file)]) == 0
    kept = README.parent / "fusedopt" / "classes.pyi"
    assert file.read_text() == kept.read_text(), "run python -m fusedopt rules --stub fusedopt/classes.pyi"
    assert "from fusedopt.rules.adam import AdamW as AdamW" in file.read_text()


def test_a_changed_table_is_seen():
    text = README.read_text()
    stale = text.replace("| `AdamW` | `adamw` |", "| `AdamW` | `adam` |")
    assert stale != text and rules.with_table(stale) == text


def test_a_file_is_rewritten_between_its_marks(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{rules.MARKS[0]}\nold\n{rules.MARKS[1]}\nafter\n")
    assert main(["rules", "--readme", str(page)]) == 0
    assert page.read_text() == f"before\n{rules.MARKS[0]}\n{rules.table()}\n{rules.MARKS[1]}\nafter\n"
    page.write_text("no marks")
    assert main(["rules", "--readme", str(page)]) == 2
    assert "lacks the marks" in capsys.readouterr().err and page.read_text() == "no marks"
    assert main(["rules", "--readme", str(tmp_path / "missing.md")]) == 2


@pytest.mark.parametrize("name", sorted(optimizers()))
def test_docstrings_have_equations_use_and_source(name):
    """What it computes, then when to use it, then arguments; and where it is from."""
    doc = inspect.getdoc(optimizers()[name])
    paragraphs = doc.split("\n\n")
    equation = next(i for i, text in enumerate(paragraphs) if "=" in text)
    arguments = next(i for i, text in enumerate(paragraphs) if text.startswith(("Args:", "Arguments and errors are")))
    assert equation < arguments and arguments >= 2, doc
    assert "Source: " in doc
