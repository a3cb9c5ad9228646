"""The course notebook: small and clean as it is stored, and what is stored is what it prints when it runs.

It needs what its first cell installs (requirements-notebook.txt). To store its outputs anew after a change:

    python -m tests.test_notebook
"""

import ast
import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "docs/azr_in_an_hour.ipynb"
MODULES = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
DEBRIS = r"Traceback|Warning|site-packages|it/s\]|\r|\x1b|/tmp\b|/home\b|/root\b|/Users\b|/usr\b|\.py:\d+"


def execute(folder: Path) -> dict:
    """The notebook with the outputs of a kernel that was started in `folder`; on the CPU, where numbers repeat."""
    import nbclient
    import nbformat

    notebook = nbformat.read(PATH, as_version=4)
    about = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=about, record_timing=False)
    client.execute(env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    return json.loads(nbformat.writes(notebook))


def store() -> None:
    notebook = execute(ROOT / "docs")
    notebook["metadata"]["language_info"] = {"name": "python"}  # without the version that happened to run it
    PATH.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def code(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cell: dict) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


@pytest.fixture(scope="module")
def stored() -> dict:
    return json.loads(PATH.read_text(encoding="utf-8"))


def test_it_is_short_and_imports_the_project_instead_of_copying_it(stored):
    assert len(stored["cells"]) <= 30 and PATH.stat().st_size <= 300_000
    nodes = [node for cell in code(stored) for node in ast.walk(ast.parse("".join(cell["source"])))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {"azr", "trr", "executor", "buffers", "prompts"} <= imported
    assert {name.partition(".")[0] for name in imported} & MODULES >= {"harness", "policy"}
    paths = [path for path in ROOT.glob("**/*.py") if path.relative_to(ROOT).parts[0] in {*MODULES, "azr.py", "trr.py"}]
    ours = {
        name for path in paths for name in re.findall(r"^def (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert not ours & {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_its_stored_outputs_are_whole_and_clean(stored):
    assert [cell["execution_count"] for cell in code(stored)] == [*range(1, len(code(stored)) + 1)]
    outputs = [output for cell in code(stored) for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    assert not re.search(DEBRIS, "".join(map(printed, code(stored))))
    assert [1 for output in outputs if "<svg" in "".join(output.get("data", {}).get("image/svg+xml", ""))] == [1]


def test_its_first_cell_installs_what_is_there(stored):
    text = "".join(stored["cells"][0]["source"])
    files = re.findall(r"-r (\S+)", text)
    assert len(files) == 2 and all((ROOT / name).is_file() for name in files)
    assert f"jupyter lab {PATH.relative_to(ROOT)}" in text


def test_its_links_lead_somewhere(stored):
    text = "".join("".join(cell["source"]) for cell in stored["cells"] if cell["cell_type"] == "markdown")
    pages = [page for page in re.findall(r"\]\(([\w/.-]+\.md)", text)]
    assert len(pages) >= 5 and all((ROOT / "docs" / page).is_file() for page in pages)


@pytest.mark.parametrize("folder", [ROOT, ROOT / "docs"])
def test_it_finds_the_project_from_the_root_and_from_its_folder(stored, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [])
    names: dict = {}
    exec("".join(code(stored)[0]["source"]), names)
    assert names["root"] == ROOT and sys.path == [str(ROOT)]


def test_it_runs_and_prints_what_is_stored(stored):
    """Every number but those of the run at its end, which other processors may round to another curve: that one must
    rise."""
    pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -r requirements-notebook.txt")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install -r requirements-notebook.txt")
    ran = code(execute(ROOT / "docs"))
    assert not [output for cell in ran for output in cell["outputs"] if output.get("name") == "stderr"]
    [run] = [number for number, cell in enumerate(ran) if "azr.main" in "".join(cell["source"])]
    for cell, before in zip(ran[:run], code(stored)[:run], strict=True):
        assert printed(cell) == printed(before), "".join(cell["source"])
    rows = [line.split() for line in printed(ran[run]).splitlines()[1:]]
    assert [row[0] for row in rows] == ["0", "4", "8", "12", "16"] and float(rows[-1][1]) > float(rows[0][1])
    assert "image/svg+xml" in ran[run]["outputs"][-1]["data"]


if __name__ == "__main__":
    store()
