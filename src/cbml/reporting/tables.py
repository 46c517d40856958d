"""Recall@K tables: method × backbone × protocol, beside the published figures for CUB-200-2011."""

import json
from importlib.resources import files
from pathlib import Path

import pandas as pd

from cbml import tracking
from cbml.config import Params
from cbml.evaluation.cell import PROTOCOLS as SCORED
from cbml.files import atomic_write, read_json

KS = (1, 2, 4, 8)
RECALLS = [f"recall_at_{k}" for k in KS]
METRICS = [*RECALLS, "r_precision", "map_at_r", "nmi"]
PUBLISHED_TEST = {"images": 5924, "classes": 100}
PROTOCOLS = {
    "final": "the model after the last iteration: the headline",
    "best_on_test": "the model whose Recall@1 on the test list was highest, as the published figures were selected: "
    "for comparison with them alone",
    "published": "as the paper prints it",
}


def published() -> pd.DataFrame:
    """The paper's six tables: backbone, embedding_dim, method, source (`paper`, `literature`), Recall@K in percent."""
    with (files("cbml.reporting") / "paper_tables.csv").open() as file:
        return pd.read_csv(file)


def collect(params: Params, dataset: str) -> pd.DataFrame:
    """A row for each cell and protocol, from evaluations/<dataset>/<cell>/metrics.json; metrics in percent."""
    rows = []
    for cell in params.cells(dataset):
        metrics = read_json(Path("evaluations", dataset, cell.name, "metrics.json"), "evaluate")
        for protocol in SCORED:
            rows.append(
                {
                    "embedding_dim": cell.embedding_dim,
                    "backbone": cell.backbone,
                    "method": cell.loss,
                    "protocol": protocol,
                    "seed": cell.seed,
                    **{name: 100 * metrics[protocol][name] for name in METRICS},
                    "untrained_recall_at_1": 100 * metrics["untrained"]["recall_at_1"],
                }
            )
    return pd.DataFrame(rows)


def summarise(cells: pd.DataFrame, *, with_published: bool) -> pd.DataFrame:
    """Mean and standard deviation over seeds.

    Args:
        cells: what `collect` returns.
        with_published: add the published figures: `paper_*` and `difference_*` columns beside our rows, and rows of
            protocol `published` for the backbones and embedding sizes of `cells`.

    Returns:
        A row a (embedding_dim, backbone, method, protocol), ordered by that and Recall@1: `n` seeds, and for each
        metric its mean and, as `<metric>_sd`, its standard deviation (empty for one seed).
    """
    keys = ["embedding_dim", "backbone", "method", "protocol"]
    columns = [*METRICS, "untrained_recall_at_1"]
    grouped = cells.groupby(keys, sort=False)
    table = grouped[columns].mean().join(grouped[METRICS].std().add_suffix("_sd"))
    table.insert(0, "n", grouped.size())
    table = table.reset_index()
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


def to_markdown(table: pd.DataFrame, dataset: str, test: dict[str, int]) -> str:
    """The tables of `summarise` for reading, one an embedding size; `test` counts the `images` and `classes`."""
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
            if "paper_recall_at_1" in rows:
                shown[f"R@{k} paper (difference)"] = [
                    ""
                    if pd.isna(row[f"paper_{name}"])
                    else f"{row[f'paper_{name}']:.1f} ({row[f'difference_{name}']:+.1f})"
                    for _, row in rows.iterrows()
                ]
        shown["MAP@R"] = [_figure(row, "map_at_r") for _, row in rows.iterrows()]
        shown["R@1 untrained"] = [
            "" if pd.isna(row.untrained_recall_at_1) else f"{row.untrained_recall_at_1:.1f}"
            for _, row in rows.iterrows()
        ]
        title = f"Embeddings of {size}" if size else "Pooled features, without a head"
        parts += [f"## {title}\n", _pipe_table(shown), ""]
    parts.append("Mean ± standard deviation over seeds. Protocols:\n")
    parts += [f"- `{name}`: {text}" for name, text in PROTOCOLS.items() if name in set(table.protocol)]
    return "\n".join(parts) + "\n"


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


def write_tables(params: Params, dataset: str) -> str:
    """Write reports/<dataset>/tables.md, tables.csv and metrics.json, log them to MLflow, return the Markdown."""
    published_too = params.option("dataset", dataset).type == "cub200"
    table = summarise(collect(params, dataset), with_published=published_too)
    test = read_json(Path("lists", dataset, "summary.json"), "build_lists")["test"]
    text, figures = to_markdown(table, dataset, test), headline(table)
    folder = Path("reports", dataset)
    config = params.model_dump(mode="json")
    axes = {name: ", ".join(map(str, config[name])) for name in ("backbone", "loss", "embedding_dim", "seed", "recipe")}
    with tracking.open_run(dataset, "tables", config=config, params=axes, tags={"kind": "tables"}) as run:
        for name, content in (
            ("tables.md", text),
            ("tables.csv", table.round(3).to_csv(index=False)),
            ("metrics.json", json.dumps(figures, indent=2) + "\n"),
        ):
            with atomic_write(folder / name) as temporary:
                temporary.write_text(content)
            run.log_file(folder / name)
        run.log_table(table.round(3), "tables.json")
    return text
