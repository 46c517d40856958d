"""Recall@K tables: method × backbone × protocol, beside the published figures for CUB-200-2011."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from cbml.config import Cell, load_cell
from cbml.errors import UserError
from cbml.files import read_json
from cbml.reporting.commands import command

KS = (1, 2, 4, 8)
RECALLS = [f"recall_at_{k}" for k in KS]
METRICS = [*RECALLS, "r_precision", "map_at_r", "nmi"]
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


def published() -> pd.DataFrame:
    """The paper's six tables: backbone, embedding_dim, method, source (`paper`, `literature`), Recall@K in percent."""
    with (files("cbml.reporting") / "paper_tables.csv").open() as file:
        return pd.read_csv(file)


def evaluated(dataset: str) -> list[Cell]:
    """Every cell that evaluations/<dataset> holds, whatever params.yaml says, by name.

    Raises:
        UserError: there is none, or two differ in more than the seed but would share a row.
    """
    cells = [load_cell(file) for file in sorted(Path("evaluations", dataset).glob("*/cell.yaml"))]
    if not cells:
        raise UserError(f"evaluations/{dataset}: no evaluated cell; the stage evaluate writes them")
    first: dict[tuple, Cell] = {}
    for cell in cells:
        other = first.setdefault(row_key(cell), cell)
        if cell.to_dict() | {"seed": None} != other.to_dict() | {"seed": None}:
            raise UserError(
                f"evaluations/{dataset}: {cell.name} and {other.name} differ in more than the seed, so their mean "
                "means nothing; remove the folder of one"
            )
    return cells


def collect(cells: list[Cell]) -> pd.DataFrame:
    """A row for each cell and protocol, from evaluations/<dataset>/<cell>/metrics.json; metrics in percent."""
    rows = []
    for cell in cells:
        metrics = read_json(Path("evaluations", cell.dataset, cell.name, "metrics.json"), "evaluate")
        seeds = [other.seed for other in cells if row_key(other) == row_key(cell)]
        for protocol in [name for name in PROTOCOLS if name in metrics]:
            rows.append(
                {
                    "embedding_dim": cell.embedding_dim,
                    "backbone": cell.backbone,
                    "method": cell.loss,
                    "protocol": protocol,
                    "seed": cell.seed,
                    **{name: 100 * metrics[protocol][name] for name in METRICS},
                    "untrained_recall_at_1": 100 * metrics["untrained"]["recall_at_1"],
                    "command": command(cell, seeds),
                }
            )
    return pd.DataFrame(rows)


def row_key(cell: Cell) -> tuple[int, str, str]:
    """What the cells of one row have in common: all but the seed."""
    return cell.embedding_dim, cell.backbone, cell.loss


def versus_best(cells: pd.DataFrame) -> pd.DataFrame:
    """Compare each method with the best of its embedding size, backbone and protocol, seed by seed.

    The same seed gives two losses the same batches, crops and start, so their difference is paired.

    Returns:
        A row a (embedding_dim, backbone, method, protocol) with at least 3 seeds in common with the best method:
        `versus_best`, the mean difference of Recall@1, its 95 % interval by Student's t (`versus_best_low` and
        `_high`; not corrected for the number of comparisons), and `within_noise`: the interval holds zero.
    """
    rows = []
    for key, group in cells.groupby(["embedding_dim", "backbone", "protocol"], sort=False):
        recalls = group.pivot(index="seed", columns="method", values="recall_at_1")
        best = recalls.mean().idxmax()
        for method in recalls.columns.drop(best):
            differences = (recalls[method] - recalls[best]).dropna()
            n = len(differences)
            if n < MIN_SEEDS:
                continue
            mean = differences.mean()
            reach = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * differences.std() / np.sqrt(n)
            low, high = mean - reach, mean + reach
            rows.append([*key, method, mean, low, high, bool(low <= 0 <= high)])
    columns = ["embedding_dim", "backbone", "protocol", "method"]
    columns += ["versus_best", "versus_best_low", "versus_best_high", "within_noise"]
    return pd.DataFrame(rows, columns=columns)


def summarise(cells: pd.DataFrame, *, with_published: bool) -> pd.DataFrame:
    """Mean and standard deviation over seeds.

    Args:
        cells: what `collect` returns.
        with_published: add the published figures: `paper_*` and `difference_*` columns beside our rows, and rows of
            protocol `published` for the backbones and embedding sizes of `cells`.

    Returns:
        A row a (embedding_dim, backbone, method, protocol), ordered by that and Recall@1: `n` seeds, and for each
        metric its mean and, as `<metric>_sd`, its standard deviation (empty for one seed); what `versus_best` returns;
        the `command` that computes the row's cells.
    """
    keys = ["embedding_dim", "backbone", "method", "protocol"]
    columns = [*METRICS, "untrained_recall_at_1"]
    grouped = cells.groupby(keys, sort=False)
    table = grouped[columns].mean().join(grouped[METRICS].std().add_suffix("_sd"))
    table.insert(0, "n", grouped.size())
    table = table.reset_index().merge(versus_best(cells), how="left", on=keys)
    table["command"] = table.merge(cells.drop_duplicates(keys), how="left", on=keys).command
    if with_published:
        paper = published()
        key = paper.method.str.lower().str.replace("-", "_")
        ours = paper[paper.source == "paper"].assign(method=key)[keys[:3] + RECALLS]
        table = table.merge(ours.rename(columns={name: f"paper_{name}" for name in RECALLS}), how="left", on=keys[:3])
        for name in RECALLS:
            table[f"difference_{name}"] = table[name] - table[f"paper_{name}"]
        wanted = paper.merge(table[["embedding_dim", "backbone"]].drop_duplicates())
        table = pd.concat([table, wanted.assign(protocol="published").drop(columns="source")], ignore_index=True)
    return table.sort_values(
        ["embedding_dim", "backbone", "recall_at_1"], ascending=[False, True, False], ignore_index=True
    )


