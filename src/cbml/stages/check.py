"""Whether every cell of a dataset can be computed, before the long work begins."""

from cbml import network
from cbml.spec.cell import Cell
from cbml.workspace import Workspace


def check_cells(cells: list[Cell], workspace: Workspace) -> None:
    """Build the network of each backbone and the loss of each cell, with the weights that they start from.

    Raises:
        UserError: weights cannot be had or do not fit; parameters do not fit together.
    """
    for cell in {(cell.backbone, cell.loss, cell.embedding_dim): cell for cell in cells}.values():
        network.build(cell, num_classes=2, root=workspace.root)
