"""Queries of the test list: whether each is answered rightly, and some of them by chance."""

import numpy as np
import pandas as pd


def judge(neighbours: np.ndarray, similarities: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Whether each query's nearest neighbour is of its class.

    Args:
        neighbours, similarities: (Q, k), as `retrieve` returns them: indices into `labels`.
        labels: (N,), the classes of all images. The first Q are the queries: all of them, each among all others, or
            some, among the rest.

    Returns:
        One row per query: its `label`; `has_answer`, whether its class has another image there; `right`; its `nearest`
        image with its `nearest_label` and `similarity`.
    """
    nearest, queries = neighbours[:, 0], labels[: len(neighbours)]
    if len(queries) == len(labels):
        _, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
        has_answer = counts[index] > 1
    else:
        has_answer = np.isin(queries, labels[len(queries) :])
    return pd.DataFrame(
        {
            "label": queries,
            "has_answer": has_answer,
            "right": labels[nearest] == queries,
            "nearest": nearest,
            "nearest_label": labels[nearest],
            "similarity": similarities[:, 0],
        }
    )


def sample_queries(queries: pd.DataFrame, count: int, seed: int) -> list[int]:
    """One query of each of `count` classes with an answer, by chance; the same for every model on the same list."""
    rng = np.random.default_rng(seed)
    classes = queries[queries.has_answer].groupby("label").groups
    chosen = rng.permutation(sorted(classes))[:count]
    return [int(rng.choice(classes[label])) for label in sorted(chosen)]
