"""The notebook runs from top to bottom, learns, and leaves its page."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, environment

NOTEBOOK = ROOT / "examples" / "cbml_in_your_loop.ipynb"


def code():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)  # which would be of one machine
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
def test_the_notebook_runs_and_cbml_learns(tmp_path):
    """Its cells one after another, as a kernel does it, for some iterations."""
    done = subprocess.run(
        [sys.executable, "-c", code()],
        cwd=tmp_path,
        env=environment() | {"ITERATIONS": "100"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    recalls = {
        name: float(rest.partition("{1: ")[2].partition(",")[0])
        for name, _, rest in (line.partition(":") for line in done.stdout.splitlines())
        if "{1: " in rest
    }
    assert recalls["CBML"] > recalls["untrained"] + 5 and recalls["CBML, mined"] > recalls["untrained"], recalls
    assert 'class="tile' in (tmp_path / "neighbours.html").read_text()
    assert os.listdir(tmp_path / "data")
