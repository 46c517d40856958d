"""The page of one cell."""

import os.path
from pathlib import Path

import numpy as np
import pandas as pd

from cbml.files import read_json
from cbml.report.cell.failures import confusions, failures, surest
from cbml.report.common.evaluated import classes_of, metrics_of
from cbml.report.common.html import figure, render
from cbml.report.common.numbers import NO_NMI, NO_NMI_IN_GALLERY, metrics, number
from cbml.report.common.pictures import Neighbours, Pictures
from cbml.report.common.queries import judge, sample_queries
from cbml.spec.cell import Cell

LABELS = {"r_precision": "R-Precision", "map_at_r": "MAP@R", "nmi": "NMI"}
ROWS = 8  # of a gallery
CLASSES = 500  # of the table of classes, which bounds the page
# The charts of a cell in the order of its page.
CHARTS = {
    "training": "Recall@1 on the test list, and the loss with its terms, over iterations.",
    "recall_at_k": "Recall@K of the final model on the test list, by K.",
    "similarities": "Cosine similarity of positive and of negative pairs, on the training and the test list.",
    "embedding_map": "Some test classes' embeddings in two dimensions.",
    "pseudo_labels": "Clusters of training images against their classes, which training did not know, by iteration.",
}


def cell_page(
    cell: Cell,
    evaluation: Path,
    charts: dict[str, str],
    pictures: Pictures,
    found: Neighbours,
    *,
    folder: Path,
    report: Path,
    index: Path,
    run_address: str | None = None,
) -> str:
    """The page of a cell.

    Args:
        evaluation: the folder of its evaluation.
        charts: an `<svg>` element for each of `CHARTS`, if there is one.
        pictures: of the test list.
        found: of the test list.
        folder: of the page; links are relative to it.
        report, index: the pages over all cells of the dataset, and over all datasets.
        run_address: of its run in MLflow's UI.

    Raises:
        UserError: a file of the evaluation is missing or damaged, or an image.
    """
    scores = metrics_of(evaluation)
    record = read_json(evaluation / "run.json", "evaluate", ("run_id",))
    protocols = pd.DataFrame({"Protocol": scores.keys()})
    for name in metrics([*scores["final"], "nmi"]):
        label = LABELS.get(name) or f"R@{name.removeprefix('recall_at_')}"
        protocols[label] = [number(values.get(name, np.nan)) for values in scores.values()]
    protocols["Iteration"] = [f"{values['iteration']:.0f}" for values in scores.values()]
    judged = judge(found["indices"], found["similarities"], pictures.images.labels)
    chosen = {
        "Queries picked by chance, one per class": sample_queries(judged, ROWS, cell.seed),
        "The surest failures, one per class": surest(failures(judged), ROWS),
    }
    galleries = {
        title: [(pictures.one(query, "query"), pictures.neighbours(query, found)) for query in rows]
        for title, rows in chosen.items()
    }
    confused = [
        {
            "pair": [
                pictures.one(pair.query, "query"),
                pictures.one(pair.nearest, f"{pair.similarity:.3f}", query=pair.query),
            ],
            "text": f"{pair.count} of {pair.queries} queries ({pair.share:.0%})",
        }
        for pair in confusions(judged).head(ROWS).itertuples()
    ]
    classes = classes_of(evaluation, len(judged))
    classes.insert(1, "R@1", [number(recall) for recall in classes.pop("recall_at_1")])
    classes.columns = ["Class", "R@1", "Images", "Most often taken for"]
    with_gallery = len(judged) < len(pictures.images.labels)
    return render(
        "cell",
        cell=cell,
        no_nmi=None if "nmi" in scores["final"] else NO_NMI_IN_GALLERY if with_gallery else NO_NMI,
        unanswered=scores["final"]["queries_without_answer"],
        protocols=protocols,
        figures=[figure(charts[name], name, caption) for name, caption in CHARTS.items() if name in charts],
        galleries=galleries,
        confusions=confused,
        pictures=pictures,
        classes=classes[:CLASSES],
        all_classes=len(classes),
        run_id=record["run_id"],
        run_address=run_address,
        files={name: (evaluation / name).read_text(encoding="utf-8") for name in ("cell.yaml", "run.json")},
        report=os.path.relpath(report, folder),
        index=f"{os.path.relpath(index, folder)}#all",
    )
