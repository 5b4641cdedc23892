"""notebooks/add.ipynb: runs from top to bottom; committed with the outputs of a real run."""

import nbformat
import pytest
from nbclient import NotebookClient
from trust import ROOT

PATH = ROOT / "notebooks" / "add.ipynb"


def images_of(notebook):
    """How many pictures each code cell shows."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [sum("image/png" in o.get("data", {}) for o in cell.outputs) for cell in cells]


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(PATH, as_version=4)


def test_it_runs_from_top_to_bottom_on_a_tiny_preset(committed, tmp_path, monkeypatch):
    monkeypatch.setenv("ADD_NOTEBOOK_PRESET", "tiny")
    notebook = nbformat.from_dict(committed.copy())
    for place in ("add.py", "toy", "common"):  # away from the checkout's own runs/
        (tmp_path / place).symlink_to(ROOT / place)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=where).execute()
    assert images_of(notebook) == images_of(committed)
    slider = notebook.cells[-2].outputs[0]["data"]
    assert "application/vnd.jupyter.widget-view+json" in slider
    assert (tmp_path / "runs" / "notebook" / "teacher" / "checkpoint.pt").exists()


def test_it_is_committed_with_the_outputs_of_a_whole_run(committed):
    cells = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(images_of(committed)) >= 8
    assert not any(o.output_type == "error" for cell in cells for o in cell.outputs)
    assert "20,000 training images" in cells[1].outputs[0]["text"]
    assert PATH.stat().st_size < 2**20


def test_it_explains_the_method_with_add_py_and_does_not_repeat_it(committed):
    code = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "code")
    assert "import add" in code and "\nclass " not in code
    headings = [c.source for c in committed.cells if c.cell_type == "markdown"]
    assert sum(text.startswith("## ") and text[3].isdigit() for text in headings) == 6
