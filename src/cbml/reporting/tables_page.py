"""The page of a table set."""

import os
import re
from collections import defaultdict
from html import escape
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from cbml.figures.comparisons import curves_chart, distributions_chart, paper_chart
from cbml.reporting import tables
from cbml.reporting.html import render, svg
from cbml.reporting.tables import Evaluated

MAX_DISTRIBUTIONS = 12


def tables_page(
    table: pd.DataFrame, evaluated: list[Evaluated], dataset: str, test: dict[str, int], folder: Path
) -> str:
    """The page of a table set: tables, the paper beside them, curves, similarities, links to the cells' own pages.

    Args:
        table: what `summarise` returns.
        evaluated: the cells that it was made from.
        test: the number of `images` and `classes` of the test list.
        folder: of the page; links are relative to it.
    """
    links = defaultdict(list)
    for one in evaluated:
        page = one.page / "index.html"  # one of another checkout may not have come with its cell
        link = '<a href="{}">{}</a>' if page.is_file() else "{1}"
        links[one.row].append(Markup(link).format(os.path.relpath(page, folder), one.cell.seed))
    parts = []
    for size, rows in table.groupby("embedding_dim", sort=False):
        text = tables.shown(rows)
        text.insert(0, "Method", text.pop("Method"))
        rows = rows.astype(object).to_dict("records")
        of_row = [
            links[tuple(row[name] for name in tables.ROW)] if row["protocol"] != "published" else [] for row in rows
        ]
        details = Markup("<details><summary>command</summary><pre>{}</pre></details>")
        commands = [details.format(row["command"]) if isinstance(row["command"], str) else "" for row in rows]
        for name, cells in (("Seeds", [Markup(" ").join(pages) for pages in of_row]), ("Reproduce", commands)):
            text[name] = pd.Series(cells, text.index, dtype=object)  # as strings they would be markup no more
        parts.append((tables.title(size), text, [row["protocol"] for row in rows]))
    figures = {}
    if "paper_recall_at_1" in table and table.paper_recall_at_1.notna().any():
        caption = "Recall@1 of the paper and ours, with the standard deviation over seeds."
        figures["The paper and ours"] = svg(paper_chart(table), "paper", caption), caption
    caption = "Recall@1 on the test list over iterations, one line per run, with a marker where the run is highest."
    figures["Recall@1 over iterations"] = svg(curves_chart(tables.curves(evaluated)), "curves", caption), caption
    first_seed = [one for one in evaluated if one.cell.seed == evaluated[0].cell.seed]
    best = _best(table, first_seed)
    caption = (
        "Cosine similarity of positive and of negative pairs of the test list, first seed, each over its own range"
    )
    caption += f", the best {MAX_DISTRIBUTIONS} by Recall@1." if len(best) < len(first_seed) else "."
    densities = tables.similarities(best, 0.005).query("split == 'test'")
    densities = densities.assign(cell=densities.cell.map({one.record["key"]: _short_name(one, best) for one in best}))
    figures["Similarities"] = svg(distributions_chart(densities), "similarities", caption), caption
    return render(
        "tables",
        dataset=dataset,
        notes=[_inline(note) for note in tables.notes(table, test, evaluated)],
        protocols={name: text for name, text in tables.PROTOCOLS.items() if name in set(table.protocol)},
        tables=parts,
        figures={title: {"picture": picture, "caption": caption} for title, (picture, caption) in figures.items()},
        provenance=tables.provenance(evaluated),
    )


def _best(table: pd.DataFrame, evaluated: list[Evaluated]) -> list[Evaluated]:
    """The best `MAX_DISTRIBUTIONS` cells by Recall@1."""
    final = table[table.protocol == "final"].sort_values("recall_at_1", ascending=False, kind="stable")
    order = list(final[tables.ROW].itertuples(index=False, name=None))
    return sorted(evaluated, key=lambda one: order.index(one.row))[:MAX_DISTRIBUTIONS]


def _short_name(one: Evaluated, others: list[Evaluated]) -> str:
    """The method, and the setting if not all have the same."""
    one_setting = len({(each.cell.backbone, each.cell.embedding_dim) for each in others}) == 1
    setting = "" if one_setting else f"{one.cell.backbone}, {one.cell.embedding_dim}"
    return "\n".join(filter(None, [one.cell.loss, one.variant, setting]))


def _inline(text: str) -> Markup:
    """Markdown's `**strong**` and `code` as HTML."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", text))
