"""One loss's constants, found by so many trials on folds of the training classes.

Musgrave et al., "A Metric Learning Reality Check", ECCV 2020: each loss gets the same number of trials, each scored on
classes that it was not trained on; the test list is not read.
"""

import copy
import hashlib
import json
import os
import random
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
import torch
from lightning_fabric import Fabric
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from cbml import network
from cbml.data.images import Images
from cbml.data.scoring import Scoring
from cbml.errors import UserError
from cbml.fetch import public
from cbml.files import locked
from cbml.models.embedding_model import EmbeddingModel
from cbml.progress import message
from cbml.samplers.classes import ClassesConfig
from cbml.schema import Range
from cbml.spec.cell import Cell
from cbml.spec.recipe import Recipe
from cbml.training.checkpoint import Checkpoint
from cbml.training.loop import Job, train

SHARED = "recipe."  # what of a space's names is the recipe's; the others are the loss's


@dataclass(frozen=True)
class Budget:
    """What each loss gets.

    Attributes:
        trials: the published constants are the first.
        folds: of the training classes; a trial's score is the mean over them.
        metric: of the held-out classes, after the last iteration.
        seed: of the sampler, and of every training.
    """

    trials: int = 20
    folds: int = 4
    metric: str = "map_at_r"
    seed: int = 0

    @property
    def told(self) -> str:
        """In words, for a table's heading."""
        return f"{self.trials} trials, {self.folds} folds of the training classes, {self.metric}"


@dataclass(frozen=True)
class Problem:
    """What constants are looked for: a cell, and the training images that it is tried on.

    Attributes:
        cell: with the published constants.
        space: what may be changed, by name: `recipe.lr`, or a parameter of the loss, as in `loss.margin`, the margin of
            the loss inside.
        images, labels: the training list; labels (N,) int64.
        model: the untrained network, as every trial begins with it.
        fingerprint: of the images.
    """

    cell: Cell
    space: dict[str, Range]
    images: Images
    labels: np.ndarray
    model: EmbeddingModel
    fingerprint: str

    @classmethod
    def of(cls, cell: Cell, search: dict[str, Range], loss: dict[str, Range], **of: Any) -> "Problem":
        """With what the recipe and the loss say that may be changed."""
        return cls(cell, {SHARED + name: each for name, each in search.items()} | loss, **of)

    @property
    def defaults(self) -> dict[str, Any]:
        """The published constants, and the recipe's own values."""
        tree = {"recipe": self.cell.recipe.model_dump(), "loss": self.cell.loss_config.model_dump()}
        return {name: _get(tree, _path(name)) for name in self.space}

    def cell_with(self, values: dict[str, Any]) -> Cell:
        """The cell with these constants.

        Raises:
            ValidationError: they do not fit together.
        """
        tree = {"recipe": self.cell.recipe.model_dump(), "loss": self.cell.loss_config.model_dump()}
        for name, value in values.items():
            *outer, last = _path(name)
            _get(tree, outer)[last] = value
        loss = type(self.cell.loss_config).model_validate(tree["loss"])
        return replace(self.cell, recipe=Recipe.model_validate(tree["recipe"]), loss_config=loss)

    def name(self, budget: Budget) -> str:
        """Of its study: a loss, and what else makes trials comparable."""
        content = [self.cell.to_dict(), self.fingerprint, budget.folds, budget.metric, budget.seed]
        content.append({name: each.model_dump() for name, each in self.space.items()})
        return f"{self.cell.loss}-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]}"


def _path(name: str) -> list[str]:
    return name.split(".") if name.startswith(SHARED) else ["loss", *name.split(".")]


