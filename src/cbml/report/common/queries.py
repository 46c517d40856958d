"""Which queries fail, and what they are mistaken for."""

import numpy as np
import pandas as pd
from scipy import stats


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


def choose(labels: np.ndarray, classes: int, images: int, seed: int) -> np.ndarray:
    """Indices of up to so many images of each of so many classes, by chance: the same for every model."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(np.unique(labels))[:classes]
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:images] for label in chosen]))


def pick(queries: pd.DataFrame, count: int, seed: int) -> list[int]:
    """One query of each of `count` classes with an answer, by chance; the same for every model on the same list."""
    rng = np.random.default_rng(seed)
    classes = queries[queries.has_answer].groupby("label").groups
    chosen = rng.permutation(sorted(classes))[:count]
    return [int(rng.choice(classes[label])) for label in sorted(chosen)]


def divided(models: list[pd.DataFrame], seed: int) -> list[int]:
    """Queries that some of these models answer rightly and some do not, the most evenly divided first.

    At most one per class; chance decides between equals.

    Args:
        models: of each what `judge` returns, on the same list.
    """
    share = np.mean([each.right for each in models], axis=0)
    order = np.random.default_rng(seed).permutation(len(share))
    order = order[np.argsort(abs(share - 0.5)[order], kind="stable")]
    labels = models[0].label.iloc[order[np.isin(share[order], (0, 1), invert=True)]]
    return labels.drop_duplicates().index.tolist()


def compare(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Where two models differ on the same queries, by class, the surest difference first.

    Args:
        first, second: what `judge` returns, on the same list.

    Returns:
        One row per class with an answer, by label: `queries`; of these `both` answer rightly, `only_first`,
        `only_second`; `p`, of the exact McNemar test; `p_corrected` by Holm's method for the number of classes.
    """
    one, other = first.right[first.has_answer], second.right[first.has_answer]
    kinds = pd.DataFrame({"both": one & other, "only_first": one & ~other, "only_second": other & ~one})
    grouped = kinds.groupby(first.label[first.has_answer])
    table = grouped.sum()
    table.insert(0, "queries", grouped.size())
    table["p"] = mcnemar(table.only_first, table.only_second)
    table["difference"] = abs(table.only_first - table.only_second) / table.queries
    table = table.sort_values(["p", "difference"], ascending=[True, False], kind="stable").drop(columns="difference")
    table["p_corrected"] = (table.p * np.arange(len(table), 0, -1)).cummax().clip(upper=1)
    return table


def mcnemar(only_first, only_second):
    """The exact McNemar test, two-sided: how probable so uneven a split is if either model were as good.

    Args:
        only_first, only_second: number of queries, or arrays of them, that this model alone answers rightly.
    """
    fewer, total = np.minimum(only_first, only_second), np.add(only_first, only_second)
    return np.minimum(1, 2 * stats.binom.cdf(fewer, total, 0.5))


def failures(queries: pd.DataFrame) -> pd.DataFrame:
    """The queries with an answer whose nearest neighbour is of another class, the most similar (surest) first."""
    failed = queries[queries.has_answer & ~queries.right]
    return failed.sort_values("similarity", ascending=False, kind="stable")


def surest(failed: pd.DataFrame, count: int) -> list[int]:
    """The first `count` of `failures`, at most one per class of the query, and no pair of images both ways round."""
    chosen, classes = [], set()
    for failure in failed.itertuples():
        if failure.label not in classes and failure.nearest not in chosen:
            chosen.append(failure.Index)
            classes.add(failure.label)
    return chosen[:count]


def confusions(queries: pd.DataFrame) -> pd.DataFrame:
    """Pairs of classes, the most frequent first: a query's, and that of its wrong nearest neighbour.

    Returns:
        One row per pair: `label`, `nearest_label`, `count`, which is a `share` of the class's `queries`, and the surest
        failure among them, `query` and `nearest` with their `similarity`.
    """
    failed = failures(queries).rename_axis("query").reset_index()
    pairs = failed.groupby(["label", "nearest_label"]).agg(
        count=("query", "size"),
        query=("query", "first"),
        nearest=("nearest", "first"),
        similarity=("similarity", "first"),
    )
    pairs = pairs.reset_index()
    pairs["queries"] = pairs.label.map(queries.groupby("label").size())
    pairs["share"] = pairs["count"] / pairs.queries
    return pairs.sort_values(["count", "share", "similarity"], ascending=False, kind="stable", ignore_index=True)


def class_table(queries: pd.DataFrame, names: dict[int, str]) -> pd.DataFrame:
    """One row per class, the worst first and those without an answer last.

    Returns:
        `class` (its name), `images`, `recall_at_1` (in percent, empty without an answer), `confused_with`: the class
        that its failures' nearest neighbours are most often of, or empty.
    """
    table = pd.DataFrame({"images": queries.groupby("label").size()})
    table["recall_at_1"] = 100 * queries[queries.has_answer].groupby("label").right.mean()
    most_frequent = confusions(queries).drop_duplicates("label").set_index("label").nearest_label
    table["confused_with"] = most_frequent.map(names)
    table.insert(0, "class", table.index.map(names))
    return table.sort_values(["recall_at_1", "class"], ignore_index=True)
