"""The page of one cell."""

from pathlib import Path

import pandas as pd

from cbml.config import Cell
from cbml.files import read_csv, read_json
from cbml.reporting.html import figure, render
from cbml.reporting.tables import metrics

LABELS = {"r_precision": "R-Precision", "map_at_r": "MAP@R", "nmi": "NMI"}
# The figures of a cell in the order of its page.
FIGURES = {
    "training.svg": "Recall@1 on the test list, and the loss with its terms, over iterations.",
    "recall_at_k.svg": "Recall@K of the final model on the test list, by K.",
    "similarities.svg": "Cosine similarity of positive and of negative pairs, on the training and the test list.",
    "embedding_map.svg": "Some test classes' embeddings in two dimensions.",
    "gallery.jpg": "Queries of the test list, each with its nearest neighbours, right and wrong ones marked.",
    "failures.jpg": "The most confident failures: a wrong nearest neighbour with the highest similarity.",
    "confusions.jpg": "The classes most often confused: a query beside its wrong nearest neighbour.",
}


def cell_page(cell: Cell, evaluation: Path, pictures: Path) -> str:
    """The page of a cell.

    Args:
        evaluation: the folder of its evaluation.
        pictures: a folder with the files of `FIGURES`.

    Raises:
        UserError: a file of the evaluation is missing or damaged.
    """
    scores = read_json(evaluation / "metrics.json", "evaluate", ("final", "untrained"))
    names = metrics([*scores["final"], "nmi"])
    protocols = pd.DataFrame({"Protocol": scores.keys()})
    protocols["Iteration"] = [f"{values['iteration']:.0f}" for values in scores.values()]
    for name in names:
        label = LABELS.get(name) or f"R@{name.removeprefix('recall_at_')}"
        protocols[label] = [f"{100 * values[name]:.1f}" if name in values else "–" for values in scores.values()]
    columns = ("class", "images", "recall_at_1", "confused_with")
    classes = read_csv(evaluation / "classes.csv", "evaluate", columns, dtype=str, keep_default_na=False)
    classes.recall_at_1 = [f"{100 * float(share):.1f}" if share else "–" for share in classes.recall_at_1]
    classes.columns = ["Class", "Images", "R@1", "Most often taken for"]
    return render(
        "cell",
        cell=cell,
        without_nmi="nmi" not in scores["final"],
        unanswered=scores["final"]["queries_without_answer"],
        protocols=protocols,
        figures=[figure(pictures / name, caption) for name, caption in FIGURES.items()],
        classes=classes,
        files={name: (evaluation / name).read_text() for name in ("cell.yaml", "run.json")},
    )