def _get(tree: Any, path: list[str]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def folds(labels: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Which images (N,) bool each fold holds out: neighbouring classes by label, as the test classes are, too.

    Raises:
        UserError: there are fewer than two folds, or a fold would have fewer than two classes.
    """
    classes = np.unique(labels)
    if not 2 <= count <= len(classes) // 2:
        raise UserError(f"folds: {count} of {len(classes)} training classes; allowed: from 2 to {len(classes) // 2}")
    for held_out in np.array_split(classes, count):
        yield np.isin(labels, held_out)


class Nowhere(Checkpoint):
    """A checkpoint that is not kept: a trial is begun again."""

    def read(self) -> None:
        return None

    def write(self, state: dict[str, Any], *, weights: tuple[str, ...] = (), now: bool = False) -> None:
        pass

    def keep(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        pass


def score(problem: Problem, cell: Cell, budget: Budget, fabric: Fabric, label: str) -> list[float]:
    """The metric on each fold, in percent; 0 where training diverges or collapses."""
    scores = []
    for number, held_out in enumerate(folds(problem.labels, budget.folds), 1):
        inside, outside = (_subset(problem, np.flatnonzero(rows)) for rows in (~held_out, held_out))
        labels = np.unique(problem.labels[~held_out], return_inverse=True)[1]
        recipe = cell.recipe.model_copy(update={"validate_every": 0, "select_by": None})
        sampler = (cell.loss_config.batches or ClassesConfig()).build(labels, recipe, budget.seed)
        torch.manual_seed(budget.seed)
        model = copy.deepcopy(problem.model)
        criterion = network.build_criterion(cell, model, num_classes=sampler.num_classes)
        job = Job(
            recipe,
            budget.seed,
            model,
            criterion,
            sampler,
            inside,
            outside,
            Scoring((1,)),
            teacher_momentum=cell.loss_config.teacher,
        )
        try:
            found = train(
                job,
                fabric,
                label=f"{label}, fold {number}",
                checkpoint=Nowhere(Path(tempfile.gettempdir())),
                log=lambda rows: None,
            )
            scores.append(found.validations[-1][budget.metric])
        except UserError as error:
            message(f"{label}, fold {number}: {error}")
            scores.append(0.0)
    return scores


def _subset(problem: Problem, rows: np.ndarray) -> Images:
    return problem.images.subset(torch.from_numpy(rows), torch.from_numpy(problem.labels[rows]))


def open_study(name: str, storage: str) -> optuna.Study:
    """A study, made if it is not there yet. Of processes that begin at once one makes Optuna's tables, others fail.

    Raises:
        UserError: the storage cannot be used.
    """
    patience = [1, 2, 4]
    while True:
        try:
            return optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
        except (SQLAlchemyError, StorageInternalError, ImportError) as error:
            if not patience or isinstance(error, ImportError | ArgumentError):  # which no waiting mends
                reason = str(error).partition("\n")[0]
                raise UserError(f"--storage {public(storage)} cannot be used: {reason}") from error
            time.sleep(random.SystemRandom().uniform(0, patience.pop(0)))  # trials are seeded alike in all processes


def run_study(problem: Problem, budget: Budget, storage: str, fabric: Fabric) -> optuna.Study:
    """Go on with a study until it has its trials; several processes may.

    A trial that a killed process had begun is done again, with the same constants.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name = problem.name(budget)
    study = open_study(name, storage)
    lock = Path(tempfile.gettempdir()) / f"cbml-{name}"
    while True:
        with locked(lock, f"{name}: another process asks for a trial, waiting"):
            _give_up_dead(study)
            trials = study.get_trials(deepcopy=False)
            states = [each.state.name for each in trials]
            used = len(states) - states.count("FAIL")
            if used >= budget.trials and "WAITING" not in states:
                break
            if not trials:
                study.enqueue_trial(problem.defaults)
            # Of its own for each trial: a process that goes on must not draw again what was drawn at first.
            study.sampler = optuna.samplers.TPESampler(
                seed=int(np.random.SeedSequence([budget.seed, used]).generate_state(1)[0]), constant_liar=True
            )
            trial = study.ask()
            trial.set_user_attr("process", f"{socket.gethostname()}:{os.getpid()}")
            values = {name: _suggest(trial, name, each) for name, each in problem.space.items()}
        label = f"{problem.cell.loss}, trial {trial.number + 1} of {budget.trials}"
        try:
            scores = score(problem, problem.cell_with(values), budget, fabric, label)
        except ValueError as error:  # constants that do not fit together
            message(f"{label}: {error}")
            scores = [0.0] * budget.folds
        trial.set_user_attr("folds", scores)
        study.tell(trial, float(np.mean(scores)))
        told = ", ".join(f"{name} {_short(value)}" for name, value in values.items())
        message(f"{label}: {np.mean(scores):.2f} with {told}")
    return study


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _suggest(trial: optuna.Trial, name: str, allowed: Range) -> Any:
    if allowed.choices:
        return trial.suggest_categorical(name, allowed.choices)
    low, high = cast(float, allowed.low), cast(float, allowed.high)
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=allowed.log)
    return trial.suggest_float(name, low, high, log=allowed.log)


def _give_up_dead(study: optuna.Study) -> None:
    """Take back the trials of processes of this machine that are no more."""
    for trial in study.get_trials(deepcopy=False):
        host, _, pid = trial.user_attrs.get("process", "").partition(":")
        if trial.state.name == "RUNNING" and host == socket.gethostname() and not Path(f"/proc/{pid}").exists():
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)
