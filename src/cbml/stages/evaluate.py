"""Score one trained cell: from its run folder to numbers, and to what its pictures are drawn from."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from cbml import network, provenance
from cbml.data.images import Images
from cbml.errors import UserError
from cbml.evaluation.embedding import embed
from cbml.evaluation.metrics import affords_nmi, evaluate
from cbml.evaluation.per_class import class_table, sample_images
from cbml.evaluation.pseudo_labels import pseudo_label_table
from cbml.evaluation.retrieval import retrieve
from cbml.evaluation.similarities import pair_similarities
from cbml.files import atomic_write, read_arrays, read_csv, read_json
from cbml.models.embedding_model import EmbeddingModel
from cbml.progress import message
from cbml.spec.cell import Cell
from cbml.spec.params import load_cell
from cbml.stages.hand_over import hand_over
from cbml.stages.inputs import open_data
from cbml.stages.records import curves_of, record_of
from cbml.training import checkpoint
from cbml.training.device import device_context, set_up
from cbml.training.features import images_for, learned
from cbml.workspace import Workspace

CURVE = tuple(2**power for power in range(10))  # the K of recall_at_k.csv
NEIGHBOURS = 8
# Of the training list, for its distribution of similarities: enough pairs, and seconds even for a large network.
TRAIN_CLASSES, TRAIN_IMAGES = 20, 15
MAP_CLASSES, MAP_IMAGES = 10, 60

Metrics = dict[str, dict[str, float]]


def evaluate_cell(run_folder: Path, workspace: Workspace, *, register: bool = False) -> Metrics:
    """Score what `train_cell` wrote, by each protocol, and write the cell's evaluation folder.

    `final` is the model after the last iteration. `best_on_test` is the one whose Recall@1 was highest on the test list
    itself, which is what the published figures are; it is there to compare with them and for nothing else. `validated`,
    if the recipe asks for it, is that of the iteration which was best on held-out training classes, trained on all of
    them. `untrained` is the network before the first iteration.

    The folder holds, of the final model on the test list:

        metrics.json        by protocol, in percent; without `nmi` where that takes too long
        recall_at_k.csv     Recall@K for K = 1, 2, 4, … 512, below the size of the list
        neighbours.npz      of each query the nearest others, `indices` (N, 8), and their `similarities` (N, 8)
        classes.csv         Recall@1 by class
        similarities.*      csv, json: cosine similarities of positive and negative pairs, also of some training images
        map.npz             some classes' `embeddings`, and `indices` of their images
        pseudo_labels.csv   if training was on clusters, how they compare with the classes, by refresh

    and of the run all but the weights, run.json with hashes of what scored it as well, `scoring_code`. The test list is
    the queries and then the gallery, where a dataset has these.

    Args:
        register: put the model into MLflow's registry, as a new version of `<dataset>-<cell>`.

    Raises:
        UserError: a file of the run, a list or an image is missing or damaged.
    """
    cell = load_cell(run_folder / "cell.yaml")
    out = workspace.evaluation(cell)
    # The checkpoint goes last: until the store has all of it, training might be wanted again.
    with checkpoint.removing(workspace.checkpoint(record_of(run_folder)["key"])) as waited:
        metrics = _scored_meanwhile(out, run_folder) if waited else None
        metrics = metrics or _score(cell, run_folder, workspace, out)
        hand_over(workspace, cell, out, run_folder, register=register)
    final, untrained = (metrics[protocol]["recall_at_1"] for protocol in ("final", "untrained"))
    message(f"{cell.name}: Recall@1 {final:.1f} %, {untrained:.1f} % untrained")
    return metrics


def _scored_meanwhile(out: Path, run_folder: Path) -> Metrics | None:
    """What another process has just found, if it is of this very run and by this code."""
    try:
        if record_of(out) == record_of(run_folder) | {"scoring_code": provenance.scoring_code()}:
            return read_json(out / "metrics.json", "evaluate")
    except UserError:  # none yet
        pass
    return None


def _score(cell: Cell, run_folder: Path, workspace: Workspace, out: Path) -> Metrics:
    """Write the evaluation folder `out` of a cell; see `evaluate_cell`."""
    record = record_of(run_folder)
    data = open_data(workspace, cell)
    tested, scoring, ks = data.test, data.scoring, data.ks
    sample = data.train.subset(sample_images(data.train.labels, TRAIN_CLASSES, TRAIN_IMAGES, seed=0))
    final = network.load(cell, run_folder / "final.pt")
    label = f"{cell.dataset}, {cell.backbone}"
    images_of = images_for(cell.recipe, data, final, trunk=cell.trunk, label=label, views=0)
    images, train_images = images_of(tested), images_of(sample)
    _, validations = curves_of(run_folder, cell)
    if selection := cell.recipe.select_by:
        read_csv(run_folder / "selection.csv", "train", ("iteration", selection.metric))

    with device_context(cell.recipe) as fabric:
        where: dict[str, Any] = {"crop": cell.recipe.crop, "interpolation": cell.recipe.interpolation}

        def embeddings_of(model: EmbeddingModel, *lists: Images) -> list[Tensor]:
            model = set_up(learned(model, cell.recipe), fabric, cell.recipe).eval()
            return [embed(model, each, **where, device=fabric.device) for each in lists]

        test, train = embeddings_of(final, images, train_images)
        queried, labels, gallery, gallery_labels = scoring.split_query_gallery(test, images.labels)
        nmi, first = gallery is None and affords_nmi(images.labels), scoring.queries or 0  # of the gallery
        curve = [k for k in CURVE if k == 1 or k < len(test) - first]
        scores = evaluate(queried, labels, gallery, gallery_labels, ks=sorted({*ks, *curve}), nmi=nmi)
        recalls = pd.DataFrame({"k": curve, "recall": [scores[f"recall_at_{k}"] for k in curve]})
        beyond = {f"recall_at_{k}" for k in set(curve) - set(ks)}
        metrics = {"final": {name: value for name, value in scores.items() if name not in beyond}}
        for protocol, iteration in record["iterations"].items():
            if iteration != record["iterations"]["final"]:  # else it is the final model
                (embeddings,) = embeddings_of(network.load(cell, run_folder / f"{protocol}.pt"), images)
                metrics[protocol] = evaluate(*scoring.split_query_gallery(embeddings, images.labels), ks=ks, nmi=nmi)
            metrics[protocol] = {**metrics.get(protocol, metrics["final"]), "iteration": iteration}
        metrics["untrained"] = validations.iloc[0].to_dict()

        found = retrieve(queried, labels, NEIGHBOURS, gallery, gallery_labels)
        indices, similarities = found[0].cpu().numpy() + first, found[1].cpu().numpy()
        distributions = {
            "train": pair_similarities(train, train_images.labels),
            "test": pair_similarities(test, images.labels),
        }

    mapped = sample_images(tested.labels, MAP_CLASSES, MAP_IMAGES, cell.seed)
    densities = pd.concat({split: table for split, (table, _) in distributions.items()}, names=["split"])
    with atomic_write(out) as folder:
        folder.mkdir()
        for file in run_folder.iterdir():
            if file.suffix != ".pt":
                shutil.copyfile(file, folder / file.name)  # not its mode: DVC's files are read-only
        record["scoring_code"] = provenance.scoring_code()
        (folder / "run.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
        recalls.to_csv(folder / "recall_at_k.csv", index=False)
        np.savez(
            folder / "neighbours.npz", indices=indices.astype(np.int32), similarities=similarities.astype(np.float32)
        )
        by_class = class_table(tested.labels, indices[:, 0], similarities[:, 0], tested.class_names)
        by_class.to_csv(folder / "classes.csv", index=False)
        densities.reset_index("split").to_csv(folder / "similarities.csv", index=False)
        moments = {split: moments for split, (_, moments) in distributions.items()}
        (folder / "similarities.json").write_text(json.dumps(moments, indent=2), encoding="utf-8")
        np.savez(folder / "map.npz", indices=mapped, embeddings=test[mapped].cpu().numpy())
        if (file := run_folder / "pseudo_labels.npz").is_file():
            arrays = read_arrays(file, "train", ("history", "iterations"))
            table = pseudo_label_table(arrays["history"], data.train.labels)
            table.assign(iteration=arrays["iterations"]).to_csv(folder / "pseudo_labels.csv", index=False)
        shutil.copyfile(workspace.lists(cell.dataset) / "summary.json", folder / "summary.json")
    return metrics
