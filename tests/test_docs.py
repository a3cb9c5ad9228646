"""The pages that name places in the code name places that exist."""

import ast
import re
import runpy
from pathlib import Path
from unittest.mock import patch

import pytest

import executor

ROOT = Path(__file__).resolve().parent.parent
PLACES = re.findall(r"`([\w/]+\.py): ([\w.]+)`", (ROOT / "docs/questions.md").read_text(encoding="utf-8"))


def names(path: Path) -> set[str]:
    """Top-level functions, classes and constants of a module, and Class.method."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            found |= {f"{node.name}.{item.name}" for item in getattr(node, "body", []) if hasattr(item, "name")}
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                found.add(target.id)
    return found


def test_there_are_twenty_questions():
    text = (ROOT / "docs/questions.md").read_text(encoding="utf-8")
    assert re.findall(r"^(\d+)\. \*\*", text, re.MULTILINE) == [str(n) for n in range(1, 21)]
    assert len(PLACES) >= 20


@pytest.mark.parametrize("file, name", sorted(set(PLACES)))
def test_every_place_exists(file, name):
    assert name in names(ROOT / file)


def test_the_readme_shows_every_limit_of_a_program(capsys):
    with patch("executor.ESCAPES", {}):
        executor.doctor()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) > 20 and "\n".join(table) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_one_step_on_the_board_is_what_the_example_prints(capsys):
    page = (ROOT / "docs/one_step.md").read_text(encoding="utf-8")
    runpy.run_path(str(ROOT / "examples/one_step.py"), run_name="__main__")
    printed = capsys.readouterr().out
    told = [line for line in page.splitlines() if line and not line.startswith(">")]
    assert told == [line for line in printed.splitlines() if line]
