"""Tables: means over seeds, the published figures beside them, and the same metric names whatever ran."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import tiny_params

from cbml.config import load_params
from cbml.reporting import tables

SEEDS = [0, 1, 2]


def score(cell, params, recall, best):
    """Write the evaluation of a cell as the stage does; recalls in [0, 1]."""

    def metrics(value):
        recalls = {f"recall_at_{k}": value + 0.02 * i for i, k in enumerate((1, 2, 4, 8))}
        return recalls | {"r_precision": value / 2, "map_at_r": value / 4, "nmi": 0.5}

    folder = Path("evaluations", cell.dataset, cell.name)
    folder.mkdir(parents=True)
    content = {"final": metrics(recall), "best_on_test": metrics(best), "untrained": metrics(0.1)}
    (folder / "metrics.json").write_text(json.dumps(content))


@pytest.fixture
def params(project):
    losses = {name: {"type": "cbml", "form": name[5:]} for name in ("cbml_log", "cbml_sqrt")}
    cub = {"type": "cub200", "url": "http://x/CUB_200_2011.tgz", "size": 1, "md5": "0" * 32}
    entry = tiny_params()["backbone"]["resnet18"]
    content = tiny_params(
        dataset={"glyphs": tiny_params()["dataset"]["glyphs"], "cub200": cub},
        seed=SEEDS,
        loss=losses,
        backbone={"resnet18": entry},
        embedding_dim=[64],
    )
    Path("params.yaml").write_text(yaml.safe_dump(content))
    params = load_params()
    Path("lists").unlink()
    for dataset in ("glyphs", "cub200"):
        Path("lists", dataset).mkdir(parents=True)
        Path("lists", dataset, "summary.json").write_text(json.dumps({"test": {"images": 1140, "classes": 20}}))
        for cell in params.cells(dataset):
            recall = 0.60 + 0.01 * cell.seed + (0.05 if cell.loss == "cbml_sqrt" else 0)
            score(cell, params, recall, best=recall + 0.03)
    return params


def test_mean_and_standard_deviation_over_seeds(params):
    table = tables.summarise(tables.collect(params, "glyphs"), with_published=False).set_index(["method", "protocol"])
    row = table.loc["cbml_log", "final"]
    assert (row.n, row.recall_at_1, row.recall_at_1_sd) == (
        3,
        pytest.approx(61),
        pytest.approx(np.std([60, 61, 62], ddof=1)),
    )
    assert table.loc["cbml_sqrt", "best_on_test"].recall_at_1 == pytest.approx(69)
    assert row.untrained_recall_at_1 == pytest.approx(10)
    assert table.index[0] == ("cbml_sqrt", "best_on_test")  # best first


def test_the_papers_figures_stand_beside_ours_for_cub_alone(params):
    text = tables.write_tables(params, "cub200")
    table = pd.read_csv("reports/cub200/tables.csv").set_index(["method", "protocol"])
    row = table.loc["cbml_sqrt", "final"]  # the paper: ResNet18, 64, CBML-sqrt: 59.4
    assert (row.paper_recall_at_1, row.difference_recall_at_1) == (59.4, pytest.approx(66 - 59.4))
    assert table.loc["EPSHN", "published"].recall_at_1 == 54.2  # literature, same backbone and size
    assert "| resnet18 | cbml_sqrt | final | 3 | 66.0 ± 1.0 | 59.4 (+6.6) |" in text
    assert "Test list: 1,140 images of 20 classes." in text and "not comparable with this part" in text
    assert "googlenet" not in text  # other backbones' rows are not asked for

    assert "paper" not in tables.write_tables(params, "glyphs")
    assert Path("reports/cub200/tables.md").read_text() == text


def test_the_metrics_have_the_same_names_whatever_cells_ran(params):
    tables.write_tables(params, "glyphs")
    all_cells = json.loads(Path("reports/glyphs/metrics.json").read_text())
    one = params.model_copy(update={"loss": {"cbml_log": params.loss["cbml_log"]}, "seed": [2]})
    tables.write_tables(one, "glyphs")
    one_cell = json.loads(Path("reports/glyphs/metrics.json").read_text())
    assert list(all_cells) == list(one_cell)
    assert (all_cells["best_cell"], all_cells["recall_at_1"]) == ("resnet18-cbml_sqrt-64", 66.0)
    assert (one_cell["best_cell"], one_cell["recall_at_1"], one_cell["cells"]) == ("resnet18-cbml_log-64", 62.0, 1)


def test_the_published_tables_are_complete():
    paper = tables.published()
    assert len(paper) == 47 and (paper.source == "paper").sum() == 18
    recalls = paper[tables.RECALLS]
    assert (recalls.diff(axis=1).iloc[:, 1:].fillna(1) > 0).all(axis=None)
