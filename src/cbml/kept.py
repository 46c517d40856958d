"""A copy of every evaluated cell, because DVC takes evaluations/ away when an experiment has other cells."""

from pathlib import Path

from cbml import tracking
from cbml.files import copy_folder


def keep(folder: Path) -> None:
    """Copy evaluations/<dataset>/<cell>, of this checkout or another."""
    copy_folder(folder, _store(folder.parent.name) / folder.name)


def restore(dataset: str) -> None:
    """Bring back to evaluations/<dataset> the cells that are not there."""
    for file in _store(dataset).glob("*/cell.yaml"):
        here = Path("evaluations", dataset, file.parent.name)
        if not here.exists():
            copy_folder(file.parent, here)


def _store(dataset: str) -> Path:
    return tracking.root() / ".evaluated" / dataset
