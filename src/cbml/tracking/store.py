"""The tracking store: where it is, how it is opened, and the archive of finished cells that it is.

It is a SQLite file and a folder of artifacts at the root of the repository, also for an experiment that DVC runs in a
temporary copy of it; `MLFLOW_TRACKING_URI` overrides. It goes along when the checkout is moved or copied. Without
MLflow installed everything runs and leaves complete folders, which `import_cells` brings into a store.
"""

import os
import re
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from cbml.errors import UserError, shortage
from cbml.files import atomic_write, locked
from cbml.workspace import Workspace

try:
    import mlflow
    import mlflow.artifacts
    import mlflow.entities
    import requests
    import sqlalchemy
    from mlflow.utils.file_utils import local_file_uri_to_path
except ModuleNotFoundError:
    mlflow = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

# What the database records of the places of files.
PLACES = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}
DELETED = "SELECT {} FROM {} WHERE lifecycle_stage = 'deleted'"
NOTE = "mlflow.note.content"  # the tag with a description, of runs and experiments
NOT_FOLDERS = ("databricks", "databricks-uc", "uc")  # URIs without a scheme that are none of a folder
BUSY = 5.0  # seconds that a database may be locked by another process
HTTP_AWAY = (408, 429, 502, 503, 504)  # statuses of a server that may answer later


def installed() -> bool:
    """Whether MLflow is."""
    return mlflow is not None


def make_database(file: Path) -> None:
    """Write an empty store, for which MLflow takes seconds."""
    mlflow.MlflowClient(sqlite_uri(file)).search_experiments(max_results=1)


