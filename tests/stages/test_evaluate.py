"""The stage evaluate: its folder holds what its embeddings say, and all that the stage draw reads."""

import json
import shutil
import time

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers import TINY_GLYPHS, TINY_RECIPE, ending, forked, tiny_params

from cbml import files, network
from cbml.data.lists import read_list
from cbml.errors import UserError
from cbml.evaluation.metrics import evaluate
from cbml.evaluation.per_class import sample_images
from cbml.evaluation.retrieval import retrieve
from cbml.evaluation.similarities import pair_similarities
from cbml.provenance import scoring_code
from cbml.spec.params import load_cell
from cbml.stages import evaluate as evaluate_stage
from cbml.stages.build_lists import build_lists
from cbml.stages.download import download
from cbml.stages.draw import draw_cell
from cbml.stages.evaluate import evaluate_cell
from cbml.tracking import store as tracking
from cbml.training.checkpoint import removing
from cbml.workspace import Workspace

RECORD = {
    "key": "resnet18-cbml_log-16-0-0123456789",
    "run_id": None,
    "iterations": {"final": 6, "best_on_test": 4},
    "train_seconds": 9.0,
    "data_seconds": 0.9,
    "finished": "2026-02-03T04:05:06+00:00",
    "device": "abacus",
    "code": {},
    "versions": {"python": "3.11"},
    "unit": "percent",
}


