"""What the scaffold command writes can be composed and built."""

import ast
import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, environment

from cbml.errors import UserError
from cbml.stages.new import KINDS, new


@pytest.fixture
def copy(tmp_path):
    for name in ("src", "conf", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return tmp_path


@pytest.mark.slow
def test_one_of_each_kind_trains(copy):
    for kind in KINDS:
        lines = new(kind, f"my_{kind}", copy)
        assert lines[0].startswith("wrote ") and not any("by hand" in line for line in lines)
    for line in lines:
        file = copy / line.split()[1]
        assert file.suffix == ".yaml" or ast.parse(file.read_text())
    commands = [
        "dvc exp run -S loss=my_loss",
        "dvc exp run -S loss=my_method -S 'embedding_dim=[64]'",
        "dvc exp run -S loss=proxy_anchor -S '+loss.proxy_anchor.batches={type: my_sampler}'",
        "dvc exp run -S dataset=my_dataset -S loss=cbml_log -S recipe.instances=8",
        "dvc exp run -S 'backbone=[my_backbone]' -S loss=cbml_log",
    ]
    code = """
import json, sys, tempfile
from pathlib import Path
from composed import compose, words_of
for line in json.loads(sys.argv[1]):
    (workspace,) = compose(words_of(line), Path(tempfile.mkdtemp()), Path("conf").resolve())
    for dataset in workspace.params().dataset:
        for cell in workspace.cells(dataset):
            from cbml import network
            network.build(cell, num_classes=4, root=Path())
            print("BUILT", dataset, cell.name, cell.loss_config.batches)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        cwd=copy,
        env=environment() | {"PYTHONPATH": os.pathsep.join([str(copy / "src"), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    built = "\n".join(line for line in done.stdout.splitlines() if line.startswith("BUILT"))
    assert all(f"my_{kind}" in built for kind in KINDS), built


def test_a_second_one_leaves_an_edit_that_no_longer_fits_to_its_author(copy):
    new("sampler", "first", copy)
    lines = new("sampler", "second", copy)
    assert lines[0] == "wrote src/cbml/samplers/second.py" and "by hand" in lines[1] and "SecondConfig" in lines[1]


def test_nothing_is_replaced_and_names_are_those_of_modules(copy):
    with pytest.raises(UserError, match=r"conf/loss/triplet\.yaml: exists; choose another name"):
        new("loss", "triplet", copy)
    assert not (copy / "src/cbml/losses/triplet.py").exists()
    with pytest.raises(UserError, match="My-Loss: no name for a loss; allowed: small letters"):
        new("loss", "My-Loss", copy)
