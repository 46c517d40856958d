"""Whether every cell of a dataset can be computed, before the long work begins."""

from cbml import network
from cbml.spec.params import Params
from cbml.workspace import Workspace


def check_cells(params: Params, dataset: str, workspace: Workspace) -> None:
    """Build the network of each backbone and the loss of each cell, with the weights that they start from.

    Raises:
        UserError: weights cannot be had or do not fit; parameters do not fit together.
    """
    cells = {(cell.backbone, cell.loss, cell.embedding_dim): cell for cell in params.cells(dataset)}
    for cell in cells.values():
        network.build(cell, num_classes=2, root=workspace.root)
