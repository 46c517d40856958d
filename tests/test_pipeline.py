"""The whole pipeline through DVC, on very little data: what runs, what is taken from the cache, what it leaves."""

import json
import re
import shutil
import subprocess

import mlflow
import pytest
import yaml
from conftest import ROOT, TINY_GLYPHS, TINY_RECIPE, environment


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of this repository whose default experiment is two losses on tiny data."""
    folder = tmp_path_factory.mktemp("repository")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for file in files:
        if file != "dvc.lock" and not file.startswith("reports/") and (ROOT / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
    config = (folder / "conf" / "config.yaml").read_text()
    for old, new in (("[cbml_const, ", "["), ("[512]", "[16]"), ("validation_classes: 0.2", "validation_classes: 0.4")):
        assert old in config
        config = config.replace(old, new)
    (folder / "conf" / "config.yaml").write_text(config)
    (folder / "conf" / "dataset" / "glyphs.yaml").write_text(yaml.safe_dump({"glyphs": TINY_GLYPHS}))
    (folder / "conf" / "recipe" / "quick.yaml").write_text(yaml.safe_dump({"quick": TINY_RECIPE}))
    for command in (
        "git init -q",
        "git config user.name x",
        "git config user.email x@x",
        "git add -A",
        "git commit -qm x",
    ):
        subprocess.run(command.split(), cwd=folder, check=True)
    return folder


def ran(repository, command):
    """Run a command; the stages that it ran."""
    done = subprocess.run(
        command, cwd=repository, shell=True, env=environment() | {"PYTHONPATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"Running stage '(.*)'", done.stdout)


def test_from_nothing_to_the_table_and_only_what_changed_afterwards(repository):
    # Hydra composes params.yaml, then every stage runs.
    assert ran(repository, "dvc exp run") == [
        "download@glyphs",
        "build_lists@glyphs",
        "train@resnet18-cbml_sqrt-16-0-glyphs",
        "train@resnet18-cbml_log-16-0-glyphs",
        "evaluate@resnet18-cbml_sqrt-16-0-glyphs",
        "evaluate@resnet18-cbml_log-16-0-glyphs",
        "tabulate@glyphs",
    ]
    table = (repository / "reports" / "glyphs" / "tables.md").read_text()
    assert "| resnet18 | cbml_sqrt | final | 1 |" in table and "| resnet18 | cbml_log | best_on_test | 1 |" in table

    assert ran(repository, "dvc repro") == []
    assert ran(repository, "dvc exp run -S loss=cbml_sqrt") == ["tabulate@glyphs"]
    assert json.loads((repository / "reports" / "glyphs" / "metrics.json").read_text())["cells"] == 1
    assert ran(repository, "dvc exp run -S loss.cbml_sqrt.margin=0.2") == [
        "train@resnet18-cbml_sqrt-16-0-glyphs",
        "evaluate@resnet18-cbml_sqrt-16-0-glyphs",
        "tabulate@glyphs",
    ]

    client = mlflow.MlflowClient(f"sqlite:///{repository}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("glyphs").experiment_id])
    cells = [run for run in runs if "loss" in run.data.tags]
    assert sorted(run.data.params["loss.margin"] for run in cells) == ["0.1", "0.1", "0.2"]
    assert sum(run.info.run_name == "tables" for run in runs) == 3


def test_an_unknown_option_is_refused_before_anything_runs(repository):
    for override in ("loss=cmbl", "backbone=vgg16", "dataset=birds", "loss.cbml_log.margn=1"):
        done = subprocess.run(
            ["dvc", "exp", "run", "-S", override],
            cwd=repository,
            env=environment() | {"PYTHONPATH": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0 and "Running stage" not in done.stdout
        assert override.partition("=")[2 if "." not in override else 0] in done.stderr
