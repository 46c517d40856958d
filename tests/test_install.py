"""What pyproject.toml says of dependencies: all that is imported, and nothing that the lock does not have."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions

import pytest
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(extra=None):
    """Of the package alone, or of one of its extras; without those that are extras of its own."""
    parsed = map(Requirement, EXTRAS[extra] if extra else PROJECT["dependencies"])
    return {canonicalize_name(each.name): each for each in parsed if each.name != PROJECT["name"]}


@pytest.mark.parametrize("folder", ["src/cbml", "pipeline"])
def test_every_import_is_declared(folder):
    declared = (
        requirements().keys()
        | requirements("pipeline").keys()
        | requirements("timm").keys()
        | requirements("tune").keys()
        | requirements("ray").keys()
    )
    distributions = packages_distributions()
    ours = {"cbml", "pipeline", "umap", "gradio"}  # and those that `dev` does not install
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - ours:
                owners = {canonicalize_name(owner) for owner in distributions[name]}
                assert owners & declared, f"{file}: {name}"


def test_the_lock_has_all_that_is_declared_and_names_no_host():
    text = (ROOT / "requirements.lock").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE))
    for name, requirement in (
        requirements()
        | requirements("pipeline")
        | requirements("dev")
        | requirements("timm")
        | requirements("onnx")
        | requirements("tune")
        | requirements("ray")
    ).items():
        assert requirement.specifier.contains(locked[name]), name
    assert "/" not in text


ALONE = """
import sys, time
import numpy, pydantic, torch, pytorch_metric_learning.losses, pytorch_metric_learning.miners
theirs, start = set(sys.modules), time.process_time()
from cbml.losses import CBML
from cbml.evaluation import evaluate, recall_at_k
seconds = time.process_time() - start
print(seconds, *sorted({name.partition(".")[0] for name in set(sys.modules) - theirs}))
criterion = CBML(form="log")
embeddings, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) // 2
criterion(embeddings, labels).backward()
assert recall_at_k(embeddings, labels, ks=(1, 7))[7] == 100 and evaluate(embeddings, labels)["queries"] == 8
heavy = "mlflow dvc lightning_fabric lightning pandas torchvision timm PIL hydra yaml matplotlib requests safetensors"
assert not set(heavy.split()) & sys.modules.keys()
"""


def test_losses_and_evaluation_need_the_core_alone():
    """Nothing that torch, numpy, pydantic and pytorch-metric-learning do not import themselves, but the declared."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seconds, *packages = done.stdout.split()
    distributions = packages_distributions()
    owners = {canonicalize_name(name) for each in packages for name in distributions.get(each, [])}
    assert owners <= requirements().keys() | {"cbml", "annotated-types"}  # which is pydantic's
    assert float(seconds) < 2


def test_core_and_pipeline_share_nothing_and_dev_brings_both():
    assert not requirements().keys() & requirements("pipeline").keys()
    (own,) = (Requirement(each) for each in EXTRAS["dev"] if Requirement(each).name == PROJECT["name"])
    assert "pipeline" in own.extras and (ROOT / "requirements.txt").read_text().endswith("-e .[dev]\n")


def test_a_wheel_has_all_of_the_package(tmp_path):
    """Types, templates and tables too, not its modules alone."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "."], cwd=tmp_path, check=True)
    (wheel,) = tmp_path.glob("cbml-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = {str(file.relative_to(ROOT / "src")) for file in (ROOT / "src/cbml").rglob("*") if file.is_file()}
    assert {file for file in files if "__pycache__" not in file} <= packed
    assert "cbml/py.typed" in packed


@pytest.mark.parametrize(
    ("active", "installed", "makes"), [("/mine", False, False), ("", False, True), ("", True, False)]
)
def test_the_ui_uses_the_environment_that_is_active(tmp_path, active, installed, makes):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    if installed:
        (tmp_path / ".venv").mkdir()
        (tmp_path / ".venv" / "installed").touch()
    variables = ["VIRTUAL_ENV=" + active, "CONDA_PREFIX="]
    done = subprocess.run(["make", "-n", "ui", *variables], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert ("-m venv .venv" in done.stdout) == makes and "python -m pipeline.ui" in done.stdout
