"""MLflow: the only module that knows it, beside the model in `serving.py` that it logs and its pages in `ui.py`.

The store is a SQLite file and a folder of artifacts at the root of the repository, also for an experiment that DVC runs
in a temporary copy of it; `MLFLOW_TRACKING_URI` overrides. It is the archive of finished cells. It may be away: then
what it should have taken waits in this process, a computed result never does; and without MLflow installed everything
runs and leaves complete folders, which `import_cells` brings into a store.
"""

import io
import json
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from PIL import Image

from cbml import provenance
from cbml.errors import UserError
from cbml.files import atomic_write, locked, share, write_text
from cbml.progress import message
from cbml.spec.cell import Cell
from cbml.spec.params import load_cell
from cbml.workspace import Workspace

# A store that cannot be reached is to say so within a minute; no bars for copying files between folders, and no word
# to MLflow's makers.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# Tracebacks of what is caught here; remarks on packages, examples, descriptions that are cut, and threads.
QUIET = ("store.db.utils", "pyfunc", "utils.environment", "utils.validation", "system_metrics.system_metrics_monitor")
for name in QUIET:
    logging.getLogger(f"mlflow.{name}").setLevel(logging.CRITICAL)

try:
    import mlflow
    from mlflow.entities import Dataset, DatasetInput, LoggedModelStatus, Metric, Param, RunStatus
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient
    from mlflow.tracking.context.registry import resolve_tags
    from mlflow.types import ColSpec, Schema, TensorSpec
    from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT
except ModuleNotFoundError:
    mlflow = None  # type: ignore[assignment]

# What the logged model imports.
SERVING: tuple[str, ...]
SERVING = ("torch", "torchvision", "pytorch-metric-learning", "pydantic", "safetensors", "matplotlib", "pillow")
SERVING += ("mlflow", "pandas", "filelock", "requests", "tqdm", "pyyaml")
METRICS_A_CALL, PARAMS_A_CALL = 1000, 100  # MLflow's limits
DVC_VARIABLES = ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")
TABLES = "tables"  # the experiment of all table sets
PATIENCE = 60.0  # seconds between attempts at a store that is away
LAST_ATTEMPTS = 3  # at the end of a run


def make_database(file: Path) -> None:
    """Write an empty store, for which MLflow takes seconds."""
    MlflowClient(f"sqlite:///{file}").search_experiments(max_results=1)


