"""What stages read of a run and of its evaluation."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cbml.files import damaged, read_arrays, read_csv, read_json
from cbml.spec.cell import Cell

# What stages take from a run.json.
RECORD = "key run_id fingerprint iterations train_seconds data_seconds finished device code versions unit"


def curves_of(folder: Path, cell: Cell, stage: str = "train") -> tuple[pd.DataFrame, pd.DataFrame]:
    """The losses and the validations of a trained cell by iteration; see `train_cell`.

    Args:
        stage: the one that wrote the folder: `evaluate` copies them.

    Raises:
        UserError: one is missing or damaged, or not of all iterations.
    """
    recipe = cell.recipe
    validated = range(0, recipe.iterations, recipe.validate_every) if recipe.validate_every else (0,)
    expected = {"losses": [*range(1, recipe.iterations + 1)], "validations": sorted({*validated, recipe.iterations})}
    tables = []
    for name, columns in (("losses", ("iteration", "loss")), ("validations", ("iteration", "recall_at_1"))):
        file = folder / f"{name}.csv"
        table = read_csv(file, stage, columns) if expected[name] else pd.DataFrame(columns=columns)
        if table.iteration.tolist() != expected[name]:
            raise damaged(file, "not of all iterations", stage)
        tables.append(table)
    return tuple(tables)


def record_of(folder: Path, stage: str = "train") -> dict[str, Any]:
    """The run.json of a trained cell; see `train_cell`.

    Args:
        stage: see `curves_of`.

    Raises:
        UserError: it is missing or damaged.
    """
    file = folder / "run.json"
    record = read_json(file, stage, tuple(RECORD.split()))
    # A key becomes a part of paths, and the file may be somebody else's.
    if not isinstance(record["key"], str) or not re.fullmatch(r"\w[\w.-]*", record["key"]):
        raise damaged(file, "no key of a cell", stage)
    return record


def neighbours_of(evaluation: Path, queries: int, images: int) -> dict[str, np.ndarray]:
    """Of each of so many queries the nearest of the list's images, `indices` (N, k), and `similarities` (N, k).

    Raises:
        UserError: the file is missing or damaged.
    """
    found = indexed(evaluation / "neighbours.npz", ("indices", "similarities"), images)
    if len(found["indices"]) != queries:
        raise damaged(evaluation / "neighbours.npz", "of another list", "evaluate")
    return found


def indexed(file: Path, names: tuple[str, ...], images: int) -> dict[str, np.ndarray]:
    """The arrays of a file that evaluation wrote: all of one length, and `indices` of a list of so many images.

    Raises:
        UserError: the file is missing or damaged.
    """
    found = read_arrays(file, "evaluate", names)
    indices = found["indices"]
    same = len({len(array) for array in found.values()}) == 1
    if not (same and indices.size and 0 <= indices.min() <= indices.max() < images):
        raise damaged(file, "of another list", "evaluate")
    return found
