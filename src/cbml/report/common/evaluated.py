"""What an evaluation left, for pages to show: whole, or refused in one line. Half of a table would pass for a table."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cbml.files import damaged, read_csv, read_json
from cbml.spec.cell import Cell

LARGEST_K = 512


def metrics_of(evaluation: Path) -> dict[str, dict[str, float]]:
    """The metrics by protocol, `recall_at_1` in each, and the same ones in each protocol of the trained network.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = evaluation / "metrics.json"
    metrics = read_json(file, "evaluate", ("final", "untrained"))
    for protocol, scores in metrics.items():
        numbers = isinstance(scores, dict) and all(isinstance(value, int | float) for value in scores.values())
        if not numbers or "recall_at_1" not in scores:
            raise damaged(file, f"no metrics of {protocol}", "evaluate")
    # A table without a number would pass for a table. Of the untrained network training knew other K, perhaps.
    if len({frozenset(scores) for protocol, scores in metrics.items() if protocol != "untrained"}) > 1:
        raise damaged(file, "not the same metrics of each protocol", "evaluate")
    return metrics


def recalls_of(evaluation: Path, gallery: int) -> pd.DataFrame:
    """Recall@K (`recall`, in percent) by `k`: 1, 2, 4, … 512, below the number of images in the gallery.

    Raises:
        UserError: the file is missing or damaged, or not of all K.
    """
    file = evaluation / "recall_at_k.csv"
    table = read_csv(file, "evaluate", ("k", "recall"))
    if table.k.tolist() != [2**i for i in range(len(table))] or 2 * table.k.iloc[-1] < min(gallery, 2 * LARGEST_K):
        raise damaged(file, "not of all K", "evaluate")
    return table


def validations_of(evaluation: Path, cell: Cell) -> pd.DataFrame:
    """`recall_at_1` on the test list, in percent, by `iteration`: the untrained network first, the final one last.

    Raises:
        UserError: the file is missing or damaged, or does not go to the last iteration.
    """
    file = evaluation / "validations.csv"
    table = read_csv(file, "evaluate", ("iteration", "recall_at_1"))
    if (table.iteration.iloc[0], table.iteration.iloc[-1]) != (0, cell.recipe.iterations):
        raise damaged(file, "not of all iterations", "evaluate")
    return table


def classes_of(evaluation: Path, queries: int) -> pd.DataFrame:
    """What `class_table` returned for so many queries; a class may be named like a number, or like nothing.

    Raises:
        UserError: the file is missing or damaged, or not of all queries.
    """
    file = evaluation / "classes.csv"
    columns = ("class", "images", "recall_at_1", "confused_with")
    text = {"class": str, "confused_with": str}
    numbers = {"images": [""], "recall_at_1": [""]}
    table = read_csv(file, "evaluate", columns, dtype=text, keep_default_na=False, na_values=numbers)
    if any(not pd.api.types.is_numeric_dtype(table[name]) for name in numbers) or table.images.sum() != queries:
        raise damaged(file, "not of all queries", "evaluate")
    return table


def similarities_of(evaluation: Path) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """What `pair_similarities` returned for a training and a test list: densities with a `split`, moments by split.

    Raises:
        UserError: a file is missing or damaged, or not of all similarities from -1 to 1.
    """
    file, of_moments = evaluation / "similarities.csv", evaluation / "similarities.json"
    columns, text = ("split", "pair", "similarity", "density"), {"split": str, "pair": str}
    densities = read_csv(file, "evaluate", columns, dtype=text)
    moments = read_json(of_moments, "evaluate", ("train", "test"))
    try:
        expected = {(split, pair) for split, kinds in moments.items() for pair in kinds if kinds[pair]["pairs"]}
    except (AttributeError, KeyError, TypeError):
        raise damaged(of_moments, "no number of pairs", "evaluate") from None
    found = dict(list(densities.groupby(["split", "pair"])))
    if found.keys() != expected or not all(_whole(rows) for rows in found.values()):
        raise damaged(file, "not of all similarities", "evaluate")
    return densities, moments


def _whole(rows: pd.DataFrame) -> bool:
    """Whether densities are of bins that go as far down as up, and integrate to 1."""
    bins = rows.similarity.to_numpy()
    return np.allclose(bins, -bins[::-1], atol=1e-5) and np.isclose(rows.density.mean() * 2, 1, rtol=1e-3)
