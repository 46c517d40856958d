"""Cells side by side on the same queries: what each retrieves, and in what two of them differ."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from cbml.report.common.numbers import number
from cbml.report.common.pictures import Neighbours, Pictures
from cbml.report.common.queries import judge, sample_queries
from cbml.report.tables.paired import compare_by_class, divided, mcnemar

QUERIES, NEIGHBOURS = 6, 3  # of a strip
MAX_DIVIDED = 16  # queries of the comparison
MAX_PICTURES = 240  # of both together, which bounds the page: of photographs, 300 kB
MAX_CLASSES = 12  # of two cells
COLUMNS = ["Class", "R@1, first", "R@1, second", "Difference", "p, corrected", "Queries"]  # of their table


def strips(pictures: Pictures, cells: list[Neighbours], names: Iterable[str], recalls: Iterable[str]) -> dict[str, Any]:
    """Some queries, the same for every model on the list, and of each cell a strip of their nearest neighbours.

    Args:
        names, recalls: what stands beside each cell's strip.
    """
    chosen = sample_queries(_judge(pictures, cells[0]), QUERIES, seed=0)
    rows = [
        {"name": name, "recall": recall, "strip": [pictures.neighbours(query, found, NEIGHBOURS) for query in chosen]}
        for found, name, recall in zip(cells, names, recalls, strict=False)
    ]
    return {"queries": [pictures.one(query) for query in chosen], "rows": rows}


def comparison(pictures: Pictures, cells: list[Neighbours], names: list[str]) -> dict[str, Any]:
    """Of every two cells, in either order, how many queries only one answers rightly, and the classes that differ most.

    Returns:
        `names`; `pairs[first][second]`, all in text; `classes`, the empty table for those of a pair; `queries` that
        some cells answer rightly and some do not, each with the neighbours that every cell finds.
    """
    judged = [_judge(pictures, found) for found in cells]
    shown = []
    for query in divided(judged, seed=0)[:MAX_DIVIDED]:
        needed = {query}.union(*(found["indices"][query][:NEIGHBOURS].tolist() for found in cells))
        if len(needed | pictures.places.keys()) > MAX_PICTURES:
            break
        right = "".join(f"{each.right[query]:d}" for each in judged)
        strip = [pictures.neighbours(query, found, NEIGHBOURS) for found in cells]
        shown.append({"query": pictures.one(query), "right": right, "strips": strip})
    pairs = [[_pair(first, second, pictures.names) for second in judged] for first in judged]
    return {"names": names, "queries": shown, "pairs": pairs, "classes": pd.DataFrame(columns=COLUMNS)}


def _judge(pictures: Pictures, found: Neighbours) -> pd.DataFrame:
    return judge(found["indices"], found["similarities"], pictures.images.labels)


def _pair(first: pd.DataFrame, second: pd.DataFrame, names: dict[int, str]) -> dict[str, list]:
    """Two cells: the figures of all queries, and of each class that differs most."""
    classes = compare_by_class(first, second)
    total = classes[["queries", "both", "only_first", "only_second"]].sum()
    neither = total.queries - total[1:].sum()
    counts = [f"{count:,}" for count in (*total[1:], neither)]
    rows = []
    for row in classes[classes.p < 1].head(MAX_CLASSES).itertuples():
        one, other = (100 * (row.both + alone) / row.queries for alone in (row.only_first, row.only_second))
        shares = number(one), number(other), f"{other - one:+.1f}"
        rows.append([names[row.Index], *shares, _p(row.p_corrected), f"{row.queries:.0f}"])
    return {"figures": [*counts, _p(mcnemar(total.only_first, total.only_second))], "classes": rows}


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
