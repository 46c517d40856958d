"""What pyproject.toml says of dependencies: all that is imported, and nothing that the lock does not have."""

import ast
import re
import sys
import tomllib
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
    declared = requirements().keys() | requirements("timm").keys()
    distributions = packages_distributions()
    ours = {"cbml", "pipeline", "umap"}  # and the one that `dev` does not install
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
        requirements() | requirements("dev") | requirements("timm") | requirements("onnx")
    ).items():
        assert requirement.specifier.contains(locked[name]), name
    assert "/" not in text
