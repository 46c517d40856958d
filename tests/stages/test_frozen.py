"""A cell whose trunk is not trained: the whole network comes out, its trunk as it was, with the same bits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import TINY_RECIPE, VALIDATING, break_at, broken, entry, from_the_beginning, result, run, tiny_params

from cbml import network, trained
from cbml.errors import UserError
from cbml.files import read_tensors
from cbml.models.trunks import Stages
from cbml.stages.evaluate import evaluate_cell
from cbml.stages.tune import tune
from cbml.tuning.study import Budget
from cbml.workspace import Workspace

FROZEN = TINY_RECIPE | {"train": "head", "views": 2}


def test_the_whole_network_comes_out_with_the_trunk_as_it_was(workspace):
    folder = run(workspace, recipe=FROZEN)
    (cell,) = workspace.cells("glyphs")
    torch.manual_seed(cell.seed)
    start = network.build(cell, num_classes=6, root=Path())[0].state_dict()
    state = read_tensors(folder / "final.pt", "train")
    assert state.keys() == start.keys()
    changed = {name for name in state if not torch.equal(state[name], start[name])}
    assert changed == {"head.weight", "head.bias"}
    assert evaluate_cell(folder, workspace)["final"]["map_at_r"] > 0


def test_pictures_are_embedded_as_their_features_are(workspace):
    folder = run(workspace, recipe=FROZEN)
    model = trained.load(folder)
    (file,) = sorted(Path(".cache").glob("features-*.npy"), key=lambda file: -file.stat().st_size)[:1]
    features = torch.from_numpy(np.load(file)).float()  # of all images, training's first
    paths = [line.rpartition(",")[0] for line in Path("lists/glyphs/train.txt").read_text().splitlines()]
    root = workspace.images(model.cell.dataset_config)
    found = model.embed([root / path for path in paths])
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.network.head(features[: len(paths)]), dim=1).numpy()
    assert (found * expected).sum(1).min() > 1 - 1e-3


@pytest.mark.parametrize("recipe", [FROZEN, VALIDATING | {"train": "head", "views": 2}], ids=["plain", "validated"])
def test_broken_off_it_ends_with_the_same_bits(workspace, monkeypatch, recipe):
    recipe = recipe | {"checkpoint_every": 1}
    unbroken = from_the_beginning(workspace, recipe=recipe)
    break_at(monkeypatch, 2)
    broken(workspace, recipe=recipe)
    assert result(run(workspace, recipe=recipe)) == unbroken


def test_features_are_computed_once_for_all_losses_and_seeds(workspace, monkeypatch):
    run(workspace, recipe=FROZEN)
    before = {file: file.stat().st_mtime_ns for file in Path(".cache").glob("features-*.npy")}
    assert len(before) == 3
    folder = run(
        workspace,
        recipe=FROZEN | {"lr": 0.1, "iterations": 2},
        loss={"triplet": entry("loss", "triplet")},
        embedding_dim=[8],
    )
    evaluate_cell(folder, workspace)
    assert {file: file.stat().st_mtime_ns for file in Path(".cache").glob("features-*.npy")} == before
    run(workspace, recipe=FROZEN, seed=[1])  # from scratch, so its trunk is another one
    assert len(list(Path(".cache").glob("features-*.npy"))) == 6


def test_evaluation_takes_the_features_and_finds_what_the_network_gives_for_the_images(workspace, monkeypatch):
    folder = run(workspace, recipe=VALIDATING | {"train": "head", "views": 2})
    expected = evaluation_of(folder, workspace)
    cell = yaml.safe_load((folder / "cell.yaml").read_text())
    cell["recipe"]["train"] = "all"  # as if all had been trained: of the images themselves
    (folder / "cell.yaml").write_text(yaml.safe_dump(cell))
    of_images = evaluation_of(folder, workspace)
    assert of_images == pytest.approx(expected, abs=1e-3)
    monkeypatch.setattr(Stages, "forward", None)
    with pytest.raises(TypeError):
        evaluate_cell(folder, workspace)
    cell["recipe"]["train"] = "head"
    (folder / "cell.yaml").write_text(yaml.safe_dump(cell))
    assert evaluation_of(folder, workspace) == expected


def evaluation_of(folder, workspace):
    """Moments of the similarities of pairs, which every embedding has a part in."""
    evaluate_cell(folder, workspace)
    moments = json.loads((workspace.root / "evaluations/glyphs" / folder.name / "similarities.json").read_text())
    return {
        (split, kind, name): value
        for split, kinds in moments.items()
        for kind, each in kinds.items()
        for name, value in each.items()
    }


def test_what_needs_a_trunk_that_is_trained_is_refused(workspace):
    with pytest.raises(UserError, match="has no head to train, and recipe.train is head; allowed with it"):
        run(workspace, recipe=FROZEN, embedding_dim=[0])
    with pytest.raises(UserError, match="has streams with attentions, and recipe.train is head; allowed with it"):
        run(workspace, recipe=FROZEN, embedding_dim=[54], loss={"deml": entry("loss", "deml")})


def test_tuning_does_not_look_at_test_classes_and_leaves_a_preset_with_its_trials(workspace, tmp_path, monkeypatch):
    lists = Path("lists").resolve()
    Path("lists").unlink()
    shutil.copytree(lists, "lists")
    run(workspace, recipe=FROZEN | {"iterations": 1})  # so that features are there
    search = {"lr": {"low": 1e-4, "high": 1e-1, "log": True}}
    Path("params.yaml").write_text(yaml.safe_dump(tiny_params(recipe=FROZEN | {"batch_size": 4, "search": search})))
    presets = []
    for storage in ("one", "two"):
        presets.append(tune(Workspace.here(), "glyphs", Budget(3, 2), f"sqlite:///{tmp_path}/{storage}.db").read_text())
        test = Path("lists/glyphs/test.txt")
        paths = [line.rpartition(",")[0] for line in test.read_text().splitlines()]
        test.write_text("".join(f"{path},0\n" for path in paths))
    body = [text.partition("defaults:")[2] for text in presets]
    assert body[0] == body[1] and "cbml_log:" in body[0]
    assert Path("reports/glyphs/tuning/trials.csv").read_text().count("\n") == 4
    assert "<svg" in Path("reports/glyphs/tuning/cbml_log.svg").read_text()
