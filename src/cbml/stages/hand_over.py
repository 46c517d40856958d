"""Bring an evaluated cell into the tracking store, which is the archive of finished cells."""

import json
from pathlib import Path

from cbml import tracking
from cbml.config import Cell
from cbml.files import read_csv, read_json
from cbml.reporting.commands import command
from cbml.reporting.tables import markdown
from cbml.stages.inputs import record_of
from cbml.workspace import Workspace


def hand_over(
    workspace: Workspace,
    cell: Cell,
    folder: Path,
    run_folder: Path,
    *,
    run_id: str | None = None,
    register: bool = False,
    **tags: str,
) -> bool:
    """Log what evaluation left in `folder`, and the model of `run_folder` if it is there; returns whether all arrived.

    Args:
        run_id: the run that training opened. Without one, or if the store did not take all of it then, the curves are
            logged as well.
        register: put the model into MLflow's registry, as a new version of `<dataset>-<cell>`.
        tags: of a new run.
    """
    record, metrics = record_of(folder), read_json(folder / "metrics.json", "evaluate")
    opened = tracking.open_cell(workspace, cell, record["key"], record["fingerprint"], run_id=run_id, **tags)
    with opened as run:
        if not (run_id and record["tracked"]):
            if cell.recipe.iterations:
                run.log(read_csv(folder / "losses.csv", "train").to_dict("records"))
            run.log(read_csv(folder / "validations.csv", "train").to_dict("records"))
        run.log([tracking.summary(metrics)], replace=True)
        run.log_text(json.dumps(record["versions"], indent=2), "versions.json")
        run.log_folder(folder)
        if (run_folder / "final.pt").is_file():
            run.log_model(run_folder, register_as=f"{cell.dataset}-{cell.name}" if register else None)
        run.note(_note(cell, metrics, workspace.conf))
        run.tag("evaluated", "true")
    return run.complete


def _note(cell: Cell, metrics: dict[str, dict[str, float]], conf: Path) -> str:
    """A cell's rows of the table, and its command, as Markdown."""
    names = [name for name in metrics["untrained"] if "recall" in name]
    table = pd.DataFrame(
        [[protocol, *(f"{100 * scores[name]:.1f}" for name in names)] for protocol, scores in metrics.items()],
        columns=["protocol", *names],
    )
    return f"{table.to_markdown(index=False)}\n\nIn percent. Again:\n\n    {command(cell, [cell.seed], conf)}\n"
