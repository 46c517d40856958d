"""Charts that put the cells of a table beside one another. Each returns an `<svg>` element, see `to_svg`."""

import math
import textwrap
from itertools import cycle

import pandas as pd
from matplotlib.ticker import MaxNLocator

from cbml.report.common.style import COLOURS, INK, MORE_COLOURS, PAIRS, chart, legend, to_svg

MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
LINE = 0.15  # inches, of a text's line


def _wrapped(names: list[str], width: int) -> dict[str, str]:
    """The same names in lines of so many characters: one with its variant may be longer than a chart is wide."""
    return {name: "\n".join(textwrap.fill(line, width) for line in name.split("\n")) for name in names}


def _lines(texts: dict[str, str]) -> int:
    """Of the highest."""
    return max(text.count("\n") + 1 for text in texts.values())


def _grid(panels: int, max_columns: int) -> tuple[int, int]:
    columns = min(panels, max_columns)
    return math.ceil(panels / columns), columns


def _looks(names: list[str]) -> dict[str, dict[str, str]]:
    """A colour and a marker for each name; eight markers and seven colours make 56 pairs."""
    return {
        name: {"color": colour, "marker": marker}
        for name, colour, marker in zip(names, cycle(COLOURS), cycle(MARKERS), strict=False)
    }


def _labelled(curves: pd.DataFrame) -> pd.DataFrame:
    """With the variant in the method's name."""
    return curves.assign(method=curves.method + curves.variant.map(lambda text: f" ({text})" if text else ""))


def _best_first(curves: pd.DataFrame) -> list[str]:
    """The methods of labelled curves by their last Recall@1."""
    last = curves[curves.iteration == curves.groupby("cell").iteration.transform("max")]
    return list(last.groupby("method").recall_at_1.mean().sort_values(ascending=False, kind="stable").index)


def cell_colours(curves: pd.DataFrame) -> tuple[dict[str, str], list[str]]:
    """The colour of each cell's method by the cell's key, as in `curves_chart`; and what is left for others."""
    curves = _labelled(curves)
    methods, colours = _best_first(curves), [*COLOURS, *MORE_COLOURS]
    looks = dict(zip(methods, cycle(colours), strict=False))
    cells = curves.drop_duplicates("cell")
    return dict(zip(cells.cell, cells.method.map(looks), strict=True)), colours[len(methods) :] or colours


