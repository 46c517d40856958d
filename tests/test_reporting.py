"""Tables: means over seeds, the published figures beside them, and the same metric names whatever ran."""

import json
import shlex
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT, tiny_params
from dvc.utils.hydra import compose_and_dump

from cbml.config import Params, load_params
from cbml.errors import UserError
from cbml.reporting import commands, tables, tableset

SEEDS = [0, 1, 2]


def score(cell, recall, best):
    """Write the evaluation of a cell as the stage does; recalls in [0, 1]."""

    def metrics(value):
        recalls = {f"recall_at_{k}": value + 0.02 * i for i, k in enumerate((1, 2, 4, 8))}
        return recalls | {"r_precision": value / 2, "map_at_r": value / 4, "nmi": 0.5}

    folder = Path("evaluations", cell.dataset, cell.name)
    folder.mkdir(parents=True)
    content = {"final": metrics(recall), "best_on_test": metrics(best), "untrained": metrics(0.1)}
    (folder / "metrics.json").write_text(json.dumps(content))
    (folder / "cell.yaml").write_text(yaml.safe_dump(cell.to_dict()))
    pd.DataFrame({"iteration": [0, 10], "recall_at_1": [0.1, recall]}).to_csv(folder / "validations.csv", index=False)
    facts = {"finished": "2026-01-01T00:00:00+00:00", "device": "abacus", "versions": {"torch": "2.11"}}
    (folder / "run.json").write_text(json.dumps(facts | {"train_seconds": 90, "data_seconds": 9}))


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
            score(cell, recall, best=recall + 0.03)
    return params


