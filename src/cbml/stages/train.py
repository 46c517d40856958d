"""Train one cell: from the lists of its dataset to its run folder."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cbml import network, provenance
from cbml.data.lists import ImageList, check_disjoint, hold_out
from cbml.data.open import fingerprint, images_of, test_list, training_list
from cbml.evaluation.scoring import Scoring
from cbml.files import atomic_write, write_tensors
from cbml.models import weights_content
from cbml.progress import message
from cbml.samplers import ClassesConfig
from cbml.spec.cell import Cell
from cbml.tracking import store as tracking
from cbml.training.checkpoint import hold
from cbml.training.device import facts, numerics
from cbml.training.loop import train
from cbml.workspace import Workspace


def train_cell(cell: Cell, workspace: Workspace) -> Path:
    """Train a cell and write its run folder, complete or not at all.

    It holds `final.pt` and, where they are of another iteration, `best_on_test.pt` and `validated.pt` (state dicts);
    `losses.csv` and `validations.csv` by iteration, and `selection.csv`, the evaluations on the validation classes, if
    the recipe has `select_by`; `pseudo_labels.npz`, each image's cluster by refresh, if the batches are of clusters;
    `cell.yaml`, the configuration; and `run.json`: the cell's `key`, MLflow's `run_id`, the iteration of each protocol,
    seconds, the device and what was set on it, versions, hashes of the training code and of the final weights, and the
    `unit` of all metrics.

    Raises:
        UserError: a list, an image, the weights or the loss's parameters are bad, before any image is decoded; the
            loss is not finite.
    """
    for name, (value, used, owner) in cell.changes.items():
        setting = f"'++{owner}.recipe.{cell.recipe_name}.{name}={value}'"
        message(f"{cell.name}: recipe.{name} is {used} by {owner}, not {value} (to keep that: -S {setting})")
    selection = cell.recipe.select_by
    train_list, (scored, scoring) = training_list(workspace, cell), test_list(workspace, cell)
    train_on_all, code = _prepare(cell, workspace, train_list, scored, scoring)
    if selection:
        held_out = hold_out(train_list, selection.validation_classes)
        select, _ = _prepare(cell, workspace, *held_out, Scoring(scoring.ks))

    data = fingerprint(workspace, cell.dataset)
    key = cell.key(data, weights_content(cell.backbone_config, workspace.root))
    with hold(workspace.checkpoint(key), key, code | provenance.packages()) as checkpoint:
        id_file = checkpoint.folder / "run_id"
        run_id = id_file.read_text(encoding="utf-8") if id_file.is_file() else None
        opened = tracking.open_cell(workspace, cell, key, data, run_id=run_id, remember=id_file)
        with opened as run, numerics(cell.recipe) as fabric:
            states: list[dict[str, Any]] = []
            if selection:
                # Its checkpoint stays with the other: a run that continues finds there what was selected.
                selected = select(
                    fabric=fabric,
                    label=f"{key} without the validation classes",
                    checkpoint=checkpoint.part("selection"),
                    log=lambda rows: run.log([_prefixed(row, "selection_") for row in rows]),
                    select_by=selection.metric,
                )
                states.append(selected)
            keep = selected["best"]["iteration"] if selection else None
            trained = train_on_all(fabric=fabric, label=key, checkpoint=checkpoint, log=run.log, keep=keep)
            states.append(trained)

            iterations = {"final": cell.recipe.iterations, "best_on_test": trained["best"]["iteration"]}
            if selection:
                iterations["validated"] = keep
            run.send()  # so that its id is known, if the store was away
            record = {
                "key": key,
                "run_id": run.id,
                "fingerprint": data,
                "iterations": iterations,
                "final_weights_sha256": weights_sha256(trained["network"]),
                **{f"{name}_seconds": round(sum(s["seconds"][name] for s in states), 2) for name in trained["seconds"]},
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "device": provenance.device_name(),
                "numerics": facts(fabric, cell.recipe),
                "code": code,
                "versions": provenance.versions(),
                "unit": "percent",  # of all metrics; a run without it is of an earlier version, which wrote shares
            }
            out = workspace.run(cell)
            with atomic_write(out) as folder:
                folder.mkdir()
                write_tensors(folder / "final.pt", trained["network"])
                for protocol, kind in (("best_on_test", "best"), ("validated", "kept")):
                    if iterations.get(protocol, cell.recipe.iterations) not in (0, cell.recipe.iterations):
                        shutil.copy(checkpoint.weights(f"{kind}-{iterations[protocol]}"), folder / f"{protocol}.pt")
                pd.DataFrame(trained["losses"]).to_csv(folder / "losses.csv", index=False)
                pd.DataFrame(trained["validations"]).to_csv(folder / "validations.csv", index=False)
                if selection:
                    pd.DataFrame(selected["validations"]).to_csv(folder / "selection.csv", index=False)
                if "history" in (seen := trained.get("batches", {})):  # none after no iteration
                    iterations_of = np.arange(len(seen["history"])) * seen["period"]
                    np.savez_compressed(
                        folder / "pseudo_labels.npz", history=seen["history"].numpy(), iterations=iterations_of
                    )
                (folder / "cell.yaml").write_text(cell.to_yaml(), encoding="utf-8")
                (folder / "run.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    # The checkpoint stays until `evaluate` begins: by then DVC has recorded this stage.
    return out


def _prepare(
    cell: Cell, workspace: Workspace, train_list: ImageList, scored: ImageList, scoring: Scoring
) -> tuple[Callable[..., dict[str, Any]], dict[str, str]]:
    """Check all that training on one list and scoring on another needs; return `train` with that filled in.

    Beside it: the hashes of the code that takes part.
    """
    check_disjoint(train_list, scored)
    recipe, method = cell.recipe, cell.loss_config
    config = method.batches or ClassesConfig()
    labels = np.unique(train_list.labels, return_inverse=True)[1]
    if not config.needs_labels:
        labels = np.zeros_like(labels)  # what is not there cannot be looked at
    numbers = {"batch_size": recipe.batch_size, "instances": recipe.instances, "iterations": recipe.iterations}
    batches = config.build(labels, seed=cell.seed, **numbers)
    torch.manual_seed(cell.seed)
    model, criterion = network.build(cell, num_classes=batches.num_classes, root=workspace.root)

    def train_on(**options: Any) -> dict[str, Any]:
        images = replace(images_of(workspace, cell, train_list), labels=torch.from_numpy(labels))
        on = images, images_of(workspace, cell, scored)
        options |= {"scoring": scoring, "teacher_momentum": method.teacher}
        return train(recipe, cell.seed, model, criterion, batches, *on, **options)

    return train_on, provenance.training_code(model, criterion, batches)


def _prefixed(row: dict[str, float], prefix: str) -> dict[str, float]:
    return {name if name == "iteration" else prefix + name: value for name, value in row.items()}


def weights_sha256(state: dict[str, Tensor]) -> str:
    """A hash of a state dict's names and values."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
