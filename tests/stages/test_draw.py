"""The stage draw: pictures and page of a cell from what its evaluation left, and one line if that is damaged."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers import TINY_GLYPHS, angles, clusters, environment, tiny_params
from PIL import Image

from cbml.data.lists import read_list
from cbml.data.sources import GlyphsConfig
from cbml.data.sources.layout import display_name
from cbml.errors import UserError
from cbml.evaluation.metrics import evaluate
from cbml.evaluation.per_class import class_table
from cbml.evaluation.retrieval import retrieve
from cbml.evaluation.similarities import pair_similarities
from cbml.report.cell.failures import failures as failures_of
from cbml.report.cell.failures import surest
from cbml.report.common.queries import judge, sample_queries
from cbml.stages.draw import draw_cell
from cbml.stages.evaluate import CURVE
from cbml.tracking import store as tracking
from cbml.workspace import Workspace

FILES = ["embedding_map.svg", "index.html", "recall_at_k.svg", "similarities.svg", "training.svg"]
RECORD = {
    "iterations": {"final": 6, "best_on_test": 4},
    "train_seconds": 9.0,
    "data_seconds": 0.9,
    "finished": "2026-02-03T04:05:06+00:00",
    "device": "a <CPU>",
    "code": {},
    "versions": {"python": "3.11"},
    "unit": "percent",
}
CELL = Path("glyphs", "resnet18-cbml_log-16-0")


@pytest.fixture(scope="module", autouse=True)
def no_store():
    """Without MLflow, as where it is not installed: a stage's folder is complete all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "mlflow", None)
        yield


