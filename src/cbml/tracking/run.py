"""A run of MLflow's, open for logging.

Tracking never costs a result. What a store that is away should have taken waits in this process, and is sent with what
comes later; what it refuses is said, once, and dropped. The complete record is handed over by `evaluate`.
"""

import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from cbml import distributed, provenance
from cbml.files import locked, write_text
from cbml.progress import message
from cbml.spec.cell import Cell
from cbml.spec.settings import ABSENT, settings_of
from cbml.tracking.model import WEIGHTS, log_model, source_name
from cbml.tracking.store import NOTE, Store, active, away, installed, mlflow, public
from cbml.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRICS_A_CALL, PARAMS_A_CALL = 1000, 100  # MLflow's limits
DVC_VARIABLES = ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")
TABLES = "tables"  # the experiment of all table sets
TUNING = "tuning"  # and of all studies
# The pages among artifacts, which MLflow lists by name: no other comes before these.
PAGE, TABLES_PAGE = "cell.html", "cells.html"
# Descriptions of experiments.
ABOUT_CELLS = (
    "One run for each cell: a network trained on {}. Its name has what was set beyond the files of conf/. Metrics are "
    "in percent; `recall_at_1` is of the final model on the test list. Its page is `cell.html` among the artifacts. "
    "`python -m pipeline.tabulate {} --all` makes one table of all."
)
ABOUT_TABLES = (
    "One run for each time that the tables of a dataset were made. The table is its description; `cells.html` among "
    "its artifacts is the page."
)
LONGEST = 200  # characters of what a run's name has beside the cell's
SOURCES = ("weights", "published")  # of a backbone: where it is from
SAME_CELL = ("cell_key", WEIGHTS)
PATIENCE = 60.0  # seconds between attempts at a store that is away, and
SHARE = 20  # times as long as an attempt takes, which may be half a minute
ID = re.compile(r"[0-9A-Za-z][\w-]{0,255}", re.ASCII)  # what MLflow takes for a run's id


