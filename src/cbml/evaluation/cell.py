"""The metrics of a trained cell."""

import json
from pathlib import Path

import pandas as pd
import torch
from lightning_fabric import Fabric

from cbml import tracking
from cbml.backbones import EmbeddingModel, create_model
from cbml.config import Cell, load_cell
from cbml.datasets.images import pack_images
from cbml.datasets.lists import read_list
from cbml.evaluation.embedding import embed
from cbml.evaluation.metrics import evaluate
from cbml.files import atomic_write, read_json

PROTOCOLS = ("final", "best_on_test")


def evaluate_cell(run_folder: Path, *, state: Path) -> dict[str, dict[str, float]]:
    """Score a folder that `run_cell` wrote, by each protocol, and write evaluations/<dataset>/<cell>/metrics.json.

    `final` is the model after the last iteration. `best_on_test` is the one whose Recall@1 was highest on the test list
    itself, which is what the published figures are; it is there to compare with them and for nothing else. `untrained`
    is the network before the first iteration.

    Args:
        state: where decoded images are kept between runs.
    """
    cell = load_cell(run_folder / "cell.yaml")
    facts = read_json(run_folder / "run.json", "train")
    data, lists = Path("data", cell.dataset), Path("lists", cell.dataset)
    fingerprint = read_json(lists / "summary.json", "build_lists")["fingerprint"]
    size = {"resize": cell.recipe.resize, "interpolation": cell.interpolation}
    test_list = read_list(lists / "test.txt", data)
    images = pack_images(test_list, data, state / ".cache", fingerprint=fingerprint, **size)

    fabric = Fabric(accelerator="auto", devices=1, precision=cell.recipe.precision)
    where = {"crop": cell.recipe.crop, "interpolation": cell.interpolation, "device": fabric.device}
    metrics = {}
    for protocol, iteration in zip(PROTOCOLS, (cell.recipe.iterations, facts["best_iteration"]), strict=True):
        if (file := run_folder / f"{protocol}.pt").is_file():  # else the model of both is the same
            model = fabric.setup_module(load_network(cell, file))
            scores = evaluate(embed(model, images, **where), images.labels, nmi=True)
        metrics[protocol] = {"iteration": iteration, **scores}
    metrics["untrained"] = pd.read_csv(run_folder / "validations.csv").iloc[0].to_dict()

    with tracking.cell_run(cell, fingerprint=fingerprint, run_id=facts["run_id"]) as run:
        row = dict(metrics["final"])
        for protocol in ("best_on_test", "untrained"):
            row |= {f"{protocol}_{name}": value for name, value in metrics[protocol].items() if "recall" in name}
        run.log([row])
        run.log_model(run_folder)
        with atomic_write(Path("evaluations", cell.dataset, cell.name)) as folder:
            folder.mkdir()
            (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
    checkpoint = state / ".checkpoints" / facts["checkpoint"]
    for file in (checkpoint, checkpoint.with_suffix(".run")):
        file.unlink(missing_ok=True)
    return metrics


def load_network(cell: Cell, weights: Path) -> EmbeddingModel:
    """The trained network of a cell, in eval mode, on the CPU, in the recipe's memory format."""
    network = create_model(cell.backbone_config, embedding_dim=cell.embedding_dim, root=Path(), load_weights=False)
    network.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    if cell.recipe.channels_last:
        network.to(memory_format=torch.channels_last)
    return network.eval()
