"""scripts/batch_inference.ipynb runs from top to bottom, and what is stored in it comes from such a run."""

import json
import pathlib
import re

import jax
import nbformat
import pytest
from nbclient import NotebookClient

FILE = pathlib.Path(__file__).parents[2] / "scripts" / "batch_inference.ipynb"

FIGURES = 2
MAX_FIGURE_BYTES = 40_000
MAX_STORED_BYTES = 300_000

TIMEOUT = 600
"""Seconds for one cell: a cell takes at most ten or so on two quiet cores."""

ABSOLUTE_PATH = re.compile(r"(?<![\w:/<.~])/[\w.-]+/[\w.-]+|\b[A-Za-z]:\\\w")
"""A path from the root of a Unix machine, or from a Windows drive."""


@pytest.fixture
def notebook():
    return nbformat.read(FILE, as_version=4)


def _code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _outputs(notebook, kind):
    return [output for cell in _code_cells(notebook) for output in cell.outputs if output.output_type == kind]


def _figures(notebook):
    """The PNGs in base64, in order."""
    return [output.data["image/png"] for output in _outputs(notebook, "display_data") if "image/png" in output.data]


def _strings(tree):
    """Every string in a tree of lists and dictionaries."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _strings(branch)


@pytest.mark.thorough
@pytest.mark.parametrize("platforms", ["cpu", pytest.param("", marks=pytest.mark.gpu, id="gpu")])
def test_notebook_runs_from_top_to_bottom(notebook, platforms, monkeypatch, tmp_path):
    """In a fresh kernel and another directory, with nothing replaced."""
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    # The notebook takes what is set: on a GPU this process already holds most of the memory.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    # Settings of this process for ranks on the CPU, and a backend of matplotlib that shows nothing.
    for name in ("NPROC", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    stored = len(_code_cells(notebook))
    client = NotebookClient(notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert not _outputs(notebook, "error")
    assert [cell.execution_count for cell in _code_cells(notebook)] == list(range(1, stored + 1))
    figures = _figures(notebook)
    assert len(figures) == FIGURES
    assert all(0 < len(figure) * 3 // 4 < MAX_FIGURE_BYTES for figure in figures)
    assert "the same key, the same tokens: True" in json.dumps(notebook)


def test_stored_outputs_are_those_of_one_run(notebook):
    cells = _code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not _outputs(notebook, "error")
    assert not [output for output in _outputs(notebook, "stream") if output.name == "stderr"]
    assert len(_figures(notebook)) == FIGURES


def test_stored_outputs_are_small(notebook):
    outputs = [cell.outputs for cell in _code_cells(notebook)]
    assert len(json.dumps(outputs)) < MAX_STORED_BYTES
    assert all(len(figure) * 3 // 4 < MAX_FIGURE_BYTES for figure in _figures(notebook))


def test_file_names_no_place_of_a_machine(notebook):
    for output in _outputs(notebook, "display_data"):
        # Base64 may spell anything.
        output.data.pop("image/png", None)
    found = [ABSOLUTE_PATH.findall(text) for text in _strings(notebook)]
    assert not any(found), found


@pytest.mark.parametrize("text", ['"/home/someone/x"', "in /tmp/x/y.py", "C:\\Users", "(/usr/lib)"])
def test_places_of_a_machine_are_seen(text):
    assert ABSOLUTE_PATH.search(text)


@pytest.mark.parametrize("text", ["and/or/both", "https://example.org/a/b", "a / b / c", "scripts/x/y.py", "</b>"])
def test_other_slashes_are_not_places(text):
    assert not ABSOLUTE_PATH.search(text)
