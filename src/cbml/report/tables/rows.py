"""Recall@K tables: what evaluated cells hold, as numbers, beside the published figures."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from cbml.provenance import changed, gone
from cbml.report.common.evaluated import metrics_of, similarities_of, validations_of
from cbml.report.common.numbers import NO_NMI, NO_NMI_IN_GALLERY, metrics, number, recalls
from cbml.report.tables.commands import command
from cbml.spec.cell import Cell, flatten
from cbml.spec.settings import settings_of

MIN_SEEDS = 3  # fewer get no interval, and so no claim
CONFIDENCE = 0.95
PUBLISHED_TEST = {"images": 5924, "classes": 100}
PROTOCOLS = {
    "final": "the model after the last iteration: the headline",
    "best_on_test": "the model whose Recall@1 on the test list was highest, as the published figures were selected: "
    "for comparison with them alone",
    "validated": "the model of the iteration that was best on held-out training classes, trained on all training "
    "classes: no test image had a say",
    "published": "as the paper prints it",
}
# What the cells of one row have in common: all but the seed.
ROW = ["embedding_dim", "backbone", "method", "variant"]
BUDGET = ["iterations", "batch_size", "spent"]  # rows of another are not ranked with one
PAGES = ("cell.html", "index.html")  # the page of a cell: in the tracking store; here, and there once
SOURCES = ("dataset", "backbone.weights", "backbone.published")  # where things are from, which is not what they are


@dataclass(frozen=True)
class Evaluated:
    """An evaluated cell.

    Attributes:
        cell: its configuration.
        record: its run.json.
        folder: of its evaluation.
        page: the folder of its page: index.html, or what it is called in the tracking store.
        variant: what tells it from others of its backbone, loss and embedding size; see `with_variants`.
    """

    cell: Cell
    record: dict[str, Any]
    folder: Path
    page: Path
    variant: str = ""

    @property
    def row(self) -> tuple[int, str, str, str]:
        """The values of `ROW`."""
        return self.cell.embedding_dim, self.cell.backbone, self.cell.loss, self.variant

    @property
    def page_file(self) -> Path | None:
        """Its page, if that is there: one of another checkout may not have come with its cell."""
        return next((self.page / name for name in PAGES if (self.page / name).is_file()), None)

    @property
    def archived(self) -> bool:
        """Whether it is from the tracking store, which keeps all of a cell in one folder."""
        return self.page == self.folder

    @property
    def budget(self) -> dict[str, Any]:
        """The values of `BUDGET`. Tuned cells have theirs in common, and 0 iterations: each loss has its own."""
        recipe, tuned = self.cell.recipe, self.cell.loss_config.tuned
        spent = f"tuned by {tuned}" if tuned else f"{recipe.iterations:,} iterations of {recipe.batch_size} images"
        spent += ", on a frozen trunk" if recipe.train == "head" else ""
        return dict(zip(BUDGET, (0 if tuned else recipe.iterations, recipe.batch_size, spent), strict=True))

    @property
    def unsupervised(self) -> bool:
        """Whether it was trained without labels."""
        batches = self.cell.loss_config.batches
        return batches is not None and not batches.needs_labels

    @property
    def started(self) -> str:
        """What the backbone started from, which may hold labels of its own."""
        weights = self.cell.backbone_config.weights
        return {None: "from scratch", "imagenet": "ImageNet weights"}.get(weights, f"weights {weights}")


def published() -> pd.DataFrame:
    """Published figures: the paper's six tables (source `paper`, `literature`), and without labels (`unsupervised`).

    Columns: `backbone`, `embedding_dim` and `method` as printed, `source`, Recall@K in percent; `option`, our name of
    the method; `source_dim`, its embedding size as its own authors have it; `note`, what else differs from the print.
    """
    with (files("cbml.report.tables") / "paper_tables.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file)


def with_variants(evaluated: list[Evaluated], conf: Path) -> list[Evaluated]:
    """The same cells with a `variant` where something that their names do not show differs between them.

    It reads like `margin=0.2, recipe=cpu`; or `tuned`, where the constants are those of `pipeline.tune`. Between cells
    of the same names, that are no seeds of one another, it is any parameter; between all cells, what was set of the
    recipe. A parameter that follows from the choice of another recipe is left out, and one that every cell has as its
    options' files in the folder `conf` have it. What no parameter shows is told by the last digits of the cells' keys.
    """
    kinds = {_row_hash(one): one.cell for one in evaluated if not one.cell.loss_config.tuned}
    flats = {kind: {name: json.dumps(value) for name, value in cell.flat().items()} for kind, cell in kinds.items()}
    set_of_recipe = {name for cell in kinds.values() for name in _set_of_recipe(cell, conf)}
    named = [
        replace(
            one,
            variant="tuned"
            if one.cell.loss_config.tuned
            else _variant(_row_hash(one), {_row_hash(each) for each in alike}, flats, set_of_recipe),
        )
        for one, alike in _with_its_row(evaluated)
    ]
    return [
        replace(one, variant=", ".join(filter(None, [one.variant, _row_hash(one)])))
        if len({_row_hash(each) for each in alike}) > 1
        else one
        for one, alike in _with_its_row(named)
    ]


def _with_its_row(evaluated: list[Evaluated]) -> list[tuple[Evaluated, list[Evaluated]]]:
    rows: dict[tuple, list[Evaluated]] = defaultdict(list)
    for one in evaluated:
        rows[one.row].append(one)
    return [(one, rows[one.row]) for one in evaluated]


def _set_of_recipe(cell: Cell, conf: Path) -> set[str]:
    """What was set of a cell's recipe: all of it, if it has no file."""
    everything = flatten("", cell.recipe.model_dump(mode="json", exclude={"name"}))
    return {f"recipe.{name}" for name in settings_of(cell, conf).get("recipe", everything)}


