"""Which queries fail, and what they are mistaken for."""

import pandas as pd


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
