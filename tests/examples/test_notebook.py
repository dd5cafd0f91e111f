"""The notebook, executed in a kernel as Jupyter does, with a tiny model."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, List

import pytest
from support.programs import REPOSITORY, run

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not all(map(find_spec, ["ipykernel", "matplotlib", "nbclient"])),
        reason="needs the extras 'notebook' and 'plots'",
    ),
]

NOTEBOOK = REPOSITORY / "examples" / "notebook.ipynb"

#: Run in its own process, because nbclient has an event loop and sockets.
EXECUTE = """
import sys
import nbclient
import nbformat

notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[1])
"""


def outputs(cell: Any) -> List[Any]:
    return cell["outputs"] if cell["cell_type"] == "code" else []


def test_the_notebook_is_stored_without_outputs() -> None:
    assert not any(outputs(cell) for cell in json.loads(NOTEBOOK.read_text())["cells"])


def test_the_notebook_runs_from_the_first_cell_to_the_last(tmp_path: Path) -> None:
    copy = tmp_path / NOTEBOOK.name
    copy.write_text(
        NOTEBOOK.read_text().replace("smollm2-135m", "tiny-random").replace("2e-3", "1e-2")
    )
    done = run(["-c", EXECUTE, str(copy)])
    assert done.returncode == 0, done.stderr
    found = [output for cell in json.loads(copy.read_text())["cells"] for output in outputs(cell)]
    assert [output for output in found if output.get("name") == "stderr"] == []
    printed = "".join("".join(output.get("text", "")) for output in found)
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", printed)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 1
    assert re.search(r"^tinker://\S+/sampler_weights/trained$", printed, re.M)
    shown = [output["data"] for output in found if output["output_type"] == "execute_result"]
    opened, before, curve, after, closed = ("".join(data["text/plain"]) for data in shown)
    assert opened.endswith("open>")
    assert closed.endswith("closed>")
    assert before != after
    assert curve.startswith("<Figure")
    assert shown[2]["image/png"]
