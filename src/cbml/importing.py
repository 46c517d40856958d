"""Cells that were trained and evaluated in another checkout, on another machine."""

import json
from pathlib import Path

import pandas as pd

from cbml import kept, tracking
from cbml.config import load_cell
from cbml.errors import UserError
from cbml.files import copy_folder, read_json
from cbml.progress import message


def import_cells(source: Path) -> list[str]:
    """Copy evaluations/ (and runs/ and lists/, as far as they are there) of another checkout into this one.

    Each new cell becomes a run in this checkout's MLflow store, with its parameters, curves, metrics and files, the
    versions that it was computed with, and a tag `imported_from`.

    Args:
        source: a folder that holds evaluations/<dataset>/<cell>.

    Returns:
        `<dataset>/<cell>` of every cell copied; a cell that is here already is left as it is.

    Raises:
        UserError: there is no evaluated cell, before anything is copied; a cell of that name is here with other
            results; the lists of the two checkouts differ.
    """
    folders = [file.parent for file in sorted(source.glob("evaluations/*/*/cell.yaml"))]
    if not folders:
        raise UserError(f"{source}: no evaluations/<dataset>/<cell>/cell.yaml; an evaluated cell has one")
    new = []
    for folder in folders:
        dataset, name = folder.parts[-2:]
        theirs, here = (root / "lists" / dataset / "summary.json" for root in (source, Path()))
        fingerprint = read_json(theirs, "build_lists")["fingerprint"]
        if here.is_file() and read_json(here, "build_lists")["fingerprint"] != fingerprint:
            raise UserError(f"{theirs}: of other images than {here}; cells of the two do not compare")
        target = Path("evaluations", dataset, name)
        if not target.is_dir():
            new.append(folder)
        elif (target / "metrics.json").read_bytes() != (folder / "metrics.json").read_bytes():
            raise UserError(f"{target}: here already, with other results than {folder}; remove one of them")
        else:
            message(f"{dataset}/{name}: here already")

    for folder in new:
        dataset, name = folder.parts[-2:]
        cell = load_cell(folder / "cell.yaml")
        metrics = read_json(folder / "metrics.json", "evaluate")
        facts = read_json(folder / "run.json", "train")
        if not Path("lists", dataset).is_dir():
            copy_folder(source / "lists" / dataset, Path("lists", dataset))
        fingerprint = read_json(Path("lists", dataset, "summary.json"), "build_lists")["fingerprint"]
        with tracking.cell_run(cell, fingerprint=fingerprint, imported_from=str(source.resolve())) as run:
            for curve in ("losses", "validations"):
                file = folder / f"{curve}.csv"
                if file.stat().st_size > 1:  # a run of no iterations has no losses
                    run.log(pd.read_csv(file).to_dict("records"))
            run.log([tracking.summary(metrics)])
            run.log_text(json.dumps(facts["versions"], indent=2), "versions.json")
            run.log_folder(folder)
            for kind in ("runs", "evaluations"):
                if (source / kind / dataset / name).is_dir():
                    copy_folder(source / kind / dataset / name, Path(kind, dataset, name))
            kept.keep(folder)
        message(f"{dataset}/{name}: imported")
    return ["/".join(folder.parts[-2:]) for folder in new]
