"""MLflow: where the store is, what a run holds, that it goes on where it stopped, and that it never costs a result."""

import http.server
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import mlflow.store.db.utils
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ending, environment, forked, run, train_command

from cbml import network
from cbml.data.lists import read_list
from cbml.data.packing import pack_images
from cbml.errors import UserError
from cbml.evaluation.embedding import embed
from cbml.spec.params import load_cell
from cbml.stages.draw import draw_cell
from cbml.stages.embed import load_model
from cbml.stages.evaluate import evaluate_cell
from cbml.stages.train import train_cell
from cbml.tracking import run as tracking
from cbml.tracking import store as stores
from cbml.tracking import ui
from cbml.workspace import Workspace


def the_cell(workspace):
    return workspace.cells("glyphs")[0]


def open_cell(workspace, **options):
    return tracking.open_cell(workspace, the_cell(workspace), "key", "0", **options)


def runs(root):
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    return client, client.search_runs([client.get_experiment_by_name("glyphs").experiment_id])


def test_a_cell_is_one_run_from_training_to_its_pictures(workspace, tmp_path_factory):
    folder = train_cell(the_cell(workspace), workspace)
    metrics = evaluate_cell(folder, workspace, register=True)
    page = draw_cell(workspace.evaluation(the_cell(workspace)), workspace)
    client, (run,) = runs(workspace.root)
    assert run.info.run_name == "resnet18-cbml_log-16-0" and run.info.status == "FINISHED"
    assert run.data.params["loss.margin"] == "0.1" and run.data.params["recipe.iterations"] == "6"
    key = json.loads((folder / "run.json").read_text())["key"]
    assert run.data.tags["cell_key"] == key and run.data.tags["evaluated"] == "true"
    assert {"backbone", "loss", "embedding_dim", "seed", "dataset_fingerprint", "recipe"} <= set(run.data.tags)
    for name in ("recall_at_1", "recall_at_8", "r_precision", "map_at_r", "nmi"):
        assert run.data.metrics[name] == pytest.approx(metrics["final"][name])
    assert run.data.metrics["recall_at_1_untrained"] == pytest.approx(metrics["untrained"]["recall_at_1"])
    assert run.data.metrics["recall_at_1_best_on_test"] >= run.data.metrics["recall_at_1"]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4, 5, 6]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "recall_at_1")] == [0, 2, 4, 6]
    by_k = client.get_metric_history(run.info.run_id, "recall_at_k")  # K as the step
    assert [(m.step, m.value) for m in by_k] == [(k, metrics["final"][f"recall_at_{k}"]) for k in (1, 2, 4, 8)]
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("glyphs", run.data.tags["dataset_fingerprint"])
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"params.yaml", "versions.json", "training.svg"} <= artifacts and min(artifacts) == "cell.html"
    # What tables are made from: the store is the archive.
    needed = {"cell.yaml", "run.json", "metrics.json", "validations.csv", "similarities.csv", "summary.json"}
    assert needed <= artifacts
    note = run.data.tags["mlflow.note.content"]
    assert (
        f"| {metrics['final']['recall_at_1']:.1f} " in note and "-S '+loss.cbml_log={type:cbml," in note
    )  # there is no conf/
    assert {"mlflow.user", "mlflow.source.name", "mlflow.source.git.commit"} <= set(run.data.tags)
    (model,) = client.search_registered_models()
    assert model.name == "glyphs-resnet18-cbml_log-16-0" and model.latest_versions[0].run_id == run.info.run_id
    text = (page / "index.html").read_text()
    assert "data:image/jpeg;base64," in text and "<svg" in text and "Most often taken for" in text
    address = f"http://127.0.0.1:5000/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType="
    assert address in text and ui.run_address(workspace, "0" * 32) is None

    # The logged model has the final model's metrics, lies on the disk once, and says what it takes, with an example.
    (output,) = run.outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    found = {metric.key: metric.value for metric in logged.metrics}
    assert found["recall_at_1"] == metrics["final"]["recall_at_1"]
    weights = workspace.artifacts / "glyphs/models" / output.model_id / "artifacts/artifacts/final.pt"
    assert weights.samefile(folder / "final.pt")
    info = mlflow.models.get_model_info(f"models:/{output.model_id}")
    assert info.signature.inputs.input_names() == ["image", "path"] and info.saved_input_example_info

    # It embeds as `evaluate` does, from paths and from bytes.
    model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/resnet18-cbml_log-16-0")
    images = read_list(Path("lists/glyphs/test.txt"))
    paths = [str(Path("data/glyphs") / path) for path in images.paths[:5]]
    from_paths = model.predict(pd.DataFrame({"path": paths}))
    from_bytes = model.predict(pd.DataFrame({"image": [Path(path).read_bytes() for path in paths]}))
    size = {"resize": 24, "interpolation": "bilinear"}
    packed = pack_images(images, Path("data/glyphs"), workspace.cache, fingerprint="-", **size)
    trained = network.load(load_cell(folder / "cell.yaml"), folder / "final.pt")
    expected = embed(trained, packed, crop=20, interpolation="bilinear", device=torch.device("cpu"))[:5].numpy()
    assert np.abs(from_paths - expected).max() < 1e-5 and np.array_equal(from_paths, from_bytes)
    assert np.linalg.norm(from_paths, axis=1) == pytest.approx(1, abs=1e-5)
    assert np.abs(load_model(run.info.run_id, workspace).embed(paths) - expected).max() < 1e-5
    key = json.loads((folder / "run.json").read_text())["key"]
    assert np.abs(load_model(key, workspace).embed(paths) - expected).max() < 1e-5
    with pytest.raises(UserError, match="^00: neither a folder nor the id of a run or the key of a cell"):
        load_model("00", workspace)
    with pytest.raises(UserError, match=f"of that name it has, newest first: {key}$"):
        load_model("runs/elsewhere/resnet18-cbml_log-16-0", workspace)

    # From any directory, with its own code.
    code = "import mlflow, sys; model = mlflow.pyfunc.load_model(sys.argv[1]); import cbml; print(cbml.__file__, "
    code += "model.predict(model.input_example).shape)"
    elsewhere = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    elsewhere["MLFLOW_TRACKING_URI"] = f"sqlite:///{workspace.database}"
    command = [sys.executable, "-c", code, f"models:/{output.model_id}"]
    done = subprocess.run(command, cwd=tmp_path_factory.mktemp("x"), env=elsewhere, capture_output=True, text=True)
    assert done.stdout.split(maxsplit=1) == [str(weights.parents[1] / "code/cbml/__init__.py"), "(1, 16)\n"], (
        done.stderr
    )

    # Its weights go when its run is deleted, and not before.
    store = stores.Store(workspace)
    store.clean()
    assert weights.is_file()
    store.client.delete_run(run.info.run_id)
    store.clean()
    assert not weights.exists()
    with pytest.raises(UserError, match="neither a folder"):
        load_model(key, workspace)