def _figure(row: pd.Series, name: str) -> str:
    if pd.isna(row[name]):
        return "–"
    return f"{row[name]:.1f}" + (f" ± {row[f'{name}_sd']:.1f}" if row.n > 1 else "")


def _pipe_table(shown: pd.DataFrame) -> str:
    rows = [shown.columns, ["---"] * len(shown.columns), *shown.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _versus_best(row: pd.Series) -> str:
    if pd.isna(row.versus_best):
        return ""
    noise = ", within noise" if row.within_noise else ""
    return f"{row.versus_best:+.1f} [{row.versus_best_low:+.1f}, {row.versus_best_high:+.1f}]{noise}"


def to_markdown(table: pd.DataFrame, dataset: str, test: dict[str, int], runs: list[dict]) -> str:
    """The tables of `summarise` for reading, one an embedding size.

    Args:
        test: the number of `images` and `classes` of the test list.
        runs: the run.json of each cell.
    """
    parts = [f"# Recall@K on {dataset}, in percent\n"]
    parts.append(f"Test list: {test['images']:,} images of {test['classes']:,} classes.")
    if "paper_recall_at_1" in table and test != PUBLISHED_TEST:
        parts.append("The published figures are on 5,924 images of 100 classes: **not comparable with this part**.")
    parts.append("")
    for size, rows in table.groupby("embedding_dim", sort=False):
        shown = pd.DataFrame(
            {
                "Backbone": rows.backbone,
                "Method": rows.method,
                "Protocol": rows.protocol,
                "Seeds": rows.n.map(lambda n: "" if pd.isna(n) else f"{n:.0f}"),
            }
        )
        for k, name in zip(KS, RECALLS, strict=True):
            shown[f"R@{k}"] = [_figure(row, name) for _, row in rows.iterrows()]
            if "paper_recall_at_1" in rows and rows.paper_recall_at_1.notna().any():
                shown[f"R@{k} paper (difference)"] = [
                    ""
                    if pd.isna(row[f"paper_{name}"])
                    else f"{row[f'paper_{name}']:.1f} ({row[f'difference_{name}']:+.1f})"
                    for _, row in rows.iterrows()
                ]
        if rows.versus_best.notna().any():
            shown["R@1 against the best [95 %]"] = [_versus_best(row) for _, row in rows.iterrows()]
        shown["MAP@R"] = [_figure(row, "map_at_r") for _, row in rows.iterrows()]
        shown["R@1 untrained"] = [
            "" if pd.isna(row.untrained_recall_at_1) else f"{row.untrained_recall_at_1:.1f}"
            for _, row in rows.iterrows()
        ]
        title = f"Embeddings of {size}" if size else "Pooled features, without a head"
        parts += [f"## {title}\n", _pipe_table(shown), ""]
    parts.append("Mean ± standard deviation over seeds. Protocols:\n")
    parts += [f"- `{name}`: {text}" for name, text in PROTOCOLS.items() if name in set(table.protocol)]
    parts += [f"\n{note}" for note in notes(table)]
    parts.append("\n## Every row again, by one command\n\n```")
    parts += list(dict.fromkeys(table.command.dropna()))
    parts.append("```\n\n## Measured with\n")
    parts += [f"- {line}" for line in provenance(runs)]
    return "\n".join(parts) + "\n"


def notes(table: pd.DataFrame) -> list[str]:
    """What a reader must know before ranking the rows of `summarise`."""
    texts = []
    if table.versus_best.notna().any():
        texts.append(
            "Against the best: mean difference of Recall@1, seed by seed, to the best method of the same backbone, "
            "size and protocol, and its 95 % interval (Student's t, not corrected for the number of comparisons)."
        )
    if (table.n < MIN_SEEDS).any():
        texts.append(f"Rows of fewer than {MIN_SEEDS} seeds rank nothing: the spread between seeds is unknown.")
    return texts


def provenance(runs: list[dict]) -> list[str]:
    """When, on what and with what the cells were computed, from their run.json; a line each."""

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
    names = runs[0]["versions"]
    return lines + [f"{name}: {listed([run['versions'][name] for run in runs])}" for name in names]


def headline(table: pd.DataFrame) -> dict[str, float | str | int]:
    """The figures that `dvc metrics show` and `dvc exp show` present: the same names whatever cells ran."""
    final = table[table.protocol == "final"]
    best = final.loc[final.recall_at_1.idxmax()]
    return {
        "best_cell": f"{best.backbone}-{best.method}-{best.embedding_dim}",
        "cells": len(final),
        **{name: round(float(best[name]), 2) for name in METRICS},
        "mean_recall_at_1": round(float(final.recall_at_1.mean()), 2),
        "untrained_recall_at_1": round(float(best.untrained_recall_at_1), 2),
    }
