"""The picture of a study: its trials, and what each constant did."""

import pandas as pd

from cbml.report.common.style import COLOURS, chart, to_svg

SCORES = ("loss", "trial", "score")


def trials_chart(title: str, trials: pd.DataFrame) -> str:
    """Score by trial with the best so far, and the score against each constant; an `<svg>` element.

    Args:
        trials: `trials_table` of one loss.
    """
    names = [name for name in trials if name not in SCORES and not name.startswith("fold_")]
    best = trials.score.idxmax()
    with chart(2.2 * (1 + len(names)), 2.6, ncols=1 + len(names), sharey=True, squeeze=False) as (figure, (axes,)):
        figure.suptitle(title)
        axes[0].step(trials.trial, trials.score.cummax(), where="post", color=COLOURS[6])
        for axis, name in zip(axes, ["trial", *names], strict=True):
            axis.scatter(trials[name], trials.score, s=12, color=COLOURS[0])
            axis.scatter(trials[name][best], trials.score[best], s=30, color=COLOURS[3])
            axis.set_xlabel(name)
            if name != "trial" and trials[name].min() > 0 and trials[name].max() > 20 * trials[name].min():
                axis.set_xscale("log")
        axes[0].set_ylabel("score of held-out classes, %")
        return to_svg(figure)
