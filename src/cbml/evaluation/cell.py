"""The metrics of a trained cell."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric

from cbml import kept, tracking
from cbml.backbones import EmbeddingModel, create_model
from cbml.config import Cell, load_cell
from cbml.datasets.lists import ImageList
from cbml.evaluation.embedding import embed
from cbml.evaluation.metrics import evaluate
from cbml.figures.cell import draw_cell
from cbml.files import atomic_write, read_json
from cbml.inputs import fingerprint, images_of, list_of
from cbml.reporting.commands import command
from cbml.reporting.page import write_cell_page

# Of the training list, for its distribution of similarities: enough pairs, and seconds even for a large network.
SAMPLE_CLASSES, SAMPLE_IMAGES = 20, 15


def evaluate_cell(run_folder: Path, *, state: Path, register: bool = False) -> dict[str, dict[str, float]]:
    """Score a folder that `run_cell` wrote, by each protocol, and write evaluations/<dataset>/<cell>.

    `final` is the model after the last iteration. `best_on_test` is the one whose Recall@1 was highest on the test list
    itself, which is what the published figures are; it is there to compare with them and for nothing else. `validated`,
    if the recipe asks for it, is that of the iteration which was best on held-out training classes, trained on all of
    them. `untrained` is the network before the first iteration.

    The folder holds `metrics.json`, the pictures of the final model (see `draw_cell`), `index.html` with all of it, and
    of the run all but the weights: what tables and reports are made from.

    Args:
        state: where decoded images are kept between runs.
        register: put the model into MLflow's registry, as a new version of `<dataset>-<cell>`.
    """
    cell = load_cell(run_folder / "cell.yaml")
    facts = read_json(run_folder / "run.json", "train")
    test_list = list_of(cell, "test")
    images = images_of(cell, test_list, state=state)

    fabric = Fabric(accelerator="auto", devices=1, precision=cell.recipe.precision)
    where = {"crop": cell.recipe.crop, "interpolation": cell.interpolation, "device": fabric.device}
    final = fabric.setup_module(load_network(cell, run_folder / "final.pt"))
    embeddings = embed(final, images, **where)
    metrics = {"final": evaluate(embeddings, images.labels, nmi=True)}
    for protocol, iteration in facts["iterations"].items():
        if protocol != "final" and (file := run_folder / f"{protocol}.pt").is_file():  # else it is the final model
            model = fabric.setup_module(load_network(cell, file))
            metrics[protocol] = evaluate(embed(model, images, **where), images.labels, nmi=True)
        metrics[protocol] = {**metrics.get(protocol, metrics["final"]), "iteration": iteration}
    metrics["untrained"] = pd.read_csv(run_folder / "validations.csv").iloc[0].to_dict()

    with tracking.cell_run(cell, fingerprint=fingerprint(cell.dataset), run_id=facts["run_id"]) as run:
        run.log([tracking.summary(metrics)])
        run.log_model(run_folder, register_as=f"{cell.dataset}-{cell.name}" if register else None)
        with atomic_write(Path("evaluations", cell.dataset, cell.name)) as folder:
            folder.mkdir()
            (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
            for file in run_folder.iterdir():
                if file.suffix != ".pt":
                    shutil.copy(file, folder)
            sample = _sample(list_of(cell, "train"))
            train_images = images_of(cell, sample, state=state)
            losses = folder / "losses.csv"
            draw_cell(
                folder,
                title=f"{cell.name} on {cell.dataset}",
                test=embeddings,
                test_labels=images.labels,
                images=images,
                class_names=dict(zip(test_list.labels.tolist(), test_list.folders, strict=True)),
                train=embed(final, train_images, **where),
                train_labels=train_images.labels,
                losses=pd.read_csv(losses) if cell.recipe.iterations else pd.DataFrame(),
                validations=pd.read_csv(folder / "validations.csv"),
                best_iteration=facts["iterations"]["best_on_test"],
                seed=cell.seed,
            )
            write_cell_page(folder, cell)
            run.log_folder(folder)
        run.note(_note(cell, metrics))
    kept.keep(Path("evaluations", cell.dataset, cell.name))
    checkpoint = state / ".checkpoints" / facts["checkpoint"]
    for suffix in (".pt", ".selection.pt", ".run"):
        checkpoint.with_suffix(suffix).unlink(missing_ok=True)
    return metrics


def _sample(images: ImageList) -> ImageList:
    """Some images of some classes, the same for every cell of a dataset."""
    rng = np.random.default_rng(0)
    classes = np.unique(images.labels)
    chosen = rng.permutation(classes)[:SAMPLE_CLASSES]
    indices = np.sort(
        np.concatenate([rng.permutation(np.flatnonzero(images.labels == label))[:SAMPLE_IMAGES] for label in chosen])
    )
    return ImageList([images.paths[index] for index in indices], images.labels[indices])


def _note(cell: Cell, metrics: dict[str, dict[str, float]]) -> str:
    """A cell's rows of the table, and its command, as Markdown."""
    names = [name for name in metrics["untrained"] if "recall" in name]
    rows = [["protocol", *names], ["---"] * (1 + len(names))]
    rows += [[protocol, *(f"{100 * scores[name]:.1f}" for name in names)] for protocol, scores in metrics.items()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\nIn percent. Again:\n\n    {command(cell, [cell.seed])}\n"


def load_network(cell: Cell, weights: Path) -> EmbeddingModel:
    """The trained network of a cell, in eval mode, on the CPU, in the recipe's memory format."""
    network = create_model(cell.backbone_config, embedding_dim=cell.embedding_dim, root=Path(), load_weights=False)
    network.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    if cell.recipe.channels_last:
        network.to(memory_format=torch.channels_last)
    return network.eval()
