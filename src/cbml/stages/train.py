"""Train one cell: from the lists of its dataset to its run folder."""

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch

from cbml import distributed, network, provenance
from cbml.data.lists import ImageList, check_disjoint, hold_out
from cbml.data.open import Data
from cbml.data.scoring import Scoring
from cbml.files import Damaged, atomic_write, read_csv, read_tensors, write_tensors, write_text
from cbml.losses.base import Loss
from cbml.models.embedding_model import EmbeddingModel
from cbml.models.trunks import weights_content
from cbml.models.weights import weights_sha256
from cbml.progress import message
from cbml.samplers.base import BatchSampler
from cbml.samplers.classes import ClassesConfig
from cbml.spec.cell import Cell
from cbml.stages.inputs import open_data
from cbml.stages.records import curves_of, record_of
from cbml.tracking.run import open_cell, open_trained
from cbml.training.checkpoint import Checkpoint, acquire
from cbml.training.device import device_context, facts
from cbml.training.features import images_for
from cbml.training.history import Row
from cbml.training.loop import Job, Trained, train
from cbml.workspace import Workspace

FINISHED = "run"  # of a checkpoint: the run folder, whole
Parts = tuple[EmbeddingModel, Loss, BatchSampler]


def train_cell(cell: Cell, workspace: Workspace) -> Path:
    """Train a cell and write its run folder, complete or not at all.

    One that is with its checkpoint, finished by the same code and packages, is taken: `pipeline.launch` leaves it
    there, and so does a training that is killed before DVC has recorded it.

    It holds `final.pt` and, where they are of another iteration, `best_on_test.pt` and `validated.pt` (state dicts);
    `losses.csv` and `validations.csv` by iteration, and `selection.csv`, the evaluations on the validation classes, if
    the recipe has `select_by`; `pseudo_labels.npz`, each image's cluster by refresh, if the batches are of clusters;
    `cell.yaml`, the configuration; and `run.json`: the cell's `key`, MLflow's `run_id`, the iteration of each protocol,
    seconds, the device and what was set on it, versions, hashes of the training code and of the final weights, and the
    `unit` of all metrics.

    Raises:
        UserError: a list, an image, the weights or the loss's parameters are bad, before anything is trained; the loss
            is not finite.
    """
    for name, (value, used, owner) in cell.changes.items():
        setting = f"'++{owner}.recipe.{cell.recipe_name}.{name}={value}'"
        message(f"{cell.name}: recipe.{name} is {used} by {owner}, not {value} (to keep that: -S {setting})")
    data = open_data(workspace, cell)
    parts = _build(cell, workspace, data.train)
    key = cell.key(data.fingerprint, weights_content(cell.backbone_config, workspace.root))
    code = provenance.training_code(*parts)
    made_with = code | provenance.packages()
    with distributed.joined(), acquire(workspace.checkpoint(key), key, made_with) as checkpoint:
        finished = checkpoint.folder / FINISHED
        record = distributed.from_first(_finished(finished, key, code) if distributed.first() else None)
        if not record:
            _train(cell, workspace, data, parts, key, code, checkpoint)
        elif distributed.first():
            message(f"{key}: is trained already ({record['finished']}), taken as it is")
            _log_finished(cell, workspace, finished, record)
        if distributed.first():
            with atomic_write(workspace.run(cell)) as folder:
                shutil.copytree(finished, folder)
    # The checkpoint stays until the cell is evaluated: by then DVC has recorded this stage.
    return workspace.run(cell)


def _train(
    cell: Cell, workspace: Workspace, data: Data, parts: Parts, key: str, code: dict[str, str], checkpoint: Checkpoint
) -> None:
    """Train a cell and leave its run folder with its checkpoint."""
    selection_job = None
    if selection := cell.recipe.select_by:
        remaining, held_out = hold_out(data.train, selection.validation_classes)
        selecting = _build(cell, workspace, remaining)
        selection_job = _prepare(cell, workspace, data, selecting, remaining, held_out, Scoring(data.ks))
        selection_job = replace(selection_job, select_by=selection.metric)
    job = _prepare(cell, workspace, data, parts, data.train, data.test, data.scoring)
    id_file = checkpoint.folder / "run_id"
    opened = open_cell(workspace, cell, key, data.fingerprint, remember=id_file)
    with opened as run, device_context(cell.recipe) as fabric:
        selected = None
        if selection_job:
            # Its checkpoint stays with the other: a run that continues finds there what was selected.
            selected = train(
                selection_job,
                fabric,
                label=f"{key} without the validation classes",
                checkpoint=checkpoint.part("selection"),
                log=lambda rows: run.log(_of_selection(rows)),
            )
        keep = selected.best if selected else None
        trained = train(job, fabric, label=key, checkpoint=checkpoint, log=run.log, keep=keep)
        if not distributed.first():
            return
        run.send()  # so that its id is known, if the store was away
        validated = {} if keep is None else {"validated": keep}
        seconds = [each.seconds for each in (trained, selected) if each]
        record = {
            "key": key,
            "run_id": run.id,
            "fingerprint": data.fingerprint,
            "iterations": {"final": cell.recipe.iterations, "best_on_test": trained.best, **validated},
            "final_weights_sha256": weights_sha256(trained.network),
            **{f"{kind}_seconds": round(sum(each[kind] for each in seconds), 2) for kind in trained.seconds},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": provenance.device_name(),
            "numerics": facts(fabric, cell.recipe),
            "code": code,
            "versions": provenance.versions(),
            "unit": "percent",  # of all metrics; a run without it is of an earlier version, which wrote shares
        }
        with atomic_write(checkpoint.folder / FINISHED) as folder:
            _write_run(folder, cell, record, job.sampler, trained, selected, checkpoint)


