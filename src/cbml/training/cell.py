"""One cell of the tables, from lists to files."""

import hashlib
import json
from dataclasses import replace
from functools import partial
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
from cbml.datasets.images import pack_images
from cbml.datasets.lists import check_disjoint, read_list
from cbml.datasets.sampler import class_balanced_batches
from cbml.files import atomic_write, read_json
from cbml.losses import Loss, build_loss
from cbml.training.loop import train


def weights_sha256(state: dict[str, Tensor]) -> str:
    """A hash of a state dict's names and values."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def run_cell(cell: Cell, *, state: Path) -> Path:
    """Train a cell and write runs/<dataset>/<cell>, a complete folder or none.

    It holds `final.pt` and, if another iteration was best, `best_on_test.pt` (state dicts), `losses.csv` and
    `validations.csv` by iteration, `cell.yaml` (the configuration) and `run.json` (MLflow's run id, the best iteration,
    a hash of the final weights, the checkpoint).

    Args:
        state: where decoded images and checkpoints are kept between runs, and what a path of weights is relative to.

    Raises:
        UserError: a list, an image, the weights or the loss's parameters are bad, before any image is decoded; the
            loss is not finite.
    """
    data, lists = Path("data", cell.dataset), Path("lists", cell.dataset)
    train_list, test_list = read_list(lists / "train.txt", data), read_list(lists / "test.txt", data)
    check_disjoint(train_list, test_list)
    fingerprint = read_json(lists / "summary.json", "build_lists")["fingerprint"]
    labels = np.unique(train_list.labels, return_inverse=True)[1]
    batches = class_balanced_batches(labels, cell.recipe.batch_size, cell.recipe.instances, cell.seed)
    torch.manual_seed(cell.seed)
    network, criterion = build(cell, num_classes=train_list.num_classes, root=state)

    # Named after everything that determines the run: a changed parameter never continues an old one.
    contents = [fingerprint, *((lists / name).read_text() for name in ("train.txt", "test.txt"))]
    if cell.backbone_config.weights not in (None, "imagenet"):
        contents.append(hashlib.sha256((state / cell.backbone_config.weights).read_bytes()).hexdigest())
    checkpoint = state / ".checkpoints" / f"{cell.dataset}-{cell.name}-{cell.hash(*contents)}.pt"
    run_id_file = checkpoint.with_suffix(".run")
    checkpoint.parent.mkdir(exist_ok=True)

    with FileLock(checkpoint.with_suffix(".lock")):  # two queued experiments may hold the same cell
        pack = partial(
            pack_images,
            root=data,
            cache=state / ".cache",
            resize=cell.recipe.resize,
            interpolation=cell.interpolation,
            fingerprint=fingerprint,
        )
        images, test_images = replace(pack(train_list), labels=torch.from_numpy(labels)), pack(test_list)
        run_id = run_id_file.read_text() if run_id_file.is_file() else None
        with tracking.cell_run(cell, fingerprint=fingerprint, run_id=run_id) as run:
            run_id_file.write_text(run.id)
            trained = train(cell, network, criterion, batches, images, test_images, checkpoint=checkpoint, log=run.log)
            facts = {
                "run_id": run.id,
                "best_iteration": trained.best_iteration,
                "final_weights_sha256": weights_sha256(trained.final),
                "checkpoint": checkpoint.name,
            }
            out = Path("runs", cell.dataset, cell.name)
            with atomic_write(out) as folder:
                folder.mkdir()
                torch.save(trained.final, folder / "final.pt")
                if trained.best_iteration != cell.recipe.iterations:
                    torch.save(trained.best_on_test, folder / "best_on_test.pt")
                pd.DataFrame(trained.losses).to_csv(folder / "losses.csv", index=False)
                pd.DataFrame(trained.validations).to_csv(folder / "validations.csv", index=False)
                (folder / "cell.yaml").write_text(yaml.safe_dump(cell.to_dict(), sort_keys=False))
                (folder / "run.json").write_text(json.dumps(facts, indent=2))
    # The checkpoint stays until `evaluate`: DVC has recorded this stage by then.
    return out


def build(cell: Cell, *, num_classes: int, root: Path) -> tuple[EmbeddingModel, Loss]:
    """The untrained network of a cell, on its weights, and its loss.

    Raises:
        UserError: the weights cannot be had or do not fit; the loss's parameters do not fit together.
    """
    network = create_model(cell.backbone_config, embedding_dim=cell.embedding_dim, root=root)
    network.freeze_bn = cell.recipe.freeze_bn
    criterion = build_loss(cell.loss_config, embedding_dim=network.embedding_dim, num_classes=num_classes)
    return network, criterion
