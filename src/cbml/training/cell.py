"""One cell of the tables, from lists to files."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from filelock import FileLock
from torch import Tensor

from cbml import tracking
from cbml.backbones import EmbeddingModel, create_model
from cbml.config import Cell
from cbml.datasets.lists import check_disjoint
from cbml.datasets.sampler import class_balanced_batches
from cbml.files import atomic_write
from cbml.inputs import fingerprint, images_of, list_file, list_of
from cbml.losses import Loss, build_loss
from cbml.training.loop import Row, Trained, train


def weights_sha256(state: dict[str, Tensor]) -> str:
    """A hash of a state dict's names and values."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def run_cell(cell: Cell, *, state: Path) -> Path:
    """Train a cell and write runs/<dataset>/<cell>, a complete folder or none.

    It holds `final.pt` and, where they are of another iteration, `best_on_test.pt` and `validated.pt` (state dicts);
    `losses.csv` and `validations.csv` by iteration, and `selection.csv`, the evaluations on the validation classes, if
    the recipe has `select_by`; `cell.yaml` (the configuration) and `run.json` (MLflow's run id, each protocol's
    iteration, seconds, device, versions, a hash of the final weights, the checkpoint).

    Args:
        state: where decoded images and checkpoints are kept between runs, and what a path of weights is relative to.

    Raises:
        UserError: a list, an image, the weights or the loss's parameters are bad, before any image is decoded; the
            loss is not finite.
    """
    select_by = cell.recipe.select_by
    ready = _prepare(cell, "train", "test", state)
    ready_to_select = _prepare(cell, "train_without_validation", "validation", state) if select_by else None

    # Named after everything that determines the run: a changed parameter never continues an old one.
    names = ["train", "test"] + (["train_without_validation", "validation"] if select_by else [])
    dataset_fingerprint = fingerprint(cell.dataset)
    contents = [dataset_fingerprint, *(list_file(cell.dataset, name).read_text() for name in names)]
    if cell.backbone_config.weights not in (None, "imagenet"):
        contents.append(hashlib.sha256((state / cell.backbone_config.weights).read_bytes()).hexdigest())
    checkpoint = state / ".checkpoints" / f"{cell.dataset}-{cell.name}-{cell.hash(*contents)}.pt"
    run_id_file = checkpoint.with_suffix(".run")
    checkpoint.parent.mkdir(exist_ok=True)

    with FileLock(checkpoint.with_suffix(".lock")):  # two queued experiments may hold the same cell
        run_id = run_id_file.read_text() if run_id_file.is_file() else None
        with tracking.cell_run(cell, fingerprint=dataset_fingerprint, run_id=run_id) as run:
            run_id_file.write_text(run.id)
            selected = None
            if ready_to_select:
                # Its checkpoint stays until `evaluate` too: a run that continues finds there what was selected.
                selected = ready_to_select(
                    name=f"{cell.name} without the validation classes",
                    checkpoint=checkpoint.with_suffix(".selection.pt"),
                    log=lambda rows: run.log([_prefixed(row, "selection_") for row in rows]),
                    select_by=select_by,
                )
            trained = ready(
                name=cell.name,
                checkpoint=checkpoint,
                log=run.log,
                keep=selected and selected.best_iteration,
            )
            weights = {"final": (cell.recipe.iterations, trained.final)}
            weights["best_on_test"] = (trained.best_iteration, trained.best)
            if selected:
                weights["validated"] = (selected.best_iteration, trained.kept)
            phases = [phase for phase in (selected, trained) if phase]
            facts = {
                "run_id": run.id,
                "iterations": {protocol: iteration for protocol, (iteration, _) in weights.items()},
                "final_weights_sha256": weights_sha256(trained.final),
                "checkpoint": checkpoint.name,
                **{
                    name: round(sum(getattr(phase, name) for phase in phases), 2)
                    for name in ("train_seconds", "data_seconds", "validation_seconds")
                },
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "device": tracking.device_name(),
                "versions": tracking.versions(),
            }
            out = Path("runs", cell.dataset, cell.name)
            with atomic_write(out) as folder:
                folder.mkdir()
                for protocol, (iteration, state_dict) in weights.items():
                    if protocol == "final" or iteration != cell.recipe.iterations:
                        torch.save(state_dict, folder / f"{protocol}.pt")
                pd.DataFrame(trained.losses).to_csv(folder / "losses.csv", index=False)
                pd.DataFrame(trained.validations).to_csv(folder / "validations.csv", index=False)
                if selected:
                    pd.DataFrame(selected.validations).to_csv(folder / "selection.csv", index=False)
                (folder / "cell.yaml").write_text(yaml.safe_dump(cell.to_dict(), sort_keys=False))
                (folder / "run.json").write_text(json.dumps(facts, indent=2))
    # The checkpoints stay until `evaluate`: DVC has recorded this stage by then.
    return out


def _prepare(cell: Cell, train_name: str, scored_name: str, state: Path) -> Callable[..., Trained]:
    """Check what training on one list and scoring on another needs; return `train` with all of it filled in."""
    train_list, scored_list = list_of(cell, train_name), list_of(cell, scored_name)
    check_disjoint(train_list, scored_list)
    labels = np.unique(train_list.labels, return_inverse=True)[1]
    batches = class_balanced_batches(labels, cell.recipe.batch_size, cell.recipe.instances, cell.seed)
    torch.manual_seed(cell.seed)
    network, criterion = build(cell, num_classes=train_list.num_classes, root=state)

    def start(**options) -> Trained:
        images = replace(images_of(cell, train_list, state=state), labels=torch.from_numpy(labels))
        return train(cell, network, criterion, batches, images, images_of(cell, scored_list, state=state), **options)

    return start


def _prefixed(row: Row, prefix: str) -> Row:
    return {name if name == "iteration" else prefix + name: value for name, value in row.items()}


def build(cell: Cell, *, num_classes: int, root: Path) -> tuple[EmbeddingModel, Loss]:
    """The untrained network of a cell, on its weights, and its loss.

    Raises:
        UserError: the weights cannot be had or do not fit; the loss's parameters do not fit together.
    """
    network = create_model(cell.backbone_config, embedding_dim=cell.embedding_dim, root=root)
    network.freeze_bn = cell.recipe.freeze_bn
    criterion = build_loss(cell.loss_config, embedding_dim=network.embedding_dim, num_classes=num_classes)
    return network, criterion
