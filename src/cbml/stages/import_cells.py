"""Cells that were evaluated in another checkout, on another machine, or without a tracking store."""

from pathlib import Path

from cbml import network
from cbml.errors import UserError
from cbml.progress import message
from cbml.report.common.evaluated import metrics_of
from cbml.spec.params import load_cell
from cbml.stages.hand_over import hand_over
from cbml.stages.records import record_of
from cbml.tracking.store import Store
from cbml.workspace import Workspace


def import_cells(source: Path, workspace: Workspace) -> list[str]:
    """Bring every evaluated cell of another checkout, or of this one, into the tracking store.

    Each becomes a run with its parameters, curves, metrics and files, the versions that it was computed with, its model
    if its weights are there, and a tag `imported_from`, the name of the folder.

    Args:
        source: a folder that holds evaluations/<dataset>/<cell>; and runs/<dataset>/<cell> if the weights are to come,
            pages/<dataset>/<cell> if the pages are.

    Returns:
        The keys of the cells that came; one that the store has already is left as it is.

    Raises:
        UserError: there is no evaluated cell, MLflow is not installed, a cell's weights are damaged, or the store has a
            cell with other results, before anything is brought; or it does not take a cell, after the others are
            brought.
    """
    theirs = Workspace(source)
    folders = theirs.evaluations()
    if not folders:
        raise UserError(f"{source}: no evaluations/<dataset>/<cell>/cell.yaml; an evaluated cell has one")
    cells = []
    for folder in folders:
        cells.append((load_cell(folder / "cell.yaml", "evaluate"), folder, record_of(folder, "evaluate")["key"]))
    store = Store(workspace)
    known = {dataset: store.finished(dataset) for dataset in {cell.dataset for cell, _, _ in cells}}
    new = []
    for cell, folder, key in cells:
        here = known[cell.dataset].get(key)
        if here is None:
            new.append((cell, folder, key))
        elif metrics_of(here) != metrics_of(folder):
            raise UserError(f"{folder}: the store has {key} already, with other results ({here})")
        else:
            message(f"{key}: here already")
    for cell, *_ in new:
        if (weights := theirs.run(cell) / "final.pt").is_file():
            network.load(cell, weights)  # they become a model
    came = []
    for cell, folder, key in new:
        page = theirs.page(cell) if theirs.page(cell).is_dir() else None
        if hand_over(workspace, cell, folder, theirs.run(cell), page=page, imported_from=source.resolve().name):
            message(f"{key}: imported")
            came.append(key)
    if len(came) < len(new):
        left = ", ".join(key for _, _, key in new if key not in came)
        raise UserError(f"{len(came)} cells imported, {len(new) - len(came)} not, for the reasons above: {left}")
    return came
