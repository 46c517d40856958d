"""The page of a table set, and the page over all of them."""

import os
import re
from collections import defaultdict
from collections.abc import Callable
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from cbml.report.common.html import figure, render
from cbml.report.common.numbers import number
from cbml.report.common.pictures import Neighbours, Pictures
from cbml.report.tables import rows as tables
from cbml.report.tables.comparisons import curves_chart, distributions_chart, paper_chart
from cbml.report.tables.rows import Evaluated
from cbml.report.tables.side_by_side import comparison, strips
from cbml.report.tables.tuning import settings, worth_chart

MAX_CELLS = 12  # side by side
IN_FRONT = 3  # methods of each dataset, on the page over all of them
# Of the headline of a table set, on the page over all of them.
SHOWN = ("recall_at_1", "untrained_recall_at_1", "cells", "best_cell")
NAME = Markup("{}<small>{} · {}</small>")
PAGE = Markup('<a href="{}#{}">{}</a>')
COMMAND = Markup(
    '<button type="button" class="copy">copy</button><details><summary>command</summary><pre>{}</pre></details>'
)


def tables_page(
    table: pd.DataFrame,
    evaluated: list[Evaluated],
    dataset: str,
    test: dict[str, int],
    gains: pd.DataFrame,
    folder: Path,
    pictures: Pictures | None = None,
    found: Callable[[Path], Neighbours] | None = None,
) -> str:
    """The page of a table set: what methods retrieve, tables, the paper beside them, two cells compared, charts.

    Args:
        table: what `summarise` returns.
        evaluated: the cells that it was made from.
        test: the number of `images` and `classes` of the test list.
        gains: what `worth` returns.
        folder: of the page; links are relative to it.
        pictures, found: of the test list, and what the evaluation in a folder found there; without them the page has no
            test images.
    """
    final, order = _ranking(table)
    cells = _best_first(evaluated, order)[:MAX_CELLS]
    best = cells[: len(order)]
    names = {one.record["key"]: _short_name(one, best) for one in cells}

    figures = {}
    if "paper_recall_at_1" in table and table.paper_recall_at_1.notna().any():
        caption = "Recall@1 of the paper and ours, with the standard deviation over seeds."
        figures["The paper and ours"] = figure(paper_chart(table), "paper", caption)
    for place, (title, rows) in enumerate(settings(gains), 1):
        caption = (
            "Recall@1 of each loss with its tuned and with its published constants, and the intervals of the means."
        )
        figures[f"What tuning was worth: {title}"] = figure(worth_chart(rows), f"tuned-{place}", caption)
    caption = "Recall@1 on the test list over iterations: means over seeds with their standard deviation, and a marker "
    caption += "where a mean is highest."
    figures["Recall@1 over iterations"] = figure(curves_chart(tables.curves(evaluated)), "curves", caption)
    densities = tables.similarities(best, 0.005).query("split == 'test'")
    caption = "Cosine similarity of positive and of negative pairs of the test list, first seed, each over its range"
    caption += f", the best {MAX_CELLS} by Recall@1." if len(order) > MAX_CELLS else "."
    densities = densities.assign(cell=densities.cell.map(names))
    figures["Similarities"] = figure(distributions_chart(densities), "similarities", caption)

    side_by_side: dict[str, Any] = {"strips": None, "compared": None}
    if pictures and found:
        retrieved = [found(one.folder) for one in cells]
        labels = [f"{names[one.record['key']]}, seed {one.cell.seed}" for one in cells]
        side_by_side["strips"] = strips(pictures, retrieved[: len(best)], names.values(), tables.shown(final)["R@1"])
        if len(cells) > 1:
            side_by_side["compared"] = comparison(pictures, retrieved, labels)
    return render(
        "tables",
        dataset=dataset,
        which=f"each of the best {MAX_CELLS} methods" if len(order) > MAX_CELLS else "each method",
        warnings=[_inline(text) for text in tables.outdated(evaluated)],
        notes=[_inline(text) for text in tables.notes(table, test)],
        protocols={name: text for name, text in tables.PROTOCOLS.items() if name in set(table.protocol)},
        tables=_parts(table, evaluated, folder),
        figures=figures,
        provenance=tables.provenance(evaluated),
        pictures=pictures,
        **side_by_side,
    )