def _variant(own: str, alike: set[str], flats: dict[str, dict[str, str]], set_of_recipe: set[str]) -> str:
    """The variant of cells by their hash, from the flat parameters of all: compared are those `alike`, or all."""
    parts = []
    for name, value in flats[own].items():
        group = name.partition(".")[0]
        of_all = name == "recipe" or any(name == each or name.startswith(f"{each}.") for each in set_of_recipe)
        pairs = {(flat[group], flat.get(name)) for kind, flat in flats.items() if of_all or kind in alike}
        follows = name != group and len(pairs) == len({option for option, _ in pairs}) > 1
        if name != "seed" and not name.startswith(SOURCES) and len({value for _, value in pairs}) > 1 and not follows:
            text = value.strip('"')
            parts.append(f"{name.removeprefix('loss.')}={text}")
    return ", ".join(parts)


def _row_hash(evaluated: Evaluated) -> str:
    return evaluated.record["key"].rpartition("-")[2]


def collect(evaluated: list[Evaluated], conf: Path) -> pd.DataFrame:
    """One row per cell and protocol: `ROW`, `BUDGET`, `protocol`, `seed`, metrics, and the `command` of its row."""
    rows = []
    for one in evaluated:
        scores = metrics_of(one.folder)
        seeds = sorted(each.cell.seed for each in evaluated if each.row == one.row)
        for protocol in [name for name in PROTOCOLS if name in scores]:
            values = {name: scores[protocol][name] for name in metrics(scores[protocol])}
            rows.append(
                {
                    **dict(zip(ROW, one.row, strict=True)),
                    **one.budget,
                    "unsupervised": one.unsupervised,
                    "started": one.started,
                    "recipe": one.cell.recipe_name,
                    "tuned": one.cell.loss_config.tuned or "",
                    "protocol": protocol,
                    "seed": one.cell.seed,
                    **values,
                    "untrained_recall_at_1": scores["untrained"]["recall_at_1"],
                    "command": command(one.cell, seeds, conf),
                }
            )
    return pd.DataFrame(rows)


def interval(values: pd.Series) -> tuple[float, float, float]:
    """Mean of one value per seed, and the ends of its 95 % interval by Student's t."""
    mean, n = values.mean(), len(values)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std() / np.sqrt(n)
    return mean, mean - reach, mean + reach


