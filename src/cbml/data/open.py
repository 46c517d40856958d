"""What stages read: lists of a dataset, their images as a recipe wants them, and the record of a run."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cbml.data.images import Images
from cbml.data.lists import ImageList, fingerprint_of, read_list
from cbml.data.packing import Packing, pack_images
from cbml.data.sources import Dataset
from cbml.errors import UserError
from cbml.evaluation.scoring import Scoring
from cbml.files import damaged, locked, read_arrays, read_csv, read_json
from cbml.spec.cell import Cell
from cbml.workspace import Workspace

# What stages take from a run.json.
RECORD: tuple[str, ...]
RECORD = ("key", "run_id", "fingerprint", "iterations", "train_seconds", "data_seconds", "finished", "device", "code")
RECORD += ("versions", "unit")


def fingerprint(workspace: Workspace, dataset: str) -> str:
    """What `build_lists` found the content of a dataset's images and lists to be."""
    return read_json(workspace.lists(dataset) / "summary.json", "build_lists", ("fingerprint",))["fingerprint"]


def dataset_of(workspace: Workspace, cell: Cell) -> Dataset:
    """The option of a cell's dataset: where the images are, and K, as params.yaml has it now, or the cell's own."""
    try:
        now = workspace.params().dataset.get(cell.dataset)
    except UserError:  # none, or of another time
        now = None
    return now if now and now.type == cell.dataset_config.type else cell.dataset_config


def bring(workspace: Workspace, dataset: Dataset) -> Path:
    """The folder of a dataset's images; what can be fetched or made is, if it is not there."""
    folder = workspace.images(dataset)
    if not folder.is_dir():
        with locked(workspace.cache / folder.name, f"waiting for another process, which brings {folder}"):
            if not folder.is_dir():
                dataset.download(folder, workspace.root)
    return folder


def training_list(workspace: Workspace, cell: Cell) -> ImageList:
    """The training images of a cell's dataset; see `read_list`."""
    return read_list(workspace.lists(cell.dataset) / "train.txt")


def test_list(workspace: Workspace, cell: Cell) -> tuple[ImageList, Scoring]:
    """The test images of a cell's dataset, queries before their gallery, and how they are scored; see `read_list`."""
    ks, folder = dataset_of(workspace, cell).ks, workspace.lists(cell.dataset)
    if not (folder / "query.txt").is_file():
        return read_list(folder / "test.txt"), Scoring(ks)
    queries, gallery = (read_list(folder / f"{name}.txt") for name in ("query", "gallery"))
    return queries + gallery, Scoring(ks, len(queries.paths))


def images_of(workspace: Workspace, cell: Cell, images: ImageList) -> Images:
    """The images of a list as the cell's recipe wants them: a part of those of the whole dataset; see `pack_images`.

    Raises:
        UserError: an image cannot be read, or the images are not those of the lists.
    """
    train, (test, scoring) = training_list(workspace, cell), test_list(workspace, cell)
    every = train + test
    print_of_lists = fingerprint(workspace, cell.dataset)
    size = cell.recipe.resize, cell.recipe.interpolation
    dataset = dataset_of(workspace, cell)
    root = workspace.images(dataset)
    if not (Packing(every, root, workspace.cache, print_of_lists).folder(size) / "images.bin").exists():
        bring(workspace, dataset)

    def check(digests: list[str]) -> None:
        queries = scoring.queries or 0
        splits = ["train"] * len(train.paths) + ["query"] * queries
        splits += ["gallery" if queries else "test"] * (len(test.paths) - queries)
        if fingerprint_of(splits, every.paths, every.labels.tolist(), digests) != print_of_lists:
            stages = f"download@{cell.dataset} build_lists@{cell.dataset}"
            raise UserError(
                f"{root}: the images or the lists have changed since the lists were made; again: "
                f"`dvc repro -f -s {stages}`, then `dvc repro`"
            )

    packed = pack_images(
        every, root, workspace.cache, resize=size[0], interpolation=size[1], fingerprint=print_of_lists, check=check
    )
    position = {path: i for i, path in enumerate(every.paths)}
    indices = torch.tensor([position[path] for path in images.paths])
    return packed.subset(indices, torch.from_numpy(images.labels))


def curves_of(folder: Path, cell: Cell) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The losses and the validations of a trained cell by iteration; see `train_cell`.

    Raises:
        UserError: one is missing or damaged, or not of all iterations.
    """
    recipe = cell.recipe
    validated = range(0, recipe.iterations, recipe.validate_every) if recipe.validate_every else (0,)
    expected = {"losses": [*range(1, recipe.iterations + 1)], "validations": sorted({*validated, recipe.iterations})}
    tables = []
    for name, columns in (("losses", ("iteration", "loss")), ("validations", ("iteration", "recall_at_1"))):
        file = folder / f"{name}.csv"
        table = read_csv(file, "train", columns) if expected[name] else pd.DataFrame(columns=columns)
        if table.iteration.tolist() != expected[name]:
            raise damaged(file, "not of all iterations", "train")
        tables.append(table)
    return tuple(tables)


def record_of(folder: Path) -> dict[str, Any]:
    """The run.json of a trained cell; see `train_cell`.

    Raises:
        UserError: it is missing or damaged.
    """
    file = folder / "run.json"
    record = read_json(file, "train", RECORD)
    # A key becomes a part of paths, and the file may be somebody else's.
    if not isinstance(record["key"], str) or not re.fullmatch(r"\w[\w.-]*", record["key"]):
        raise damaged(file, "no key of a cell", "train")
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
