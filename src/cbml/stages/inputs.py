"""What stages read: lists of a dataset, their images as a recipe wants them, and the record of a run."""

import re
from pathlib import Path
from typing import Any

from cbml.config import Cell
from cbml.datasets.images import PackedImages, pack_images
from cbml.datasets.lists import ImageList, read_list
from cbml.errors import UserError
from cbml.files import read_json
from cbml.workspace import Workspace

# What stages take from a run.json.
RECORD = ("key", "run_id", "fingerprint", "iterations", "train_seconds", "data_seconds", "finished", "device", "code")
RECORD += ("versions",)


def fingerprint(workspace: Workspace, dataset: str) -> str:
    """What `build_lists` found the content of a dataset's images and lists to be."""
    return read_json(workspace.lists(dataset) / "summary.json", "build_lists", ("fingerprint",))["fingerprint"]


def list_of(workspace: Workspace, cell: Cell, name: str) -> ImageList:
    """The list `name` (`train`, `test`) of a cell's dataset; see `read_list`."""
    return read_list(workspace.lists(cell.dataset) / f"{name}.txt", workspace.data(cell.dataset))


def images_of(workspace: Workspace, cell: Cell, images: ImageList) -> PackedImages:
    """The decoded images of a list."""
    return pack_images(
        images,
        workspace.data(cell.dataset),
        workspace.cache,
        resize=cell.recipe.resize,
        interpolation=cell.recipe.interpolation,
        fingerprint=fingerprint(workspace, cell.dataset),
    )


def record_of(folder: Path) -> dict[str, Any]:
    """The run.json of a trained cell; see `train_cell`.

    Raises:
        UserError: it is missing or damaged.
    """
    file = folder / "run.json"
    record = read_json(file, "train", RECORD)
    # A key becomes a part of paths, and the file may be somebody else's.
    if not re.fullmatch(r"\w[\w.-]*", str(record["key"])):
        raise UserError(f"{file}: damaged (no key of a cell); run the stage train again, which writes it")
    return record
