"""Find each loss's constants by the same number of trials on folds of the training classes."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cbml import network, provenance
from cbml.errors import UserError
from cbml.files import write_text
from cbml.progress import message
from cbml.report.tables.tuning import trials_chart
from cbml.spec.cell import Cell
from cbml.stages.inputs import open_data
from cbml.tracking.run import log_study
from cbml.training.device import device_context
from cbml.training.features import images_for, learned
from cbml.tuning.preset import near_an_end, trials_table, write_preset
from cbml.tuning.study import Budget, Problem, run_study
from cbml.workspace import Workspace


def tune(workspace: Workspace, dataset: str, budget: Budget, storage: str | None = None) -> Path:
    """Give each loss of params.yaml its trials, and write what came out.

    That is a preset, conf/paper/tuned_<dataset>_<recipe>_<backbone>.yaml, which trains each loss with its best
    constants; and in reports/<dataset>/tuning all trials, `trials.csv`, and a picture of each loss's. No test
    image is scored, and no class of one is read. What is interrupted goes on; several processes may work on it.

    Args:
        storage: where Optuna keeps the studies, a URL; None: a file of the repository, which git ignores.

    Raises:
        UserError: params.yaml has several backbones or sizes, or the folds do not fit the training classes; a cell
            cannot be built.
    """
    params, cells = workspace.params(), workspace.cells(dataset)
    if len(params.backbone) > 1 or len(params.embedding_dim) > 1:
        raise UserError("tune: takes one backbone and one size; -S 'backbone=[NAME]' -S 'embedding_dim=[N]'")
    cells = [cell for cell in cells if cell.seed == cells[0].seed]
    storage = storage or f"sqlite:///{workspace.studies}"
    tables, best, notes = [], {}, []
    for cell in cells:
        method = params.option("loss", cell.loss)
        problem = _problem(workspace, cell, params.recipe.search, method.search)
        with device_context(cell.recipe) as fabric:
            study = run_study(problem, budget, storage, fabric)
        tables.append(trials_table(problem, study))
        log_study(workspace, cell, study.study_name, budget.told, tables[-1])
        best[cell.loss] = study.best_params
        if ends := near_an_end(problem, study.best_params):
            notes.append(f"{cell.loss}: at an end of its range: {', '.join(ends)}")
        message(f"{cell.loss}: {study.best_value:.2f} after {len(tables[-1])} trials")
    return _write(workspace, cells, pd.concat(tables, ignore_index=True), best, notes, budget)


def _problem(workspace: Workspace, cell: Cell, search: dict[str, Any], loss: dict[str, Any]) -> Problem:
    data = open_data(workspace, cell)
    torch.manual_seed(cell.seed)
    model, _ = network.build(cell, num_classes=len(data.train.class_names), root=workspace.root)
    images_of = images_for(cell.recipe, data, model, trunk=cell.trunk, label=f"{cell.dataset}, {cell.backbone}")
    of = {"images": images_of(data.train), "labels": data.train.labels, "fingerprint": data.fingerprint}
    return Problem.of(cell, search, loss, model=learned(model, cell.recipe), **of)


def _write(
    workspace: Workspace,
    cells: list[Cell],
    trials: pd.DataFrame,
    best: dict[str, dict[str, Any]],
    notes: list[str],
    budget: Budget,
) -> Path:
    first, today = cells[0], datetime.now(UTC).date().isoformat()
    told = budget.told
    preset = workspace.conf / "paper" / f"tuned_{first.dataset}_{first.recipe_name}_{first.backbone}.yaml"
    heading = [f"Each loss is tuned by {told}; {today}, {provenance.revision()}.", *notes]
    heading += ["", f"    dvc exp run -S +paper={preset.stem}", ""]
    write_text(preset, write_preset(cells, best, told, "\n".join(heading)))
    folder = workspace.report(first.dataset) / "tuning"
    write_text(folder / "trials.csv", trials.to_csv(index=False))
    for cell in cells:
        own = trials[trials.loss == cell.loss].dropna(axis=1, how="all")
        write_text(folder / f"{cell.loss}.svg", trials_chart(f"{cell.loss}: {told}", own))
    message(f"{preset}: trained by dvc exp run -S +paper={preset.stem}")
    return preset