class Store:
    """The tracking store of a workspace."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace
        own = f"sqlite:///{workspace.database}"
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or own
        self.own = self.uri == own

    @cached_property
    def client(self) -> "MlflowClient":
        if mlflow is None:
            raise UserError("MLflow is not installed; pip install mlflow")
        database = self.workspace.database
        with self._alone():
            if self.own and not (database.is_file() and database.stat().st_size):
                # Made beside and renamed: half a database would stop every later run.
                with atomic_write(database) as temporary:
                    make_database(temporary)
        mlflow.set_tracking_uri(self.uri)
        return MlflowClient(self.uri)

    def experiment(self, name: str) -> str:
        """The id of an experiment, made on first use."""
        with self._alone():
            if found := self.client.get_experiment_by_name(name):
                return found.experiment_id
            artifacts = (self.workspace.artifacts / name).as_uri() if self.own else None
            # Else the UI takes the experiment for one of language models and opens on their pages.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return self.client.create_experiment(name, artifact_location=artifacts, tags=kind)

    def _alone(self) -> AbstractContextManager[None]:
        """Hold what two processes might make at once: the database, an experiment."""
        return locked(self.workspace.cache / "mlflow", "MLflow: waiting for another process")

    def finished(self, dataset: str) -> dict[str, Path]:
        """The files of every evaluated cell of a dataset, the newest of each key, in the order of their keys."""
        experiment = self.client.get_experiment_by_name(dataset)
        found: dict[str, Path] = {}
        token = None
        while experiment:
            page = self.client.search_runs(
                [experiment.experiment_id],
                "tags.evaluated = 'true' and attributes.status = 'FINISHED'",
                order_by=["attributes.start_time DESC"],
                page_token=token,
            )
            for run in page:
                if (key := run.data.tags["cell_key"]) not in found:
                    found[key] = self.folder(run.info.artifact_uri, run.info.run_id)
            if not (token := page.token):
                break
        return dict(sorted(found.items()))

    def model(self, name: str) -> Path:
        """The folder with the cell and the weights of a model: the newest of the run with that id, or of a cell's key.

        Raises:
            UserError: the store has no such run, or the run no model.
        """
        if mlflow is None or (self.own and not self.workspace.database.is_file()):
            raise UserError(f"{name}: no such folder, and no store that could have a run or a cell of this name")
        client = self.client
        try:
            experiments = [each.experiment_id for each in client.search_experiments()]
            wanted = [f"{what} = '{name}'" for what in ("attributes.run_id", "tags.cell_key")]
            runs = [run for each in wanted for run in client.search_runs(experiments, each)]
            outputs = [output for run in runs if run.outputs for output in run.outputs.model_outputs]
            models = [client.get_logged_model(output.model_id) for output in outputs]
        except mlflow.MlflowException as error:
            raise UserError(f"{name}: MLflow at {public(self.uri)}: {error}") from None
        whole = [model for model in models if model.status == LoggedModelStatus.READY]
        if not whole:
            raise UserError(f"{name}: neither a folder nor the id of a run or the key of a cell with a model in MLflow")
        newest = max(whole, key=lambda model: model.creation_timestamp)
        return self.folder(newest.artifact_location, newest.model_id) / "artifacts"

    def clean(self) -> None:
        """Remove for good what was deleted in MLflow: runs and, what `mlflow gc` alone would leave, their models.

        Raises:
            UserError: the store is not this repository's own.
        """
        if not self.own:
            raise UserError(f"{public(self.uri)}: not this repository's own store; whoever keeps it cleans it")
        client = self.client
        experiments = [each.experiment_id for each in client.search_experiments()]
        page = client.search_logged_models(experiments)
        models = [*page]
        while page.token:
            page = client.search_logged_models(experiments, page_token=page.token)
            models += page
        for model in models:
            if model.source_run_id and not _exists(client, model.source_run_id):
                client.delete_logged_model(model.model_id)
        from mlflow.cli import gc

        gc.main(["--backend-store-uri", self.uri, "--tracking-uri", self.uri], standalone_mode=False)

    def folder(self, uri: str, name: str) -> Path:
        """Artifacts: where they are, or a copy of that name of those that are elsewhere."""
        if local(uri):
            return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
        copy = self.workspace.cache / "archive" / name
        if not copy.is_dir():
            with atomic_write(copy) as temporary:
                temporary.mkdir()
                mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(temporary))
        return copy


class Run:
    """One MLflow run, open for logging. What the store does not take now waits, and is sent with what comes later.

    Attributes:
        id: of the run, or None as long as the store has not made it.
        continued: whether the store had it.
    """

    def __init__(self, store: Store | None, run_id: str | None = None):
        self.store, self.id = store, run_id
        self.waiting: deque[Callable[[], None]] = deque()
        self._next_attempt = 0.0
        self.continued = False
        self._logged: dict[str, dict[int, float]] = {}  # values by metric and step

    @property
    def complete(self) -> bool:
        """Whether a store has everything."""
        return self.store is not None and not self.waiting

    def do(self, operation: Callable[[], None]) -> None:
        """Do this after all that waits, now or later."""
        self.waiting.append(operation)
        if time.monotonic() >= self._next_attempt:
            self.send()

    def send(self) -> None:
        """Do all that waits, as far as the store allows."""
        while self.waiting and self.store:
            try:
                self.waiting[0]()
            except Exception as error:  # MLflow, its database and every kind of remote store have their own types
                reason = public(f"{type(error).__name__}: {error}".partition("\n")[0])[:200]
                message(f"MLflow at {public(self.store.uri)} does not answer, going on without: {reason}")
                self._next_attempt = time.monotonic() + PATIENCE
                return
            self.waiting.popleft()

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
        assert self.store and self.id
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
                new.append(Metric(name, value, time_logged, step))
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

    def note(self, text: str) -> None:
        """Set the run's description, Markdown that the UI shows above everything else."""
        self.tag("mlflow.note.content", text)

    def log_file(self, path: Path) -> None:
        """Keep a file as an artifact."""
        self.call("log_artifact", str(path))

    def log_folder(self, folder: Path) -> None:
        """Keep the files of a folder as artifacts."""
        self.call("log_artifacts", str(folder))

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as an artifact."""
        self.call("log_text", text, name)

    def log_table(self, table: pd.DataFrame, name: str) -> None:
        """Keep a table where MLflow's UI shows and compares tables."""
        self.call("log_table", table, name)

    def log_model(self, folder: Path, *, register_as: str | None = None) -> None:
        """Log what training a cell left in `folder` as an MLflow model that turns pictures into embeddings."""
        self.do(lambda: self._log_model(folder, register_as))

    def _log_model(self, folder: Path, register_as: str | None) -> None:
        cell = load_cell(folder / "cell.yaml")
        picture = io.BytesIO()
        Image.new("RGB", (cell.recipe.resize, cell.recipe.resize)).save(picture, "PNG")
        columns = Schema([ColSpec("binary", "image", required=False), ColSpec("string", "path", required=False)])
        signature = ModelSignature(columns, Schema([TensorSpec(np.dtype("float32"), (-1, -1))]))
        needs = [*SERVING, *(["timm"] if cell.backbone_config.type == "timm" else [])]
        with mlflow.start_run(run_id=self.id, log_system_metrics=False):
            model = mlflow.pyfunc.log_model(
                name="model",
                step=cell.recipe.iterations,  # whose metrics the model's page shows
                registered_model_name=register_as,
                python_model=str(Path(__file__).parents[1] / "serving.py"),
                artifacts={"cell": str(folder / "cell.yaml"), "weights": str(folder / "final.pt")},
                code_paths=[str(Path(__file__).parents[1])],
                signature=signature,
                input_example=pd.DataFrame({"image": [picture.getvalue()]}),
                pip_requirements=[f"{name}=={version(name)}" for name in needs],
            )
        if self.store and local(model.artifact_path):  # else its weights would lie twice on one disk
            share(folder / "final.pt", self.store.folder(model.artifact_path, model.model_id) / "artifacts/final.pt")


