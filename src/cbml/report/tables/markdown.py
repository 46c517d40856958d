"""Tables as Markdown."""

import pandas as pd

from cbml.report.tables.rows import PROTOCOLS, Evaluated, notes, outdated, provenance, sections, shown
from cbml.report.tables.tuning import settings, shown_worth


def to_markdown(
    table: pd.DataFrame, dataset: str, test: dict[str, int], evaluated: list[Evaluated], gains: pd.DataFrame
) -> str:
    """The tables of `summarise` for reading, one for each embedding size.

    Args:
        test: the number of `images` and `classes` of the test list.
        gains: what `worth` returns.
    """
    parts = [f"# Recall@K on {dataset}, in percent", *outdated(evaluated), *notes(table, test)]
    for title, rows in sections(table):
        parts += [f"## {title}", pipe_table(shown(rows))]
    for title, rows in settings(gains):
        parts += [f"## {title}", pipe_table(shown_worth(rows))]
    parts.append("Mean ± standard deviation over seeds. Protocols:")
    parts.append("\n".join(f"- `{name}`: {text}" for name, text in PROTOCOLS.items() if name in set(table.protocol)))
    if commands := "\n".join(dict.fromkeys(table.command.dropna())):
        parts.append(f"## Every row again, by one command\n\n```\n{commands}\n```")
    parts.append("## Measured with\n\n" + "\n".join(f"- {line}" for line in provenance(evaluated)))
    return "\n\n".join(parts) + "\n"


def pipe_table(text: pd.DataFrame) -> str:
    """A table of strings as Markdown."""
    return text.to_markdown(index=False, disable_numparse=True)
