"""Charts of one cell. Each is an `<svg>` element, see `to_svg`."""

import math

import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from cbml.report.common.style import COLOURS, PAIRS, chart, heading, legend, to_svg

ABOVE = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0, "ncols": 6, "columnspacing": 1.2}
POINTS = 400  # of a curve by iteration: more could not be told apart


def recall_chart(title: str, recalls: pd.DataFrame) -> str:
    """Draw Recall@K (column `recall`, in percent) by `k`."""
    with chart(5.0, 3.2) as (figure, ax):
        ax.plot(recalls.k, recalls.recall, "o-", markersize=4)
        ax.set_xscale("log", base=2)
        ax.set_xticks(recalls.k, recalls.k.astype(str))
        ax.set_ylim(0, 103)
        ax.yaxis.set_major_formatter(PercentFormatter())
        for row in recalls[recalls.k.isin([1, 8])].itertuples():
            ax.annotate(f"{row.recall:.1f}%", (row.k, row.recall), (6, -10), textcoords="offset points")
        ax.set(xlabel="K", ylabel="Recall@K")
        heading(figure, title)
        return to_svg(figure)


def pseudo_labels_chart(title: str, table: pd.DataFrame) -> str:
    """Draw how clusters compare with the classes, by the `iteration` before which they were found.

    Args:
        table: `iteration`; `nmi`, `purity`, `kept_purity` and `changed` in percent; one row per refresh.
    """
    curves = {"nmi": "NMI", "purity": "purity", "kept_purity": "purity of what is kept", "changed": "changed"}
    with chart(7.2, 3.2) as (figure, ax):
        for (name, label), colour in zip(curves.items(), COLOURS, strict=False):
            ax.plot(table.iteration, table[name], ".-", color=colour, label=label)
        ax.set_ylim(0, 103)
        ax.yaxis.set_major_formatter(PercentFormatter())
        ax.set(xlabel="iteration")
        ax.legend(**ABOVE)
        heading(figure, title)
        return to_svg(figure)


def training_chart(title: str, losses: pd.DataFrame, validations: pd.DataFrame, best_iteration: int) -> str:
    """Draw Recall@1 on the test list by iteration, and below it the loss and its terms, if there are any.

    Args:
        losses: `iteration`, `loss` and any `loss_<term>`, one row per iteration; may be empty.
        validations: `iteration` and `recall_at_1` (in percent), the untrained network first, the final one last.
        best_iteration: the one whose Recall@1 was highest.
    """
    panels = 2 if len(losses) else 1
    with chart(7.2, 0.6 + 2.3 * panels, nrows=panels, sharex=True, squeeze=False) as (figure, axes):
        ax = axes[0, 0]
        recall = validations.set_index("iteration").recall_at_1
        ax.plot(recall, "-", color=COLOURS[6], marker=".", markersize=4, linewidth=1)
        final = recall.index[-1]
        marked = {"untrained": (0, "o", COLOURS[6])}
        if best_iteration:
            marked["best on test"] = (best_iteration, "*", COLOURS[1])
        if final:
            marked["final"] = (final, "s", COLOURS[0])
        for size, (name, (iteration, marker, colour)) in zip((5, 13, 5), marked.items(), strict=False):
            label = f"{name}: {recall[iteration]:.1f}% at {iteration:,}"
            ax.plot(iteration, recall[iteration], marker, color=colour, markersize=size, label=label, clip_on=False)
        ax.yaxis.set_major_formatter(PercentFormatter())
        ax.set_ylabel("Recall@1, test list")
        ax.legend(**ABOVE, handletextpad=0.2)
        if len(losses):
            window = math.ceil(len(losses) / POINTS)
            means = losses.groupby(np.arange(len(losses)) // window).mean()
            ax = axes[1, 0]
            terms = [name for name in losses if name.startswith("loss_")]
            lines = [
                ax.plot(means.iteration, means[name], style, linewidth=1.2)[0]
                for name, style in zip(["loss", *terms], ["-", "--", "-.", ":", "--", "-.", ":"], strict=False)
            ]
            ax.set_ylabel("loss" if window == 1 else f"loss, means of {window} iterations")
            if terms:
                names = ["loss", *(name.removeprefix("loss_") for name in terms)]
                legend(ax, names[: len(lines)], lines, **ABOVE)
        ax.set_xlabel("iteration")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]) if final else FixedLocator([0]))
        heading(figure, title)
        return to_svg(figure)


def similarities_chart(title: str, densities: pd.DataFrame, moments: dict[str, dict]) -> str:
    """Draw a panel for each split, all on the same axes.

    Args:
        densities, moments: what `pair_similarities` returns, with a column `split` and by split.
    """
    occupied = densities[densities.density > 0].similarity
    densities = densities[densities.similarity.between(occupied.min() - 0.03, occupied.max() + 0.03)]
    with chart(7.2, 3.4, ncols=len(moments), sharex=True, sharey=True) as (figure, axes):
        for ax, (split, kinds) in zip(axes, moments.items(), strict=True):
            for pair, (colour, dashes) in PAIRS.items():
                shown = densities[(densities.split == split) & (densities.pair == pair)]
                if kinds[pair]["pairs"]:
                    label = f"{pair}: mean {kinds[pair]['mean']:.3f}, variance {kinds[pair]['variance']:#.2g}"
                    ax.fill_between(shown.similarity, shown.density, color=colour, alpha=0.2, linewidth=0)
                    ax.plot(shown.similarity, shown.density, dashes, color=colour, linewidth=1.2, label=label)
            ax.set_xlabel(f"cosine similarity of a pair, {split}")
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
        axes[0].set_ylim(bottom=0)
        axes[0].set_ylabel("density")
        heading(figure, f"{title}: positive and negative pairs")
        return to_svg(figure)
