"""The notebooks are what their .py files say, and run from top to bottom."""

import os
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "colab").glob("*.py"))
every_notebook = pytest.mark.parametrize(
  "source", SOURCES, ids=lambda path: path.stem
)
# Sizes that the notebooks read, for a run of seconds.
SMALL = {"JAXCHUNK_STEPS": "4", "JAXCHUNK_LONGEST": "8192"}


def cells(notebook):
  return [
    (cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells
  ]


@pytest.mark.fast
def test_every_notebook_has_its_source():
  names = {path.stem for path in (ROOT / "colab").glob("*.ipynb")}
  assert names == {path.stem for path in SOURCES} != set()


@pytest.mark.fast
@every_notebook
def test_notebook_is_its_source(source):
  stored = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
  nbformat.validate(stored)
  made = jupytext.read(source)
  assert cells(stored) == cells(made)
  assert stored.metadata.kernelspec == made.metadata.kernelspec
  for cell in stored.cells:
    assert not cell.get("outputs") and cell.get("execution_count") is None


@every_notebook
def test_notebook_runs(source, tmp_path):
  notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
  client = NotebookClient(
    notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
  )
  client.execute(env={**os.environ, **SMALL, "XLA_FLAGS": ""})
  pictures = [
    output
    for cell in notebook.cells
    for output in cell.get("outputs", [])
    if "image/png" in output.get("data", {})
  ]
  assert len(pictures) >= 3