def versus_best(cells: pd.DataFrame) -> pd.DataFrame:
    """Compare each method with the best of its section (see `sections`), backbone and protocol, seed by seed.

    The same seed gives two losses the same batches, crops and start, so their difference is paired. Methods of fewer
    than 3 seeds take no part.

    Returns:
        One row per `ROW` and protocol with at least 3 seeds in common with the best: `versus_best`, the mean difference
        of Recall@1, its 95 % interval by Student's t (`versus_best_low` and `_high`; not corrected for the number of
        comparisons), and `within_noise`: the interval holds zero.
    """
    rows = []
    by = ["embedding_dim", "backbone", "protocol"]
    for key, group in cells.groupby([*by, "unsupervised", *BUDGET], sort=False):
        recalls = group.pivot(index="seed", columns=["method", "variant"], values="recall_at_1")
        recalls = recalls.loc[:, recalls.count() >= MIN_SEEDS]
        if recalls.empty:
            continue
        best = recalls.mean().idxmax()
        for method in recalls.columns.drop(best):
            differences = (recalls[method] - recalls[best]).dropna()
            if len(differences) < MIN_SEEDS:
                continue
            mean, low, high = interval(differences)
            rows.append([*key[: len(by)], *method, mean, low, high, bool(low <= 0 <= high)])
    columns = [*by, "method", "variant", "versus_best", "versus_best_low", "versus_best_high", "within_noise"]
    return pd.DataFrame(rows, columns=columns)


def summarise(cells: pd.DataFrame, *, with_published: bool) -> pd.DataFrame:
    """Mean and standard deviation over seeds.

    Args:
        cells: what `collect` returns.
        with_published: add the published figures: `paper_*` and `difference_*` columns beside our rows, and rows of
            protocol `published` for the backbones and embedding sizes of `cells`.

    Returns:
        One row per `ROW` and protocol, ordered by embedding size, `BUDGET`, backbone and Recall@1: `n` seeds, and for
        each metric its mean and, as `<metric>_sd`, its standard deviation (empty for one seed); what `versus_best`
        returns; the `command` that computes the row's cells.
    """
    keys = [*ROW, *BUDGET, "unsupervised", "started", "protocol"]
    names = metrics(cells)
    grouped = cells.groupby(keys, sort=False)
    table = grouped[[*names, "untrained_recall_at_1"]].mean().join(grouped[names].std().add_suffix("_sd"))
    table.insert(0, "n", grouped.size())
    table = table.reset_index().merge(versus_best(cells), how="left", on=[*ROW, "protocol"])
    table["command"] = table.merge(cells.drop_duplicates(keys), how="left", on=keys).command
    if with_published:
        paper = published()
        paper["unsupervised"] = paper.source == "unsupervised"
        columns = {name: f"paper_{name}" for name in recalls(paper)} | {"source_dim": "paper_dim"}
        # Beside a row of the size that is printed, or of the size that it was.
        theirs = pd.concat([paper, paper.assign(embedding_dim=paper.source_dim)])
        theirs = theirs.assign(method=theirs.option)[[*ROW[:3], *columns]].rename(columns=columns)
        table = table.merge(theirs.dropna(subset="method").drop_duplicates(ROW[:3]), how="left", on=ROW[:3])
        for name in recalls(paper):
            table[f"difference_{name}"] = table[name] - table[f"paper_{name}"]
        wanted = paper.merge(table[["embedding_dim", "backbone", "unsupervised", *BUDGET]].drop_duplicates())
        wanted = wanted.assign(protocol="published", variant="").drop(columns=["source", "option"])
        table = pd.concat([table, wanted], ignore_index=True)
    order = {"unsupervised": True, "embedding_dim": False} | dict.fromkeys(BUDGET, False)
    order |= {"backbone": True, "recall_at_1": False}
    return table.sort_values([*order], ascending=[*order.values()], ignore_index=True)