@contextmanager
def open_run(
    workspace: Workspace,
    experiment: str,
    name: str,
    *,
    config: dict[str, Any],
    params: dict[str, Any],
    tags: dict[str, str],
    fingerprint: str | None = None,
    run_id: str | None = None,
    remember: Path | None = None,
) -> Iterator[Run]:
    """Open a run, or continue that of `run_id` if the store has it; it ends with the block, failed if that raised.

    Args:
        config, params: of a new run, logged as the artifact `params.yaml` and as parameters.
        tags: of a new run, beside the revision and what DVC tells of its experiment, which every run has.
        fingerprint: of the dataset that the run uses, which is the experiment's.
        remember: a file for the id of a new run.
    """
    if mlflow is None:
        yield Run(None)
        return
    store = Store(workspace)
    run = Run(store, run_id)
    run.do(lambda: _start(run, store, experiment, name, tags, remember))
    run.do(lambda: _describe(run, experiment, config, params, fingerprint))
    try:
        with _system_metrics(run):
            yield run
    except BaseException as error:
        run.tag("error", " ".join(str(error).split()) or type(error).__name__)
        run.call("set_terminated", RunStatus.to_string(RunStatus.FAILED))
        raise
    run.call("set_terminated")
    for attempt in range(LAST_ATTEMPTS):
        if run.complete:
            return
        time.sleep(attempt)
        run.send()
    message(f"MLflow at {public(store.uri)} did not take all of {name}; import_cells can bring it there later")


def _start(run: Run, store: Store, experiment: str, name: str, tags: dict[str, str], remember: Path | None) -> None:
    client = store.client
    if run.id and _exists(client, run.id):
        run.continued = True
        client.update_run(run.id, status=RunStatus.to_string(RunStatus.RUNNING))
        if "error" in client.get_run(run.id).data.tags:  # of an earlier attempt
            client.delete_tag(run.id, "error")
        return
    tags = tags | {variable.lower(): os.environ[variable] for variable in DVC_VARIABLES if variable in os.environ}
    tags = resolve_tags(tags | {MLFLOW_GIT_COMMIT: provenance.revision()})  # and user, script, branch, as MLflow does
    run.id = client.create_run(store.experiment(experiment), run_name=name, tags=tags).info.run_id
    if remember:
        write_text(remember, run.id)


def _describe(
    run: Run, experiment: str, config: dict[str, Any], params: dict[str, Any], fingerprint: str | None
) -> None:
    if run.continued:
        return
    client, run_id = run.opened()
    flat = [Param(key, str(value)) for key, value in params.items()]
    for start in range(0, len(flat), PARAMS_A_CALL):
        client.log_batch(run_id, params=flat[start : start + PARAMS_A_CALL])
    if fingerprint:
        source = json.dumps({"uri": f"lists/{experiment}"})
        client.log_inputs(run_id, [DatasetInput(Dataset(experiment, fingerprint, "local", source))])
    client.log_text(run_id, yaml.safe_dump(config, sort_keys=False), "params.yaml")


@contextmanager
def _system_metrics(run: Run) -> Iterator[None]:
    """Log the load of this machine meanwhile, as MLflow does, if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING asks for it."""
    monitor = None
    if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get() and run.id and run.store:
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


def _exists(client: "MlflowClient", run_id: str) -> bool:
    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def open_cell(
    workspace: Workspace,
    cell: Cell,
    key: str,
    fingerprint: str,
    *,
    run_id: str | None = None,
    remember: Path | None = None,
    **tags: str,
) -> AbstractContextManager[Run]:
    """`open_run` for a cell, under its dataset's experiment; `tags` go with its own."""
    own = {"cell_key": key, "backbone": cell.backbone, "loss": cell.loss, "recipe": cell.recipe_name}
    own |= {"embedding_dim": str(cell.embedding_dim), "seed": str(cell.seed), "dataset_fingerprint": fingerprint}
    return open_run(
        workspace,
        cell.dataset,
        cell.name,
        config=cell.to_dict(),
        params=cell.flat(),
        tags=own | tags,
        fingerprint=fingerprint,
        run_id=run_id,
        remember=remember,
    )


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
    return open_run(workspace, TABLES, dataset, config=config, params=params, tags={"dataset": dataset})


def summary(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    """A cell's metrics by protocol as one row: those of `final`, and the others' Recall@K as `recall_at_1_<protocol>`.

    MLflow's UI orders charts and columns by name: so the headline comes first.
    """
    row = dict(metrics["final"])
    for protocol, scores in metrics.items():
        if protocol != "final":
            row |= {f"{name}_{protocol}": value for name, value in scores.items() if "recall" in name}
    return row


def local(uri: str) -> bool:
    """Whether artifacts lie in a folder of this machine."""
    return uri.startswith(("file:", "/"))


def public(uri: str) -> str:
    """A URI without the user and password that may be in it."""
    return re.sub(r"//[^/@]*@", "//", uri)