@pytest.fixture(scope="module", autouse=True)
def no_store():
    """Without MLflow, as where it is not installed: a stage's folder is complete all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "mlflow", None)
        yield


def write_run(workspace, **changes):
    """Write what training leaves of two networks by chance, the final one and the best; return its folder."""
    fingerprint = json.loads((workspace.lists("glyphs") / "summary.json").read_text())["fingerprint"]
    folder = workspace.tree / "runs/glyphs/resnet18-cbml_log-16-0"
    folder.mkdir(parents=True)
    (folder / "cell.yaml").write_text(yaml.safe_dump(tiny_params(recipe=TINY_RECIPE | changes)))
    (folder / "run.json").write_text(json.dumps(RECORD | {"fingerprint": fingerprint}))
    cell = load_cell(folder / "cell.yaml")
    for seed, name in enumerate(("final", "best_on_test")):
        torch.manual_seed(seed)
        model, _ = network.build(cell, num_classes=6, root=workspace.root)
        torch.save(model.state_dict(), folder / f"{name}.pt")
    pd.DataFrame({"iteration": range(1, 7), "loss": 1.0}).to_csv(folder / "losses.csv", index=False)
    scores = pd.DataFrame({"iteration": [0, 2, 4, 6], "recall_at_1": [10.0, 30.0, 50.0, 40.0], "map_at_r": 10.0})
    scores.to_csv(folder / "validations.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def workspace(tiny_dataset, tmp_path_factory):
    tree = tmp_path_factory.mktemp("tree")
    for name in ("data", "lists"):
        (tree / name).symlink_to(tiny_dataset / name)
    return Workspace(tree, tree)


@pytest.fixture(scope="module")
def evaluated(workspace):
    """The folder of an evaluation, and the metrics that it returned."""
    run = write_run(workspace)
    metrics = evaluate_cell(run, workspace)
    return workspace.evaluation(load_cell(run / "cell.yaml")), metrics


@pytest.fixture(scope="module")
def listed(workspace):
    return read_list(workspace.lists("glyphs") / "test.txt")


@pytest.fixture(scope="module")
def embeddings(evaluated):
    """The test list has fewer classes and images than the map takes: it holds all of them."""
    with np.load(evaluated[0] / "map.npz") as arrays:
        assert arrays["indices"].tolist() == list(range(36))
        return torch.from_numpy(arrays["embeddings"])


def test_the_folder_holds_the_evaluation_and_the_run_without_its_weights(evaluated):
    run = ["cell.yaml", "losses.csv", "run.json", "validations.csv"]
    own = ["classes.csv", "map.npz", "metrics.json", "neighbours.npz", "recall_at_k.csv", "summary.json"]
    own += ["similarities.csv", "similarities.json"]
    assert sorted(path.name for path in evaluated[0].iterdir()) == sorted(run + own)


def test_the_record_says_which_code_scored_it(evaluated):
    record = json.loads((evaluated[0] / "run.json").read_text())
    assert record["scoring_code"] == scoring_code() and record["key"] == RECORD["key"]


def test_each_protocol_is_scored_with_its_own_weights(evaluated, embeddings, listed):
    folder, metrics = evaluated
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    labels = torch.from_numpy(listed.labels)
    assert metrics["final"] == pytest.approx(evaluate(embeddings, labels, nmi=True) | {"iteration": 6})
    assert metrics["best_on_test"]["iteration"] == 4
    assert metrics["best_on_test"]["map_at_r"] != metrics["final"]["map_at_r"]
    assert metrics["untrained"] == {"iteration": 0, "recall_at_1": 10, "map_at_r": 10}


def test_recall_at_k_is_that_of_evaluate(evaluated, embeddings, listed):
    table = pd.read_csv(evaluated[0] / "recall_at_k.csv")
    assert table.k.tolist() == [1, 2, 4, 8, 16, 32]  # 36 images
    expected = evaluate(embeddings, torch.from_numpy(listed.labels), ks=table.k.tolist())
    assert table.recall.tolist() == pytest.approx([expected[f"recall_at_{k}"] for k in table.k])


def test_recall_at_k_ends_below_the_size_of_the_list(workspace, tmp_path):
    tree = Workspace(tmp_path, tmp_path)
    recipe = TINY_RECIPE | {"instances": 4}  # of the two classes to train on
    few = tiny_params(dataset={"glyphs": TINY_GLYPHS | {"classes": 4, "images_per_class": 2}}, recipe=recipe)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(few))
    download(tree, "glyphs")
    build_lists(tree, "glyphs")
    run = write_run(tree)
    metrics = evaluate_cell(run, tree)
    folder = tree.evaluation(load_cell(run / "cell.yaml"))
    assert pd.read_csv(folder / "recall_at_k.csv").k.tolist() == [1, 2]
    assert metrics["final"].keys() > {"recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8"}
    with np.load(folder / "neighbours.npz") as arrays:
        assert arrays["indices"].shape == arrays["similarities"].shape == (4, 3)
    draw_cell(folder, tree)


def test_neighbours_are_those_of_retrieve(evaluated, embeddings, listed):
    indices, similarities = retrieve(embeddings, torch.from_numpy(listed.labels), 8)
    with np.load(evaluated[0] / "neighbours.npz") as arrays:
        assert arrays["indices"].tolist() == indices.tolist()
        np.testing.assert_allclose(arrays["similarities"], similarities, atol=1e-6)


def test_classes_add_up_and_have_their_names_for_reading(evaluated, listed):
    classes = pd.read_csv(evaluated[0] / "classes.csv")
    recall = pd.read_csv(evaluated[0] / "recall_at_k.csv").recall[0]
    assert (classes.recall_at_1 * classes.images).sum() / classes.images.sum() == pytest.approx(recall)
    assert classes.recall_at_1.is_monotonic_increasing
    assert sorted(classes["class"]) == sorted(listed.class_names.values())
    assert not any(name.isupper() or "_" in name for name in classes["class"])


def test_similarities_are_kept_by_split(evaluated, embeddings, listed):
    moments = json.loads((evaluated[0] / "similarities.json").read_text())
    table = pd.read_csv(evaluated[0] / "similarities.csv")
    assert list(table) == ["split", "pair", "similarity", "density"]
    assert set(zip(table.split, table.pair, strict=True)) == {
        (split, pair) for split in ("train", "test") for pair in ("positive", "negative")
    }
    densities, expected = pair_similarities(embeddings, torch.from_numpy(listed.labels))
    for pair, values in expected.items():
        assert moments["test"][pair] == pytest.approx(values)
    np.testing.assert_allclose(table[table.split == "test"].density, densities.density, atol=1e-9)
    assert moments["train"]["positive"]["pairs"] == 6 * 15 and moments["train"] != moments["test"]


def test_the_map_has_some_images_of_some_classes_the_same_for_every_model(workspace, evaluated, listed, monkeypatch):
    monkeypatch.setattr("cbml.stages.evaluate.MAP_CLASSES", 3)
    monkeypatch.setattr("cbml.stages.evaluate.MAP_IMAGES", 4)
    folder, _ = evaluated
    with np.load(folder / "map.npz") as arrays:
        every = arrays["embeddings"]
    copy = Workspace(workspace.tree / "copy", workspace.root)
    copy.tree.mkdir()
    for name in ("data", "lists", "runs"):
        (copy.tree / name).symlink_to(workspace.tree / name)
    evaluate_cell(copy.tree / "runs/glyphs" / folder.name, copy)
    with np.load(copy.tree / "evaluations/glyphs" / folder.name / "map.npz") as arrays:
        assert arrays["indices"].tolist() == sample_images(listed.labels, 3, 4, 0).tolist()
        np.testing.assert_array_equal(arrays["embeddings"], every[arrays["indices"]])


def test_what_evaluate_writes_can_be_drawn(workspace, evaluated):
    page = draw_cell(evaluated[0], workspace)
    assert page == workspace.tree / "pages/glyphs" / evaluated[0].name
    assert (page / "index.html").stat().st_size > 10_000


def test_a_checkpoint_goes_with_the_evaluation(workspace, tmp_path):
    tree = Workspace(tmp_path, tmp_path)
    for name in ("data", "lists"):
        (tmp_path / name).symlink_to(workspace.tree / name)
    run = write_run(tree)
    other = tree.checkpoint("resnet18-cbml_log-16-1-0123456789")
    for folder in (tree.checkpoint(RECORD["key"]), other):
        folder.mkdir(parents=True)
    evaluate_cell(run, tree)
    assert not tree.checkpoint(RECORD["key"]).exists() and other.exists()


def test_what_another_process_evaluates_meanwhile_is_waited_for_and_not_computed_again(
    workspace, evaluated, tmp_path, monkeypatch
):
    tree = Workspace(tmp_path, tmp_path)
    for name in ("data", "lists", "runs"):
        (tmp_path / name).symlink_to(workspace.tree / name)
    run, said = tmp_path / "runs/glyphs" / evaluated[0].name, tmp_path / "said"
    times = []
    monkeypatch.setattr(evaluate_stage, "_score", lambda *_: times.append(None) or metrics)
    monkeypatch.setattr(evaluate_stage, "hand_over", lambda *_, **__: True)
    monkeypatch.setattr(files, "message", said.write_text)
    folder, metrics = evaluated

    def work():
        assert evaluate_cell(run, tree) == metrics and not times

    with removing(tree.checkpoint(RECORD["key"])):
        child = forked(work)
        while not said.exists():
            time.sleep(0.01)
        assert said.read_text() == f"{RECORD['key']}: another process trains or evaluates it, waiting"
        shutil.copytree(folder, tmp_path / "evaluations/glyphs" / folder.name)
    assert ending(child) == 0
    evaluate_cell(run, tree)  # on its own, it is computed again
    assert times


@pytest.mark.parametrize("damage", ["cut", "absent"])
@pytest.mark.parametrize("name", ["cell.yaml", "run.json", "validations.csv", "final.pt", "best_on_test.pt"])
def test_one_line_names_a_file_of_the_run_that_is_damaged_and_its_stage(workspace, evaluated, tmp_path, name, damage):
    tree = Workspace(tmp_path, tmp_path)
    for part in ("data", "lists"):
        (tmp_path / part).symlink_to(workspace.tree / part)
    shutil.copytree(workspace.tree / "runs", tmp_path / "runs")
    file = tmp_path / "runs/glyphs" / evaluated[0].name / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:20])
    with pytest.raises(UserError) as caught:
        evaluate_cell(file.parent, tree)
    text = str(caught.value)
    assert text.startswith(f"{file}: ") and "the stage train" in text and "\n" not in text
    assert not (tmp_path / "evaluations").exists()
