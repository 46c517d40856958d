"""What stages read of a cell's dataset."""

from pathlib import Path

from cbml.data.open import Data
from cbml.data.sources import Dataset
from cbml.errors import UserError
from cbml.files import locked
from cbml.spec.cell import Cell
from cbml.workspace import Workspace


def open_data(workspace: Workspace, cell: Cell) -> Data:
    """The lists of a cell's dataset, and their images as its recipe wants them."""
    dataset, recipe = dataset_of(workspace, cell), cell.recipe
    return Data(
        workspace.lists(cell.dataset),
        workspace.images(dataset),
        workspace.cache,
        ks=dataset.ks,
        size=(recipe.resize, recipe.interpolation),
        ensure_images=lambda: ensure_images(workspace, dataset),
    )


def dataset_of(workspace: Workspace, cell: Cell) -> Dataset:
    """The option of a cell's dataset: where the images are, and K, as params.yaml has it now, or the cell's own."""
    try:
        now = workspace.params().dataset.get(cell.dataset)
    except UserError:  # none, or of another time
        now = None
    return now if now and now.type == cell.dataset_config.type else cell.dataset_config


def ensure_images(workspace: Workspace, dataset: Dataset) -> Path:
    """The folder of a dataset's images; what can be fetched or made is, if it is not there."""
    folder = workspace.images(dataset)
    if not folder.is_dir():
        with locked(workspace.cache / folder.name, f"waiting for another process, which brings {folder}"):
            if not folder.is_dir():
                dataset.download(folder, workspace.root)
    return folder