def test_mean_and_standard_deviation_over_seeds(params):
    table = tables.summarise(tables.collect(params.cells("glyphs")), with_published=False).set_index(
        ["method", "protocol"]
    )
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
    text = tableset.write_tables(params, "cub200")
    table = pd.read_csv("reports/cub200/tables.csv").set_index(["method", "protocol"])
    row = table.loc["cbml_sqrt", "final"]  # the paper: ResNet18, 64, CBML-sqrt: 59.4
    assert (row.paper_recall_at_1, row.difference_recall_at_1) == (59.4, pytest.approx(66 - 59.4))
    assert table.loc["EPSHN", "published"].recall_at_1 == 54.2  # literature, same backbone and size
    assert "| resnet18 | cbml_sqrt | final | 3 | 66.0 ± 1.0 | 59.4 (+6.6) |" in text
    assert "a run: 1.5 minutes, 10.0% of it waiting" in text and "device: abacus" in text
    assert "Test list: 1,140 images of 20 classes." in text and "not comparable with this part" in text
    assert "googlenet" not in text  # other backbones' rows are not asked for

    assert "paper" not in tableset.write_tables(params, "glyphs")
    assert Path("reports/cub200/tables.md").read_text() == text
    picture = ElementTree.parse("reports/cub200/curves.svg")
    assert {"cbml_log", "cbml_sqrt"} < {element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")}


def cells_with(recalls):
    """What `collect` returns for one backbone: {method: Recall@1 of seed 0, 1, …}."""
    rows = [
        {
            "embedding_dim": 64,
            "backbone": "b",
            "method": method,
            "protocol": "final",
            "seed": seed,
            "recall_at_1": value,
        }
        for method, values in recalls.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_a_difference_is_paired_by_seed_and_has_an_interval():
    recalls = {"good": [60, 65, 70], "close": [59, 63, 69], "erratic": [40, 80, 61]}
    table = tables.versus_best(cells_with(recalls))
    row = table.set_index("method").loc["close"]
    # d = -1, -2, -1: mean -4/3, standard error 1/3, t(0.975, 2) = 4.3027
    assert row.versus_best == pytest.approx(-4 / 3)
    assert row.versus_best_low == pytest.approx(-4 / 3 - 4.302653 / 3, abs=1e-5)
    assert row.versus_best_high == pytest.approx(-4 / 3 + 4.302653 / 3, abs=1e-5)
    assert row.within_noise
    # The seeds spread over ten points, but both methods in the same way: the difference is certain.
    table = tables.versus_best(cells_with({"good": [60, 65, 70], "worse": [55, 59, 65.5]}))
    assert table.method.tolist() == ["worse"] and not table.within_noise[0]


def test_fewer_than_three_seeds_make_no_claim(params):
    assert tables.versus_best(cells_with({"good": [60, 65], "worse": [10, 11]})).empty
    two = params.model_copy(update={"seed": [0, 1]})
    text = tableset.write_tables(two, "glyphs")
    assert "against the best" not in text and "rank nothing" in text
    text = tableset.write_tables(params, "glyphs")
    assert "-5.0 [-5.0, -5.0]" in text and "rank nothing" not in text


def test_all_cells_are_those_of_the_folder(params):
    one = params.model_copy(update={"loss": {"cbml_log": params.loss["cbml_log"]}})
    assert "cbml_sqrt" not in tableset.write_tables(one, "glyphs")
    assert "cbml_sqrt" in tableset.write_tables(one, "glyphs", all_cells=True)
    file = Path("evaluations/glyphs/resnet18-cbml_log-64-2/cell.yaml")
    file.write_text(file.read_text().replace("margin: 0.1", "margin: 0.2"))
    with pytest.raises(UserError, match="resnet18-cbml_log-64-2 and resnet18-cbml_log-64-0 differ in more than"):
        tableset.write_tables(one, "glyphs", all_cells=True)


def test_the_command_of_a_row_names_what_differs_from_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "params.yaml").read_text()
    changed = yaml.safe_load(text)
    changed["loss"]["cbml_log"]["margin"] = 0.2
    changed["backbone"]["resnet18"] |= {"weights": "my weights.pth", "recipe": {"quick": {"lr": 0.01}}}
    changed["recipe"]["quick"] |= {"lr_steps": [50, 80], "select_by": "map_at_r"}
    cell = Params.model_validate(changed).cell("glyphs", "resnet18", "cbml_log", 512, 0)
    words = shlex.split(commands.command(cell, [0, 1]))
    assert words[:3] == ["dvc", "exp", "run"] and set(words[3::2]) == {"-S"}
    assert words[4::2] == [
        "dataset=glyphs",
        "recipe=quick",
        "backbone=[resnet18]",
        "loss=[cbml_log]",
        "embedding_dim=[512]",
        "seed=[0,1]",
        'backbone.resnet18.weights="my weights.pth"',
        "++backbone.resnet18.recipe.quick.lr=0.01",
        "loss.cbml_log.margin=0.2",
        "recipe.quick.lr_steps=[50,80]",
        "recipe.quick.select_by=map_at_r",
    ]
    # Hydra, as DVC calls it, makes the same cell of it.
    compose_and_dump(tmp_path / "p.yaml", str(ROOT / "conf"), None, "config", None, words[4::2])
    again = load_params(tmp_path / "p.yaml")
    assert again.cell("glyphs", "resnet18", "cbml_log", 512, 0) == cell and again.seed == [0, 1]


def test_the_metrics_have_the_same_names_whatever_cells_ran(params):
    tableset.write_tables(params, "glyphs")
    all_cells = json.loads(Path("reports/glyphs/metrics.json").read_text())
    one = params.model_copy(update={"loss": {"cbml_log": params.loss["cbml_log"]}, "seed": [2]})
    tableset.write_tables(one, "glyphs")
    one_cell = json.loads(Path("reports/glyphs/metrics.json").read_text())
    assert list(all_cells) == list(one_cell)
    assert (all_cells["best_cell"], all_cells["recall_at_1"]) == ("resnet18-cbml_sqrt-64", 66.0)
    assert (one_cell["best_cell"], one_cell["recall_at_1"], one_cell["cells"]) == ("resnet18-cbml_log-64", 62.0, 1)


def test_the_published_tables_are_complete():
    paper = tables.published()
    assert len(paper) == 47 and (paper.source == "paper").sum() == 18
    recalls = paper[tables.RECALLS]
    assert (recalls.diff(axis=1).iloc[:, 1:].fillna(1) > 0).all(axis=None)
