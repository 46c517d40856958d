"""What tuning found, and what it was worth."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from cbml.report.common.numbers import number
from cbml.report.common.style import COLOURS, INK, chart, legend, to_svg
from cbml.report.tables.rows import MIN_SEEDS, against, interval

SCORES = ("loss", "trial", "score")


def trials_chart(title: str, trials: pd.DataFrame) -> str:
    """Score by trial with the best so far, and the score against each constant; an `<svg>` element.

    Args:
        trials: `trials_table` of one loss.
    """
    names = [name for name in trials if name not in SCORES and not name.startswith("fold_")]
    best = trials.score.idxmax()
    with chart(2.2 * (1 + len(names)), 2.6, ncols=1 + len(names), sharey=True, squeeze=False) as (figure, (axes,)):
        figure.suptitle(title)
        axes[0].step(trials.trial, trials.score.cummax(), where="post", color=COLOURS[6])
        for axis, name in zip(axes, ["trial", *names], strict=True):
            axis.scatter(trials[name], trials.score, s=12, color=COLOURS[0])
            axis.scatter(trials[name][best], trials.score[best], s=30, color=COLOURS[3])
            axis.set_xlabel(name)
            if name != "trial" and trials[name].min() > 0 and trials[name].max() > 20 * trials[name].min():
                axis.set_xscale("log")
        axes[0].set_ylabel("score of held-out classes, %")
        return to_svg(figure)


SETTING = ["embedding_dim", "backbone", "recipe"]


def worth(cells: pd.DataFrame) -> pd.DataFrame:
    """What tuning was worth to each method, by Recall@1 of the final model.

    Args:
        cells: what `collect` returns.

    Returns:
        One row per setting, budget and tuned method of at least 3 seeds, the best first: `n`, `recall_at_1` and
        `map_at_r`; `published`, Recall@1 with the constants as conf/ has them, if one row of the cells is of these;
        `gain` and `versus_best`, differences seed by seed. Each has its `_sd`, and its 95 % interval from `_low` to
        `_high`.
    """
    final = cells[cells.protocol == "final"]
    rows = []
    for setting, group in final[final.tuned != ""].groupby([*SETTING, "tuned"], sort=False):
        tuned = _by_seed(group)
        tuned = tuned.loc[:, tuned.count() >= MIN_SEEDS]
        plain = final[(final[SETTING] == setting[:3]).all(axis=1) & (final.tuned == "")]
        plain = plain[plain.groupby("method").variant.transform("nunique") == 1]
        published = _by_seed(plain).reindex(columns=tuned.columns)
        for method in tuned.mean().sort_values(ascending=False, kind="stable").index:
            own, best = tuned[method], tuned[tuned.mean().idxmax()]
            figures = {"recall_at_1": own, "map_at_r": _by_seed(group, "map_at_r")[method]}
            figures |= {"published": published[method], "gain": own - published[method], "versus_best": own - best}
            row = dict(zip([*SETTING, "tuned"], setting, strict=True)) | {"method": method, "n": own.count()}
            for name, values in figures.items():
                row |= _with_interval(name, values.dropna())
            rows.append(row)
    return pd.DataFrame(rows)


def settings(gains: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of `worth` that compare with one another, each with a title."""
    for (size, backbone, recipe, budget), rows in gains.groupby([*SETTING, "tuned"], sort=False) if len(gains) else ():
        yield f"{backbone}, {recipe}, {size}, each loss tuned: {budget}", rows


def _by_seed(cells: pd.DataFrame, metric: str = "recall_at_1") -> pd.DataFrame:
    return cells.pivot(index="seed", columns="method", values=metric)


def _with_interval(name: str, values: pd.Series) -> dict[str, float]:
    mean, low, high = interval(values) if len(values) >= MIN_SEEDS else (values.mean(), np.nan, np.nan)
    return {name: mean, f"{name}_sd": values.std(), f"{name}_low": low, f"{name}_high": high}


def shown_worth(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `worth` of one setting as text, in the columns that people read."""

    def mean(row: Any, name: str) -> str:
        value = getattr(row, name)
        return "" if pd.isna(value) else f"{number(value)} ± {getattr(row, f'{name}_sd'):.1f}"

    columns: dict[str, Callable[[Any], str]] = {
        "Method": lambda row: row.method,
        "Seeds": lambda row: str(row.n),
        "R@1 tuned": lambda row: mean(row, "recall_at_1"),
        "against the best [95 %]": lambda row: against(row, "versus_best") if row.versus_best else "",
        "R@1 published constants": lambda row: mean(row, "published"),
        "tuning was worth [95 %]": lambda row: against(row, "gain"),
        "MAP@R tuned": lambda row: mean(row, "map_at_r"),
    }
    return pd.DataFrame({title: [write(row) for row in rows.itertuples()] for title, write in columns.items()})


def worth_chart(rows: pd.DataFrame) -> str:
    """Recall@1 of each method with tuned and with published constants, best first; an `<svg>` element.

    Args:
        rows: of `worth`, of one setting.
    """
    rows = rows[::-1].reset_index(drop=True)
    with chart(6.5, 1.0 + 0.2 * len(rows)) as (figure, axes):
        axes.hlines(rows.index, rows.published, rows.recall_at_1, color=INK, alpha=0.3, linewidth=1)
        handles = []
        for name, colour in (("published", COLOURS[6]), ("recall_at_1", COLOURS[0])):
            reach = [rows[name] - rows[f"{name}_low"], rows[f"{name}_high"] - rows[name]]
            handles.append(axes.errorbar(rows[name], rows.index, xerr=reach, fmt="o", markersize=4, color=colour))
        axes.set_yticks(rows.index, rows.method)
        axes.set_xlabel("Recall@1, %, and 95 % interval of its mean over seeds")
        axes.grid(axis="x", color=INK, alpha=0.15)
        names = ["published constants, the recipe's rate", f"tuned: {rows.tuned[0]}"]
        legend(figure, names, handles, loc="outside upper center")
        return to_svg(figure)
