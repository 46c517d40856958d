"""HTML pages that stand alone: nothing is loaded, light and dark, narrow and wide; and the page of one cell."""

import base64
import re
from collections.abc import Collection, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import pandas as pd
from PIL import Image

from cbml.config import Cell
from cbml.files import read_json, write_text

LABELS = {
    "recall_at_1": "R@1",
    "recall_at_2": "R@2",
    "recall_at_4": "R@4",
    "recall_at_8": "R@8",
    "r_precision": "R-Precision",
    "map_at_r": "MAP@R",
    "nmi": "NMI",
}
MIME = {".jpg": "image/jpeg", ".png": "image/png"}
# The figures of a cell in the order of its page: file (one of several formats), caption.
FIGURES = [
    (("training.svg",), "Recall@1 on the test list, and the loss with its terms, over iterations."),
    (("recall_at_k.svg",), "Recall@K of the final model on the test list, by K."),
    (("similarities.svg",), "Cosine similarity of positive and of negative pairs, on the training and the test list."),
    (("embedding_map.svg", "embedding_map.png"), "Some test classes' embeddings in two dimensions."),
    (("gallery.jpg",), "Queries of the test list, each with its nearest neighbours, right and wrong ones marked."),
    (("failures.jpg",), "The most confident failures: a wrong nearest neighbour with the highest similarity."),
    (("confusions.jpg",), "The classes most often confused: a query beside its wrong nearest neighbour."),
]


def write_cell_page(folder: Path, cell: Cell) -> None:
    """Write `index.html`, the page of a cell, into the folder of its evaluation, from the files that lie there.

    metrics.json is needed; a figure, classes.csv, cell.yaml or run.json that is not there is left out.

    Raises:
        UserError: metrics.json is missing or is not JSON.
    """
    metrics = read_json(folder / "metrics.json", "evaluate")
    embedding = f"embeddings of {cell.embedding_dim}" if cell.embedding_dim else "pooled features, without a head"
    recipe = f"recipe {cell.recipe_name}: {cell.recipe.iterations:,} iterations of {cell.recipe.batch_size} images"
    facts = [cell.dataset, cell.backbone, cell.loss, embedding, f"seed {cell.seed}", recipe]
    parts = [
        f"<h1>{escape(cell.name)}</h1>",
        f"<p>{escape(' · '.join(facts))}</p>",
        _metrics_table(metrics),
    ]
    if unanswered := metrics["final"].get("queries_without_answer"):
        parts.append(f"<p>{unanswered:,.0f} queries have no other image of their class and are left out.</p>")
    there = [(folder / name, caption) for names, caption in FIGURES for name in names if (folder / name).is_file()]
    parts += ['<div class="figures">', *(figure(file, caption) for file, caption in there), "</div>"]
    if (file := folder / "classes.csv").is_file():
        parts += ["<h2>Classes</h2>", _classes_table(pd.read_csv(file, dtype=str, keep_default_na=False))]
    for name in ("cell.yaml", "run.json"):
        if (file := folder / name).is_file():
            parts.append(f"<details><summary>{name}</summary><pre>{escape(file.read_text())}</pre></details>")
    write_page(folder / "index.html", f"{cell.name} on {cell.dataset}", parts)


def _metrics_table(metrics: dict[str, dict[str, float]]) -> str:
    shown = pd.DataFrame({"Protocol": metrics.keys()})
    shown["Iteration"] = [f"{scores['iteration']:.0f}" for scores in metrics.values()]
    for name, label in LABELS.items():
        shown[label] = [f"{100 * scores[name]:.1f}" if name in scores else "–" for scores in metrics.values()]
    return html_table(shown, caption="In percent, on the test list.", text=["Protocol"])


def _classes_table(classes: pd.DataFrame) -> str:
    shown = pd.DataFrame(
        {
            "Class": classes["class"].map(escape),
            "Images": classes.images,
            "R@1": pd.to_numeric(classes.recall_at_1).map(
                lambda share: "–" if pd.isna(share) else f"{100 * share:.1f}"
            ),
            "Most often taken for": classes.confused_with.map(escape),
        }
    )
    caption = "Share of a class's images, in percent, whose nearest neighbour is of that class; worst first."
    return html_table(shown, caption=caption, text=["Class", "Most often taken for"])


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write a page of these pieces of HTML, whole or not at all."""
    skeleton = Template((files("cbml.reporting") / "page.html").read_text())
    write_text(path, skeleton.substitute(title=escape(title), body="\n".join(parts)))


def html_table(
    shown: pd.DataFrame, *, caption: str, text: Collection[str], classes: Sequence[str] | None = None
) -> str:
    """A table that its reader can sort, in a box of its own to scroll in.

    Args:
        shown: HTML strings; the first column names the row. Numbers are sorted by what a cell begins with.
        text: the columns of words; the others are numbers.
        classes: a CSS class for each row.
    """

    def kind(column: str) -> str:
        return "" if column in text else ' class="number"'

    head = "".join(
        f'<th scope="col" aria-sort="none"{kind(column)}><button type="button">{column}</button></th>'
        for column in shown
    )
    body = ""
    for (first, *others), name in zip(shown.itertuples(index=False), classes or [""] * len(shown), strict=True):
        cells = "".join(f"<td{kind(c)}>{value}</td>" for c, value in zip(shown.columns[1:], others, strict=True))
        body += f'<tr class="{escape(name)}"><th scope="row">{first}</th>{cells}</tr>\n'
    # tabindex: a box that scrolls is reached by keyboard.
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def figure(file: Path, caption: str) -> str:
    """A picture file as part of the page."""
    if file.suffix == ".svg":
        return svg_figure(file.read_text(), file.stem, caption)
    data = base64.b64encode(file.read_bytes()).decode()
    with Image.open(file) as image:
        size = f'width="{image.width}" height="{image.height}"'  # else what follows jumps when the picture appears
    image = f'<img src="data:{MIME[file.suffix]};base64,{data}" alt="{escape(caption)}" {size} loading="lazy">'
    return f'<figure><div class="box" tabindex="0">{image}</div><figcaption>{escape(caption)}</figcaption></figure>'


def svg_figure(svg: str, name: str, caption: str) -> str:
    """An `<svg>` element as part of the page; `name`, which no other figure of the page has, makes its ids unique."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return f'<figure><div class="box" tabindex="0">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'