def test_the_load_of_the_machine_is_logged_when_asked_for(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    with open_cell(workspace) as run:
        time.sleep(0.5)
    assert not run.store.client.get_run(run.id).data.metrics
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    for _ in range(2):
        with open_cell(workspace, run_id=run.id):
            time.sleep(1)
    history = run.store.client.get_metric_history(run.id, "system/cpu_utilization_percentage")
    steps = [point.step for point in history]
    assert len(steps) >= 2 and steps == [*range(len(steps))]
    assert run.store.client.get_run(run.id).info.status == "FINISHED"


def test_loading_a_network_does_not_import_what_only_people_look_at():
    code = "import sys, cbml.serving; print([n for n in sys.modules if n.startswith(('cbml', 'sklearn.manifold'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    for name in ("cbml.report", "cbml.tracking", "cbml.stages", "sklearn.manifold"):
        assert name not in done.stdout


def test_the_store_is_at_the_root_that_dvc_names_unless_overridden(project, tmp_path_factory, monkeypatch):
    root, other = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("other")
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.setenv("DVC_EXP_NAME", "tidal-wave")
    workspace = Workspace.here()
    with open_cell(workspace) as run:
        assert (root / "mlflow.db").is_file()
        info = run.store.client.get_run(run.id)
        assert info.data.tags["dvc_exp_name"] == "tidal-wave"
        assert info.info.artifact_uri.startswith((root / "mlruns" / "glyphs").as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}/mine.db")
    with open_cell(workspace):
        assert (other / "mine.db").is_file()


def test_a_failed_run_says_so_and_is_continued_by_its_id(workspace):
    with pytest.raises(ValueError), open_cell(workspace) as run:
        raise ValueError("out of luck")
    client = run.store.client
    assert client.get_run(run.id).info.status == "FAILED" and client.get_run(run.id).data.tags["error"] == "out of luck"
    with open_cell(workspace, run_id=run.id) as again:
        assert again.id == run.id
    assert client.get_run(run.id).info.status == "FINISHED" and "error" not in client.get_run(run.id).data.tags
    with open_cell(workspace, run_id="0" * 32) as new:
        assert new.id != run.id


def test_points_that_are_sent_again_are_there_once(workspace):
    rows = [{"iteration": i, "loss": 1 / i} for i in range(1, 6)]
    with open_cell(workspace) as run:
        run.log(rows[:4])
    with open_cell(workspace, run_id=run.id) as again:  # from a checkpoint after iteration 2
        again.log(rows[2:])
        again.log([{"iteration": 5, "nmi": 0.5}], replace=True)
    with open_cell(workspace, run_id=run.id) as again:
        again.log([{"iteration": 5, "nmi": 0.5, "loss": 0.7}], replace=True)
    history = run.store.client.get_metric_history(run.id, "loss")
    assert [point.step for point in history] == [1, 2, 3, 4, 5, 5] and history[-1].value == 0.7
    assert len(run.store.client.get_metric_history(run.id, "nmi")) == 1


@pytest.fixture
def really_made(empty_stores, monkeypatch):
    """New stores are made by MLflow itself, not copied."""
    monkeypatch.setattr(stores, "make_database", empty_stores)


def test_processes_that_open_a_new_store_at_once_share_it(workspace, really_made):
    def work():
        with tracking.open_run(workspace, "glyphs", "x", config={}, params={}, tags={}) as run:
            pass
        assert run.complete

    children = [forked(work) for _ in range(3)]
    assert [ending(child) for child in children] == [0, 0, 0]
    assert len(runs(workspace.root)[1]) == 3


def test_killed_while_the_database_is_made_the_next_run_makes_it(workspace, really_made):
    def work():
        with open_cell(workspace):
            time.sleep(60)

    for moment in (0.1, 0.3, 0.5):
        child = forked(work)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        assert ending(child) == -signal.SIGKILL
    with open_cell(workspace) as run:
        pass
    assert run.complete and not list(Path().glob(".mlflow.db*"))


def test_an_empty_database_is_made_anew(workspace):
    workspace.database.touch()
    with open_cell(workspace) as run:
        pass
    assert run.complete


@pytest.fixture
def impatient(monkeypatch):
    """Attempts at a store that is away follow one another at once."""
    monkeypatch.setattr(tracking, "PATIENCE", 0.0)


@pytest.fixture
def locked_database(workspace, monkeypatch):
    """A store that another process has locked; call the fixture's value to release it."""
    text = mlflow.store.db.utils.sql.text  # MLflow waits for 20 seconds
    monkeypatch.setattr(mlflow.store.db.utils.sql, "text", lambda words: text(words.replace("20000", "100")))
    monkeypatch.setattr(stores, "BUSY", 0.1)
    with open_cell(workspace):
        pass
    connection = sqlite3.connect(workspace.database, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")
    yield connection.rollback
    connection.close()


def test_a_locked_database_is_waited_for_with_a_message(workspace, impatient, locked_database, capsys):
    with open_cell(workspace) as run:
        run.log([{"iteration": 1, "loss": 0.5}])
        assert run.id is None and "does not answer, going on without: OperationalError" in capsys.readouterr().err
        locked_database()
        run.log([{"iteration": 2, "loss": 0.4}])
    assert [m.step for m in run.store.client.get_metric_history(run.id, "loss")] == [1, 2]
    assert run.store.client.get_run(run.id).info.status == "FINISHED"


def test_training_ends_without_the_store_and_evaluation_hands_everything_over(workspace, locked_database, capsys):
    folder = train_cell(the_cell(workspace), workspace)
    assert "did not take all of resnet18-cbml_log-16-0" in capsys.readouterr().err
    assert json.loads((folder / "run.json").read_text())["run_id"] is None
    locked_database()
    evaluate_cell(folder, workspace)
    client, found = runs(workspace.root)
    (run,) = (run for run in found if run.data.tags.get("evaluated"))
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4, 5, 6]
    assert run.data.params["loss.margin"] == "0.1" and run.info.status == "FINISHED"


class Silent(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(3600)

    do_POST = do_GET


@pytest.mark.parametrize("kind", ["refuses", "is silent"])
def test_a_store_that_cannot_be_reached_is_said_soon_and_costs_nothing(project, kind):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if kind == "refuses":
        server.server_close()
    uri = f"http://me:secret@127.0.0.1:{server.server_port}"
    fast = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = subprocess.run(
        train_command(), env=environment() | fast, capture_output=True, text=True, timeout=120, check=True
    )
    server.shutdown()
    assert "MLflow at http://127.0.0.1" in done.stderr and "does not answer" in done.stderr
    assert "secret" not in done.stderr and "Traceback" not in done.stderr
    assert Path("runs/glyphs/resnet18-cbml_log-16-0/final.pt").is_file()


def test_a_full_disk_ends_in_one_line_and_a_failed_run(workspace, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "state.pt")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("cbml.training.checkpoint.write_tensors", full)
        run(workspace)
    _, (failed,) = runs(workspace.root)
    assert failed.info.status == "FAILED" and "No space left" in failed.data.tags["error"]
    run(workspace)
    _, (continued,) = runs(workspace.root)
    assert continued.info.status == "FINISHED"
