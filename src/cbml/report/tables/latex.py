"""Tables for a paper."""

import pandas as pd

from cbml.report.tables.rows import sections, shown


def to_latex(table: pd.DataFrame, dataset: str, test: dict[str, int]) -> str:
    """The tables of `summarise`, one `tabular` for each embedding size; `\\usepackage{booktabs}` is all they need.

    Args:
        test: the number of `images` and `classes` of the test list.
    """
    parts = []
    for title, rows in sections(table):
        text = shown(rows)
        text.columns = [name.replace("%", r"\%") for name in text.columns]
        what = f"% Recall@K on {dataset} in percent: {title}; test list: {test['images']:,} images of "
        what += f"{test['classes']:,} classes; protocols: {', '.join(rows.protocol.unique())}\n"
        tabular = (
            text.style.format(escape="latex")
            .hide()
            .to_latex(hrules=True, column_format="lll" + "r" * (len(text.columns) - 3))
        )
        parts.append(what + tabular.replace("±", r"$\pm$").replace("–", "--"))
    return "\n".join(parts)
