"""The metrics of a trained cell."""

import json
import shutil
from pathlib import Path

import pandas as pd
import torch
from lightning_fabric import Fabric

from cbml import tracking
from cbml.backbones import EmbeddingModel, create_model
from cbml.config import Cell, load_cell
from cbml.evaluation.embedding import embed
from cbml.evaluation.metrics import evaluate
from cbml.files import atomic_write, read_json
from cbml.inputs import fingerprint, images_of, list_of

PROTOCOLS = ("final", "best_on_test", "validated")


def evaluate_cell(run_folder: Path, *, state: Path) -> dict[str, dict[str, float]]:
    """Score a folder that `run_cell` wrote, by each protocol, and write evaluations/<dataset>/<cell>.

    `final` is the model after the last iteration. `best_on_test` is the one whose Recall@1 was highest on the test list
    itself, which is what the published figures are; it is there to compare with them and for nothing else. `validated`,
    if the recipe asks for it, is that of the iteration which was best on held-out training classes, trained on all of
    them. `untrained` is the network before the first iteration.

    The folder holds `metrics.json` and, of the run, all but the weights: what tables and reports are made from.

    Args:
        state: where decoded images are kept between runs.
    """
    cell = load_cell(run_folder / "cell.yaml")
    facts = read_json(run_folder / "run.json", "train")
    images = images_of(cell, list_of(cell, "test"), state=state)

    fabric = Fabric(accelerator="auto", devices=1, precision=cell.recipe.precision)
    where = {"crop": cell.recipe.crop, "interpolation": cell.interpolation, "device": fabric.device}
    metrics = {}
    for protocol, iteration in facts["iterations"].items():
        if (file := run_folder / f"{protocol}.pt").is_file():
            model = fabric.setup_module(load_network(cell, file))
            scores = evaluate(embed(model, images, **where), images.labels, nmi=True)
        else:  # the model is the final one
            scores = metrics["final"]
        metrics[protocol] = {**scores, "iteration": iteration}
    metrics["untrained"] = pd.read_csv(run_folder / "validations.csv").iloc[0].to_dict()

    with tracking.cell_run(cell, fingerprint=fingerprint(cell.dataset), run_id=facts["run_id"]) as run:
        run.log([tracking.summary(metrics)])
        run.log_model(run_folder)
        with atomic_write(Path("evaluations", cell.dataset, cell.name)) as folder:
            folder.mkdir()
            (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
            for file in run_folder.iterdir():
                if file.suffix != ".pt":
                    shutil.copy(file, folder)
    checkpoint = state / ".checkpoints" / facts["checkpoint"]
    for suffix in (".pt", ".selection.pt", ".run"):
        checkpoint.with_suffix(suffix).unlink(missing_ok=True)
    return metrics


def load_network(cell: Cell, weights: Path) -> EmbeddingModel:
    """The trained network of a cell, in eval mode, on the CPU, in the recipe's memory format."""
    network = create_model(cell.backbone_config, embedding_dim=cell.embedding_dim, root=Path(), load_weights=False)
    network.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    if cell.recipe.channels_last:
        network.to(memory_format=torch.channels_last)
    return network.eval()
