"""The example notebook runs from its first cell to the last, as it does in Jupyter, with a tiny model."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "compare_methods.ipynb"
PACKAGES = (ROOT, *(ROOT / name for name in ("server", "client", "strategies", "simulations")))


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    assert not [cell.id for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]


def test_every_cell_runs_and_shows_what_the_text_says(notebook, tmp_path, monkeypatch, checkpoint):
    monkeypatch.setenv("FEDLORA_NOTEBOOK_SHORT", "1")
    monkeypatch.setenv("FEDLORA_NOTEBOOK_MODEL", str(checkpoint("bert")))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, PACKAGES)))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert "wrote 4000 notes each" in str(outputs["notes"])
    assert "fedsvd" in str(outputs["table"]) and "ffa-lora" in str(outputs["table"])
    assert any("image/png" in output.get("data", {}) for output in outputs["plot"])
    assert "'accuracy'" in str(outputs["rows"])
    assert any(label in str(outputs["adapter"]) for label in ("routine", "urgent"))
    assert (tmp_path / "comparison" / "comparison.png").is_file()