def sections(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The tables that people read, each with its title: by embedding size and budget, those without labels apart."""
    budgets = len(table[BUDGET].drop_duplicates())
    by = ["embedding_dim", "unsupervised", *BUDGET]
    for (size, unsupervised, *_, spent), rows in table.groupby(by, sort=False):
        title = f"Embeddings of {size}" if size else "Pooled features, without a head"
        title += ", trained without labels" if unsupervised else ""
        yield title + (f", {spent}" if budgets > 1 or "iterations" not in spent else ""), rows


def shown(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `summarise` as text, in the columns that people read; `R@K paper` where the paper has a figure."""

    def column(write: Callable[[Any], str]) -> list[str]:
        return [write(row) for row in rows.itertuples()]

    def method(row: Any) -> str:
        start = row.started if row.unsupervised and row.protocol != "published" else ""
        details = ", ".join(filter(None, [row.variant, start]))
        return f"{row.method} ({details})" if details else row.method

    text = pd.DataFrame(
        {
            "Backbone": rows.backbone,
            "Method": column(method),
            "Protocol": rows.protocol,
            "Seeds": column(lambda row: "" if pd.isna(row.n) else f"{row.n:.0f}"),
        }
    )
    for name in recalls(rows):
        label = f"R@{name.removeprefix('recall_at_')}"
        text[label] = column(partial(_figure, name=name))
        if f"paper_{name}" in rows and rows[f"paper_{name}"].notna().any():
            text[f"{label} paper"] = column(partial(_against_paper, name=name))
        if name == "recall_at_1" and rows.versus_best.notna().any():
            text["R@1 against the best [95 %]"] = column(partial(against, name="versus_best"))
    text["MAP@R"] = column(lambda row: _figure(row, "map_at_r"))
    text["R@1 untrained"] = column(lambda row: number(row.untrained_recall_at_1, ""))
    return text


def _figure(row: Any, name: str) -> str:
    return number(getattr(row, name)) + (f" ± {getattr(row, f'{name}_sd'):.1f}" if row.n > 1 else "")


def _against_paper(row: Any, name: str) -> str:
    paper = getattr(row, f"paper_{name}")
    if pd.isna(paper):
        return ""
    size = "" if row.paper_dim == row.embedding_dim else f"{row.paper_dim:.0f}-d, "
    return f"{paper:.1f} ({size}{getattr(row, f'difference_{name}'):+.1f})"


def against(row: Any, name: str) -> str:
    """A difference with its interval, which may hold zero."""
    mean, low, high = (getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))
    if pd.isna(low):
        return ""
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]{', within noise' if low <= 0 <= high else ''}"


def notes(table: pd.DataFrame, test: dict[str, int]) -> list[str]:
    """What a reader must know before comparing the rows of `summarise`, as Markdown.

    Args:
        test: the number of `images` and `classes` of the test list; and of `queries`, if they have a gallery.
    """
    texts = [f"Test list: {test['images']:,} images of {test['classes']:,} classes"]
    if queries := test.get("queries"):
        texts[0] += f": {queries:,} queries, which are searched for in a gallery of {test['images'] - queries:,}"
    texts[0] += "."
    if (table.protocol == "published").any() and test != PUBLISHED_TEST:
        texts.append("The published figures are on 5,924 images of 100 classes: **not comparable with this part**.")
    if "note" in table:
        remarks = table.dropna(subset="note").drop_duplicates("method")
        if len(remarks):
            found = "; ".join(f"{row.method}: {row.note}" for row in remarks.itertuples())
            texts.append(f"The paper's figures of others stand as it prints them. {found}.")
    if table.unsupervised.any():
        texts.append(
            "Trained without labels: no label of this dataset. ImageNet weights hold labels of their own, some of them "
            "of birds. The published figures without labels are best-on-test."
        )
    if table.versus_best.notna().any():
        texts.append(
            "Against the best: mean difference of Recall@1, seed by seed, to the best method of the same backbone, "
            "size and protocol, and its 95 % interval (Student's t, not corrected for the number of comparisons)."
        )
    if len(table[BUDGET].drop_duplicates()) > 1:
        texts.append("Rows of other iterations or batch sizes are tables of their own, and not ranked together.")
    if "nmi" not in table:
        texts.append(NO_NMI_IN_GALLERY if queries else NO_NMI)
    final = table[table.protocol == "final"]
    if below := _names(final[final.recall_at_1 < final.untrained_recall_at_1]):
        texts.append(f"Training made the network worse than untrained, by Recall@1: {', '.join(below.values())}.")
    if (table.n < MIN_SEEDS).any():
        texts.append(f"Rows of fewer than {MIN_SEEDS} seeds rank nothing: the spread between seeds is unknown.")
    return texts


