"""Executes the notebooks, and writes each .ipynb from its percent script.

Command:
    python -m notebooks.render                  (all)
    python -m notebooks.render scaling_laws     (those that are named)

The script is the source; the .ipynb is written from it and never edited. Lines on standard error,
which are progress with timings, are left out, and cells have the numbers of their order as ids, so
that the file changes only where a cell or a result does.
"""

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jupytext
from nbclient import NotebookClient
from nbformat import NotebookNode, v4, write
from traitlets.config import Config

FOLDER = Path(__file__).resolve().parent
NAMES = ("first_prompt", "results_explorer", "prompt_geometry", "scaling_laws")

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read_script(name: str) -> NotebookNode:
    """The notebook of a percent script, without outputs."""
    notebook = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("lines_to_next_cell", None)  # jupytext's, of blank lines
    notebook.metadata = METADATA
    return notebook


def execute(
    name: str, parameters: Mapping[str, Any] | None = None, *, cwd: Path = FOLDER.parent
) -> NotebookNode:
    """Executes a notebook in a kernel of its own.

    Args:
        name: of the notebook.
        parameters: names that are set after the cell with the tag "parameters", as papermill does.
            What sets them is not in the notebook that is returned.
        cwd: the kernel's working directory.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = read_script(name)
    (after,) = (n for n, c in enumerate(notebook.cells, 1) if "parameters" in tags(c))
    lines = [f"{key} = {value!r}" for key, value in (parameters or {}).items()]
    notebook.cells.insert(after, v4.new_code_cell("\n".join(lines)))
    with tempfile.TemporaryDirectory() as folder:  # of the kernel's own files: none in the home
        kernel = Config()
        kernel.KernelManager.transport = "ipc"
        kernel.KernelManager.connection_file = f"{folder}/kernel.json"
        resources = {"metadata": {"path": str(cwd)}}
        client = NotebookClient(notebook, timeout=900, resources=resources, config=kernel)
        client.execute(env=os.environ | {"IPYTHONDIR": folder})
    del notebook.cells[after]
    return tidy(notebook)


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def tidy(notebook: NotebookNode) -> NotebookNode:
    """Leaves out what differs from run to run: standard error, times of cells, versions."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
        cell.execution_count = number
        for one in cell.outputs:
            if "execution_count" in one:
                one["execution_count"] = number
        cell.metadata.pop("execution", None)
    notebook.metadata = METADATA
    return notebook


def main() -> None:
    """Renders the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], metavar="NAME")
    for name in parser.parse_args().names or NAMES:
        with tempfile.TemporaryDirectory() as empty:  # so that no trial is an earlier run's
            cwd = Path(empty) if name == "first_prompt" else FOLDER.parent
            write(execute(name, cwd=cwd), FOLDER / f"{name}.ipynb")
        print(f"wrote notebooks/{name}.ipynb")


if __name__ == "__main__":
    main()