class Run:
    """One MLflow run, open for logging.

    Attributes:
        id: of the run: the one to continue, until the store has made another; None if there is none to continue.
        made: whether the store has it.
        continued: whether the store had it.
        refused: whether the store has refused something.
    """

    def __init__(self, store: Store | None, run_id: str | None = None):
        self.store, self.id = store, run_id
        self.made = self.continued = self.refused = False
        self._waiting: deque[Callable[[], None]] = deque()
        self._next_attempt = 0.0
        self._said: set[str] = set()
        self._logged: dict[str, dict[int, float]] = {}  # values by metric and step

    @property
    def complete(self) -> bool:
        """Whether a store has everything."""
        return self.store is not None and not self._waiting and not self.refused

    def do(self, operation: Callable[[], None]) -> None:
        """Do this after all that waits, now or later."""
        if self.store:
            self._waiting.append(operation)
            if time.monotonic() >= self._next_attempt:
                self.send()

    def send(self) -> None:
        """Do all that waits, as far as the store allows."""
        while self._waiting and self.store:
            started = time.monotonic()
            try:
                self._waiting[0]()
            except Exception as error:  # MLflow, its database and every kind of remote store have their own types
                reason = self.store.reason(error)
                if away(error):
                    self._say(f"does not answer, going on without: {reason}")
                    now = time.monotonic()
                    self._next_attempt = now + max(PATIENCE, SHARE * (now - started))
                    return
                self._say(f"refuses, going on without: {reason}")
                self.refused = True
                if not self.made:  # there is nothing that the rest could be logged to
                    self._waiting.clear()
                    self.store = None
                    return
            self._waiting.popleft()

    def _say(self, text: str) -> None:
        assert self.store
        if text[:70] not in self._said:  # what follows may be of one value of many
            self._said.add(text[:70])
            message(f"MLflow at {public(self.store.uri)} {text}")

    def log(self, rows: Iterable[dict[str, float]], *, replace: bool = False) -> None:
        """Log rows of metrics; `iteration` in each is the step. A step that is there already is left.

        Args:
            replace: log it again if its value is another.
        """
        now = int(time.time() * 1000)
        points = [
            (name, float(value), now, int(row["iteration"]))
            for row in rows
            for name, value in row.items()
            if name != "iteration"
        ]
        for start in range(0, len(points), METRICS_A_CALL):
            self.do(partial(self._log_points, points[start : start + METRICS_A_CALL], replace))

    def opened(self) -> tuple["MlflowClient", str]:
        """The client and the id of the run, for what is done by `do`: there is a store then, and the run is made."""
        assert self.store and self.made and self.id
        return self.store.client, self.id

    def _log_points(self, points: list[tuple[str, float, int, int]], replace: bool) -> None:
        client, run_id = self.opened()
        for name in {name for name, *_ in points} - self._logged.keys():
            history = client.get_metric_history(run_id, name) if self.continued else []
            self._logged[name] = {point.step: point.value for point in history}
        new = []
        for name, value, time_logged, step in points:
            known = self._logged[name].get(step)
            if known is None or (replace and known != value):
                new.append(mlflow.entities.Metric(name, value, time_logged, step))
        client.log_batch(run_id, metrics=new)
        for metric in new:
            self._logged[metric.key][metric.step] = metric.value

    def call(self, method: str, *args: Any) -> None:
        """Call that method of MLflow's client for this run."""

        def operation() -> None:
            client, run_id = self.opened()
            getattr(client, method)(run_id, *args)

        self.do(operation)

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self.call("set_tag", name, value)

    def seal(self, name: str) -> None:
        """Set a tag to `true` if the store has taken all that was logged before."""

        def operation() -> None:
            client, run_id = self.opened()
            if not self.refused:
                client.set_tag(run_id, name, "true")

        self.do(operation)

    def note(self, text: str) -> None:
        """Set the run's description, Markdown that the UI shows above everything else."""
        self.tag(NOTE, text)

    def log_file(self, path: Path) -> None:
        """Keep a file as an artifact."""
        self.call("log_artifact", str(path))

    def log_folder(self, folder: Path) -> None:
        """Keep the files of a folder as artifacts."""
        self.call("log_artifacts", str(folder))

    def log_page(self, folder: Path) -> None:
        """Keep the page of a cell and its charts as artifacts: its index.html as `PAGE`, which is listed first."""
        for file in sorted(folder.iterdir()):
            if file.name == "index.html":
                self.log_text(file.read_text(encoding="utf-8"), PAGE)
            else:
                self.log_file(file)

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as an artifact."""
        self.call("log_text", text, name)

    def log_table(self, table: pd.DataFrame, name: str) -> None:
        """Keep a table where MLflow's UI shows and compares tables."""
        self.call("log_table", table, name)

    def colour(self, experiment: str, colours: dict[str, str], others: Sequence[str]) -> None:
        """Give the cells of an experiment the colours of their methods.

        Args:
            colours: by the key of a cell.
            others: for what is no such cell: the methods take turns.
        """

        def operation() -> None:
            client, _ = self.opened()
            found = client.get_experiment_by_name(experiment)
            runs = client.search_runs([found.experiment_id], "tags.cell_key LIKE '%'") if found else []
            methods = sorted({run.data.tags["loss"] for run in runs if run.data.tags["cell_key"] not in colours})
            by_method = dict(zip(methods, cycle(others), strict=False))
            for run in runs:
                tags = run.data.tags
                colour = colours.get(tags["cell_key"]) or by_method[tags["loss"]]
                if tags.get("mlflow.runColor") != colour:
                    client.set_tag(run.info.run_id, "mlflow.runColor", colour)

        self.do(operation)

    def log_model(self, folder: Path, *, weights: str | None = None, register_as: str | None = None) -> None:
        """Log what training a cell left in `folder` as an MLflow model; see `model.log_model`."""

        def operation() -> None:
            _, run_id = self.opened()
            assert self.store
            log_model(self.store, run_id, folder, weights, register_as)

        self.do(operation)


@contextmanager
def open_run(
    workspace: Workspace,
    experiment: str,
    name: str,
    *,
    config: dict[str, Any],
    params: dict[str, Any],
    tags: dict[str, str],
    identity: tuple[str, ...] = SAME_CELL,
    fingerprint: str | None = None,
    run_id: str | None = None,
    remember: Path | None = None,
    later: str = "the same command brings it there later",
    at_once: bool = False,
    about: str = "",
) -> Iterator[Run]:
    """Open a run, or continue that of `run_id` if the store has it; it ends with the block, failed if that raised.

    If the store has no such run, one whose tags of these names are the same, its `identity`, is continued.

    Args:
        config, params: of a new run, logged as the artifact `params.yaml` and as parameters.
        tags: of a new run, beside the revision and what DVC tells of its experiment, which every run has.
        fingerprint: of the dataset that the run uses, which is the experiment's.
        remember: a file for the id of a new run; what it holds is the `run_id`, if none is given.
        later: what to say if the store has not taken all.
        at_once: it is not running meanwhile, as nobody may continue it if this process is killed: a new run counts as
            failed until it is complete, another one as what it was.
        about: the description of the experiment, if it has none.
    """
    if not installed() or not distributed.first():
        yield Run(None)
        return
    store = Store(workspace)
    if remember and remember.is_file():
        run_id = run_id or remember.read_text(encoding="utf-8", errors="replace").strip()
    # From a file, which may be damaged.
    run = Run(store, run_id if isinstance(run_id, str) and ID.fullmatch(run_id) else None)
    run.do(lambda: _start(run, store, experiment, about, name, tags, identity, remember, at_once))
    run.do(lambda: _describe(run, experiment, config, params, fingerprint))
    try:
        with _system_metrics(run):
            yield run
    except BaseException as error:
        run.tag("error", " ".join(str(error).split()) or type(error).__name__)
        run.call("set_terminated", "FAILED")
        raise
    run.call("set_terminated", "FINISHED")
    run.send()
    if not run.complete:
        message(f"MLflow at {public(store.uri)} did not take all of {name}; {later}")


