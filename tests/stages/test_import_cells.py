"""Cells from another checkout: all of their results and records, and nothing overwritten."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml
from helpers import HIDE, TINY_GLYPHS, TINY_RECIPE, environment, tiny_params

from cbml.errors import UserError
from cbml.stages.build_lists import build_lists
from cbml.stages.download import download
from cbml.stages.evaluate import evaluate_cell
from cbml.stages.import_cells import import_cells
from cbml.stages.tabulate import tabulate
from cbml.stages.train import train_cell
from cbml.tracking.store import Store
from cbml.workspace import Workspace

NAME = "resnet18-cbml_log-16-0"
SPEED = ("train_images_per_second", "train_data_percent")


def compute(workspace, **changes):
    """Train and evaluate the one cell of the tiny parameters with some groups replaced; its key."""
    Path("params.yaml").write_text(yaml.safe_dump(tiny_params(**changes)))
    (cell,) = workspace.cells("glyphs")
    folder = train_cell(cell, workspace)
    evaluate_cell(folder, workspace)
    return json.loads((folder / "run.json").read_text())["key"]


@pytest.fixture
def other(workspace, tmp_path_factory, monkeypatch):
    """Another checkout, with one evaluated cell and its tables; the working directory is a new one without anything."""
    compute(workspace)
    tabulate(workspace, "glyphs")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow's own note of the store in use
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    Path("params.yaml").write_text(yaml.safe_dump(tiny_params()))
    return workspace.root


def records(root):
    client = mlflow.MlflowClient(f"sqlite:///{root.resolve()}/mlflow.db")
    return client, client.search_runs([client.get_experiment_by_name("glyphs").experiment_id])


def table(text):
    return text[: text.index("## Measured with")]


def test_everything_arrives_and_the_tables_are_the_same(other):
    here = Workspace.here()
    (key,) = import_cells(other, here)
    assert key.startswith(NAME)
    assert tabulate(here, "glyphs", all_cells=True) == (other / "reports/glyphs/tables.md").read_text()
    (theirs, (there,)), (ours, (run,)) = records(other), records(Path())
    assert run.data.params == there.data.params
    # All but the speed by iteration, which no file of a run holds: run.json has the seconds.
    assert run.data.metrics == {k: v for k, v in there.data.metrics.items() if k not in SPEED}
    assert run.data.tags["imported_from"] == other.name and run.data.tags["cell_key"] == key
    for name in ("loss", "loss_variance", "recall_at_1"):
        curves = [
            [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)]
            for client, found in ((theirs, there), (ours, run))
        ]
        assert curves[0] == curves[1] and curves[0]
    versions = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/versions.json")
    assert versions == json.loads((other / "evaluations/glyphs" / NAME / "run.json").read_text())["versions"]
    assert mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/resnet18-cbml_log-16-0")

    assert import_cells(other, here) == [] and len(records(Path())[1]) == 1  # again: nothing new


def test_a_cell_with_other_results_is_refused_and_nothing_is_brought(other):
    here = Workspace.here()
    import_cells(other, here)
    second = other / "evaluations/glyphs/a-copy"
    shutil.copytree(other / "evaluations/glyphs" / NAME, second)
    record = json.loads((second / "run.json").read_text())
    (second / "run.json").write_text(json.dumps(record | {"key": "new-0"}))
    file = other / "evaluations/glyphs" / NAME / "metrics.json"
    metrics = json.loads(file.read_text())
    file.write_text(json.dumps(metrics | {"final": metrics["final"] | {"recall_at_1": 0.123}}))
    with pytest.raises(UserError, match=f"the store has {NAME}-.* already, with other results"):
        import_cells(other, here)
    assert len(records(Path())[1]) == 1


def test_damaged_weights_become_no_model_and_nothing_is_brought(other):
    (file,) = other.glob("runs/*/*/final.pt")
    file.write_bytes(file.read_bytes()[:1000])
    here = Workspace.here()
    with pytest.raises(UserError, match=r"final\.pt: damaged"):
        import_cells(other, here)
    assert not Store(here).finished("glyphs")


def test_a_folder_without_cells_is_refused(tmp_path):
    with pytest.raises(UserError, match="no evaluations/<dataset>/<cell>/cell.yaml"):
        import_cells(tmp_path, Workspace(tmp_path, tmp_path))


def test_names_in_somebodys_files_lead_nowhere(other):
    """A key becomes a part of paths."""
    file = other / "evaluations/glyphs" / NAME / "run.json"
    for key in ("../../x", "/etc/x", "a/b", "..", "", None):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"key": key}))
        with pytest.raises(UserError, match="run.json: damaged"):
            import_cells(other, Workspace.here())
        with pytest.raises(UserError, match="run.json: damaged"):
            evaluate_cell(file.parent, Workspace(other, other))


def test_two_values_of_a_parameter_are_two_rows_of_all_cells(workspace):
    loss = tiny_params()["loss"]["cbml_log"]
    keys = {compute(workspace, loss={"cbml_log": loss | {"margin": margin}}) for margin in (0.1, 0.2)}
    assert len(keys) == 2  # of one name, so the second took the first one's place in runs/ and evaluations/
    text = tabulate(workspace, "glyphs", all_cells=True)
    assert "cbml_log (margin=0.1)" in text and "cbml_log (margin=0.2)" in text
    assert "cbml_log (" not in tabulate(workspace, "glyphs")


def test_two_recipes_of_a_cell_are_two_rows(workspace):
    compute(workspace)
    compute(workspace, recipe=TINY_RECIPE | {"name": "other", "lr": 1e-4, "iterations": 4})
    text = table(tabulate(workspace, "glyphs", all_cells=True))
    assert "cbml_log (recipe=tiny)" in text and "cbml_log (recipe=other)" in text


def test_the_newest_of_a_key_counts(workspace):
    compute(workspace)
    first = tabulate(workspace, "glyphs", all_cells=True)
    shutil.rmtree("runs")
    compute(workspace)
    assert len(records(Path())[1]) == 2
    assert table(tabulate(workspace, "glyphs", all_cells=True)) == table(first)


def test_cells_of_other_images_are_left_out(workspace, capsys):
    compute(workspace)
    for name in ("data", "lists"):  # which all tests share
        Path(name).unlink()
    others = {"glyphs": TINY_GLYPHS | {"split": 0.4}}
    Path("params.yaml").write_text(yaml.safe_dump(tiny_params(dataset=others)))
    download(workspace, "glyphs")
    build_lists(workspace, "glyphs")
    compute(workspace, dataset=others, seed=[1])
    assert "| 1 " in tabulate(workspace, "glyphs", all_cells=True)
    assert "1 cells of other images or lists are left out" in capsys.readouterr().err


def test_all_cells_are_found_after_dvc_took_their_folders_away(workspace):
    compute(workspace)
    for folder in ("runs", "evaluations"):
        shutil.rmtree(folder)
    with pytest.raises(UserError, match="no such file; the stage evaluate writes it"):
        tabulate(workspace, "glyphs")
    assert "| cbml_log " in tabulate(workspace, "glyphs", all_cells=True)
    with pytest.raises(UserError, match="the tracking store has no evaluated cell"):
        tabulate(workspace, "cub200", all_cells=True)


WITHOUT = f"""
{HIDE}
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_node_with_only_pytorch_computes_what_another_brings_home(workspace, monkeypatch, tmp_path_factory):
    """Without MLflow, DVC and git, training and evaluation leave complete folders."""
    bare = environment() | {"PATH": "/nowhere"}

    def stage(*command):
        return subprocess.run(
            [sys.executable, "-c", WITHOUT, *command], env=bare, capture_output=True, text=True, check=True
        )

    axes = "--dataset glyphs --backbone resnet18 --loss cbml_log --embedding-dim 16 --seed 0"
    stage("pipeline.train", *axes.split())
    stage("pipeline.evaluate", f"runs/glyphs/{NAME}")
    stage("pipeline.draw", f"evaluations/glyphs/{NAME}")
    assert not Path("mlflow.db").exists() and Path("pages/glyphs", NAME, "index.html").is_file()
    record = json.loads(Path("evaluations/glyphs", NAME, "run.json").read_text())
    assert record["run_id"] is None and record["versions"]["cbml"] == "unknown"
    node = workspace.root
    monkeypatch.chdir(tmp_path_factory.mktemp("home"))
    (key,) = import_cells(node, Workspace.here())
    client, (run,) = records(Path())
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4, 5, 6]
    assert run.data.tags["cell_key"] == key == record["key"]
