"""Runs the notebooks and keeps their outputs.

    python -m tools.notebooks [NAME ...]

What is edited is `notebooks/NAME.md`. `NAME.ipynb` is written from it, run from top to bottom in a fresh kernel of this
interpreter, and holds nothing else that changes from run to run: cells are numbered and no versions are noted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode

DIRECTORY = Path(__file__).parents[1] / "notebooks"
REPOSITORY = "phi4mm-jax/phi4mm_jax"
"""On GitHub, from which Colab opens the notebooks and installs the package."""
CELL_SECONDS = 120
"""What a cell may take."""

_METADATA = {
    "jupytext": {"formats": "ipynb,md", "notebook_metadata_filter": "-all"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def names() -> list[str]:
    """All notebooks, in the order in which they are read."""
    return sorted(path.stem for path in DIRECTORY.glob("*.md"))


def read(name: str) -> NotebookNode:
    """A notebook without outputs, from its Markdown."""
    notebook = jupytext.read(DIRECTORY / f"{name}.md")
    notebook.metadata = nbformat.from_dict(_METADATA)
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"cell-{number}"
    return notebook


def run(notebook: NotebookNode) -> None:
    """Runs all cells in an empty directory, and leaves their outputs in them.

    Raises:
      CellExecutionError: a cell failed.
      CellTimeoutError: a cell took too long.
    """
    specs = KernelSpecManager(kernel_dirs=[])  # this interpreter's own kernel alone
    manager = AsyncKernelManager(kernel_spec_manager=specs)
    with tempfile.TemporaryDirectory() as directory:
        NotebookClient(
            notebook,
            km=manager,
            timeout=CELL_SECONDS,
            coalesce_streams=True,
            record_timing=False,
            resources={"metadata": {"path": directory}},
        ).execute(cleanup_kc=True)
    notebook.metadata = nbformat.from_dict(_METADATA)


def main() -> None:
    """Runs the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=names(), help="such as 01_quickstart; default: all")
    for name in parser.parse_args().names:
        notebook = read(name)
        start = time.monotonic()
        run(notebook)
        nbformat.write(notebook, DIRECTORY / f"{name}.ipynb")
        jupytext.write(notebook, DIRECTORY / f"{name}.md")
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
