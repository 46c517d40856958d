"""What tuning was worth: tuned cells beside those with the published constants, seed by seed."""

from xml.etree import ElementTree

import numpy as np
import pytest
from finished_cells import cells, finish

from cbml.report.tables import rows as tables
from cbml.report.tables.tuning import settings, shown_worth, worth, worth_chart
from cbml.stages.records import record_of
from cbml.tracking import store as tracking
from cbml.workspace import Workspace

BUDGET = "4 trials, 2 folds of the training classes, map_at_r"
PUBLISHED = {"cbml_log": [50, 52, 51], "cbml_sqrt": [60, 61, 62]}
TUNED = {"cbml_log": [58, 61, 62], "cbml_sqrt": [60, 62, 61]}


def losses(tuned):
    own = {"tuned": BUDGET, "margin": 0.2, "recipe": {"tiny": {"lr": 0.5}}} if tuned else {}
    return {name: {"type": "cbml", "form": name[5:]} | own for name in PUBLISHED}


@pytest.fixture
def collected(tmp_path, monkeypatch):
    """Two losses with three seeds each, tuned and not."""
    monkeypatch.setattr(tracking, "mlflow", None)
    evaluated = []
    for tuned, recalls in ((False, PUBLISHED), (True, TUNED)):
        workspace = Workspace(tmp_path / str(tuned), tmp_path / str(tuned))
        for cell in cells(loss=losses(tuned), seed=[0, 1, 2]):
            recall = float(recalls[cell.loss][cell.seed])
            finish(workspace, cell, recall)
            folder = workspace.evaluation(cell)
            evaluated.append(tables.Evaluated(cell, record_of(folder), folder, folder))
    return tables.collect(tables.with_variants(evaluated, tmp_path), tmp_path)


def test_each_loss_is_compared_with_itself_and_with_the_best_tuned_one(collected):
    assert set(collected.variant) == {"tuned", ""}
    rows = worth(collected).set_index("method")
    assert rows.index.tolist() == ["cbml_sqrt", "cbml_log"]
    assert rows.recall_at_1.tolist() == pytest.approx([61, 181 / 3])
    assert rows.gain.tolist() == pytest.approx([0, 28 / 3]) and rows.published.tolist() == [61, 51]
    assert rows.versus_best.cbml_log == pytest.approx(-2 / 3) and rows.versus_best.cbml_sqrt == 0
    differences = np.array([8, 9, 11])
    reach = 4.302653 * differences.std(ddof=1) / np.sqrt(3)
    assert rows.gain_low.cbml_log == pytest.approx(28 / 3 - reach, abs=1e-4)
    ((title, shown),) = settings(worth(collected))
    assert title.endswith(f"each loss tuned: {BUDGET}")
    text = shown_worth(shown).to_csv(index=False)
    assert "61.0 ± 1.0,,61.0 ± 1.0" in text and "within noise" in text
    assert "cbml_sqrt" in "".join(ElementTree.fromstring(worth_chart(shown)).itertext())


def test_without_tuned_cells_or_with_too_few_seeds_nothing_is_said(collected):
    assert worth(collected[collected.tuned == ""]).empty
    assert worth(collected[collected.seed < 2]).empty
    assert list(settings(worth(collected[collected.seed < 2]))) == []


def test_what_was_not_trained_with_published_constants_is_compared_with_the_others_alone(collected):
    (row,) = worth(collected[(collected.tuned != "") & (collected.method == "cbml_log")]).itertuples()
    assert row.recall_at_1 == pytest.approx(181 / 3) and np.isnan(row.gain)
