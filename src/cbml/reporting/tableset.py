"""A table set: every table, chart and page of a dataset's cells."""

import json
from pathlib import Path

from cbml import kept, tracking
from cbml.config import Params
from cbml.figures.comparison import draw_curves
from cbml.files import read_json, write_text
from cbml.reporting import curves, tables
from cbml.reporting.index import write_index
from cbml.reporting.latex import to_latex

INDEX = Path("reports", "index.html")


def write_tables(params: Params, dataset: str, *, all_cells: bool = False) -> str:
    """Write reports/<dataset> and reports/index.html, log them to MLflow, return the table in Markdown.

    In the folder: `tables.md`, `.csv` and `.tex`; `metrics.json`, the headline; `curves.csv` and, for the first seed,
    `similarities.csv`, what `dvc plots` draws; `curves.svg`, a picture of the curves.

    Args:
        params: whose cells are tabulated.
        all_cells: tabulate every cell that was ever evaluated here or imported instead.

    Raises:
        UserError: a cell has not been evaluated; see `tables.evaluated`.
    """
    if all_cells:
        kept.restore(dataset)
    cells = tables.evaluated(dataset) if all_cells else params.cells(dataset)
    table = tables.summarise(tables.collect(cells), with_published=cells[0].dataset_config.type == "cub200")
    test = read_json(Path("lists", dataset, "summary.json"), "build_lists")["test"]
    runs = [read_json(Path("evaluations", dataset, cell.name, "run.json"), "evaluate") for cell in cells]
    text, figures = tables.to_markdown(table, dataset, test, runs), tables.headline(table)
    folder = Path("reports", dataset)
    recalls = curves.curves(cells)
    first_seed = [cell for cell in cells if cell.seed == cells[0].seed]
    axes = {
        "backbone": [cell.backbone for cell in cells],
        "loss": [cell.loss for cell in cells],
        "embedding_dim": [cell.embedding_dim for cell in cells],
        "seed": [cell.seed for cell in cells],
        "recipe": [cell.recipe_name for cell in cells],
    }
    axes = {name: ", ".join(map(str, dict.fromkeys(values))) for name, values in axes.items()}
    config = {"cells": [cell.to_dict() for cell in cells]}
    with tracking.open_run(dataset, "tables", config=config, params=axes, tags={"kind": "tables"}) as run:
        for name, content in (
            ("tables.md", text),
            ("tables.csv", table.round(3).to_csv(index=False)),
            ("tables.tex", to_latex(table, dataset, test)),
            ("metrics.json", json.dumps(figures, indent=2) + "\n"),
            ("curves.csv", recalls.to_csv(index=False)),
            # On white: as a file of its own it cannot take a page's colours.
            ("curves.svg", draw_curves(recalls).replace("<svg", '<svg style="background: white"', 1)),
            ("similarities.csv", curves.similarities(first_seed, 0.02).to_csv(index=False)),
        ):
            write_text(folder / name, content)
            run.log_file(folder / name)
        run.log_table(table.round(3), "tables.json")
        write_index(INDEX, table, cells, dataset=dataset, test=test, runs=runs)
        run.log_file(INDEX)
        run.note(text)
    return text
