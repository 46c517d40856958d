"""MLflow: where the store is, what a run holds, and that it goes on where it stopped."""

import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import environment

from cbml import tracking
from cbml.config import load_cell, load_params
from cbml.datasets.images import pack_images
from cbml.datasets.lists import read_list
from cbml.evaluation.cell import evaluate_cell
from cbml.evaluation.embedding import embed
from cbml.serving import load_network
from cbml.training import run_cell


def cell():
    return load_params().cell("glyphs", "resnet18", "cbml_log", 16, 0)


def test_a_cell_is_one_run_from_training_to_evaluation(project):
    folder = run_cell(cell(), state=project)
    metrics = evaluate_cell(folder, state=project, register=True)
    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("glyphs").experiment_id])
    assert run.info.run_name == "resnet18-cbml_log-16-0" and run.info.status == "FINISHED"
    assert run.data.params["loss.margin"] == "0.1" and run.data.params["recipe.iterations"] == "6"
    assert {"backbone", "loss", "embedding_dim", "seed", "dataset_fingerprint", "git_revision"} <= set(run.data.tags)
    for name in ("recall_at_1", "recall_at_8", "r_precision", "map_at_r", "nmi"):
        assert run.data.metrics[name] == pytest.approx(metrics["final"][name])
    assert run.data.metrics["untrained_recall_at_1"] == pytest.approx(metrics["untrained"]["recall_at_1"])
    assert run.data.metrics["best_on_test_recall_at_1"] >= run.data.metrics["recall_at_1"]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4, 5, 6]
    assert {m.step for m in client.get_metric_history(run.info.run_id, "recall_at_1")} == {0, 2, 4, 6}
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"params.yaml", "versions.json", "metrics.json", "index.html", "gallery.jpg", "classes.csv"} <= artifacts
    note = run.data.tags["mlflow.note.content"]
    assert f"| final | {100 * metrics['final']['recall_at_1']:.1f} |" in note and "-S 'loss=[cbml_log]'" in note
    (model,) = client.search_registered_models()
    assert model.name == "glyphs-resnet18-cbml_log-16-0" and model.latest_versions[0].run_id == run.info.run_id
    page = (Path("evaluations/glyphs") / folder.name / "index.html").read_text()
    assert "data:image/jpeg;base64," in page and "<svg" in page and "Most often taken for" in page

    # The logged model embeds as `evaluate` does, from paths and from bytes.
    model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
    images = read_list(Path("lists/glyphs/test.txt"), Path("data/glyphs"))
    paths = [str(Path("data/glyphs") / path) for path in images.paths[:5]]
    from_paths = model.predict(pd.DataFrame({"path": paths}))
    from_bytes = model.predict(pd.DataFrame({"image": [Path(path).read_bytes() for path in paths]}))
    packed = pack_images(
        images, Path("data/glyphs"), project / ".cache", resize=24, interpolation="bilinear", fingerprint="-"
    )
    network = load_network(load_cell(folder / "cell.yaml"), folder / "final.pt")
    expected = embed(network, packed, crop=20, interpolation="bilinear", device=torch.device("cpu"))[:5].numpy()
    assert np.abs(from_paths - expected).max() < 1e-5 and np.array_equal(from_paths, from_bytes)
    assert np.linalg.norm(from_paths, axis=1) == pytest.approx(1, abs=1e-5)


def test_the_store_is_at_the_root_that_dvc_names_unless_overridden(project, tmp_path_factory, monkeypatch):
    root, other = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("other")
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.setenv("DVC_EXP_NAME", "tidal-wave")
    with tracking.cell_run(cell(), fingerprint="0") as run:
        assert (root / "mlflow.db").is_file()
        assert run.client.get_run(run.id).data.tags["dvc_exp_name"] == "tidal-wave"
        assert run.client.get_run(run.id).info.artifact_uri.startswith((root / "mlruns" / "glyphs").as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}/mine.db")
    with tracking.cell_run(cell(), fingerprint="0"):
        assert (other / "mine.db").is_file()


def test_a_failed_run_says_so_and_is_continued_by_its_id(project):
    with pytest.raises(ValueError), tracking.cell_run(cell(), fingerprint="0") as run:
        raise ValueError("out of luck")
    info = run.client.get_run(run.id)
    assert info.info.status == "FAILED" and info.data.tags["error"] == "out of luck"
    with tracking.cell_run(cell(), fingerprint="0", run_id=run.id) as again:
        assert again.id == run.id
    assert run.client.get_run(run.id).info.status == "FINISHED"
    with tracking.cell_run(cell(), fingerprint="0", run_id="deleted") as new:
        assert new.id != run.id


def test_processes_that_open_a_new_store_at_once_share_it(project):
    code = "from cbml.tracking import open_run\nwith open_run('glyphs', 'x', config={}, params={}, tags={}): pass"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env=environment()) for _ in range(2)
    ]
    assert [(process.wait(), process.stderr.read()[-500:] if process.returncode else b"") for process in processes] == [
        (0, b"")
    ] * 2
    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    assert len(client.search_runs([client.get_experiment_by_name("glyphs").experiment_id])) == 2