def strip_part(
    table: pd.DataFrame,
    evaluated: list[Evaluated],
    dataset: str,
    pictures: Pictures | None = None,
    found: Callable[[Path], Neighbours] | None = None,
) -> str:
    """What the page over all table sets shows of this one: what its best methods retrieve. See `tables_page`."""
    if not (pictures and found):
        return ""
    pictures = Pictures(pictures.images, pictures.root, pictures.side)  # with a sheet of these alone
    final, order = _ranking(table)
    best = _best_first(evaluated, order)[: min(IN_FRONT, len(order))]
    names = [_short_name(one, best) for one in best]
    shown = strips(pictures, [found(one.folder) for one in best], names, tables.shown(final)["R@1"])
    return render("strip", dataset=dataset, strips=shown, pictures=pictures)


def index_page(reports: dict[str, dict[str, Any]], strips: dict[str, str]) -> str:
    """The page over all table sets. Where there is but one, a browser goes on to it.

    Args:
        reports: the `headline` of each dataset's; of one without, the link alone is shown.
        strips: what `strip_part` returned for each.
    """
    link = Markup('<a href="{0}/index.html">{0}</a>')
    rows = []
    for name, headline in reports.items():
        *recalls, count, best = (headline.get(each, "") for each in SHOWN)
        rows.append([link.format(name), *(number(each) if headline else "" for each in recalls), count, best])
    columns = ["Dataset", "R@1", "R@1 untrained", "Rows", "Best row"]
    table = pd.DataFrame(rows, columns=columns, dtype=object)
    shown = {name: Markup(strip) for name, strip in strips.items() if strip}
    return render("index", reports=table, strips=shown, only=name if len(reports) == 1 else None)


def _ranking(table: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple]]:
    """The rows of the headline protocol, of the largest budget and best first, and their values of `ROW`."""
    final = table[table.protocol == "final"].sort_values(
        [*tables.BUDGET, "recall_at_1"], ascending=False, kind="stable"
    )
    return final, list(final[tables.ROW].itertuples(index=False, name=None))


def _parts(table: pd.DataFrame, evaluated: list[Evaluated], folder: Path) -> list[tuple[str, pd.DataFrame, list[str]]]:
    """Of each embedding size the title, the table as text and markup, and the protocols of its rows."""
    links: dict[tuple, list[tuple]] = defaultdict(list)
    for one in evaluated:
        # One in the tracking store is told the way back.
        back = os.path.relpath(folder / "index.html", one.page)
        places = [os.path.relpath(page, folder), back] if (page := one.page_file) else []
        links[one.row].append((one.cell.seed, *places))
    parts = []
    for title, rows in tables.sections(table):
        text = tables.shown(rows)
        parts_of_name = zip(text["Method"], text.pop("Backbone"), text.pop("Protocol"), strict=True)
        columns: dict[str, list[str]] = {"Method": [], "Seeds": [], "Reproduce": []}
        for row, (method, *setting) in zip(rows.itertuples(), parts_of_name, strict=True):
            ours = row.protocol != "published"
            of_row = links[row.embedding_dim, row.backbone, row.method, row.variant] if ours else []
            first = next((place for _, *place in of_row if place), None)
            columns["Method"].append(NAME.format(PAGE.format(*first, method) if first else method, *setting))
            seeds = [PAGE.format(*place, seed) if place else str(seed) for seed, *place in of_row]
            columns["Seeds"].append(Markup(" ").join(seeds))
            columns["Reproduce"].append("" if pd.isna(row.command) else COMMAND.format(row.command))
        del text["Seeds"]  # comes last
        for name, cells in columns.items():
            text[name] = pd.Series(cells, text.index, dtype=object)  # as strings they would be markup no more
        parts.append((title, text, list(rows.protocol)))
    return parts


def _best_first(evaluated: list[Evaluated], order: list[tuple]) -> list[Evaluated]:
    """The first seed of each row, in the order of the rows; then the second seeds; and so on."""
    seeds = defaultdict(list)
    for one in evaluated:
        seeds[one.row].append(one)
    return [one for nth in zip_longest(*(seeds[row] for row in order)) for one in nth if one]


def _short_name(one: Evaluated, others: list[Evaluated]) -> str:
    """The method, and the setting if not all have the same."""
    one_setting = len({(each.cell.backbone, each.cell.embedding_dim) for each in others}) == 1
    setting = "" if one_setting else f"{one.cell.backbone}, {one.cell.embedding_dim}"
    return ", ".join(filter(None, [one.cell.loss, one.variant, setting]))


def _inline(text: str) -> Markup:
    """Markdown's `**strong**` and `code` as HTML."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", text))