def outdated(evaluated: list[Evaluated]) -> list[str]:
    """Warnings of cells that other code than today's trained, or scored, each with the command that does it again."""
    warnings = []
    for done, stage, record in (("Trained", "train", "code"), ("Scored", "evaluate", "scoring_code")):
        found = [(one, files) for one in evaluated if (files := changed(one.record.get(record, {})))]
        if not found:
            continue
        files = sorted({file for _, of_one in found for file in of_one})
        absent = gone(files)
        edited = [file for file in files if file not in absent]
        lists = [", ".join(f"src/cbml/{file}" for file in each) for each in (edited, absent)]
        modules = "; ".join(filter(None, [lists[0], lists[1] and f"no longer there: {lists[1]}"]))
        names = ", ".join(dict.fromkeys(f"{one.cell.name}{one.variant and f' ({one.variant})'}" for one, _ in found))
        stages = " ".join(dict.fromkeys(f"{stage}@{one.cell.name}-{one.cell.dataset}" for one, _ in found))
        again = "Again, just those"
        if any(one.archived for one, _ in found):  # params.yaml may have other cells of these names
            again = "Again, after the command of its row, just those"
        warnings.append(
            f"**{done} by other code than today's** ({modules}): {names}. {again}: "
            f"`dvc repro -f -s {stages} && dvc repro`."
        )
    return warnings


def provenance(evaluated: list[Evaluated]) -> list[str]:
    """When, on what and with what the cells were computed, from their records."""
    runs = [one.record for one in evaluated]

    def listed(values: list[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    def span(values: list[str]) -> str:
        return " to ".join(dict.fromkeys([values[0], values[-1]]))

    seconds = sorted(run["train_seconds"] for run in runs)
    minutes = span([f"{value / 60:.1f}" for value in seconds])
    waited = sum(run["data_seconds"] for run in runs) / max(sum(seconds), 1e-9)
    lines = [
        f"runs: {len(runs)}, finished {span(sorted(run['finished'][:10] for run in runs))}",
        f"device: {listed([run['device'] for run in runs])}",
        f"iterations of a run: {minutes} minutes, {waited:.1%} of it waiting for batches",
    ]
    names = dict.fromkeys(name for run in runs for name in run["versions"])
    versions = {name: dict.fromkeys(run["versions"].get(name, "–") for run in runs) for name in names}
    return [*lines, ", ".join(f"{name} {' or '.join(found)}" for name, found in versions.items())]


def headline(table: pd.DataFrame) -> dict[str, Any]:
    """What `dvc metrics show` and `dvc exp show` present: the best row, and below `R@1` the Recall@1 of each row."""
    final = table[table.protocol == "final"]
    names = _names(final)
    best = final.recall_at_1.idxmax()
    return {
        "best_cell": names[best],
        "cells": len(final),
        **{name: round(float(final[name][best]), 2) for name in ("recall_at_1", "untrained_recall_at_1")},
        "R@1": {names[row]: round(float(recall), 2) for row, recall in final.recall_at_1.items()},
    }


def curves(evaluated: list[Evaluated]) -> pd.DataFrame:
    """Recall@1 on the test list by iteration: columns `cell`, `ROW`, `seed`, `iteration`, `recall_at_1`."""
    parts = []
    for one in evaluated:
        rows = validations_of(one.folder, one.cell)
        rows = rows.assign(cell=one.record["key"], **dict(zip(ROW, one.row, strict=True)), seed=one.cell.seed)
        parts.append(rows.assign(recall_at_1=rows.recall_at_1.round(3)))
    return pd.concat(parts, ignore_index=True)[["cell", *ROW, "seed", "iteration", "recall_at_1"]]


def similarities(evaluated: list[Evaluated], bin_width: float) -> pd.DataFrame:
    """Densities of cosine similarity, means over bins: columns `cell`, `split`, `pair`, `similarity`, `density`."""
    keys = ["cell", "split", "pair"]
    parts = [similarities_of(one.folder)[0].assign(cell=one.record["key"]) for one in evaluated]
    rows = pd.concat(parts, ignore_index=True)
    bins = (rows.similarity // bin_width).rename("bin")
    means = rows.groupby([*keys, bins], sort=False)[["similarity", "density"]].mean()
    return means.round(4).reset_index().drop(columns="bin")


def _names(rows: pd.DataFrame) -> dict[Any, str]:
    """Of each row, what is trained in it."""
    return {
        row.Index: f"{row.backbone}-{row.method}-{row.embedding_dim}" + (row.variant and f" ({row.variant})")
        for row in rows.itertuples()
    }
