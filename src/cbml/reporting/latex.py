"""The tables for a paper."""

import pandas as pd

from cbml.reporting import tables

SPECIAL = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def escape(text: object) -> str:
    """Text whose every character LaTeX prints as it stands."""
    return str(text).translate(str.maketrans(SPECIAL))


def to_latex(table: pd.DataFrame, dataset: str, test: dict[str, int]) -> str:
    """The tables of `summarise` as LaTeX, one `tabular` an embedding size; `\\usepackage{booktabs}` is all they need.

    Args:
        test: counts the `images` and `classes` of the test list.
    """
    parts = []
    for size, rows in table.groupby("embedding_dim", sort=False):
        columns = {"Backbone": rows.backbone.map(escape), "Method": rows.method.map(escape)}
        columns["Protocol"] = rows.protocol.map(escape)
        columns["Seeds"] = ["" if pd.isna(n) else f"{n:.0f}" for n in rows.n]
        for k, name in zip(tables.KS, tables.RECALLS, strict=True):
            columns[f"R@{k}"] = [_figure(row, name) for _, row in rows.iterrows()]
            if rows.get(f"paper_{name}", pd.Series(dtype=float)).notna().any():
                columns[f"R@{k} paper"] = ["" if pd.isna(value) else f"{value:.1f}" for value in rows[f"paper_{name}"]]
        columns["MAP@R"] = [_figure(row, "map_at_r") for _, row in rows.iterrows()]
        what = f"embeddings of {size}" if size else "pooled features, without a head"
        parts += [
            f"% Recall@K on {dataset} in percent, {what}; test list: {test['images']:,} images of {test['classes']:,} "
            f"classes; protocols: {', '.join(rows.protocol.unique())}",
            f"\\begin{{tabular}}{{lll{'r' * (len(columns) - 3)}}}",
            r"\toprule",
            " & ".join(columns) + r" \\",
            r"\midrule",
            *(" & ".join(line) + r" \\" for line in zip(*columns.values(), strict=True)),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    return "\n".join(parts)


def _figure(row: pd.Series, name: str) -> str:
    if pd.isna(row[name]):
        return "--"
    return f"{row[name]:.1f}" + (f" $\\pm$ {row[f'{name}_sd']:.1f}" if row.n > 1 else "")
