"""The page of a table set."""

import os
from collections import defaultdict
from html import escape
from pathlib import Path

import pandas as pd

from cbml.config import Cell
from cbml.figures.comparison import draw_against_paper, draw_curves, draw_similarities
from cbml.reporting import curves, tables
from cbml.reporting.page import LABELS, html_table, svg_figure, write_page

MAX_DISTRIBUTIONS = 12


def write_index(
    path: Path, table: pd.DataFrame, cells: list[Cell], *, dataset: str, test: dict[str, int], runs: list[dict]
) -> None:
    """Write the page of a table set: tables, the paper beside them, curves, similarities, links to the cells' pages.

    Args:
        path: of the page; the links to evaluations/<dataset>/<cell>/index.html are relative to its folder.
        table: what `summarise` returns.
        cells: those that the table was made from. Of their evaluations, validations.csv and similarities.csv are read;
            a cell without such a file is missing from that figure.
        test: the number of `images` and `classes` of the test list.
        runs: the run.json of each cell.
    """
    links = defaultdict(list)
    for cell in cells:
        page = os.path.relpath(Path("evaluations", dataset, cell.name, "index.html"), path.parent)
        links[tables.row_key(cell)].append(f'<a href="{escape(page)}">{cell.seed}</a>')
    protocols = [name for name in tables.PROTOCOLS if name in set(table.protocol)]
    with_paper = "paper_recall_at_1" in table and table.paper_recall_at_1.notna().any()
    note = ""
    if "paper_recall_at_1" in table and test != tables.PUBLISHED_TEST:
        note = (
            "The published figures are on 5,924 images of 100 classes: <strong>not comparable with this part</strong>."
        )
    parts = [
        f"<h1>Recall@K on {escape(dataset)}</h1>",
        f"<p>Test list: {test['images']:,} images of {test['classes']:,} classes. {note}</p>",
        "<p>Figures are in percent, mean ± standard deviation over seeds. A seed leads to the page of its cell.</p>",
        *(f"<p>{escape(note)}</p>" for note in tables.notes(table)),
        _protocols(protocols),
    ]
    for size, rows in table.groupby("embedding_dim", sort=False):
        title = f"Embeddings of {size}" if size else "Pooled features, without a head"
        parts += [f"<h2>{title}</h2>", _table(rows, links, title)]
    if with_paper:
        caption = "Recall@1 of the paper and ours, with the standard deviation over seeds."
        parts += ["<h2>The paper and ours</h2>", svg_figure(draw_against_paper(table), "paper", caption)]
    if len(recalls := curves.curves(cells)):
        caption = "Recall@1 on the test list over iterations, a line a run, with a marker where the run is highest."
        parts += ["<h2>Recall@1 over iterations</h2>", svg_figure(draw_curves(recalls), "curves", caption)]
    first_seed = [cell for cell in cells if cell.seed == cells[0].seed]
    if len(densities := _densities(table, first_seed)):
        caption = (
            "Cosine similarity of positive and of negative pairs of the test list, first seed, each over its own range"
        )
        caption += f", the best {MAX_DISTRIBUTIONS} by Recall@1." if len(first_seed) > MAX_DISTRIBUTIONS else "."
        parts += ["<h2>Similarities</h2>", svg_figure(draw_similarities(densities), "similarities", caption)]
    lines = "".join(f"<li>{escape(line)}</li>" for line in tables.provenance(runs))
    parts.append(f"<h2>Measured with</h2><ul>{lines}</ul>")
    write_page(path, f"Recall@K on {dataset}", parts)


def _protocols(shown: list[str]) -> str:
    """What each protocol is, with a box to show or hide its rows."""
    boxes = "".join(
        f'<dt><label><input type="checkbox" name="protocol" value="{escape(name)}" checked> {escape(name)}</label></dt>'
        f"<dd>{escape(tables.PROTOCOLS[name])}</dd>"
        for name in shown
    )
    return f"<h2>Protocols</h2><dl>{boxes}</dl>"


def _table(rows: pd.DataFrame, links: dict[tuple, list[str]], title: str) -> str:
    rows = list(rows.to_dict("records"))
    columns = {
        "Method": [escape(row["method"]) for row in rows],
        "Backbone": [escape(row["backbone"]) for row in rows],
        "Protocol": [escape(row["protocol"]) for row in rows],
        "Seeds": [_seeds(row, links) for row in rows],
    }
    for name, label in LABELS.items():
        columns[label] = [_figure(row, name) for row in rows]
        if name == "recall_at_1" and any(pd.notna(row["versus_best"]) for row in rows):
            columns["Against the best"] = [_versus_best(row) for row in rows]
    columns["R@1 untrained"] = [_plain(row["untrained_recall_at_1"]) for row in rows]
    columns["Reproduce"] = [_command(row["command"]) for row in rows]
    shown = pd.DataFrame(columns)
    text = ["Method", "Backbone", "Protocol", "Seeds", "Reproduce"]
    return html_table(shown, caption=f"{title}, Recall@K in percent", text=text, classes=[r["protocol"] for r in rows])


def _seeds(row: dict, links: dict[tuple, list[str]]) -> str:
    if row["protocol"] == "published":
        return ""
    return " ".join(links[row["embedding_dim"], row["backbone"], row["method"]])


def _plain(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.1f}"


def _figure(row: dict, name: str) -> str:
    text = _plain(row[name]) + (f" ± {row[f'{name}_sd']:.1f}" if row["n"] > 1 else "")
    if pd.notna(paper := row.get(f"paper_{name}")):
        text += f"<small>paper {paper:.1f} ({row[f'difference_{name}']:+.1f})</small>"
    return text


def _versus_best(row: dict) -> str:
    if pd.isna(row["versus_best"]):
        return "–"
    text = f"{row['versus_best']:+.1f} [{row['versus_best_low']:+.1f}, {row['versus_best_high']:+.1f}]"
    return text + "<small>within noise</small>" if row["within_noise"] else text


def _command(command: str | float) -> str:
    return "" if pd.isna(command) else f"<details><summary>command</summary><pre>{escape(command)}</pre></details>"


def _densities(table: pd.DataFrame, cells: list[Cell]) -> pd.DataFrame:
    """Of the best cells, named by what tells them apart."""
    final = table[table.protocol == "final"].sort_values("recall_at_1", ascending=False, kind="stable")
    order = list(final[["embedding_dim", "backbone", "method"]].itertuples(index=False, name=None))
    best = sorted(cells, key=lambda cell: order.index(tables.row_key(cell)))[:MAX_DISTRIBUTIONS]
    one_setting = len({(cell.backbone, cell.embedding_dim) for cell in best}) == 1
    names = {
        cell.name: cell.loss if one_setting else f"{cell.loss}\n{cell.backbone}, {cell.embedding_dim}" for cell in best
    }
    densities = curves.similarities(best, 0.005)
    return densities[densities.split == "test"].assign(cell=densities.cell.map(names))
