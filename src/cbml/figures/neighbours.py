"""Which queries fail, what they are mistaken for, and what stands beside them."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cbml.evaluation.retrieval import BLOCK, RESOLUTION, similarity_blocks

NEIGHBOURS = 8


@torch.no_grad()
def judge_queries(embeddings: Tensor, labels: Tensor, *, block: int = BLOCK) -> pd.DataFrame:
    """Whether each query's nearest neighbour is of its class, by the rules of `evaluate`: ties count against the model.

    Args:
        embeddings, labels: (N, D) unit vectors in float64, and their classes (N,), on the same device.
        block: the most similarities held at once.

    Returns:
        A row a query: its `label`; `has_answer`, whether its class has another image; `right`; and the nearest image
        of another class: its index `wrong`, its `wrong_label` and its `similarity` (-inf if there is no other class).
    """
    # Allocated before the blocks: small tensors kept from between large ones leave holes in memory that add up.
    positive, negative = embeddings.new_empty(2, len(embeddings))
    wrong = torch.empty_like(labels, dtype=torch.int64)
    for rows, similarities in similarity_blocks(embeddings, None, block):
        same = labels[rows, None] == labels
        positive[rows] = similarities.masked_fill(~same, -torch.inf).amax(dim=1)
        negative[rows], wrong[rows] = similarities.masked_fill_(same, -torch.inf).max(dim=1)
    columns = {
        "label": labels,
        "has_answer": positive > -torch.inf,
        "right": negative < positive - RESOLUTION,
        "wrong": wrong,
        "wrong_label": labels[wrong],
        "similarity": negative,
    }
    return pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})


def nearest(embeddings: Tensor, labels: Tensor, query: int) -> list[tuple[int, float]]:
    """(index, cosine similarity) of a query's `NEIGHBOURS` nearest others, or all of them if they are fewer.

    Args:
        embeddings, labels: as for `judge_queries`; at a tie an image of another class comes first here too.
    """
    similarities = embeddings @ embeddings[query]
    order = similarities + RESOLUTION * (labels != labels[query])
    order[query] = -torch.inf
    indices = order.argsort(descending=True, stable=True)[: min(NEIGHBOURS, len(order) - 1)]
    return list(zip(indices.tolist(), similarities[indices].tolist(), strict=True))


def pick_queries(queries: pd.DataFrame, count: int, seed: int) -> list[int]:
    """One query of each of `count` classes with an answer, by chance; the same for every model on the same list."""
    rng = np.random.default_rng(seed)
    classes = queries[queries.has_answer].groupby("label").groups
    chosen = rng.permutation(sorted(classes))[:count]
    return [int(rng.choice(classes[label])) for label in sorted(chosen)]


def failures(queries: pd.DataFrame) -> pd.DataFrame:
    """The queries with an answer whose nearest neighbour is of another class, the most similar (surest) first."""
    failed = queries[queries.has_answer & ~queries.right]
    return failed.sort_values("similarity", ascending=False, kind="stable")


def worst_failures(failed: pd.DataFrame, count: int) -> list[int]:
    """The first `count` of `failures`, at most one a class of the query, and no pair of images both ways round."""
    chosen, classes = [], set()
    for failure in failed.itertuples():
        if failure.label not in classes and failure.wrong not in chosen:
            chosen.append(failure.Index)
            classes.add(failure.label)
    return chosen[:count]


def confusions(queries: pd.DataFrame) -> pd.DataFrame:
    """Pairs of classes, the most frequent first: a query's, and that of its wrong nearest neighbour.

    Returns:
        A row a pair: `label`, `wrong_label`, `count`, which is a `share` of the class's `queries`, and the surest
        failure among them, `query` and `wrong` with their `similarity`.
    """
    failed = failures(queries).rename_axis("query").reset_index()
    pairs = failed.groupby(["label", "wrong_label"]).agg(
        count=("query", "size"), query=("query", "first"), wrong=("wrong", "first"), similarity=("similarity", "first")
    )
    pairs = pairs.reset_index()
    pairs["queries"] = pairs.label.map(queries.groupby("label").size())
    pairs["share"] = pairs["count"] / pairs.queries
    return pairs.sort_values(["count", "share", "similarity"], ascending=False, kind="stable", ignore_index=True)


def class_table(queries: pd.DataFrame, names: dict[int, str]) -> pd.DataFrame:
    """A row a class, the worst first and those without an answer last.

    Returns:
        `class` (its name), `images`, `recall_at_1` (empty without an answer), `confused_with`: the class that its
        failures' nearest neighbours are most often of, or empty.
    """
    table = pd.DataFrame({"images": queries.groupby("label").size()})
    table["recall_at_1"] = queries[queries.has_answer].groupby("label").right.mean()
    most_frequent = confusions(queries).drop_duplicates("label").set_index("label").wrong_label
    table["confused_with"] = most_frequent.map(names)
    table.insert(0, "class", table.index.map(names))
    return table.sort_values(["recall_at_1", "class"], ignore_index=True)
