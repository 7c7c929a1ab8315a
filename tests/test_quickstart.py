# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The notebook runs, and prints what it is committed with."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def outputs(notebook) -> list[str]:
    """What each code cell printed to stdout or gave back; of pictures, that there is one."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(_text(output) for output in cell.outputs if output.get("name") != "stderr") for cell in cells]


def _text(output) -> str:
    if output.output_type == "stream":
        return output.text
    return "a picture" if "image/png" in output.data else output.data["text/plain"]


@pytest.mark.slow
@pytest.mark.usefixtures("loopback")
def test_quickstart_prints_what_it_is_committed_with(tmp_path):
    committed = nbformat.read(NOTEBOOK, as_version=4)
    executed = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(executed, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert outputs(executed) == outputs(committed)
    assert "".join(outputs(committed)).count("a picture") == 2


def test_quickstart_is_small_and_has_no_warnings_in_it():
    assert NOTEBOOK.stat().st_size < 300_000
    committed = nbformat.read(NOTEBOOK, as_version=4)
    assert not [
        output for cell in committed.cells for output in cell.get("outputs", []) if output.get("name") == "stderr"
    ]
    nbformat.validate(committed)