def curves_chart(curves: pd.DataFrame) -> str:
    """Recall@1 on the test list over iterations: the mean over seeds, with a marker where it is highest, and a band of
    one standard deviation to either side.

    Up to seven methods share a panel, one panel for each backbone and embedding size. More get a panel each, best
    first, over every method's mean in grey.

    Args:
        curves: what `cbml.report.tables.rows.curves` returns, with at least one row.
    """
    curves = _labelled(curves)
    curves = curves.assign(setting=curves.backbone + ", " + curves.embedding_dim.astype(str))
    best_first = _best_first(curves)
    crowded = len(best_first) > len(COLOURS)
    panel_by, line_by = ("method", "setting") if crowded else ("setting", "method")
    order = {"method": best_first, "setting": list(curves.setting.unique())}
    panels, looks = order[panel_by], _looks(order[line_by])
    means = curves.pivot_table("recall_at_1", "iteration", ["setting", "method"])
    rows, columns = _grid(len(panels), 4 if crowded else 3)
    titles, labels = _wrapped(panels, 26), _wrapped(order[line_by], 40)
    if crowded:
        width, height = 2.0 * columns, (1.35 + LINE * _lines(titles)) * rows + 0.6
    else:
        longest = max(len(line) for label in labels.values() for line in label.split("\n"))
        legend_height = (sum(label.count("\n") + 1.5 for label in labels.values()) + 1) * LINE
        width, height = 2.8 * columns + max(1.5, 0.6 + 0.07 * longest), max(2.8 * rows, legend_height)
    with chart(width, height, nrows=rows, ncols=columns, sharex=True, sharey=True, squeeze=False) as (figure, axes):
        for axis, panel in zip(axes.flat, panels, strict=False):
            axis.set_title(titles[panel], fontsize=9)
            if crowded:
                axis.plot(means, color=INK, alpha=0.2, linewidth=0.6)
            for name, runs in curves[curves[panel_by] == panel].groupby(line_by, sort=False):
                recalls = runs.groupby("iteration").recall_at_1
                mean, sd, colour = recalls.mean(), recalls.std().fillna(0), looks[name]["color"]
                axis.plot(mean, color=colour, linewidth=1.1)
                axis.fill_between(mean.index, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
                best = (mean[mean.index > 0] if len(mean) > 1 else mean).idxmax()  # the untrained network is none
                axis.plot(best, mean[best], markersize=4.5, fillstyle="none", **looks[name])
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for column in axes.T:  # the lowest panel that is drawn
            column[sum(axis.axison for axis in column) - 1].tick_params(labelbottom=True)
        figure.supxlabel("iteration", fontsize=9)
        figure.supylabel("Recall@1, %", fontsize=9)
        if len(looks) > 1:
            handles = [
                axes[0, 0].plot([], [], linewidth=1.1, markersize=4.5, fillstyle="none", **look)[0]
                for look in looks.values()
            ]
            if crowded:
                legend(figure, list(labels.values()), handles, loc="outside upper center", ncols=3)
            else:
                legend(figure, list(labels.values()), handles, loc="outside right upper")
        return to_svg(figure)


def distributions_chart(similarities: pd.DataFrame) -> str:
    """Densities of the cosine similarity of pairs of one class and of two, one panel per cell, each over its own range.

    Args:
        similarities: columns `cell` (the panel's title), `pair` (`positive`, `negative`), `similarity`, `density`, of
            one split, with at least one row.
    """
    cells = list(similarities.cell.unique())
    rows, columns = _grid(len(cells), 4)
    titles = _wrapped(cells, 26)
    size = (max(2.0 * columns, 4.0), (1.35 + LINE * _lines(titles)) * rows + 0.8)
    with chart(*size, nrows=rows, ncols=columns, squeeze=False) as (figure, axes):
        for axis, cell in zip(axes.flat, cells, strict=False):
            axis.set_title(titles[cell], fontsize=9)
            axis.set_yticks([])
            axis.spines["left"].set_visible(False)
            axis.xaxis.set_major_locator(MaxNLocator(3))
            shown = similarities[similarities.cell == cell]
            # A loss may leave all similarities within a tenth of each other, which an axis from -1 to 1 hides.
            seen = shown.similarity[shown.density > 0.01 * shown.density.max()]
            shown = shown[shown.similarity.between(seen.min(), seen.max())]
            for pair, (colour, line) in PAIRS.items():
                density = shown[shown.pair == pair].set_index("similarity").density
                axis.plot(density, line, color=colour, linewidth=1.2, label=f"{pair} pairs")
                axis.fill_between(density.index, density, color=colour, alpha=0.2, linewidth=0)
            axis.set_ylim(bottom=0)
        for axis in axes.flat[len(cells) :]:
            axis.set_axis_off()
        figure.supxlabel("cosine similarity", fontsize=9)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        return to_svg(figure)


def paper_chart(table: pd.DataFrame) -> str:
    """Recall@1 of the paper and ours, by protocol, with the standard deviation over seeds.

    Args:
        table: what `summarise` of `rows` returns with the published figures, with at least one row that has
            one.
    """
    rows = table.dropna(subset="paper_recall_at_1")
    keys = rows.embedding_dim.astype(str) + " · " + rows.backbone + " · " + rows.method
    keys += rows.variant.map(lambda text: f" ({text})" if text else "")
    names = list(keys.unique())
    protocols = sorted(rows.protocol.unique(), key=lambda protocol: protocol != "final")  # the headline first
    labels = _wrapped(names, 40)
    with chart(7.5, max(0.32, LINE * _lines(labels)) * len(names) + 1.2) as (figure, axis):
        paper = rows.groupby(keys).paper_recall_at_1.first()
        axis.plot(paper[names], range(len(names)), "D", color=INK, fillstyle="none", label="paper")
        for i, (protocol, look) in enumerate(_looks(protocols).items()):
            ours = rows[rows.protocol == protocol]
            # One below the other within a row: their bars overlap otherwise.
            offset = 0.22 * (i - (len(protocols) - 1) / 2)
            places = keys[ours.index].map(names.index) + offset
            axis.errorbar(
                ours.recall_at_1,
                places,
                xerr=ours.recall_at_1_sd.fillna(0),
                linestyle="none",
                markersize=5,
                elinewidth=1.2,
                label=protocol,
                **look,
            )
        axis.set_yticks(range(len(names)), labels.values())
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.2)
        axis.set_xlabel("Recall@1, %")
        figure.legend(loc="outside upper right", ncols=len(protocols) + 1)
        return to_svg(figure)