def _finished(folder: Path, key: str, code: dict[str, str]) -> dict[str, Any] | None:
    """The run.json of a finished run folder, if it is whole, and this cell's by this code and these packages."""
    if not (folder / "run.json").is_file():
        return None
    try:
        record = record_of(folder)
        weights = {file.stem: read_tensors(file, "train") for file in folder.glob("*.pt")}
        intact = weights_sha256(weights["final"]) == record["final_weights_sha256"]
    except (Damaged, KeyError) as error:
        message(f"{key}: is not taken from {folder}: {error}")
        return None
    same = record["key"] == key and record["code"] == code
    same = same and provenance.packages_of(record) == provenance.packages()
    return record if intact and same else None


def _log_finished(cell: Cell, workspace: Workspace, folder: Path, record: dict[str, Any]) -> None:
    """Give a finished run its run in this workspace's tracking store: another one may have been trained with."""
    with open_trained(workspace, cell, record, later="the stage evaluate hands it over") as run:
        for curve in curves_of(folder, cell):
            run.log(curve.to_dict("records"))
        if (file := folder / "selection.csv").is_file():
            run.log(_of_selection(read_csv(file, "train").to_dict("records")))
        run.send()
    write_text(folder / "run.json", json.dumps(record | {"run_id": run.id or record["run_id"]}, indent=2))


def _build(cell: Cell, workspace: Workspace, train_list: ImageList) -> Parts:
    """The untrained network of a cell, its loss, and the batches of a training list."""
    config = cell.loss_config.batches or ClassesConfig()
    sampler = config.build(_labels(cell, train_list), cell.recipe, cell.seed)
    torch.manual_seed(cell.seed)
    return *network.build(cell, num_classes=sampler.num_classes, root=workspace.root), sampler


def _labels(cell: Cell, train_list: ImageList) -> np.ndarray:
    """(N,) int64 from 0, as training sees them: what is not to be looked at is not there."""
    config = cell.loss_config.batches or ClassesConfig()
    labels = np.unique(train_list.labels, return_inverse=True)[1]
    return labels if config.needs_labels else np.zeros_like(labels)


def _prepare(
    cell: Cell,
    workspace: Workspace,
    data: Data,
    parts: Parts,
    train_list: ImageList,
    scored: ImageList,
    scoring: Scoring,
) -> Job:
    """Check and open all that training on one list and scoring on another needs."""
    check_disjoint(train_list, scored)
    model, criterion, sampler = parts
    images_of = images_for(cell.recipe, data, model, trunk=cell.trunk, label=f"{cell.dataset}, {cell.backbone}")
    images = images_of(replace(train_list, labels=_labels(cell, train_list))), images_of(scored)
    teacher = cell.loss_config.teacher
    return Job(cell.recipe, cell.seed, model, criterion, sampler, *images, scoring=scoring, teacher_momentum=teacher)


def _write_run(
    folder: Path,
    cell: Cell,
    record: dict[str, Any],
    sampler: BatchSampler,
    trained: Trained,
    selected: Trained | None,
    checkpoint: Checkpoint,
) -> None:
    """The files of a run folder; see `train_cell`."""
    folder.mkdir()
    write_tensors(folder / "final.pt", trained.network)
    for protocol, kind in (("best_on_test", "best"), ("validated", "kept")):
        iteration = record["iterations"].get(protocol)
        if iteration not in (None, 0, cell.recipe.iterations):
            shutil.copy(checkpoint.weights(f"{kind}-{iteration}"), folder / f"{protocol}.pt")
    pd.DataFrame(trained.losses).to_csv(folder / "losses.csv", index=False)
    pd.DataFrame(trained.validations).to_csv(folder / "validations.csv", index=False)
    if selected:
        pd.DataFrame(selected.validations).to_csv(folder / "selection.csv", index=False)
    if len(history := sampler.state_dict().get("history", ())):  # none after no iteration
        iterations = np.arange(len(history)) * cast(int, sampler.period)
        np.savez_compressed(folder / "pseudo_labels.npz", history=history.numpy(), iterations=iterations)
    write_text(folder / "cell.yaml", cell.to_yaml())
    write_text(folder / "run.json", json.dumps(record, indent=2))


def _of_selection(rows: list[Row]) -> list[Row]:
    """The rows with names of their own."""
    return [{name if name == "iteration" else f"selection_{name}": row[name] for name in row} for row in rows]
