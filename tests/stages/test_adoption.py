"""A finished folder beside its checkpoint: what `train` takes, and what it does not."""

import json
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from helpers import VALIDATING, record, result, run

from cbml.stages import train as stage
from cbml.stages.draw import draw_cell
from cbml.stages.evaluate import evaluate_cell


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("it is trained again")

    return lambda: monkeypatch.setattr(stage, "train", refuse)


def runs_of(store):
    client = mlflow.MlflowClient(store)
    return client, client.search_runs([client.get_experiment_by_name("glyphs").experiment_id])


def finished():
    (folder,) = Path(".checkpoints").glob("*/*/run")
    return folder


def test_a_cell_that_another_checkout_trained_is_taken_with_its_curves_and_is_one_run(
    workspace, monkeypatch, no_training
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd()}/theirs.db")
    theirs = run(workspace, recipe=VALIDATING)
    expected, their_id = result(theirs), record(theirs)["run_id"]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    shutil.rmtree("runs")
    no_training()

    ours = run(workspace, recipe=VALIDATING)
    assert result(ours) == expected
    client, runs = runs_of(f"sqlite:///{Path.cwd()}/mlflow.db")
    assert [each.info.run_id for each in runs] == [record(ours)["run_id"]] != [their_id]
    for name, file, column in (
        ("loss", "losses", "loss"),
        ("recall_at_1", "validations", "recall_at_1"),
        ("selection_map_at_r", "selection", "map_at_r"),
    ):
        points = client.get_metric_history(runs[0].info.run_id, name)
        rows = stage.read_csv(ours / f"{file}.csv", "train")
        assert {point.step: point.value for point in points} == dict(zip(rows.iteration, rows[column], strict=True))

    (cell,) = workspace.cells("glyphs")
    evaluate_cell(ours, workspace)
    draw_cell(workspace.evaluation(cell), workspace)
    client, runs = runs_of(f"sqlite:///{Path.cwd()}/mlflow.db")
    (only,) = runs
    assert only.data.tags["evaluated"] == "true" and only.info.status == "FINISHED"
    assert not [*Path(".checkpoints").glob("*/*")]
    assert {each.path for each in client.list_artifacts(only.info.run_id)} >= {"metrics.json", "cell.html"}


def test_a_training_that_was_killed_before_it_was_recorded_is_taken(workspace, no_training):
    expected = result(run(workspace))
    shutil.rmtree("runs")
    no_training()
    assert result(run(workspace)) == expected
    assert len(runs_of(f"sqlite:///{Path.cwd()}/mlflow.db")[1]) == 1


def edit(**changes):
    file = finished() / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def other_weights():
    weights = torch.load(finished() / "final.pt")
    weights["head.bias"] += 1
    torch.save(weights, finished() / "final.pt")


SPOILT = {
    "other code": lambda: edit(code=json.loads((finished() / "run.json").read_text())["code"] | {"network.py": "0"}),
    "other packages": lambda: edit(versions={"torch": "0.1"}),
    "another cell": lambda: edit(key="resnet18-cbml_log-16-0-0000000000"),
    "other weights": other_weights,
    "damaged weights": lambda: (finished() / "final.pt").write_bytes(b"x"),
    "no weights": lambda: (finished() / "final.pt").unlink(),
    "a damaged record": lambda: (finished() / "run.json").write_text("{"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_not_this_cells_is_not_taken(workspace, no_training, what):
    run(workspace)
    SPOILT[what]()
    no_training()
    with pytest.raises(AssertionError, match="trained again"):
        run(workspace)


def test_what_other_code_finished_is_not_taken_for_a_checkpoint_that_goes_on(workspace, monkeypatch, no_training):
    run(workspace)
    edit(code={"training/loop.py": "0"})
    (own,) = Path(".checkpoints").glob("*/*/")
    own.rename(own.with_name("0123456789"))
    monkeypatch.setenv("CBML_RESUME", "always")
    no_training()
    with pytest.raises(AssertionError, match="trained again"):
        run(workspace)
