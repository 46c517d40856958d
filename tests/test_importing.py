"""Cells from another checkout: all of their results and records, and nothing overwritten."""

import json
import shutil
from pathlib import Path

import mlflow
import pytest
import yaml
from conftest import tiny_params

from cbml.config import load_params
from cbml.errors import UserError
from cbml.evaluation.cell import evaluate_cell
from cbml.importing import import_cells
from cbml.reporting.tableset import write_tables
from cbml.training import run_cell

CELL = "resnet18-cbml_log-16-0"
SPEED = ("images_per_second", "data_share")


@pytest.fixture
def other(project, tmp_path_factory, monkeypatch):
    """Another checkout, with one evaluated cell and its tables; the working directory is a new one without anything."""
    params = load_params()
    evaluate_cell(run_cell(params.cells("glyphs")[0], state=project), state=project)
    write_tables(params, "glyphs")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow's own note of the store in use
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    Path("params.yaml").write_text(yaml.safe_dump(tiny_params()))
    return project


def records(root):
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("glyphs").experiment_id], "tags.loss = 'cbml_log'")
    return client, runs


def test_everything_arrives_and_the_tables_are_the_same(other):
    assert import_cells(other) == [f"glyphs/{CELL}"]
    assert write_tables(load_params(), "glyphs", all_cells=True) == (other / "reports/glyphs/tables.md").read_text()
    assert Path("runs/glyphs", CELL, "final.pt").is_file()
    (theirs, (there,)), (ours, (here,)) = records(other), records(Path())
    assert here.data.params == there.data.params
    # All but the speed by iteration, which no file of a run holds: run.json has the seconds.
    assert here.data.metrics == {k: v for k, v in there.data.metrics.items() if k not in SPEED}
    assert here.data.tags["imported_from"] == str(other)
    for name in ("loss", "loss_variance", "recall_at_1"):
        curves = [
            [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            for client, run in ((theirs, there), (ours, here))
        ]
        assert curves[0] == curves[1] and curves[0]

    assert import_cells(other) == [] and len(records(Path())[1]) == 1  # again: nothing new
    shutil.rmtree("evaluations")  # as DVC does when an experiment has other cells
    assert "| resnet18 | cbml_log | final |" in write_tables(load_params(), "glyphs", all_cells=True)


def test_what_is_here_already_is_not_overwritten(other):
    import_cells(other)
    file = other / "evaluations/glyphs" / CELL / "metrics.json"
    file.write_text(file.read_text().replace('"recall_at_1": ', '"recall_at_1": 0'))
    with pytest.raises(UserError, match="here already, with other results"):
        import_cells(other)
    shutil.rmtree(Path("evaluations"))
    summary = Path("lists/glyphs/summary.json")
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"fingerprint": "another"}))
    with pytest.raises(UserError, match="of other images"):
        import_cells(other)
    assert not Path("evaluations").exists()


def test_a_folder_without_cells_is_refused(tmp_path):
    with pytest.raises(UserError, match="no evaluations/<dataset>/<cell>/cell.yaml"):
        import_cells(tmp_path)


def test_all_cells_are_found_also_after_dvc_took_their_folders_away(project):
    params = load_params()
    evaluate_cell(run_cell(params.cells("glyphs")[0], state=project), state=project)
    shutil.rmtree("evaluations")
    with pytest.raises(UserError, match="no such file; the stage evaluate writes it"):
        write_tables(params, "glyphs")
    assert "| resnet18 | cbml_log | final |" in write_tables(params, "glyphs", all_cells=True)
