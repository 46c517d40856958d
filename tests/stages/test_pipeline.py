"""The whole pipeline through DVC, on very little data: what runs, what is taken from the cache, what it leaves."""

import json
import re
import subprocess

import mlflow
import pytest
import yaml
from dvc.api import exp_show
from helpers import CELL, environment, ran, stages

pytestmark = pytest.mark.slow


def changed_files(repository):
    command = ["git", "status", "--porcelain"]
    return subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True).stdout.splitlines()


def add_line(repository, file, line):
    path = repository / file
    path.write_text(f"{path.read_text()}\n{line}\n")


def test_from_nothing_to_the_table_and_only_what_changed_afterwards(repository):
    # Hydra composes params.yaml, then every stage runs.
    first = ran(repository, "dvc exp run")
    assert first[:2] == ["download@glyphs", "build_lists@glyphs"] and first[-1] == "tabulate@glyphs"
    assert sorted(first[2:-1]) == sorted(stages("cbml_sqrt", *CELL) + stages("cbml_log", *CELL))
    table = (repository / "reports" / "glyphs" / "tables.md").read_text()
    assert re.search(r"\| cbml_sqrt +\| final ", table) and re.search(r"\| cbml_log +\| best_on_test ", table)
    assert changed_files(repository) == [" M params.yaml", "?? dvc.lock"]  # which is what DVC writes

    # DVC's cache, the workspace and MLflow's store have the same file.
    assert {file.stat().st_nlink for file in (repository / "runs").rglob("final.pt")} == {3}
    assert 'class="tile ' in (repository / "reports" / "glyphs" / "index.html").read_text()

    assert ran(repository, "dvc repro") == []
    assert ran(repository, "dvc exp run -S loss=cbml_sqrt") == ["tabulate@glyphs"]
    assert json.loads((repository / "reports" / "glyphs" / "metrics.json").read_text())["cells"] == 1
    again = [*stages("cbml_sqrt", *CELL), "tabulate@glyphs"]
    assert ran(repository, "dvc exp run -n wide -S loss.cbml_sqrt.margin=0.2 -S loss=cbml_sqrt") == again
    metrics = json.loads((repository / "reports" / "glyphs" / "metrics.json").read_text())
    (shown,) = [each for each in exp_show(str(repository)) if each["Experiment"] == "wide"]
    assert shown["R@1.resnet18-cbml_sqrt-16"] == metrics["R@1"]["resnet18-cbml_sqrt-16"]

    client = mlflow.MlflowClient(f"sqlite:///{repository}/mlflow.db")
    cells, sets = (
        client.search_runs([client.get_experiment_by_name(name).experiment_id]) for name in ("glyphs", "tables")
    )
    assert sorted(run.data.params["loss.margin"] for run in cells) == ["0.1", "0.1", "0.2"] and len(sets) == 3

    # The store has both values of the parameter, though the workspace has the last one alone.
    assert ran(repository, "PYTHONPATH=src python -m pipeline.tabulate glyphs --all") == []
    table = (repository / "reports" / "glyphs" / "tables.md").read_text()
    assert "cbml_sqrt (margin=0.1)" in table and "cbml_sqrt (margin=0.2)" in table and "cbml_log " in table


def test_a_change_of_code_runs_what_it_changes_and_nothing_else(repository):
    assert ran(repository, "dvc exp run -S loss=cbml_sqrt")[-1:] == ["tabulate@glyphs"]
    drawn, scored = stages("cbml_sqrt", "draw"), stages("cbml_sqrt", "evaluate")
    add_line(repository, "src/cbml/report/tables/rows.py", "# Another table.")
    assert ran(repository, "dvc repro") == ["tabulate@glyphs"]
    add_line(repository, "src/cbml/report/cell/page.py", "# Another page, which comes to the same.")
    assert ran(repository, "dvc repro") == drawn
    add_line(repository, "src/cbml/report/common/numbers.py", "# Other digits.")
    assert ran(repository, "dvc repro") == [*drawn, "tabulate@glyphs"]
    add_line(repository, "src/cbml/evaluation/metrics.py", "# Another metric, which comes to the same.")
    assert ran(repository, "dvc repro") == [*scored, "tabulate@glyphs"]

    def told(kind):
        """The command beside the only warning that the tables give."""
        table = (repository / "reports" / "glyphs" / "tables.md").read_text()
        (command,) = re.findall(r"`(dvc repro -f -s .*?)`", table) or [""]
        assert bool(command) == (f"**{kind} by other code than today's**" in table)
        return command

    assert not told("Trained")
    # What trained a cell and what scored it are not run again unasked; what asks for it is in the table.
    add_line(repository, "src/cbml/losses/cbml.py", "MENDED = True")
    assert ran(repository, "dvc repro") == ["tabulate@glyphs"]
    again = ran(repository, told("Trained"))
    assert (again[0], again[-1]) == (*stages("cbml_sqrt", "train"), "tabulate@glyphs") and not told("Trained")


def test_changed_images_are_noticed_through_the_lists_and_neither_copied_nor_counted(repository):
    """They lie in the repository itself, also for a queued experiment, and DVC has their catalogue alone."""
    ran(repository, f"dvc exp run -S loss=cbml_sqrt {stages('cbml_sqrt', 'train')[0]}")  # if no test before did
    command = "dvc exp run -S loss=cbml_sqrt -S dataset.glyphs.seed=3 build_lists@glyphs"
    assert ran(repository, command) == ["download@glyphs", "build_lists@glyphs"]
    status = subprocess.run(
        ["dvc", "status", "train"], cwd=repository, check=True, capture_output=True, text=True
    ).stdout
    assert stages("cbml_sqrt", "train")[0] in status and re.search(r"modified: +lists/glyphs", status)
    before = sorted(path.name for path in (repository / "data").iterdir())
    assert len([name for name in before if name.startswith("glyphs-")]) >= 2
    lock = yaml.safe_load((repository / "dvc.lock").read_text())
    assert [out["path"] for out in lock["stages"]["download@glyphs"]["outs"]] == ["data/glyphs.csv"]


@pytest.mark.parametrize("override", ["loss=cmbl", "loss.cbml_log.margn=1"])
def test_an_unknown_option_is_refused_before_anything_runs(repository, override):
    done = subprocess.run(
        ["dvc", "exp", "run", "-S", override],
        cwd=repository,
        env=environment() | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "Running stage" not in done.stdout
    assert override.partition("=")[2 if "." not in override else 0] in done.stderr