def _start(
    run: Run,
    store: Store,
    experiment: str,
    about: str,
    name: str,
    tags: dict[str, str],
    identity: tuple[str, ...],
    remember: Path | None,
    at_once: bool,
) -> None:
    from mlflow.tracking.context.registry import resolve_tags
    from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

    client, id = store.client, store.experiment(experiment, about)
    if found := _same(client, id, run.id, tags, identity):
        if not at_once:
            client.update_run(found, status="RUNNING")
        if "error" in client.get_run(found).data.tags:  # of an earlier attempt
            client.delete_tag(found, "error")
        run.id, run.continued = found, True
    else:
        tags = tags | {variable.lower(): os.environ[variable] for variable in DVC_VARIABLES if variable in os.environ}
        tags |= {MLFLOW_GIT_COMMIT: provenance.revision()} | source_name()
        # And user and branch, as MLflow does.
        run.id = client.create_run(id, run_name=name, tags=resolve_tags(tags)).info.run_id
        if at_once:
            client.set_terminated(run.id, "FAILED")
        if remember:
            write_text(remember, run.id)
    run.made = True


def _same(
    client: "MlflowClient", experiment: str, run_id: str | None, tags: dict[str, str], identity: tuple[str, ...]
) -> str | None:
    """The id of the run to continue: `run_id`, or one of the same identity."""
    of_cell = tags.get("cell_key")
    if run_id and active(client, run_id) and client.get_run(run_id).data.tags.get("cell_key") == of_cell:
        return run_id
    if not tags.keys() >= set(identity):
        return None
    alike = " and ".join(f"tags.{name} = '{tags[name]}'" for name in identity)
    found = client.search_runs([experiment], alike, max_results=1, order_by=["attributes.start_time DESC"])
    return found[0].info.run_id if found else None


def _describe(
    run: Run, experiment: str, config: dict[str, Any], params: dict[str, Any], fingerprint: str | None
) -> None:
    client, run_id = run.opened()
    if run.continued and client.get_run(run_id).data.params:
        return
    client.log_text(run_id, yaml.safe_dump(config, sort_keys=False), "params.yaml")
    if fingerprint:
        dataset = mlflow.entities.Dataset(experiment, fingerprint, "local", json.dumps({"uri": f"lists/{experiment}"}))
        client.log_inputs(run_id, [mlflow.entities.DatasetInput(dataset)])
    flat = [mlflow.entities.Param(key, str(value)) for key, value in params.items()]
    for start in range(0, len(flat), PARAMS_A_CALL):
        client.log_batch(run_id, params=flat[start : start + PARAMS_A_CALL])


@contextmanager
def _system_metrics(run: Run) -> Iterator[None]:
    """Log the load of this machine meanwhile, as MLflow does, if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING asks for it."""
    monitor = None
    if run.id and run.store and mlflow.environment_variables.MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            monitor = SystemMetricsMonitor(run.id, resume_logging=run.continued, tracking_uri=run.store.uri)
            monitor.start()
        except Exception as error:  # psutil is not installed, or the store is away
            message(f"system metrics are not logged: {error}")
    try:
        yield
    finally:
        if monitor:
            monitor.finish()


def open_cell(
    workspace: Workspace,
    cell: Cell,
    key: str,
    fingerprint: str,
    *,
    tags: dict[str, str] | None = None,
    run_id: str | None = None,
    remember: Path | None = None,
    later: str = "the stage evaluate hands it over",
    at_once: bool = False,
) -> AbstractContextManager[Run]:
    """`open_run` for a cell, under its dataset's experiment; `tags` go with its own."""
    own = {"cell_key": key, "backbone": cell.backbone, "loss": cell.loss, "recipe": cell.recipe_name}
    own |= {"embedding_dim": str(cell.embedding_dim), "seed": str(cell.seed), "dataset_fingerprint": fingerprint}
    return open_run(
        workspace,
        cell.dataset,
        run_name(cell, workspace.conf),
        config=cell.to_dict(),
        params=cell.flat(),
        tags=own | (tags or {}),
        fingerprint=fingerprint,
        run_id=run_id,
        remember=remember,
        later=later,
        at_once=at_once,
        about=ABOUT_CELLS.format(cell.dataset, cell.dataset),
    )


