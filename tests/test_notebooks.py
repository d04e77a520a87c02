"""The notebooks run from top to bottom (needs the extra ``notebooks``)."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="the extra 'notebooks' is not installed")
    nbclient = pytest.importorskip("nbclient", reason="the extra 'notebooks' is not installed")
    pytest.importorskip("ipykernel", reason="the extra 'notebooks' is not installed")
    notebook = nbformat.read(path, as_version=4)
    (tmp_path / "run").mkdir()  # what an earlier run of the notebook has left
    (tmp_path / "run" / "run.json").write_text("{}")
    assert any(cell.get("outputs") for cell in notebook.cells), "commit it executed"
    nbclient.NotebookClient(
        notebook, timeout=170, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()


def test_there_is_a_notebook():
    assert NOTEBOOKS
