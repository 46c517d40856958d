"""The metrics of a trained cell."""

import json
from pathlib import Path

import pandas as pd
import torch
from lightning_fabric import Fabric

from cbml import tracking
from cbml.backbones import create_model
from cbml.config import load_cell
from cbml.datasets.images import pack_images
from cbml.datasets.lists import read_list
from cbml.evaluation.embedding import embed
from cbml.evaluation.metrics import evaluate
from cbml.files import atomic_write

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
    facts = json.loads((run_folder / "run.json").read_text())
    lists = Path("lists", cell.dataset)
    fingerprint = json.loads((lists / "summary.json").read_text())["fingerprint"]
    test_list = read_list(lists / "test.txt", Path("data", cell.dataset))
    images = pack_images(
        test_list,
        Path("data", cell.dataset),
        state / ".cache",
        resize=cell.recipe.resize,
        interpolation=cell.interpolation,
        fingerprint=fingerprint,
    )

    fabric = Fabric(accelerator="auto", devices=1, precision=cell.recipe.precision)
    network = create_model(cell.backbone_config, embedding_dim=cell.embedding_dim, root=state, load_weights=False)
    model = fabric.setup_module(network)
    model.eval()
    metrics = {}
    for protocol, iteration in zip(PROTOCOLS, (cell.recipe.iterations, facts["best_iteration"]), strict=True):
        if (file := run_folder / f"{protocol}.pt").is_file():
            network.load_state_dict(torch.load(file, weights_only=True, map_location=fabric.device))
            embeddings = embed(
                model, images, crop=cell.recipe.crop, interpolation=cell.interpolation, device=fabric.device
            )
            scores = evaluate(embeddings, images.labels, nmi=True)
        metrics[protocol] = {"iteration": iteration, **scores}
    metrics["untrained"] = pd.read_csv(run_folder / "validations.csv").iloc[0].to_dict()

    with tracking.cell_run(cell, fingerprint=fingerprint, run_id=facts["run_id"]) as run:
        run.log(
            [
                metrics["final"],
                *(
                    {
                        "iteration": metrics["final"]["iteration"],
                        **{
                            f"{protocol}_{name}": value for name, value in metrics[protocol].items() if "recall" in name
                        },
                    }
                    for protocol in ("best_on_test", "untrained")
                ),
            ]
        )
        run.log_model(run_folder)
        with atomic_write(Path("evaluations", cell.dataset, cell.name)) as folder:
            folder.mkdir()
            (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
    return metrics
