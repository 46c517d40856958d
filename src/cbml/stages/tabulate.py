"""The tables of a dataset's cells, and the page with them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cbml.errors import UserError
from cbml.files import damaged, read_json, write_text
from cbml.progress import message
from cbml.report.common.pictures import Neighbours, Pictures
from cbml.report.tables import rows as tables
from cbml.report.tables.comparisons import cell_colours, curves_chart
from cbml.report.tables.latex import to_latex
from cbml.report.tables.markdown import to_markdown
from cbml.report.tables.page import SHOWN, index_page, strip_part, tables_page
from cbml.report.tables.rows import Evaluated
from cbml.report.tables.tuning import settings, worth, worth_chart
from cbml.spec.params import load_cell
from cbml.stages.inputs import open_data
from cbml.stages.records import neighbours_of, record_of
from cbml.tracking.run import TABLES_PAGE, open_tables
from cbml.tracking.store import Store
from cbml.workspace import Workspace

SIDE = 64  # of a thumbnail, in pixels


def tabulate(workspace: Workspace, dataset: str, *, all_cells: bool = False) -> str:
    """Write the report of a dataset, log it to MLflow; return the table in Markdown, and last what is outdated in it.

    In its folder: `tables.md`, `.csv` and `.tex`; `metrics.json`, the headline; `curves.csv` and, for the first seed,
    `similarities.csv`, what `dvc plots` draws; `curves.svg`, a picture of the curves; `index.html`, the page;
    `strip.html`, its part of the page over all datasets, which is written as well. Where cells are tuned,
    `tuned-1.svg`, …, pictures of what that was worth.

    Args:
        all_cells: tabulate every finished cell of the dataset in the tracking store, the newest of each key, and not
            those of params.yaml.

    Raises:
        UserError: a cell has not been evaluated, or there is none.
    """
    found = _archived(workspace, dataset) if all_cells else _here(workspace, dataset)
    evaluated = tables.with_variants(found, workspace.conf)
    summary = read_json(evaluated[0].folder / "summary.json", "evaluate", ("test",))
    test = summary["test"] | ({"queries": summary["query"]["images"]} if "query" in summary else {})
    with_published = evaluated[0].cell.dataset_config.type == "cub200"
    cells = tables.collect(evaluated, workspace.conf)
    table, gains = tables.summarise(cells, with_published=with_published), worth(cells)
    text, curves = to_markdown(table, dataset, test, evaluated, gains), tables.curves(evaluated)
    first_seed = [one for one in evaluated if one.cell.seed == evaluated[0].cell.seed]
    folder = workspace.report(dataset)
    retrieved = _retrieved(workspace, evaluated[0])
    contents = {
        "tables.md": text,
        "tables.csv": table.round(3).to_csv(index=False),
        "tables.tex": to_latex(table, dataset, test),
        "metrics.json": json.dumps(tables.headline(table), indent=2) + "\n",
        "curves.csv": curves.to_csv(index=False),
        # On white: as a file of its own it cannot take a page's colours.
        "curves.svg": curves_chart(curves).replace("<svg", '<svg style="background: white"', 1),
        "similarities.csv": tables.similarities(first_seed, 0.02).to_csv(index=False),
        "index.html": tables_page(table, evaluated, dataset, test, gains, folder, *retrieved),
        "strip.html": strip_part(table, evaluated, dataset, *retrieved),
    }
    for number, (_, rows) in enumerate(settings(gains), 1):
        contents[f"tuned-{number}.svg"] = worth_chart(rows).replace("<svg", '<svg style="background: white"', 1)
    for name, content in contents.items():
        write_text(folder / name, content)
    pages = sorted(workspace.reports.glob("*/index.html"))  # git has the figures of datasets whose page is not here
    reports = [page.parent for page in pages]
    write_text(
        workspace.index,
        index_page({each.name: _headline(each) for each in reports}, {each.name: _strip(each) for each in reports}),
    )
    with open_tables(workspace, dataset, [one.cell for one in evaluated]) as run:
        for name in contents.keys() - {"index.html", "strip.html"}:
            run.log_file(folder / name)
        run.log_text(contents["index.html"], TABLES_PAGE)
        run.log_table(table.round(3), "tables.json")
        run.note(text)
        run.colour(dataset, *cell_colours(curves))
    return "\n".join([text, *tables.outdated(evaluated)])  # again where a terminal shows it: in the last line


def _headline(report: Path) -> dict[str, Any]:
    """What `rows.headline` wrote of a dataset; nothing, which is said, if it cannot be read: it may be another's."""
    try:
        headline = read_json(report / "metrics.json", f"tabulate@{report.name}", SHOWN)
        if not all(isinstance(headline[name], int | float) for name in SHOWN[:3]):
            raise damaged(report / "metrics.json", "no numbers", f"tabulate@{report.name}")
    except UserError as error:
        message(f"{report.parent}/index.html has no figures of {report.name}: {error}")
        return {}
    return headline


def _strip(report: Path) -> str:
    file = report / "strip.html"
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _retrieved(workspace: Workspace, one: Evaluated) -> tuple[Pictures, Callable[[Path], Neighbours]] | tuple[()]:
    """The test list, and what reads the neighbours that a cell like `one` finds; nothing if the images are not here."""
    dataset = one.cell.dataset
    try:
        data = open_data(workspace, one.cell)
        if data.fingerprint != one.record["fingerprint"]:
            raise UserError(f"lists/{dataset} is of other images than the cells")
        images, queries = data.test, data.scoring.queries
        if not data.root.is_dir():
            raise UserError(f"{data.root} is not there")
    except UserError as error:
        message(f"{dataset}: a page without pictures, {error}")
        return ()
    count = len(images.labels)
    return Pictures(images, data.root, SIDE), partial(neighbours_of, queries=queries or count, images=count)


def _here(workspace: Workspace, dataset: str) -> list[Evaluated]:
    """The cells of params.yaml."""
    return [
        Evaluated(
            cell, record_of(workspace.evaluation(cell), "evaluate"), workspace.evaluation(cell), workspace.page(cell)
        )
        for cell in workspace.cells(dataset)
    ]


def _archived(workspace: Workspace, dataset: str) -> list[Evaluated]:
    """The finished cells in the tracking store that are of the same images and lists as the newest one."""
    folders = Store(workspace).finished(dataset).values()
    found = [
        Evaluated(load_cell(folder / "cell.yaml", "evaluate"), record_of(folder, "evaluate"), folder, folder)
        for folder in folders
    ]
    if not found:
        raise UserError(f"{dataset}: the tracking store has no evaluated cell of it; the stage evaluate brings them")
    fingerprint = max(found, key=lambda one: one.record["finished"]).record["fingerprint"]
    alike = [one for one in found if one.record["fingerprint"] == fingerprint]
    if len(alike) < len(found):
        message(f"{dataset}: {len(found) - len(alike)} cells of other images or lists are left out")
    return alike