class Store:
    """The tracking store of a workspace.

    Attributes:
        uri: where it is, absolute.
        database: the file of the repository's own.
        own: whether it is the repository's own.

    Raises:
        UserError: MLflow is not installed.
    """

    def __init__(self, workspace: Workspace):
        if not installed():
            raise UserError("MLflow is not installed; pip install mlflow")
        self.workspace, self.root = workspace, workspace.root.resolve()
        self.database = self.root / workspace.database.name
        own = sqlite_uri(self.database)
        named = os.environ.get("MLFLOW_TRACKING_URI")
        self.uri = absolute(named, self.root) if named else own
        self.own = self.uri == own

    @classmethod
    def existing(cls, workspace: Workspace) -> "Store | None":
        """The store, for who only looks: None without MLflow, or if the repository has no database of its own yet."""
        if not installed():
            return None
        store = cls(workspace)
        return store if store.database.is_file() or not store.own else None

    @cached_property
    def client(self) -> "MlflowClient":
        """MLflow's client.

        Raises:
            UserError: the database is damaged, or what it records of its files' places does not fit this checkout.
        """
        with self._alone():
            if file := sqlite_file(self.uri):
                if file.is_dir():
                    raise UserError(f"{file}: a folder, expected a database; {_move_away(file)}")
                # Made beside and renamed: half a database would stop every later run.
                if not (file.is_file() and file.stat().st_size):
                    with atomic_write(file) as temporary:
                        make_database(temporary)
                check_database(file)
                if self.own:
                    take_along(file, self.artifacts)
        mlflow.set_tracking_uri(self.uri)
        return mlflow.MlflowClient(self.uri)

    @property
    def artifacts(self) -> Path:
        """Where this process writes files itself: beside a SQLite file, else in the checkout."""
        file = sqlite_file(self.uri)
        return (file.parent if file else self.root) / self.workspace.artifacts.name

    def experiment(self, name: str, about: str = "") -> str:
        """The id of an experiment, made on first use; `about` is its description, if it has none."""
        client = self.client
        with self._alone():
            if found := self._experiment(name):
                if about and NOTE not in found.tags:
                    client.set_experiment_tag(found.experiment_id, NOTE, about)
                return found.experiment_id
            database = self.uri.partition(":")[0].partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")
            # A server, or a store that is a folder, has a place of its own.
            artifacts = (self.artifacts / name).as_uri() if database else None
            # Else the UI takes the experiment for one of language models and opens on their pages.
            tags = {"mlflow.experimentKind": "custom_model_development"} | ({NOTE: about} if about else {})
            return client.create_experiment(name, artifact_location=artifacts, tags=tags)

    def _experiment(self, name: str) -> "Experiment | None":
        found = self.client.get_experiment_by_name(name)
        if found and found.lifecycle_stage == "deleted":
            command = f"mlflow experiments restore --experiment-id {found.experiment_id}"
            raise UserError(
                f"the experiment {name} was deleted; to have it back: MLFLOW_TRACKING_URI={self.named} {command}"
                + ("; to remove it for good: python -m pipeline.clean" if self.own else "")
            )
        return found

    @property
    def named(self) -> str:
        """The URI, for a command that is shown; a password is not."""
        return shlex.quote(self.uri) if public(self.uri) == self.uri else '"$MLFLOW_TRACKING_URI"'

    def _alone(self) -> AbstractContextManager[bool]:
        """Hold what two processes might make at once: the database, an experiment."""
        return locked(self.workspace.cache / "mlflow", "MLflow: waiting for another process")

    @contextmanager
    def asked(self) -> Iterator[None]:
        """What the store answers to the block; one line instead of a traceback if it does not.

        Raises:
            UserError: it is away, refuses, or is damaged.
        """
        try:
            yield
        except (mlflow.MlflowException, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
            if shortage(error):
                raise
            answers = " does not answer" if away(error) else ""
            raise UserError(f"MLflow at {public(self.uri)}{answers}: {self.reason(error)}") from None

    def reason(self, error: Exception) -> str:
        """Why the store did not do what it was asked: one line, and what helps, if that is known."""
        text = re.sub(r"\(Background on this error at.*|\[SQL: .*", "", str(error), flags=re.DOTALL)
        text = public(" ".join(text.split()))
        if "out-of-date database schema" in text:
            return (
                f"its database is of another release of MLflow than {mlflow.__version__}, which is installed; "
                f"keep a copy of it, then: mlflow db upgrade {self.named}"
            )
        if "readonly database" in text or "read-only" in text.lower():
            return f"{text}: it, or its folder, cannot be written; make it writable, or move it away"
        if "malformed" in text or "not a database" in text:
            return f"{text}; {_move_away(sqlite_file(self.uri))}"
        known = isinstance(error, UserError | mlflow.MlflowException)
        return text[:400] if known else f"{type(error).__name__}: {text[:400]}"

    def finished(self, dataset: str) -> dict[str, Path]:
        """The files of every evaluated cell of a dataset, the newest of each key, in the order of their keys.

        Raises:
            UserError: the store is away, or has no such files.
        """
        with self.asked():
            experiment = self._experiment(dataset)
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
                        # A run that was opened again ends at another time: its files may be others.
                        found[key] = self.folder(run.info.artifact_uri, f"{run.info.run_id}-{run.info.end_time}")
                if not (token := page.token):
                    break
            return dict(sorted(found.items()))

    def folder(self, uri: str, name: str) -> Path:
        """Artifacts: where they are, or a copy of that name of those that are elsewhere.

        Raises:
            UserError: they should be in a folder of this machine, and are not.
        """
        if local(uri):
            folder = Path(local_file_uri_to_path(uri))
            if not folder.is_dir():
                raise UserError(
                    f"{folder}: no such folder, and MLflow has it as that of {name}; bring it, or delete that"
                )
            return folder
        copy = self.workspace.cache / "artifacts" / name
        if not copy.is_dir():
            with atomic_write(copy) as temporary:
                into = temporary.with_name("download")
                into.mkdir()
                fetched = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(into))
                os.rename(fetched, temporary)
        return copy

    def clean(self) -> None:
        """Remove for good what was deleted in MLflow: runs and, what `mlflow gc` alone would leave, their models.

        Raises:
            UserError: the store is not this repository's own, or files of what was deleted lie outside of it.
        """
        if not self.own:
            raise UserError(f"{public(self.uri)}: not this repository's own store; whoever keeps it cleans it")
        with self.asked():
            client = self.client
            experiments = [each.experiment_id for each in client.search_experiments()]
            page = client.search_logged_models(experiments)
            models = [*page]
            while page.token:
                page = client.search_logged_models(experiments, page_token=page.token)
                models += page
            for model in models:
                if model.source_run_id and not active(client, model.source_run_id):
                    client.delete_logged_model(model.model_id)
            self._check_inside()
            from mlflow.cli import gc

            gc.main(["--backend-store-uri", self.uri, "--tracking-uri", self.uri], standalone_mode=False)

    def _check_inside(self) -> None:
        """Refuse to remove what another checkout, or its owner elsewhere, may need."""
        deleted = [DELETED.format(PLACES[table][0], table) for table in ("runs", "logged_models", "experiments")]
        with closing(sqlite3.connect(self.database)) as connection:
            places = [place for query in deleted for (place,) in connection.execute(query)]
        for place in places:
            if not (local(place) and Path(local_file_uri_to_path(place)).resolve().is_relative_to(self.root)):
                raise UserError(
                    f"{public(place)}: files of what was deleted, outside this checkout ({self.root}), and perhaps "
                    f"another one's; to remove them nevertheless: mlflow gc --backend-store-uri {self.named}"
                )


