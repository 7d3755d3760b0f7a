"""The notebooks run from top to bottom, and are committed with their outputs."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from tools import notebooks

NAMES = notebooks.names()
MOST_BYTES = 700_000
LONG = {"02_images", "03_speech", "05_kernels_and_quantization"}
"""Those that take half a minute each, with what other tests see too."""


def committed(name: str) -> NotebookNode:
    return nbformat.read(notebooks.DIRECTORY / f"{name}.ipynb", nbformat.NO_CONVERT)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: NotebookNode) -> list:
    """What a cell shows, but not what it says: another machine rounds, and hurries, otherwise."""
    return [(out.output_type, out.get("name"), sorted(out.get("data", ()))) for out in cell.outputs]


def test_both_forms_are_there() -> None:
    assert NAMES and NAMES == sorted(path.stem for path in notebooks.DIRECTORY.glob("*.ipynb"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in NAMES]
)
def test_it_runs_and_shows_the_same_kinds_of_things(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for setting in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION", "MPLBACKEND", "XLA_FLAGS"):
        monkeypatch.delenv(setting, raising=False)  # of the tests; a reader's kernel has none of them
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = notebooks.read(name)
    notebooks.run(notebook)
    for cell, before in zip(code(notebook), code(committed(name)), strict=True):
        assert kinds(cell) == kinds(before), cell.source


@pytest.mark.parametrize("name", NAMES)
def test_the_markdown_is_the_same(name: str) -> None:
    notebook = committed(name)
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    assert notebook == notebooks.read(name)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_committed(name: str) -> None:
    notebook = committed(name)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    outputs = [out for cell in code(notebook) for out in cell.outputs]
    assert {out.output_type for out in outputs} <= {"stream", "display_data", "execute_result"}
    assert {out.get("name") for out in outputs} <= {"stdout", None}
    text = re.sub(r"[A-Za-z0-9+/=\\n]{80,}", "", json.dumps(outputs))  # without pictures and sounds
    assert not re.search(r"/(work|root|home|tmp|Users)\b|Traceback|Warning", text)
    assert (notebooks.DIRECTORY / f"{name}.ipynb").stat().st_size < MOST_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_colab_opens_and_installs_it(name: str) -> None:
    notebook = committed(name)
    address = f"https://colab.research.google.com/github/{notebooks.REPOSITORY}/blob/main/notebooks/{name}.ipynb"
    assert f"({address})" in notebook.cells[0].source
    installing = code(notebook)[0].source
    assert f"git+https://github.com/{notebooks.REPOSITORY}" in installing
    assert installing == code(committed(NAMES[0]))[0].source
    elsewhere = re.findall(r"github\.com/([^/\"]+/[^/\")\n]+)", "".join(cell.source for cell in notebook.cells))
    assert set(elsewhere) == {notebooks.REPOSITORY}
