"""How every chart looks, and how it is written so that a page in light or dark can show it."""

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

# Okabe and Ito's colours: distinct for the colour-blind, and on light and dark grounds.
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c8c8c"]
# Of more methods than that, beside one another in MLflow: Tol's muted colours and a few between them.
MORE_COLOURS = ["#332288", "#882255", "#44aa99", "#999933", "#aa4499", "#117733", "#b8860b", "#6699cc", "#661100"]
MORE_COLOURS += ["#7fbf3f", "#9467bd", "#008b8b", "#ff7f7f"]
RIGHT, WRONG = "#0072b2", "#d55e00"
PAIRS = {"positive": (RIGHT, "-"), "negative": (WRONG, "--")}
LETTERS = 12  # of a title, at least, to an inch
INK = "#123456"  # stands for the page's text colour until `to_svg` replaces it

STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "cbml",  # else the ids in a file differ from run to run
    "text.color": INK,
    "text.parse_math": False,  # names are drawn as they are written, with their dollars
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def chart(width: float = 6.0, height: float = 3.5, **subplots: Any) -> Iterator[tuple[Figure, Any]]:
    """Yield a figure of that size in inches and its axes (as `Figure.subplots` returns them), in the project's style.

    The figure belongs to no global state, so nothing needs closing and threads do not meet.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(**subplots)


def heading(figure: Figure, title: str) -> None:
    """A title over the figure, in as many lines as it needs: where Matplotlib wraps, it reads mathematics in names."""
    columns = int(LETTERS * figure.get_figwidth())
    figure.suptitle(textwrap.fill(title, columns, break_on_hyphens=False))


def legend(where: Any, names: Sequence[str], handles: Sequence[Any], **options: Any) -> None:
    """A legend of these names, as they are written: Matplotlib leaves out what begins with an underscore."""
    texts = where.legend(handles=handles, labels=[str(i) for i in range(len(names))], **options).get_texts()
    for text, name in zip(texts, names, strict=True):
        text.set_text(name)


def to_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element whose text and axes take the colour of the page that it is put into.

    Call it inside the `chart` block: the style holds for drawing too.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return re.sub(INK, "currentColor", text[text.index("<svg") :])
