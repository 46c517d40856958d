"""The trained cell as a logged model of MLflow: how it is made, and where it is."""

import filecmp
import io
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import yaml
from PIL import Image

from cbml.errors import UserError
from cbml.files import atomic_write, share
from cbml.progress import message
from cbml.spec.params import load_cell
from cbml.tracking.store import Store, local, mlflow, public
from cbml.workspace import Workspace

PACKAGE = Path(__file__).parents[1]
# What the logged model imports.
SERVING: tuple[str, ...]
SERVING = ("torch", "torchvision", "pytorch-metric-learning", "pydantic", "safetensors", "matplotlib", "pillow")
SERVING += ("mlflow", "pandas", "filelock", "requests", "tqdm", "pyyaml")
WEIGHTS = "final_weights_sha256"  # the tag that tells one model of a run from another


def log_model(store: Store, run_id: str, folder: Path, weights: str | None, register_as: str | None) -> None:
    """Log what training a cell left in `folder` as a model that turns pictures into embeddings.

    A model of the same `weights` (a hash) that the run has already is left; its file of them is replaced if it holds
    something else.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    if weights and (known := _logged(store, run_id, weights)):
        uri = f"models:/{known.model_id}"
        if (file := _weights_file(known)) and not _same(file, folder / "final.pt"):
            message(f"{file}: damaged, replaced")
            with atomic_write(file) as temporary:
                shutil.copyfile(folder / "final.pt", temporary)
            share(folder / "final.pt", file)
        versions = store.client.search_model_versions(f"name = '{register_as}'") if register_as else []
        if register_as and uri not in {each.source for each in versions}:
            mlflow.register_model(uri, register_as)
        return
    cell = load_cell(folder / "cell.yaml")
    picture = io.BytesIO()
    Image.new("RGB", (cell.recipe.resize, cell.recipe.resize)).save(picture, "PNG")
    columns = Schema([ColSpec("binary", "image", required=False), ColSpec("string", "path", required=False)])
    needs = [*SERVING, *(["timm"] if cell.backbone_config.type == "timm" else [])]
    with mlflow.start_run(run_id=run_id, log_system_metrics=False):
        model = mlflow.pyfunc.log_model(
            name=cell.name,
            step=cell.recipe.iterations,  # whose metrics the model's page shows
            registered_model_name=register_as,
            python_model=str(PACKAGE / "serving.py"),
            # As URIs: MLflow reads %20 in a path as a space.
            artifacts={"cell": _uri(folder / "cell.yaml"), "weights": _uri(folder / "final.pt")},
            code_paths=[str(PACKAGE)],
            signature=ModelSignature(columns, Schema([TensorSpec(np.dtype("float32"), (-1, -1))])),
            input_example=pd.DataFrame({"image": [picture.getvalue()]}),
            pip_requirements=[f"{name}=={version(name)}" for name in needs],
            tags=source_name() | ({WEIGHTS: weights} if weights else {}),
        )
    _forget_paths(store, model.model_id, model.artifact_path)
    if local(model.artifact_path):  # else its weights would lie twice on one disk
        share(folder / "final.pt", store.folder(model.artifact_path, model.model_id) / "artifacts/final.pt")


def _uri(file: Path) -> str:
    return file.resolve().as_uri()


def _forget_paths(store: Store, id: str, uri: str) -> None:
    """Remove from a model's description where on this machine MLflow took its files from."""
    with TemporaryDirectory() as folder:
        file = Path(mlflow.artifacts.download_artifacts(artifact_uri=f"{uri}/MLmodel", dst_path=folder))
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        content.pop("artifact_path", None)
        flavor = content["flavors"]["python_function"]
        flavor["model_code_path"] = Path(flavor["model_code_path"]).name
        for artifact in flavor["artifacts"].values():
            artifact["uri"] = artifact["path"]
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        store.client.log_model_artifact(id, str(file))


def source_name() -> dict[str, str]:
    """The tag with the script that logs, whose path MLflow would take."""
    return {"mlflow.source.name": Path(sys.argv[0]).name}


def _weights_file(model: "mlflow.entities.LoggedModel") -> Path | None:
    """The file of a model's weights, if it lies in a folder of this machine."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    if not local(model.artifact_location):
        return None
    return Path(local_file_uri_to_path(model.artifact_location)) / "artifacts/final.pt"


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and (one.samefile(other) or filecmp.cmp(one, other, shallow=False))


def _logged(store: Store, run_id: str, weights: str) -> "mlflow.entities.LoggedModel | None":
    """The whole model of these weights that the run has, if its files were not taken away."""
    outputs = store.client.get_run(run_id).outputs
    models = [store.client.get_logged_model(each.model_id) for each in (outputs.model_outputs if outputs else [])]
    alike = [each for each in models if _whole(each) and each.tags.get(WEIGHTS) == weights]
    return next((each for each in alike if not (file := _weights_file(each)) or file.parent.is_dir()), None)


def known_models(workspace: Workspace) -> list[str]:
    """The keys of the cells with a model in the store, newest first; none without a store, or if it is away."""
    if not (store := Store.existing(workspace)):
        return []
    try:
        with store.asked():
            experiments = [each.experiment_id for each in store.client.search_experiments()]
            return _keys(store, experiments, "tags.evaluated = 'true'")
    except UserError as error:
        message(str(error))
        return []


def _keys(store: Store, experiments: list[str], wanted: str) -> list[str]:
    found = store.client.search_runs(experiments, wanted, order_by=["attributes.start_time DESC"])
    with_model = (run for run in found if run.outputs and run.outputs.model_outputs)
    return list(dict.fromkeys(run.data.tags["cell_key"] for run in with_model))


def _alike(store: Store, experiments: list[str], name: str) -> str:
    """The keys of cells whose run folder may have been `name`, before another experiment replaced it; to be shown."""
    cell = Path(name).name
    if not re.fullmatch(r"[\w.-]+", cell):
        return ""
    keys = _keys(store, experiments, f"tags.cell_key LIKE '{cell}-%'")
    return f"; of that name it has, newest first: {', '.join(keys)}" if keys else ""


def _whole(model: "mlflow.entities.LoggedModel") -> bool:
    return model.status == mlflow.entities.LoggedModelStatus.READY


def find_model(workspace: Workspace, name: str) -> Path:
    """The folder with the cell and the weights of a model: the newest of the run with that id, or of a cell's key.

    Raises:
        UserError: the store is away, or has no such run, or the run no model.
    """
    if not (store := Store.existing(workspace)):
        raise UserError(f"{name}: no such folder, and no store that could have a run or a cell of this name")
    with store.asked():
        client = store.client
        experiments = [each.experiment_id for each in client.search_experiments()]
        wanted = [f"{what} = '{name}'" for what in ("attributes.run_id", "tags.cell_key")]
        runs = [run for each in wanted for run in client.search_runs(experiments, each)]
        outputs = [output for run in runs if run.outputs for output in run.outputs.model_outputs]
        models = [client.get_logged_model(output.model_id) for output in outputs]
        if not (whole := [model for model in models if _whole(model)]):
            what = "neither a folder nor the id of a run or the key of a cell with a model in MLflow"
            raise UserError(f"{name}: {what} at {public(store.uri)}{_alike(store, experiments, name)}")
        newest = max(whole, key=lambda model: model.creation_timestamp)
        return store.folder(newest.artifact_location, newest.model_id) / "artifacts"
