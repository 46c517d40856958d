"""What the evaluations of a table's cells hold by iteration and by similarity, as one table each."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from cbml.config import Cell

CURVES = ["cell", "backbone", "method", "embedding_dim", "seed", "iteration", "recall_at_1"]
SIMILARITIES = ["cell", "split", "pair", "similarity", "density"]


def curves(cells: list[Cell]) -> pd.DataFrame:
    """Recall@1 on the test list, in percent, by cell and iteration; from evaluations/<dataset>/<cell>/validations.csv.

    A cell without that file has no rows. Columns: `CURVES`.
    """

    def names(cell: Cell) -> dict[str, str | int]:
        return {
            "backbone": cell.backbone,
            "method": cell.loss,
            "embedding_dim": cell.embedding_dim,
            "seed": cell.seed,
        }

    rows = _gather(cells, "validations.csv", CURVES, names)
    return rows.assign(recall_at_1=(100 * rows.recall_at_1).astype(float).round(3))


def similarities(cells: list[Cell], bin_width: float) -> pd.DataFrame:
    """Densities of cosine similarity by cell, split and kind of pair; from evaluations/…/<cell>/similarities.csv.

    Means over bins of that width. A cell without that file has no rows. Columns: `SIMILARITIES`.
    """
    rows = _gather(cells, "similarities.csv", SIMILARITIES, lambda cell: {})
    bins = (rows.similarity.astype(float) // bin_width).rename("bin")
    means = rows.groupby([*SIMILARITIES[:3], bins], sort=False)[SIMILARITIES[3:]].mean()
    return means.astype(float).round(4).reset_index().drop(columns="bin")


def _gather(cells: list[Cell], file: str, columns: list[str], names: Callable[[Cell], dict]) -> pd.DataFrame:
    rows = [
        pd.read_csv(path).assign(cell=cell.name, **names(cell))[columns]
        for cell in cells
        if (path := Path("evaluations", cell.dataset, cell.name, file)).is_file()
    ]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)