def write_inputs(tree, test, labels, train=None, train_labels=None):
    """Write images and list of a data set, and what evaluation leaves of these embeddings; return the workspace."""
    paths = [f"images/{label + 1:03}.CLASS_{label}/{n}.png" for n, label in enumerate(labels.tolist())]
    root = Workspace(tree, tree).images(GlyphsConfig(**TINY_GLYPHS))
    for n, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 24 + n % 3), (n % 256, 90, 160)).save(file)
    (tree / "lists/glyphs").mkdir(parents=True)
    lines = [f"{path},{label}\n" for path, label in zip(paths, labels.tolist(), strict=True)]
    (tree / "lists/glyphs/test.txt").write_text("".join(lines))
    names = [f"{label} class {label}\n" for label in sorted(set(labels.tolist()))]
    (tree / "lists/glyphs/classes.txt").write_text("".join(names))

    folder = tree / "evaluations" / CELL
    folder.mkdir(parents=True)
    (folder / "cell.yaml").write_text(yaml.safe_dump(tiny_params()))
    record = RECORD | {"key": f"{CELL.name}-0123456789", "run_id": None, "fingerprint": "0123456789abcdef"}
    (folder / "run.json").write_text(json.dumps(record))
    losses = pd.DataFrame({"iteration": range(1, 7), "loss": 1.0, "lr": 0.1, "loss_a": 0.4, "loss_b": 0.6})
    losses.to_csv(folder / "losses.csv", index=False)
    validations = pd.DataFrame({"iteration": [0, 2, 4, 6], "recall_at_1": [10.0, 30.0, 50.0, 40.0]})
    validations.to_csv(folder / "validations.csv", index=False)

    scores = evaluate(test, labels, ks=(1, 2, 4, 8)) | {"iteration": 6}
    metrics = {"final": scores, "best_on_test": scores | {"iteration": 4}, "untrained": scores | {"iteration": 0}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    curve = [k for k in CURVE if k == 1 or k < len(test)]
    of_curve = evaluate(test, labels, ks=curve)
    recalls = pd.DataFrame({"k": curve, "recall": [of_curve[f"recall_at_{k}"] for k in curve]})
    recalls.to_csv(folder / "recall_at_k.csv", index=False)
    indices, similarities = retrieve(test, labels, 8)
    np.savez(folder / "neighbours.npz", indices=indices.int().numpy(), similarities=similarities.float().numpy())
    names = read_list(tree / "lists/glyphs/test.txt").class_names
    nearest = (each[:, 0].numpy() for each in (indices, similarities))
    class_table(labels.numpy(), *nearest, names).to_csv(folder / "classes.csv", index=False)
    train, train_labels = (test, labels) if train is None else (train, train_labels)
    found = {"train": pair_similarities(train, train_labels), "test": pair_similarities(test, labels)}
    densities = pd.concat({split: table for split, (table, _) in found.items()}, names=["split"])
    densities.reset_index("split").to_csv(folder / "similarities.csv", index=False)
    moments = {split: moments for split, (_, moments) in found.items()}
    (folder / "similarities.json").write_text(json.dumps(moments))
    np.savez(folder / "map.npz", indices=np.arange(len(test)), embeddings=test.numpy())
    return Workspace(tree, tree)


def draw(workspace):
    return draw_cell(workspace.tree / "evaluations" / CELL, workspace)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A workspace with the evaluation of 12 classes."""
    return write_inputs(tmp_path_factory.mktemp("tree"), *clusters(12, 6, noise=1.5))


@pytest.fixture(scope="module")
def drawn(written):
    """What is drawn of it."""
    return draw(written)


@pytest.fixture
def workspace(written, tmp_path):
    """The same with an evaluation to damage and no page."""
    for name in ("data", "lists"):
        (tmp_path / name).symlink_to(written.tree / name)
    shutil.copytree(written.tree / "evaluations", tmp_path / "evaluations")
    return Workspace(tmp_path, tmp_path)


def test_all_files_are_written_and_small(drawn, written):
    assert drawn == written.tree / "pages" / CELL
    assert sorted(path.name for path in drawn.iterdir()) == sorted(FILES)
    for path in drawn.glob("*.svg"):
        assert path.stat().st_size < 150_000


def test_the_same_input_gives_the_same_bytes(drawn, workspace):
    again = draw(workspace)
    assert [name for name in FILES if (drawn / name).read_bytes() != (again / name).read_bytes()] == []


def test_a_page_that_is_there_is_replaced(workspace):
    page = workspace.tree / "pages" / CELL
    page.mkdir(parents=True)
    (page / "old.svg").write_text("old")
    draw(workspace)
    assert sorted(path.name for path in page.iterdir()) == sorted(FILES)


@pytest.mark.slow
def test_what_is_drawn_and_tabulated_is_utf_8_whatever_the_machine_has(drawn, workspace):
    (workspace.tree / "params.yaml").write_text(yaml.safe_dump(tiny_params()))
    summary = {"test": {"images": 72, "classes": 12}}
    (workspace.tree / "evaluations" / CELL / "summary.json").write_text(json.dumps(summary))
    plain = environment() | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for command in (["draw", f"evaluations/{CELL}"], ["tabulate", "glyphs"]):
        command = [sys.executable, "-m", f"pipeline.{command[0]}", *command[1:]]
        done = subprocess.run(command, cwd=workspace.tree, env=plain, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and rb"Mean \xb1 standard" in done.stdout
    assert (workspace.tree / "pages" / CELL / "training.svg").read_bytes() == (drawn / "training.svg").read_bytes()
    assert "±" in (workspace.report("glyphs") / "tables.md").read_text(encoding="utf-8")


def test_pseudo_labels_are_a_chart_where_there_are_any(workspace):
    table = "refresh,nmi,purity,kept_purity,changed,iteration\n0,40.0,30.0,35.0,,0\n1,50.0,45.0,50.0,20.0,3\n"
    (workspace.tree / "evaluations" / CELL / "pseudo_labels.csv").write_text(table)
    page = draw(workspace)
    assert sorted(path.name for path in page.iterdir()) == sorted([*FILES, "pseudo_labels.svg"])
    assert "purity of what is kept" in (page / "pseudo_labels.svg").read_text()
    assert "which training did not know" in (page / "index.html").read_text()


def test_the_pictures_show_what_the_files_say(drawn, written):
    training, similarities, recall = (
        (drawn / f"{name}.svg").read_text() for name in ("training", "similarities", "recall_at_k")
    )
    for label in ("untrained: 10.0% at 0", "best on test: 50.0% at 4", "final: 40.0% at 6", ">a<", ">b<"):
        assert label in training
    evaluation = written.tree / "evaluations" / CELL
    for split, kinds in json.loads((evaluation / "similarities.json").read_text()).items():
        assert split in similarities
        for values in kinds.values():
            assert f"mean {values['mean']:.3f}" in similarities
    assert f"{pd.read_csv(evaluation / 'recall_at_k.csv').recall[0]:.1f}%" in recall
    title = f"{CELL.name} on glyphs"
    assert all(f">{title}" in (drawn / f"{name}.svg").read_text() for name in ("training", "recall_at_k"))


def galleries(page):
    """Of each gallery of a page its rows, and in them the titles of the images."""
    text = (page / "index.html").read_text()
    parts = [part.partition("<h2>")[0] for part in text.split('<div class="box gallery"')[1:]]
    return [[re.findall(r'title="([^"]*)"', row) for row in part.split('<div class="row">')[1:]] for part in parts]


def test_the_page_shows_queries_with_their_neighbours_and_who_is_right(drawn, written):
    chance, failures = galleries(drawn)
    with np.load(written.tree / "evaluations" / CELL / "neighbours.npz") as arrays:
        found = dict(arrays)
    images = read_list(written.tree / "lists/glyphs/test.txt")
    names = [images.class_names[label] for label in images.labels]
    judged_queries = judge(found["indices"], found["similarities"], images.labels)
    for rows, chosen in (
        (chance, sample_queries(judged_queries, 8, 0)),
        (failures, surest(failures_of(judged_queries), 8)),
    ):
        expected = [
            [f"{names[query]}, query"]
            + [
                f"{names[index]}, {'right' if names[index] == names[query] else 'wrong'}, {similarity:.3f}"
                for index, similarity in zip(found["indices"][query], found["similarities"][query], strict=True)
            ]
            for query in chosen
        ]
        assert rows == expected and len(rows) == 8
    assert [row[1].split(", ")[1] for row in failures] == ["wrong"] * 8


def test_every_image_of_a_page_is_in_it_once(drawn):
    text = (drawn / "index.html").read_text()
    (sheet,) = re.findall(r"url\(data:image/jpeg;base64,([^)]*)\)", text)
    places = set(re.findall(r'style="--x:(\d+);--y:(\d+)"', text))
    with Image.open(io.BytesIO(base64.b64decode(sheet))) as image:
        assert image.size == (16 * 96, -(-len(places) // 16) * 96)
    assert len(text) < 600_000


def test_the_page_holds_every_chart_and_the_names_that_the_charts_have(drawn):
    text = (drawn / "index.html").read_text()
    assert text.count("<figure>") == text.count("<svg") == len(FILES) - 1
    assert "class 7" in text and "class 7" in (drawn / "embedding_map.svg").read_text()
    assert not re.search(r"CLASS_\d", text)


def test_a_page_leads_back(drawn, written):
    index, report = re.findall(r'<a href="([^"]*index.html)(?:#all)?">', (drawn / "index.html").read_text())
    assert (drawn / report).resolve() == (written.report("glyphs") / "index.html").resolve()
    assert (drawn / index).resolve() == written.index.resolve()


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("101.White_Pelican", "White Pelican"),
        ("005.LATIN_SMALL_LETTER_A", "latin small letter a"),
        ("Chuck_will_Widow", "Chuck will Widow"),
        ("12.4_Runner", "4 Runner"),
    ],
)
def test_class_names_are_shown_for_reading(raw, shown):
    assert display_name(raw) == shown


def test_no_failure_is_said(tmp_path):
    page = draw(write_inputs(tmp_path, *clusters(4, 5, noise=0.01)))
    chance, failures = galleries(page)
    assert len(chance) == 4 and failures == []
    text = (page / "index.html").read_text()
    assert text.count("None: every query") == 1 and "confusions" not in text.partition("</style>")[2]


def test_the_smallest_lists(tmp_path):
    workspace = write_inputs(
        tmp_path, angles(0, 20, 90), torch.tensor([12, 12, 40]), angles(0, 1), torch.tensor([3, 3])
    )
    folder = draw(workspace)
    assert len(galleries(folder)[0]) == 1  # the class of one image has no answer
    assert (folder / "similarities.svg").read_text().count("negative: mean") == 1


@pytest.mark.parametrize(
    ("embeddings", "labels"),
    [(torch.ones(40, 4), torch.arange(8).repeat(5)), (clusters(1, 12)[0], torch.full((12,), 3))],
    ids=["collapsed", "one class"],
)
def test_collapsed_embeddings_and_one_test_class(tmp_path, embeddings, labels):
    folder = draw(write_inputs(tmp_path, embeddings, labels))
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_a_network_that_was_not_trained_has_no_losses(workspace):
    evaluation = workspace.tree / "evaluations" / CELL
    content = tiny_params()
    content["recipe"] |= {"iterations": 0, "validate_every": 0}
    (evaluation / "cell.yaml").write_text(yaml.safe_dump(content))
    record = json.loads((evaluation / "run.json").read_text())
    (evaluation / "run.json").write_text(json.dumps(record | {"iterations": {"final": 0, "best_on_test": 0}}))
    (evaluation / "validations.csv").write_text("iteration,recall_at_1\n0,25.0\n")
    (evaluation / "losses.csv").write_text("\n")  # of no rows pandas writes that
    text = (draw(workspace) / "training.svg").read_text()
    assert "untrained: 25.0% at 0" in text and "final" not in text and ">loss<" not in text


# Damage

# What the evaluation folder is drawn from, and the stage that writes it.
READ = {
    "cell.yaml": "evaluate",
    "run.json": "evaluate",
    "losses.csv": "evaluate",
    "validations.csv": "evaluate",
    "neighbours.npz": "evaluate",
    "map.npz": "evaluate",
    "metrics.json": "evaluate",
    "recall_at_k.csv": "evaluate",
    "classes.csv": "evaluate",
    "similarities.csv": "evaluate",
    "similarities.json": "evaluate",
}
DAMAGES = {
    "missing": None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "bytes": lambda content: bytes(range(256)) * 4,
    "without what it should hold": lambda content: b"{}",
    "something else": lambda content: b"[]",
    "without rows": lambda content: content.partition(b"\n")[0],
    "other columns": lambda content: b"a,b\n1,2\n",
    "without its last row": lambda content: content.rstrip().rpartition(b"\n")[0] + b"\n",
    "without its last character": lambda content: content.rstrip()[:-1],
}


def refused(workspace, file, stage):
    """Draw, which must end in one line that names the file and its stage, and leave no page."""
    with pytest.raises(UserError) as caught:
        draw(workspace)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
    assert f"the stage {stage}" in str(caught.value) and "write" in str(caught.value)
    assert not list(workspace.tree.glob("pages/*/*"))
    return str(caught.value)


TABLE_ONLY = ("without rows", "other columns", "without its last row", "without its last character")
CASES = [(name, damage) for name in READ for damage in DAMAGES if name.endswith(".csv") or damage not in TABLE_ONLY]


def test_these_files_are_all_that_is_read(written):
    evaluation = written.tree / "evaluations" / CELL
    assert {path.name for path in evaluation.iterdir()} == set(READ)


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_one_line_names_a_file_that_is_missing_or_damaged_and_its_stage(workspace, name, damage):
    file = workspace.tree / "evaluations" / CELL / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(DAMAGES[damage](content))
    text = refused(workspace, file, READ[name])
    assert ("no such file" in text) == (damage == "missing")


@pytest.mark.parametrize("name", ["neighbours.npz", "map.npz"])
@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays | {"indices": arrays["indices"][:-1]},
        lambda arrays: arrays | {"indices": arrays["indices"] + 1},
        lambda arrays: arrays | {"indices": arrays["indices"] - 1},
        lambda arrays: {key: array[:0] for key, array in arrays.items()},
        lambda arrays: {"indices": arrays["indices"]},
        lambda arrays: arrays | {"indices": np.array([{}])},
    ],
    ids=["shorter", "beyond the last", "before the first", "empty", "alone", "objects"],
)
def test_arrays_that_do_not_fit(workspace, name, change):
    file = workspace.tree / "evaluations" / CELL / name
    np.savez(file, **change(dict(np.load(file))))
    assert "damaged" in refused(workspace, file, "evaluate")


def test_neighbours_of_a_list_of_another_length(workspace):
    file = workspace.tree / "evaluations" / CELL / "neighbours.npz"
    whole = dict(np.load(file))
    for count in (len(whole["indices"]) - 1, len(whole["indices"]) + 1):
        np.savez(file, **{name: np.resize(array, (count, 8)) for name, array in whole.items()})
        assert "of another list" in refused(workspace, file, "evaluate")


def test_validations_without_the_iteration_that_was_best(workspace):
    file = workspace.tree / "evaluations" / CELL / "validations.csv"
    for rows in ("0,0.1\n6,0.4\n", "4,0.5\n6,0.4\n"):
        file.write_text(f"iteration,recall_at_1\n{rows}")
        assert "not of all iterations" in refused(workspace, file, "evaluate")


def test_a_list_or_an_image_that_is_missing_or_damaged_is_named(workspace, written):
    for name in ("data", "lists"):
        (workspace.tree / name).unlink()
        shutil.copytree(written.tree / name, workspace.tree / name)
    images = sorted((workspace.tree / "data").rglob("*.png"))
    lines = []

    def fails(pattern):
        with pytest.raises(UserError, match=pattern) as caught:
            draw(workspace)
        lines.append(str(caught.value))

    for image in images:
        image.write_bytes(b"not a picture")
    fails(r"/images/.*\.png: not an image")
    for image in images:
        image.unlink()
    fails(r"\.png: .*No such file")
    (workspace.tree / "lists/glyphs/test.txt").unlink()
    fails("lists/glyphs/test.txt does not exist; build_lists writes it")
    assert not any("\n" in line for line in lines)
    assert not list(workspace.tree.glob("pages/*/*"))


# The tracking store


def test_a_page_comes_to_the_run_of_its_cell(workspace, monkeypatch):
    import mlflow

    monkeypatch.setattr(tracking, "mlflow", mlflow)
    folder = draw(workspace)
    client = tracking.Store(workspace).client
    (run,) = client.search_runs([client.get_experiment_by_name("glyphs").experiment_id])
    assert run.data.tags["cell_key"] == f"{CELL.name}-0123456789"
    assert run.info.status == "FINISHED"
    kept = Path(mlflow.artifacts.download_artifacts(artifact_uri=run.info.artifact_uri))
    names = {name: "cell.html" if name == "index.html" else name for name in FILES}
    assert all((kept / there).read_bytes() == (folder / name).read_bytes() for name, there in names.items())
