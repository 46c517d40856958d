"""The whole pipeline through DVC, on very little data: what runs, what is taken from the cache, what it leaves."""

import json
import re
import shutil
import subprocess

import mlflow
import pytest
import yaml
from conftest import ROOT, TINY_GLYPHS, TINY_RECIPE, environment
from dvc.api import exp_show
from PIL import Image


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
    for old, new in (("[cbml_const, ", "["), ("[512]", "[16]")):
        assert old in config
        config = config.replace(old, new)
    (folder / "conf" / "config.yaml").write_text(config)
    for name, seed in (("glyphs", 0), ("runes", 1)):
        option = {name: TINY_GLYPHS | {"seed": seed}}
        (folder / "conf" / "dataset" / f"{name}.yaml").write_text(yaml.safe_dump(option))
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


def changed_files(repository):
    command = ["git", "status", "--porcelain"]
    return subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True).stdout.splitlines()


def stages(loss, *names, dataset="glyphs"):
    return [f"{name}@resnet18-{loss}-16-0-{dataset}" for name in names]


CELL = ("train", "evaluate", "draw")


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
    add_line(repository, "src/cbml/reporting/tables.py", "# Another table.")
    assert ran(repository, "dvc repro") == ["tabulate@glyphs"]
    add_line(repository, "src/cbml/figures/charts.py", "# Another figure.")
    assert ran(repository, "dvc repro") == [*stages("cbml_sqrt", "draw"), "tabulate@glyphs"]
    add_line(repository, "src/cbml/evaluation/metrics.py", "# Another metric.")
    assert ran(repository, "dvc repro") == stages("cbml_sqrt", "evaluate")  # which came to the same
    assert "other code" not in (repository / "reports" / "glyphs" / "tables.md").read_text()
    add_line(repository, "src/cbml/losses/cbml.py", "MENDED = True")
    assert ran(repository, "dvc repro") == ["tabulate@glyphs"]
    table = (repository / "reports" / "glyphs" / "tables.md").read_text()
    (command,) = re.findall(r"`(dvc repro -f -s .*?)`", table)
    assert "other code than today's** (src/cbml/losses/cbml.py)" in table
    again = ran(repository, command)
    assert (again[0], again[-1]) == (*stages("cbml_sqrt", "train"), "tabulate@glyphs")
    assert "other code" not in (repository / "reports" / "glyphs" / "tables.md").read_text()


def test_two_datasets_have_a_page_each_and_one_over_both(repository):
    done = ran(repository, "dvc exp run -S loss=cbml_sqrt -S 'dataset=[glyphs,runes]'")
    assert set(stages("cbml_sqrt", *CELL, dataset="runes")) | {"tabulate@runes", "download@runes"} <= set(done)
    assert "train@resnet18-cbml_sqrt-16-0-glyphs" not in done
    index = (repository / "reports" / "index.html").read_text()
    for name in ("glyphs", "runes"):
        assert f'href="{name}/index.html"' in index and (repository / "reports" / name / "index.html").is_file()


def test_changed_images_are_noticed_through_the_lists(repository):
    command = "dvc exp run -S loss=cbml_sqrt -S dataset.glyphs.seed=3 build_lists@glyphs"
    assert ran(repository, command) == ["download@glyphs", "build_lists@glyphs"]
    status = subprocess.run(
        ["dvc", "status", "train"], cwd=repository, check=True, capture_output=True, text=True
    ).stdout
    assert stages("cbml_sqrt", "train")[0] in status and re.search(r"modified: +lists/glyphs", status)


def test_images_of_ones_own(repository, tmp_path):
    """What the README shows: a folder of ten class folders; what is added to it is noticed."""
    pictures = tmp_path / "my pictures, größer"
    for label in range(10):
        for k in range(4):
            file = pictures / f"class {label}" / f"{k}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 24 + k), (25 * label, 60 * k, 90)).save(file)
    command = f"dvc exp run -S dataset=folder -S 'dataset.folder.path=\"{pictures}\"' -S loss=cbml_sqrt"
    everything = ["download@folder", "build_lists@folder", *stages("cbml_sqrt", *CELL, dataset="folder")]
    assert ran(repository, command) == [*everything, "tabulate@folder"]
    table = (repository / "reports" / "folder" / "tables.md").read_text()
    assert "Test list: 20 images of 5 classes" in table
    (command,) = re.findall("^dvc exp run .*", table, re.MULTILINE)
    assert "dataset.folder.path=" in command and "watch" not in command
    assert ran(repository, command) == []
    Image.new("RGB", (30, 30)).save(pictures / "class 9" / "new.jpg")
    assert ran(repository, "dvc repro build_lists@folder") == everything[:2]
    lists = json.loads((repository / "lists" / "folder" / "summary.json").read_text())
    assert lists["test"] == {"images": 21, "classes": 5}
    done = subprocess.run(
        ["dvc", "exp", "run", "-S", "dataset=folder"],
        cwd=repository,
        env=environment() | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "dataset.folder.path" in done.stderr


def test_images_are_neither_copied_nor_counted_by_dvc(repository):
    """They lie in the repository itself, also for a queued experiment, and DVC has their catalogue alone."""
    assert ran(repository, "dvc exp run -S loss=cbml_sqrt -S dataset.glyphs.seed=5 build_lists@glyphs") != []
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
