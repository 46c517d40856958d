"""Fetch or make a dataset's images, and write a table of them."""

import os

import pandas as pd

from cbml.data.sources.base import check_catalogue
from cbml.files import atomic_write
from cbml.stages.check import check_batches, check_cells
from cbml.stages.inputs import ensure_images
from cbml.workspace import Workspace


def download(workspace: Workspace, dataset: str) -> pd.DataFrame:
    """Fetch or make the images of a dataset if they are not there, and write its catalogue.

    The images are not a DVC output: DVC would look at each of them for every stage, keep a copy, and make another copy
    for every queued experiment. The catalogue is an output: `path`, `label`, `name`, `split`, and `bytes` and
    `modified` of each file, so that it changes with any of them.

    Raises:
        UserError: the images cannot be had, or they cannot be trained and tested on.
    """
    cells = workspace.cells(dataset)
    config = cells[0].dataset_config
    if not workspace.images(config).is_dir():
        check_cells(cells, workspace)
    folder = ensure_images(workspace, config)
    table = config.catalogue(folder)
    check_catalogue(table, folder)
    check_batches(cells, table.label[table.split == "train"].to_numpy())
    facts = [os.stat(folder / path) for path in table.path]
    table = table.assign(bytes=[each.st_size for each in facts], modified=[each.st_mtime_ns for each in facts])
    with atomic_write(workspace.catalogue(dataset)) as temporary:
        table.to_csv(temporary, index=False)
    return table
