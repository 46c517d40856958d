"""What tuning leaves: a preset that people read, commit and train, and all trials as a table."""

import math
from typing import Any

import optuna
import pandas as pd
import yaml

from cbml.spec.cell import Cell
from cbml.tuning.study import SHARED, Problem

EDGE = 0.02  # of a range: a best value so near to an end asks for a wider range


def trials_table(problem: Problem, study: optuna.Study) -> pd.DataFrame:
    """One row per finished trial: `loss`, `trial` from 1, `score` in percent, `fold_1`, …, and the constants."""
    rows = []
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]):
        folds = {f"fold_{number}": value for number, value in enumerate(trial.user_attrs["folds"], 1)}
        row = {"loss": problem.cell.loss, "trial": trial.number + 1, "score": trial.value}
        rows.append(row | folds | trial.params)
    return pd.DataFrame(rows)


def near_an_end(problem: Problem, values: dict[str, Any]) -> list[str]:
    """The constants that lie at an end of their range: a wider one may hold better ones."""
    found = []
    for name, value in values.items():
        allowed = problem.space[name]
        if allowed.low is None or allowed.high is None:
            continue
        low, high, at = (math.log(x) if allowed.log else x for x in (allowed.low, allowed.high, value))
        if min(at - low, high - at) < EDGE * (high - low):
            found.append(name)
    return found


def write_preset(cells: list[Cell], best: dict[str, dict[str, Any]], budget: str, heading: str) -> str:
    """A file for conf/paper: the cells' options, each loss with its tuned constants, and five seeds.

    Args:
        cells: one for each loss, of one backbone and one size.
        best: by loss, the constants of its best trial.
        budget: what they were found by, which tables show.
        heading: comment lines, without `#`.
    """
    first = cells[0]
    defaults = [
        f"override /dataset: {first.dataset}",
        f"override /recipe: {first.recipe_name}",
        f"override /backbone: [{first.backbone}]",
        f"override /loss: [{', '.join(cell.loss for cell in cells)}]",
    ]
    losses: dict[str, Any] = {}
    for cell in cells:
        tree: dict[str, Any] = {"tuned": budget}
        for name, value in best[cell.loss].items():
            path = name.split(".")
            if name.startswith(SHARED):  # of the recipe, for this loss alone
                path = ["recipe", first.recipe_name, *path[1:]]
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = float(f"{value:.4g}") if isinstance(value, float) else value
        losses[cell.loss] = tree
    lines = ["# @package _global_", *(f"# {line}".rstrip() for line in heading.split("\n")), "defaults:"]
    lines += [f"  - {each}" for each in defaults]
    body = {"embedding_dim": [first.embedding_dim], "seed": [0, 1, 2, 3, 4], "loss": losses}
    return "\n".join(lines) + "\n\n" + yaml.safe_dump(body, sort_keys=False)