def run_name(cell: Cell, conf: Path) -> str:
    """The cell's name, and what was set for it beyond the files of `conf`: `… margin=0.2, recipe.iterations=60`."""
    if cell.loss_config.tuned:  # too many to be read
        return f"{cell.name} tuned"
    parts = [
        f"{path if group == 'loss' else f'{group}.{path}'}={json.dumps(value)}".replace('"', "")
        for group, values in settings_of(cell, conf).items()
        for path, value in values.items()
        if group != "dataset" and path not in SOURCES and value is not ABSENT
    ]
    text = ", ".join(parts)
    return f"{cell.name} {text[:LONGEST]}{'…' if len(text) > LONGEST else ''}".strip()


@contextmanager
def open_trained(
    workspace: Workspace, cell: Cell, record: dict[str, Any], *, later: str, tags: dict[str, str] | None = None
) -> Iterator[Run]:
    """`open_cell` for one that is trained, by its run.json: the run of the training, or the one that has its place.

    One process at a time has it open: what one has logged the next does not log again.
    """
    key, tags = record["key"], dict(tags or {})
    if re.fullmatch("[0-9a-f]+", weights := str(record.get(WEIGHTS))):
        tags[WEIGHTS] = weights
    known = {"tags": tags, "run_id": record["run_id"], "later": later, "at_once": True}
    opened = open_cell(workspace, cell, key, record["fingerprint"], **known)
    with locked(workspace.cache / "mlflow-cells" / key, f"{key}: another process logs it; waiting"), opened as run:
        yield run


def open_tables(workspace: Workspace, dataset: str, cells: list[Cell]) -> AbstractContextManager[Run]:
    """`open_run` for the table set of these cells, in an experiment of their own."""
    axes: dict[str, list[Any]] = {
        "dataset": [dataset],
        "backbone": [cell.backbone for cell in cells],
        "loss": [cell.loss for cell in cells],
        "embedding_dim": [cell.embedding_dim for cell in cells],
        "seed": [cell.seed for cell in cells],
        "recipe": [cell.recipe_name for cell in cells],
    }
    params = {name: ", ".join(map(str, dict.fromkeys(values))) for name, values in axes.items()}
    config = {"cells": [cell.to_dict() for cell in cells]}
    return open_run(
        workspace,
        TABLES,
        dataset,
        config=config,
        params=params,
        tags={"dataset": dataset},
        at_once=True,
        about=ABOUT_TABLES,
    )


def log_study(workspace: Workspace, cell: Cell, study: str, budget: str, trials: pd.DataFrame) -> None:
    """Log a study of a cell's constants: one run, and in it one for each trial. A study is logged once.

    Args:
        study: its name, which changes with all that makes trials comparable.
        trials: `loss`, `trial`, `score` and `fold_…`, and the constants by name.
    """
    opened = open_run(
        workspace,
        TUNING,
        f"{cell.dataset} {cell.backbone} {cell.loss}",
        config=cell.to_dict(),
        params=cell.flat(),
        tags={"study": study, "trials": str(len(trials)), "budget": budget, "loss": cell.loss},
        identity=("study", "trials"),
        at_once=True,
    )
    with opened as run:
        run.do(partial(_log_trials, run, trials))
        run.log([{"iteration": 0, "score": trials.score.max()}])
        run.log_text(trials.to_csv(index=False), "trials.csv")


def _log_trials(run: Run, trials: pd.DataFrame) -> None:
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    client, run_id = run.opened()
    experiment = client.get_run(run_id).info.experiment_id
    logged = client.search_runs([experiment], f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}' and status = 'FINISHED'")
    known = {each.data.tags["trial"] for each in logged}
    for values in trials.to_dict("records"):
        loss, number = values.pop("loss"), str(values.pop("trial"))
        if number in known:
            continue
        tags = {MLFLOW_PARENT_RUN_ID: run_id, "trial": number, "loss": loss}
        trial = client.create_run(experiment, run_name=f"{loss} trial {number}", tags=tags).info.run_id
        now = int(time.time() * 1000)
        scores = {name: value for name, value in values.items() if name == "score" or name.startswith("fold_")}
        client.log_batch(
            trial,
            metrics=[mlflow.entities.Metric(name, float(value), now, 0) for name, value in scores.items()],
            params=[mlflow.entities.Param(name, str(values[name])) for name in values.keys() - scores.keys()],
        )
        client.set_terminated(trial)


def summary(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    """A cell's metrics by protocol as one row: those of `final`, and the others' Recall@K as `recall_at_1_<protocol>`.

    MLflow's UI orders charts and columns by name: so the headline comes first.
    """
    row = dict(metrics["final"])
    for protocol, scores in metrics.items():
        if protocol != "final":
            row |= {f"{name}_{protocol}": value for name, value in scores.items() if "recall" in name}
    return row
