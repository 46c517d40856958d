"""Cells as training, evaluation and drawing leave them, without any of the three."""

import json

import numpy as np
import pandas as pd
import yaml
from helpers import TINY_GLYPHS, tiny_params
from PIL import Image

from cbml.data.lists import read_list
from cbml.data.sources import GlyphsConfig
from cbml.provenance import training_code
from cbml.report.cell.page import CHARTS, cell_page
from cbml.report.common.pictures import Pictures
from cbml.report.common.style import chart, to_svg
from cbml.report.tables.rows import Evaluated
from cbml.spec.params import Params

TEST = {"images": 1140, "classes": 20}
CLASSES, PER_CLASS = 10, 4  # of the images that there are


def cells(**groups):
    """Those of a params.yaml like `tiny_params`."""
    return Params.model_validate(tiny_params(**groups)).cells("glyphs")


def finish(workspace, cell, recall=50.0, *, best=None, weights=None, **facts):
    """Write run, evaluation and page of a cell.

    Args:
        recall: of the final model, in percent; Recall@2, 4, 8 are 2 more each.
        best: of the protocol `best_on_test`; 3 more than `recall` if not given.
        weights: what the backbone starts from, for the cell's key.
        facts: of its run.json, instead of those that are written otherwise.
    """

    def scores(value):
        recalls = {f"recall_at_{k}": value + 2 * i for i, k in enumerate((1, 2, 4, 8))}
        return recalls | {"r_precision": value / 2, "map_at_r": value / 4, "nmi": 50.0}

    best = recall + 3 if best is None else best
    final = scores(recall) | {"queries": 1137, "queries_without_answer": 3, "iteration": 6}
    untrained = {"iteration": 0.0, **{name: value for name, value in scores(10.0).items() if "recall" in name}}
    record = {
        "key": cell.key("0123", weights),
        "run_id": None,
        "fingerprint": "0123",
        "iterations": {"final": 6, "best_on_test": 4},
        "train_seconds": 90.0,
        "data_seconds": 9.0,
        "finished": "2026-02-03T04:05:06+00:00",
        "device": "abacus",
        "code": training_code(),
        "versions": {"python": "3.11", "torch": "2.11"},
        "unit": "percent",
    } | facts
    folder, page = workspace.evaluation(cell), workspace.page(cell)
    for each in (folder, page):
        each.mkdir(parents=True)
    (folder / "cell.yaml").write_text(yaml.safe_dump(cell.to_dict(), sort_keys=False))
    (folder / "run.json").write_text(json.dumps(record))
    metrics = {"final": final, "best_on_test": final | scores(best) | {"iteration": 4}, "untrained": untrained}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    right = range(round(recall / 100 * CLASSES * PER_CLASS))
    np.savez(folder / "neighbours.npz", **neighbours(right))
    (folder / "summary.json").write_text(json.dumps({"fingerprint": "0123", "test": TEST}))
    pd.DataFrame({"iteration": range(1, 7), "loss": 0.5}).to_csv(folder / "losses.csv", index=False)
    validations = {"iteration": [0, 2, 4, 6], "recall_at_1": [10.0, recall - 10, best, recall]}
    pd.DataFrame(validations).to_csv(folder / "validations.csv", index=False)
    pairs = [(split, pair) for split in ("train", "test") for pair in ("positive", "negative")]
    bins = {"similarity": np.linspace(-0.9, 0.9, 10), "density": 0.5}
    densities = pd.concat([pd.DataFrame({"split": split, "pair": pair, **bins}) for split, pair in pairs])
    densities.to_csv(folder / "similarities.csv", index=False)
    moments = {pair: {"mean": 0.1, "variance": 0.2, "pairs": 10} for pair in ("positive", "negative")}
    (folder / "similarities.json").write_text(json.dumps({"train": moments, "test": moments}))
    classes = ["class,images,recall_at_1,confused_with", "Laysan <Albatross>,9,25.0,Crow", "None,1,,"]
    classes.append("036.LATIN_LETTER_SMALL_CAPITAL_INVERTED_R,30,100.0,")
    (folder / "classes.csv").write_text("\n".join(classes) + "\n")
    (page / "index.html").write_text("the page of a cell")
    return Evaluated(cell, record, folder, page)


def write_images(workspace):
    """A test list and its images, as the cells of `finish` were computed on: 10 classes of 4."""
    lines = []
    names = {label: "Laysan <Albatross>" if label == 3 else f"Class {label}" for label in range(CLASSES)}
    for n in range(CLASSES * PER_CLASS):
        label = n // PER_CLASS
        path = f"images/{label + 1:03}.CLASS_{label}/{n}.png"
        file = folder_of(workspace) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (5 * n, 90, 160)).save(file)
        lines.append(f"{path},{label}\n")
    workspace.lists("glyphs").mkdir(parents=True)
    (workspace.lists("glyphs") / "test.txt").write_text("".join(lines))
    (workspace.lists("glyphs") / "classes.txt").write_text("".join(f"{k} {name}\n" for k, name in names.items()))
    (workspace.lists("glyphs") / "summary.json").write_text(json.dumps({"fingerprint": "0123"}))


def neighbours(right, count=8):
    """What a cell finds: for the images in `right` one of their own class first, else none of it.

    Returns:
        `indices` and `similarities` of every image, (40, count).
    """
    indices = []
    for query in range(CLASSES * PER_CLASS):
        own = query // PER_CLASS * PER_CLASS
        others = [(own + PER_CLASS + i) % (CLASSES * PER_CLASS) for i in range(count)]
        indices.append([own + (query + 1) % PER_CLASS, *others[1:]] if query in right else others)
    return {"indices": np.array(indices), "similarities": np.tile(np.linspace(0.9, 0.5, count), (len(indices), 1))}


def pictures(workspace, side=16):
    """Those of `write_images`."""
    return Pictures(read_list(workspace.lists("glyphs") / "test.txt"), folder_of(workspace), side)


def folder_of(workspace):
    """The images."""
    return workspace.images(GlyphsConfig(**TINY_GLYPHS))


def write_cell_page(one, workspace, run_address=None):
    """The page of a finished cell, all its charts with the same ids."""
    with chart(2, 2) as (figure, axis):
        axis.plot([0, 1], [0, 1], marker="o")
        charts = dict.fromkeys([name for name in CHARTS if name != "pseudo_labels"], to_svg(figure))
    report, index = workspace.report("glyphs") / "index.html", workspace.index
    found = neighbours(range(0, 40, 2))
    places = {"folder": one.page, "report": report, "index": index, "run_address": run_address}
    page = cell_page(one.cell, one.folder, charts, pictures(workspace), found, **places)
    (one.page / "index.html").write_text(page)
    return one.page / "index.html"
