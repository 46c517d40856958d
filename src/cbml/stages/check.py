"""Whether every cell of a dataset can be computed, before the long work begins."""

import numpy as np

from cbml import network
from cbml.samplers.classes import ClassesConfig
from cbml.spec.cell import Cell
from cbml.workspace import Workspace


def check_cells(cells: list[Cell], workspace: Workspace) -> None:
    """Build the network of each backbone and the loss of each cell, with the weights that they start from.

    Raises:
        UserError: weights cannot be had or do not fit; parameters do not fit together.
    """
    for cell in {(cell.backbone, cell.loss, cell.embedding_dim): cell for cell in cells}.values():
        network.build(cell, num_classes=2, root=workspace.root)


def check_batches(cells: list[Cell], labels: np.ndarray) -> None:
    """Make the batch sampler of each cell.

    Args:
        labels: (N,), of the training images.

    Raises:
        UserError: the images and the recipe do not fit together: a batch needs more classes than there are.
    """
    known = np.unique(labels, return_inverse=True)[1]
    for cell in {(cell.backbone, cell.loss): cell for cell in cells}.values():
        config = cell.loss_config.batches or ClassesConfig()
        config.build(known if config.needs_labels else np.zeros_like(known), cell.recipe, cell.seed)
