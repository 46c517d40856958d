"""Bring an evaluated cell into the tracking store, which is the archive of finished cells."""

import json
from pathlib import Path

import pandas as pd

from cbml.files import read_csv
from cbml.report.common.evaluated import metrics_of
from cbml.report.common.numbers import recalls
from cbml.report.tables.commands import command
from cbml.report.tables.markdown import pipe_table
from cbml.spec.cell import Cell
from cbml.stages.records import curves_of, record_of
from cbml.tracking.model import WEIGHTS
from cbml.tracking.run import open_trained, summary
from cbml.workspace import Workspace

LATER = "python -m pipeline.import_cells . brings it there later"


def hand_over(
    workspace: Workspace,
    cell: Cell,
    evaluation: Path,
    run_folder: Path,
    *,
    page: Path | None = None,
    register: bool = False,
    **tags: str,
) -> bool:
    """Log what evaluation left, and the model of `run_folder` if it is there.

    The run is that which training opened, if the store has it. The curves are logged as far as it has not taken them.

    Args:
        page: the folder of its page, if that is drawn already.
        register: put the model into MLflow's registry, as a new version of `<dataset>-<cell>`.
        tags: of a new run.

    Returns:
        Whether the store has taken everything.
    """
    record, metrics = record_of(evaluation, "evaluate"), metrics_of(evaluation)
    with open_trained(workspace, cell, record, later=LATER, tags=tags) as run:
        run.tag("evaluated", "false")  # until all of it is there
        for curve in curves_of(evaluation, cell, "evaluate"):
            run.log(curve.to_dict("records"))
        if (file := evaluation / "pseudo_labels.csv").is_file():
            table = read_csv(file, "evaluate", ("iteration", "nmi", "purity", "changed")).set_index("iteration")
            for iteration, row in table[["nmi", "purity", "changed"]].iterrows():
                run.log([{"iteration": iteration, **row.dropna().add_prefix("pseudo_label_")}])
        run.log([summary(metrics)], replace=True)
        # K as the step: one chart has the curves of all runs.
        by_k = {int(name.removeprefix("recall_at_")): metrics["final"][name] for name in recalls(metrics["final"])}
        run.log([{"iteration": k, "recall_at_k": recall} for k, recall in by_k.items()], replace=True)
        run.log_text(json.dumps(record["versions"], indent=2), "versions.json")
        run.log_folder(evaluation)
        if page:
            run.log_page(page)
        if (run_folder / "final.pt").is_file():
            name = f"{cell.dataset}-{cell.name}" if register else None
            run.log_model(run_folder, weights=record.get(WEIGHTS), register_as=name)
        run.note(_note(cell, metrics, workspace.conf))
        run.seal("evaluated")
    return run.complete


def _note(cell: Cell, metrics: dict[str, dict[str, float]], conf: Path) -> str:
    """A cell's rows of the table, and its command, as Markdown."""
    names = [name for name in recalls(metrics["final"]) if all(name in scores for scores in metrics.values())]
    rows = [[protocol, *(f"{scores[name]:.1f}" for name in names)] for protocol, scores in metrics.items()]
    table = pipe_table(pd.DataFrame(rows, columns=["protocol", *names]))
    # Not as a block, whose long line would push the rest of MLflow's page out of sight.
    again = command(cell, [cell.seed], conf)
    return f"{table}\n\nIn percent.{f' Again: `{again}`' if again else ''}\n"
