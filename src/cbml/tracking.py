"""MLflow: the only module that knows it, beside the model in `serving.py` that it logs.

The store is a SQLite file and a folder of artifacts at the root of the repository, also for an experiment that DVC runs
in a temporary copy of it; `MLFLOW_TRACKING_URI` overrides.
"""

import io
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
import yaml
from filelock import FileLock
from mlflow.entities import Metric, Param, RunStatus
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, Schema, TensorSpec
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from PIL import Image

from cbml.config import Cell, load_cell

PACKAGES = ("torch", "torchvision", "lightning-fabric", "pytorch-metric-learning", "numpy", "pillow", "mlflow", "dvc")
# What the logged model imports.
SERVING = ("torch", "torchvision", "pytorch-metric-learning", "pydantic", "safetensors", "matplotlib", "pillow")
SERVING += ("mlflow", "pandas", "filelock", "requests", "tqdm", "pyyaml", "scikit-learn", "lightning-fabric")
METRICS_A_CALL, PARAMS_A_CALL = 1000, 100  # MLflow's limits
DVC_VARIABLES = ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")


def root() -> Path:
    """The repository that a stage works for: DVC runs queued experiments in a copy, but names the original."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def _client(experiment: str) -> tuple[MlflowClient, str]:
    """The client and the id of an experiment, made on first use."""
    home = root()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    # The first two processes that open a new database would both migrate it, and both would make the experiment.
    (home / ".cache").mkdir(exist_ok=True)
    with FileLock(home / ".cache" / "mlflow.lock"):
        client = MlflowClient()
        if found := client.get_experiment_by_name(experiment):
            return client, found.experiment_id
        artifacts = (home / "mlruns" / experiment).as_uri() if uri.startswith("sqlite:") else None
        # Else the UI takes the experiment for one of language models and opens on their pages.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return client, client.create_experiment(experiment, artifact_location=artifacts, tags=kind)


def _revision() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """What computed a result: interpreter, platform, this source and the packages that matter."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cbml": _revision(),
        **{name: version(name) for name in PACKAGES},
    }


def device_name() -> str:
    """What trains here: the name of the GPU, or of the CPU with its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.is_file() else []
    return f"{(models or [platform.machine()])[0]}, {torch.get_num_threads()} thread(s)"


# Bars for copying files from one folder to the next.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def summary(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    """A cell's metrics by protocol as one row: those of `final`, and the others' Recall@K under their protocol."""
    row = dict(metrics["final"])
    for protocol, scores in metrics.items():
        if protocol != "final":
            row |= {f"{protocol}_{name}": value for name, value in scores.items() if "recall" in name}
    return row


class Run:
    """One MLflow run, open for logging."""

    def __init__(self, client: MlflowClient, run_id: str):
        self.client, self.id = client, run_id

    def log(self, rows: Iterable[dict[str, float]]) -> None:
        """Log rows of metrics; `iteration` in each is the step."""
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, float(value), now, int(row["iteration"]))
            for row in rows
            for name, value in row.items()
            if name != "iteration"
        ]
        for start in range(0, len(metrics), METRICS_A_CALL):
            self.client.log_batch(self.id, metrics=metrics[start : start + METRICS_A_CALL])

    def log_file(self, path: Path) -> None:
        """Keep a file as an artifact."""
        self.client.log_artifact(self.id, str(path))

    def log_folder(self, folder: Path) -> None:
        """Keep the files of a folder as artifacts."""
        self.client.log_artifacts(self.id, str(folder))

    def note(self, text: str) -> None:
        """Set the run's description, Markdown that the UI shows above everything else."""
        self.client.set_tag(self.id, MLFLOW_RUN_NOTE, text)

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as an artifact."""
        self.client.log_text(self.id, text, name)

    def log_table(self, table: pd.DataFrame, name: str) -> None:
        """Keep a table where MLflow's UI shows and compares tables."""
        self.client.log_table(self.id, table, name)

    def log_model(self, folder: Path, *, register_as: str | None = None) -> None:
        """Log what `run_cell` left in `folder` as an MLflow model that turns pictures into embeddings."""
        cell = load_cell(folder / "cell.yaml")
        picture = io.BytesIO()
        Image.new("RGB", (cell.recipe.resize, cell.recipe.resize)).save(picture, "PNG")
        columns = [ColSpec("binary", "image", required=False), ColSpec("string", "path", required=False)]
        signature = ModelSignature(Schema(columns), Schema([TensorSpec(np.dtype("float32"), (-1, -1))]))
        needs = [*SERVING, *(["timm"] if cell.backbone_config.type == "timm" else [])]
        with mlflow.start_run(run_id=self.id):
            mlflow.pyfunc.log_model(
                name="model",
                registered_model_name=register_as,
                python_model=str(Path(__file__).with_name("serving.py")),
                artifacts={"cell": str(folder / "cell.yaml"), "weights": str(folder / "final.pt")},
                code_paths=[str(Path(__file__).parent)],
                signature=signature,
                input_example=pd.DataFrame({"image": [picture.getvalue()]}),
                pip_requirements=[f"{name}=={version(name)}" for name in needs],
            )


@contextmanager
def open_run(
    experiment: str,
    name: str,
    *,
    config: dict[str, Any],
    params: dict[str, Any],
    tags: dict[str, str],
    run_id: str | None = None,
) -> Iterator[Run]:
    """Open a run, or continue that of `run_id` if the store has it; it ends with the block, failed if that raised.

    Args:
        experiment: one a dataset.
        name: of the run.
        config, params: when the run is new, logged as the artifact `params.yaml` and as parameters.
        tags: beside the revision and what DVC tells of its experiment, which every run has.
    """
    client, experiment_id = _client(experiment)
    if run_id is None or not _exists(client, run_id):
        dvc = {variable.lower(): os.environ[variable] for variable in DVC_VARIABLES if variable in os.environ}
        tags = {**tags, **dvc, "git_revision": _revision()}
        run_id = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
        flat = [Param(key, str(value)) for key, value in params.items()]
        for start in range(0, len(flat), PARAMS_A_CALL):
            client.log_batch(run_id, params=flat[start : start + PARAMS_A_CALL])
        client.log_text(run_id, yaml.safe_dump(config, sort_keys=False), "params.yaml")
        client.log_text(run_id, json.dumps(versions(), indent=2), "versions.json")
    try:
        client.update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING))
        yield Run(client, run_id)
    except BaseException as error:
        client.set_terminated(run_id, RunStatus.to_string(RunStatus.FAILED))
        client.set_tag(run_id, "error", str(error))
        raise
    if "error" in client.get_run(run_id).data.tags:  # of an earlier attempt
        client.delete_tag(run_id, "error")
    client.set_terminated(run_id)


def _exists(client: MlflowClient, run_id: str) -> bool:
    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except mlflow.MlflowException:
        return False


def cell_run(cell: Cell, *, fingerprint: str, run_id: str | None = None, **tags: str):
    """`open_run` for a cell, under its dataset's experiment; `tags` go with its own."""
    return open_run(
        cell.dataset,
        cell.name,
        run_id=run_id,
        config=cell.to_dict(),
        params=cell.flat(),
        tags={
            "backbone": cell.backbone,
            "loss": cell.loss,
            "embedding_dim": str(cell.embedding_dim),
            "seed": str(cell.seed),
            "recipe": cell.recipe_name,
            "dataset_fingerprint": fingerprint,
            **tags,
        },
    )
