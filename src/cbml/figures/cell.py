"""The pictures of one cell."""

import json
import re
from pathlib import Path

import pandas as pd
from torch import Tensor

from cbml.datasets.images import PackedImages
from cbml.errors import UserError
from cbml.evaluation.metrics import evaluate
from cbml.evaluation.retrieval import unit_vectors
from cbml.figures.curves import draw_recall, draw_training
from cbml.figures.embedding_map import draw_map
from cbml.figures.neighbours import (
    class_table,
    confusions,
    failures,
    judge_queries,
    nearest,
    pick_queries,
    worst_failures,
)
from cbml.figures.pages import confusion_page, neighbour_page, save_jpeg
from cbml.figures.similarities import draw_similarities, pair_similarities
from cbml.files import write_text

ROWS = 8  # of a page
KS = [2**power for power in range(10)]
NO_FAILURE = ": none, every query's nearest neighbour is of its own class"


def draw_cell(
    folder: Path,
    *,
    title: str,
    test: Tensor,
    test_labels: Tensor,
    images: PackedImages,
    class_names: dict[int, str],
    train: Tensor,
    train_labels: Tensor,
    losses: pd.DataFrame,
    validations: pd.DataFrame,
    best_iteration: int,
    seed: int,
) -> None:
    """Write what one trained model's embeddings look like, and how it was trained, into `folder`.

    Each query is a test image, its gallery the other test images. Written are:

        gallery.jpg         queries picked by chance, one a class, and their nearest neighbours
        failures.jpg        the wrong nearest neighbours of the highest similarity
        confusions.jpg      the pairs of classes that are confused most often
        classes.csv         Recall@1 a class
        similarities.*      csv, json, svg: cosine similarities of all positive and negative pairs
        recall_at_k.*       csv, svg: Recall@K for K = 1, 2, 4, … 512, below the size of the list
        training.svg        Recall@1 and the loss by iteration
        embedding_map.svg   some classes in two dimensions

    The same input gives the same bytes. All choices by chance depend on the labels and `seed` alone, so the pictures of
    several models can be compared.

    Args:
        title: what the model is, for the head of each picture.
        test, test_labels: embeddings (N, D), of any norm, and classes (N,) of the test list.
        images: its images, in the same order.
        class_names: the name of every class of the test list, as the dataset's folders have it.
        train, train_labels: the same of the training list, (M, D) and (M,).
        losses, validations: by iteration, as `run_cell` writes them; `losses` may be empty.
        best_iteration: the validated one whose Recall@1 was highest.

    Raises:
        UserError: embeddings, labels and images that do not match; a class without a name; no query with an answer.
    """
    for name, labels, count in (("test_labels", test_labels, len(test)), ("train_labels", train_labels, len(train))):
        if labels.shape != (count,):
            raise UserError(f"{name}: shape {tuple(labels.shape)}, allowed is one label an embedding, ({count},)")
    if len(images) != len(test):
        raise UserError(f"images: {len(images)} images, allowed is one an embedding, {len(test)}")
    if nameless := sorted(set(test_labels.tolist()) - class_names.keys()):
        raise UserError(f"class_names: no name for label {nameless[0]}; every class of the test list needs one")

    ks = [k for k in KS if k == 1 or k < len(test)]
    scores = evaluate(test, test_labels, ks=ks)
    recalls = pd.DataFrame({"k": ks, "recall": [scores[f"recall_at_{k}"] for k in ks]})
    write_text(folder / "recall_at_k.csv", recalls.to_csv(index=False))
    draw_recall(folder / "recall_at_k.svg", title, recalls)
    draw_training(folder / "training.svg", title, losses, validations, best_iteration)

    test, train = unit_vectors(test, "test"), unit_vectors(train, "train")
    test_labels, train_labels = test_labels.to(test.device), train_labels.to(train.device)
    names = {label: display_name(name) for label, name in class_names.items()}

    queries = judge_queries(test, test_labels)
    failed = failures(queries)
    write_text(folder / "classes.csv", class_table(queries, names).to_csv(index=False))
    labels = test_labels.tolist()
    for file, subtitle, chosen in (
        ("gallery.jpg", "Queries picked by chance, one a class", pick_queries(queries, ROWS, seed)),
        ("failures.jpg", "The surest failures, one a class", worst_failures(failed, ROWS)),
    ):
        rows = {query: nearest(test, test_labels, query) for query in chosen}
        subtitle += ", and their nearest neighbours with their cosine similarity" if rows else NO_FAILURE
        save_jpeg(neighbour_page(title, subtitle, rows, images, labels, names), folder / file)
    pairs = confusions(queries).head(ROWS)
    subtitle = "The most frequent confusions" + (", with the surest failure of each" if len(pairs) else NO_FAILURE)
    save_jpeg(confusion_page(title, subtitle, pairs, images, names), folder / "confusions.jpg")

    densities, moments = {}, {}
    for split, embeddings, of in (("train", train, train_labels), ("test", test, test_labels)):
        densities[split], moments[split] = pair_similarities(embeddings, of)
    densities = pd.concat(densities, names=["split"]).reset_index("split")
    write_text(folder / "similarities.csv", densities.to_csv(index=False))
    write_text(folder / "similarities.json", json.dumps(moments, indent=2) + "\n")
    draw_similarities(folder / "similarities.svg", title, densities, moments)
    draw_map(folder / "embedding_map.svg", title, test, test_labels.cpu().numpy(), names, seed)


def display_name(name: str) -> str:
    """A class's folder name for reading: without its number and underscores, capitals alone in lower case."""
    name = re.sub(r"^\d+\.", "", name).replace("_", " ")
    return name.lower() if name.isupper() else name
