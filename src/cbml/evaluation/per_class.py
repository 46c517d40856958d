"""Recall@1 by class, and some images of some classes."""

import numpy as np
import pandas as pd


def class_table(
    labels: np.ndarray, nearest: np.ndarray, similarities: np.ndarray, names: dict[int, str]
) -> pd.DataFrame:
    """One row per class of the queries, the worst first and those without an answer last.

    Args:
        labels: (N,), the classes of all images. The first Q are the queries: all of them, each among all others, or
            some, among the rest.
        nearest, similarities: (Q,), the nearest image of each query, an index into `labels`, and how similar it is.
        names: of the classes.

    Returns:
        `class` (its name), `images`, `recall_at_1` (in percent, empty without an answer), `confused_with`: the class
        that its failures' nearest neighbours are most often of, or empty; of equals that of the surest failure.
    """
    queries = pd.DataFrame({"label": labels[: len(nearest)], "nearest": labels[nearest], "similarity": similarities})
    right = queries.nearest == queries.label
    table = pd.DataFrame({"images": queries.groupby("label").size()})
    among_others = len(queries) == len(labels)
    gallery = pd.Series(labels if among_others else labels[len(queries) :]).value_counts()
    answers = gallery.reindex(table.index, fill_value=0) - int(among_others)  # an image is no answer to itself
    table["recall_at_1"] = 100 * right.groupby(queries.label).mean().where(answers > 0)
    failures = queries[~right & (queries.label.map(answers) > 0)]
    pairs = failures.groupby(["label", "nearest"]).similarity.agg(["size", "max"]).reset_index()
    pairs = pairs.sort_values(["size", "max"], ascending=False, kind="stable").drop_duplicates("label")
    table["confused_with"] = pairs.set_index("label").nearest.map(names)
    table.insert(0, "class", table.index.map(names))
    return table.sort_values(["recall_at_1", "class"], ignore_index=True)


def sample_images(labels: np.ndarray, classes: int, images: int, seed: int) -> np.ndarray:
    """Indices of up to so many images of each of so many classes, by chance: the same for every model."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(np.unique(labels))[:classes]
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:images] for label in chosen]))
