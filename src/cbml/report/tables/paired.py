"""Two or more models on the same queries: where they differ, and whether that is chance."""

import numpy as np
import pandas as pd
from scipy import stats


def divided(models: list[pd.DataFrame], seed: int) -> list[int]:
    """Queries that some of these models answer rightly and some do not.

    They take turns by which of the models are right, so that each model has some of its own. In a turn the most evenly
    divided come first. At most one per class; chance decides between equals.

    Args:
        models: of each what `judge` returns, on the same list.
    """
    right = np.stack([each.right for each in models], axis=1)
    share = right.mean(axis=1)
    order = np.random.default_rng(seed).permutation(len(share))
    order = order[np.argsort(abs(share - 0.5)[order], kind="stable")]
    order = order[np.isin(share[order], (0, 1), invert=True)]
    turn = pd.DataFrame(right[order]).groupby([*range(len(models))]).cumcount()
    labels = models[0].label.iloc[order[np.argsort(turn, kind="stable")]]
    return labels.drop_duplicates().index.tolist()


def compare_by_class(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
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