def check_database(file: Path) -> None:
    """Find out at once what MLflow would try for minutes.

    Raises:
        UserError: it is no database, or cannot be read.
    """
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY)) as connection:
            connection.execute("SELECT name FROM sqlite_master").fetchall()
    except sqlite3.DatabaseError as error:
        if away(error):
            raise
        cure = "it cannot be read" if "unable to open" in str(error) else _move_away(file)
        raise UserError(f"{file}: {error}; {cure}") from None


def _move_away(file: Path | None) -> str:
    old = shlex.quote(str(file or "mlflow.db"))
    return f"move it away (mv {old} {old}.damaged) and bring the cells that are here: python -m pipeline.import_cells ."


def take_along(database: Path, artifacts: Path) -> None:
    """Correct what a database records of the places of its files, if its checkout was moved or copied.

    Raises:
        UserError: the files did not come along.
    """
    with closing(sqlite3.connect(database, timeout=BUSY)) as connection:
        rows = connection.execute(
            "SELECT name, experiment_id, artifact_location, EXISTS (SELECT 1 FROM runs WHERE "
            "runs.experiment_id = experiments.experiment_id) FROM experiments"
        )
        moved = set()
        for name, id, location, has_runs in rows.fetchall():
            # As `Store.experiment` names them, and MLflow those of its own.
            for folder in (name, str(id)):
                root = (location or "").removesuffix(f"/{quote(folder)}")
                if not local(root) or root == location or not root.endswith(f"/{artifacts.name}"):
                    continue
                if root == artifacts.as_uri():
                    continue
                there = Path(local_file_uri_to_path(root))
                if has_runs and there != artifacts and not (artifacts / folder).is_dir():
                    raise UserError(_left_behind(database, there, artifacts, folder))
                moved.add(root)
        for root in moved:
            for table, columns in PLACES.items():
                known = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
                for column in known.intersection(columns):
                    new, length = f"{artifacts.as_uri()}/", len(root) + 1
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                        (new, length + 1, length, f"{root}/"),
                    )
        connection.commit()


def _left_behind(database: Path, there: Path, artifacts: Path, folder: str) -> str:
    if (there / folder).is_dir():
        bring = shlex.join(["cp", "-r", f"{there}/.", str(artifacts)])
        return f"{database}: its files were left in {there}; to bring them along: {bring}"
    return (
        f"{database}: its files were in {there / folder}, and are not in {artifacts / folder}; bring that folder, or "
        f"have a new store: mv {shlex.quote(str(database))} {shlex.quote(str(database))}.old"
    )


def active(client: "MlflowClient", run_id: str) -> bool:
    """Whether the store has the run, and it was not deleted."""
    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def away(error: Exception) -> bool:
    """Whether a store may take later what it did not take now: it is not reached, or busy. Else it has refused."""
    if "sqlite3." in str(error) or isinstance(error, sqlite3.Error):
        return "is locked" in str(error)
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, requests.exceptions.RetryError):
            return "too many 500 " not in str(each)
        unreached = (ConnectionError, TimeoutError, requests.ConnectionError, requests.Timeout)
        if isinstance(each, (*unreached, sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError)):
            return True
        each = each.__cause__ or each.__context__
    return isinstance(error, mlflow.MlflowException) and error.get_http_status_code() in HTTP_AWAY


def sqlite_uri(file: Path) -> str:
    """The URI of a SQLite file, whatever is in its path."""
    plain = f"sqlite:///{file}"
    if sqlite_file(plain) == file:
        return plain
    # With the driver named, MLflow does not make the folder, which would be one of the quoted name.
    return f"sqlite+pysqlite:///{quote(str(file))}"


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite URI, as it will be opened; None of any other store."""
    url = _sqlite(uri)
    return Path(url.database) if url and url.database and not url.query and url.database != ":memory:" else None


def _sqlite(uri: str) -> "sqlalchemy.URL | None":
    with suppress(sqlalchemy.exc.ArgumentError):
        return sqlalchemy.make_url(uri) if uri.startswith("sqlite") else None
    return None


def absolute(uri: str, root: Path) -> str:
    """A URI whose path, if it is relative, starts at `root`: not in DVC's temporary copy of it, which goes away."""
    scheme, colon, path = uri.partition(":")
    if (url := _sqlite(uri)) and url.database and not url.database.startswith(("/", ":memory:", "file:")):
        _, question, query = uri.partition("?")
        return sqlite_uri(root / url.database) + question + query
    if scheme == "file" and not path.startswith("/"):
        return (root / unquote(path)).as_uri()
    return uri if colon or uri in NOT_FOLDERS else str(root / uri)


def local(uri: str) -> bool:
    """Whether artifacts lie in a folder of this machine."""
    return uri.startswith(("file:", "/"))


def public(text: str) -> str:
    """A text without the users, passwords and tokens of the URIs in it."""
    return re.sub(r"\?[^\s'\"/]*=[^\s'\")]*", "", re.sub(r"//[^/\s]*@", "//", text))
